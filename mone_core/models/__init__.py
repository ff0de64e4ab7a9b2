"""Models, and the table of the sizes that the papers name."""

from mone_core.models.config import ModelConfig
from mone_core.models.vit import NestedViT, Output

__all__ = ["VIT_SIZES", "ModelConfig", "NestedViT", "Output", "build_model"]

# Width, depth and heads by letter, at patch 16 and 224 pixels: Dosovitskiy et al. 2021, table 1;
# Ti and S of DeiT's table 1.
VIT_SIZES = {
    "Ti": ModelConfig(dim=192, depth=12, heads=3),
    "S": ModelConfig(dim=384, depth=12, heads=6),
    "B": ModelConfig(dim=768, depth=12, heads=12),
    "L": ModelConfig(dim=1024, depth=24, heads=16),
}


def build_model(config: ModelConfig) -> NestedViT:
    """Make the model that a configuration describes, freshly initialised from torch's seed."""
    return NestedViT(config)
