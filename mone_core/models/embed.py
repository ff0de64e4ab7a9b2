"""Pixels to tokens: patches of images, tubelets of clips, their positions, the class token.

A clip becomes one encoder input per temporal step (factorised attention) or one input in all
(joint attention).

Axes: B images, clips or frames as the encoder sees them, N tokens, D model width, T temporal steps.
"""

import torch
from torch import Tensor, nn

from mone_core.errors import ShapeError
from mone_core.flops import linear_macs
from mone_core.models.config import ModelConfig

# From the fastest to the slowest sine. Grids have tens of positions along a side, not thousands.
POSITION_SPAN = 100.0
POSITION_SCALE = 0.5  # about the size of a patch's own embedding


class PatchEmbedding(nn.Module):
    """Non-overlapping patches -> tokens in raster order, with a learned position added.

    A class token, if there is one, comes first and has a position of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(3 * config.video.tubelet * config.patch_size**2, config.dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.cls_D = nn.Parameter(torch.zeros(config.dim)) if config.pool == "cls" else None
        self.position_ND = nn.Parameter(_first_positions(config))

    def forward(self, pixels: Tensor) -> Tensor:
        """Images `[B, 3, height, width]` or clips `[clips, frames, 3, height, width]` -> `BND`.

        With factorised attention B is clips * T, the steps of a clip next to each other.

        Raises:
            ShapeError: The pixels are of another size than the model was made for.
        """
        _check_shape(pixels, self.config)
        x_BND = self.project(patches(pixels, self.config))
        if self.cls_D is not None:
            x_BND = torch.cat([self.cls_D.expand(x_BND.shape[0], 1, -1), x_BND], dim=1)
        out_BND: Tensor = x_BND + self.position_ND
        return out_BND

    def macs(self) -> int:
        """Multiply-accumulates of one encoder input."""
        return linear_macs(
            self.config.num_patches, self.project.in_features, self.project.out_features
        )


def patches(pixels: Tensor, config: ModelConfig) -> Tensor:
    """Cut pixels into encoder inputs of flat patches, `[B, N, 3 * tubelet * patch^2]`.

    The values of a patch run over colour, frame, row, column: the order in which the
    kernels of a convolution are stored.
    """
    p, t, side = config.patch_size, config.video.tubelet, config.grid
    shape = (-1, config.video.steps, t, 3, side, p, side, p)
    x = pixels.reshape(shape).permute(0, 1, 4, 6, 3, 2, 5, 7)
    return x.reshape(-1, config.num_patches, 3 * t * p * p)


def _check_shape(pixels: Tensor, config: ModelConfig) -> None:
    frames = (config.video.frames,) if config.video.frames > 1 else ()
    expected = (*frames, 3, config.image_size, config.image_size)
    if pixels.ndim != len(expected) + 1 or tuple(pixels.shape[1:]) != expected:
        kind = "clips" if frames else "images"
        raise ShapeError(
            f"{kind} of shape {list(pixels.shape)} do not fit this model, which takes "
            f"[B, {', '.join(map(str, expected))}]; resize them, or build a model of their size"
        )


def _first_positions(config: ModelConfig) -> Tensor:
    """What the position table starts from, shape ND, the class token's row first."""
    with_cls = config.pool == "cls"
    if config.positions == "normal":
        return torch.empty(config.num_patches + with_cls, config.dim).normal_(std=0.02)
    axis_G = torch.arange(config.grid, dtype=torch.get_default_dtype())
    frequencies = POSITION_SPAN ** -torch.linspace(0, 1, config.dim // 4)
    y_NF, x_NF = (
        place_GG.flatten()[:, None] * frequencies
        for place_GG in torch.meshgrid(axis_G, axis_G, indexing="ij")
    )
    one_ND = POSITION_SCALE * torch.cat([x_NF.sin(), x_NF.cos(), y_NF.sin(), y_NF.cos()], dim=1)
    table_ND = one_ND.repeat(config.num_patches // one_ND.shape[0], 1)
    return torch.cat([torch.zeros(int(with_cls), config.dim), table_ND])
