"""The MoNE ViT: one ViT, nested widths, one router, every compute budget.

Tokens are embedded, scored once by the router, sorted by width and kept in that order
through all layers; attention and mean pooling do not care about order. The budget is a Python
number that can change between any two steps without touching a weight.

Axes: B images, N tokens, D model width, E experts, K classes.

Source: arXiv 2407.19985; at effective capacity 1 and alpha 0 it is a plain pre-norm ViT with
mean pooling.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mone_core.block import BoundedScale, NestedBlock
from mone_core.capacity import effective_capacity_of, token_counts
from mone_core.errors import ShapeError
from mone_core.flops import linear_macs, nested_block_macs
from mone_core.models.config import ModelConfig
from mone_core.nested import Layout
from mone_core.routing import Router, expert_preferred_routing, sort_by_width

# From the fastest to the slowest sine. Grids have tens of positions along a side, not thousands.
POSITION_SPAN = 100.0
POSITION_SCALE = 0.5  # about the size of a patch's own embedding


class Output(NamedTuple):
    """What a model says of a batch of images.

    Attributes:
        logits_BK: Class scores before softmax.
        expert_BN: Nested expert of every patch in raster order, 0 the narrowest.
        probs_BNE: Router probabilities of every patch, detached.
    """

    logits_BK: Tensor
    expert_BN: Tensor
    probs_BNE: Tensor


class PatchEmbedding(nn.Module):
    """Non-overlapping patches -> tokens, with a learned position added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.project = nn.Linear(3 * config.patch_size**2, config.dim)
        self.position_ND = nn.Parameter(_first_positions(config))
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, height, width]` -> tokens `BND`, patches in raster order."""
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ShapeError(
                f"images of shape {list(images.shape)} do not fit this model, which takes "
                f"[B, {', '.join(map(str, expected))}]; resize them, or build a model of their size"
            )
        batch, channels, height, width = images.shape
        p = self.patch_size
        patches = images.view(batch, channels, height // p, p, width // p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)
        x_BND: Tensor = self.project(patches) + self.position_ND
        return x_BND


class NestedViT(nn.Module):
    """A ViT whose tokens are computed at the width that the router gives them.

    Shape: images `[B, 3, image_size, image_size]`, float -> `Output`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = PatchEmbedding(config)
        self.router = Router(config.dim, len(config.widths))
        self.blocks = nn.ModuleList(
            NestedBlock(
                config.dim,
                config.heads,
                config.mlp_ratio * config.dim,
                gelu=config.gelu,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.depth)
        )
        self.alphas = nn.ModuleList(
            BoundedScale() for _ in range(config.depth if config.alpha_per_layer else 1)
        )
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.set_effective_capacity(config.effective_capacity)

    def set_effective_capacity(self, effective_capacity: float) -> None:
        """Choose the compute budget of the next forward passes; no weight changes.

        Raises:
            CapacityError: The budget is out of reach of the model's widths.
        """
        self.counts, self.layout = _plan(self.config, effective_capacity)

    @property
    def realised_effective_capacity(self) -> float:
        """The budget that whole tokens per image come to."""
        return effective_capacity_of(self.counts, self.config.widths)

    def forward(self, images: Tensor) -> Output:
        """Class scores of images, and where the router sent their patches."""
        x_BND = self.embed(images)
        probs_BNE = self.router(x_BND)
        expert_BN = expert_preferred_routing(probs_BNE, self.counts)
        order_BN = sort_by_width(expert_BN)
        chosen_BN = probs_BNE.gather(2, expert_BN.unsqueeze(-1)).squeeze(-1)
        x_NBD = _reorder(x_BND, order_BN)
        chosen_NB1 = _reorder(chosen_BN.unsqueeze(-1), order_BN).to(x_NBD.dtype)
        for layer, block in enumerate(self.blocks):
            alpha = self.alphas[layer % len(self.alphas)]()
            x_NBD = block(x_NBD, self.layout, alpha * chosen_NB1 + 1)
        logits_BK = self.head(self.norm(x_NBD).mean(dim=0))
        return Output(logits_BK, expert_BN, probs_BNE.detach())

    def macs(self) -> int:
        """Multiply-accumulates of one image at the present budget."""
        config = self.config
        num_tokens, dim = config.num_tokens, config.dim
        block = nested_block_macs(self.counts, config.dims, dim=dim, hidden=config.mlp_ratio * dim)
        return (
            linear_macs(num_tokens, 3 * config.patch_size**2, dim)
            + linear_macs(num_tokens, dim, len(config.widths))
            + config.depth * block
            + linear_macs(1, dim, config.num_classes)
        )


def _first_positions(config: ModelConfig) -> Tensor:
    """What the position table starts from, shape ND."""
    if config.positions == "normal":
        return torch.empty(config.num_tokens, config.dim).normal_(std=0.02)
    axis_G = torch.arange(config.grid, dtype=torch.get_default_dtype())
    frequencies = POSITION_SPAN ** -torch.linspace(0, 1, config.dim // 4)
    y_NF, x_NF = (
        place_GG.flatten()[:, None] * frequencies
        for place_GG in torch.meshgrid(axis_G, axis_G, indexing="ij")
    )
    return POSITION_SCALE * torch.cat([x_NF.sin(), x_NF.cos(), y_NF.sin(), y_NF.cos()], dim=1)


@lru_cache(maxsize=1024)  # a training that draws its budget anew each step asks each step
def _plan(config: ModelConfig, effective_capacity: float) -> tuple[tuple[int, ...], Layout]:
    """Tokens per expert and where they lie, for a budget."""
    counts = token_counts(config.capacity(effective_capacity), config.num_tokens)
    return counts, Layout.of(counts, config.dims)


def _reorder(x_BND: Tensor, order_BN: Tensor) -> Tensor:
    """Put each image's tokens in `order`, sequence first: `BND` -> `NBD`."""
    x_NBD = x_BND.transpose(0, 1)
    index_NBD = order_BN.t().unsqueeze(-1).expand_as(x_NBD)
    return x_NBD.gather(0, index_NBD)
