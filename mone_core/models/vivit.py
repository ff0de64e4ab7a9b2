"""The clip model with factorised attention: a spatial encoder per step, then a temporal one.

Routing happens in the spatial encoder alone, which costs most, and for every frame on its own; the
temporal encoder is dense.

Axes: B clips, T temporal steps, N tokens of one step, D model width.

Source: arXiv 2103.15691, section 3.3 (model 2); arXiv 2407.19985, section 4.4.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mone_core.experts import ExpertsConfig
from mone_core.models.config import DENSE, ModelConfig, SkippingConfig
from mone_core.models.encoder import Encoded, Encoder
from mone_core.models.vit import ViT, pool


class ViViT(ViT):
    """A video vision transformer, factorised encoder.

    Shape: clips `[B, frames, 3, image_size, image_size]`, float -> `Output`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        steps, with_cls = config.video.steps, config.pool == "cls"
        dense = replace(
            config,
            depth=config.video.temporal_depth,
            nesting=DENSE,
            experts=ExpertsConfig(),
            skipping=SkippingConfig(),
        )
        self.temporal_cls_D = nn.Parameter(torch.zeros(config.dim)) if with_cls else None
        self.temporal_position_TD = nn.Parameter(
            torch.empty(steps + with_cls, config.dim).normal_(std=0.02)
        )
        self.temporal_encoder = Encoder(dense, steps)
        self.temporal_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def features(self, pixels: Tensor) -> tuple[Tensor, Encoded]:
        """What the head reads, shape BD, and what the spatial encoder did on the way."""
        spatial = self.encoder(self.embed(pixels))
        x_SD = pool(spatial.x_NBD, self.norm, self.config)
        x_BTD = x_SD.view(-1, self.config.video.steps, self.config.dim)
        if self.temporal_cls_D is not None:
            x_BTD = torch.cat([self.temporal_cls_D.expand(x_BTD.shape[0], 1, -1), x_BTD], dim=1)
        temporal = self.temporal_encoder(x_BTD + self.temporal_position_TD)
        return pool(temporal.x_NBD, self.temporal_norm, self.config), spatial

    def macs(self) -> int:
        """Multiply-accumulates of one clip at the present budget."""
        spatial = self.embed.macs() + self.encoder.macs()
        return self.config.video.steps * spatial + self.temporal_encoder.macs() + self.head.macs()
