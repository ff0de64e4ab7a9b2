"""Models, and the table of the sizes that the papers name."""

from mone_core.experts import ExpertsConfig
from mone_core.models.config import DENSE, ModelConfig, NestingConfig, SkippingConfig, VideoConfig
from mone_core.models.vit import Output, ViT
from mone_core.models.vivit import ViViT

__all__ = [
    "DENSE",
    "VIT_SIZES",
    "VIVIT_SIZES",
    "VMOE_SIZES",
    "ExpertsConfig",
    "ModelConfig",
    "NestingConfig",
    "Output",
    "SkippingConfig",
    "ViT",
    "ViViT",
    "VideoConfig",
    "build_model",
]

# Width, depth and heads by letter, at patch 16 and 224 pixels: Dosovitskiy et al. 2021, table 1;
# Ti and S of DeiT's table 1.
VIT_SIZES = {
    "Ti": ModelConfig(dim=192, depth=12, heads=3),
    "S": ModelConfig(dim=384, depth=12, heads=6),
    "B": ModelConfig(dim=768, depth=12, heads=12),
    "L": ModelConfig(dim=1024, depth=24, heads=16),
}


def _vmoe(dim: int, depth: int, heads: int, patch: int, mlp_dim: int | None = None) -> ModelConfig:
    """A V-MoE backbone with Every-2 experts, E = 32 and K = 2, for ImageNet-21k's 21,843 classes.

    Source: arXiv 2106.05974, section 4 and appendix; the public configurations.
    """
    return ModelConfig(
        patch_size=patch,
        num_classes=21_843,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        pool="cls",
        head_bias=-10.0,
        nesting=DENSE,
        experts=ExpertsConfig(placement="every", spacing=2, num_experts=32),
    )


# V-MoE's S has 8 layers of width 512, unlike the ViT-S above. The 15B shape is reconstructed from
# the published parameter count.
VMOE_SIZES = {
    "S/32": _vmoe(512, 8, 8, 32),
    "B/32": _vmoe(768, 12, 12, 32),
    "B/16": _vmoe(768, 12, 12, 16),
    "L/32": _vmoe(1024, 24, 16, 32),
    "L/16": _vmoe(1024, 24, 16, 16),
    "H/14": _vmoe(1280, 32, 16, 14),
    "15B": _vmoe(1408, 48, 16, 14, mlp_dim=6400),
}

# Factorised encoder, 32 frames in tubelets of 2: ViViT's B/16x2 (arXiv 2103.15691, table 7).
VIVIT_SIZES = {
    "B/16x2": ModelConfig(
        dim=768,
        depth=12,
        heads=12,
        num_classes=400,
        pool="cls",
        video=VideoConfig(frames=32, tubelet=2, temporal_depth=4),
    ),
}


def build_model(config: ModelConfig) -> ViT:
    """Make the model that a configuration describes, freshly initialised from torch's seed."""
    factorised = config.video.frames > 1 and config.video.attention == "factorised"
    return ViViT(config) if factorised else ViT(config)
