"""A stack of blocks, and the routers between them.

Tokens are scored and sorted by width where a router stands, and stay in that order until the next
one: attention and pooling do not care about order. The budget is a Python number that can change
between any two passes without touching a weight.

Axes: B inputs (images, frames, clips), N tokens, D model width, E nested experts.

Source: arXiv 2407.19985, sections 4 and 5; sparse blocks arXiv 2106.05974.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mone_core.baselines import SkippingBlock, SlicedBlock
from mone_core.block import BoundedScale, NestedBlock
from mone_core.capacity import effective_capacity_of
from mone_core.experts import Dispatched, SparseBlock
from mone_core.flops import attention_macs, linear_macs, mlp_macs
from mone_core.models.config import ModelConfig
from mone_core.nested import Layout
from mone_core.ranks import ALONE, Ranks
from mone_core.routing import Router, expert_preferred_routing, sort_by_width


class Routed(NamedTuple):
    """What one router decided.

    Attributes:
        expert_BN: Nested expert of every patch in raster order, 0 the narrowest.
        probs_BNE: Its probabilities in the same order, detached.
    """

    expert_BN: Tensor
    probs_BNE: Tensor


class Encoded(NamedTuple):
    """What an encoder returns.

    Attributes:
        x_NBD: Tokens in the order of their last widths; a class token is the first.
        routed: One per router, the earliest first.
        dispatched: One per block with sparse experts, the earliest first.
    """

    x_NBD: Tensor
    routed: tuple[Routed, ...]
    dispatched: tuple[Dispatched, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A budget in whole tokens.

    Attributes:
        counts: Patches per nested expert, narrowest first.
        full: Where all tokens lie before the first router.
        routed: Where they lie after it, or always if there is none; a class token comes first.
        skipped: Patches at the end of the order that no block computes.
    """

    counts: tuple[int, ...]
    full: Layout
    routed: Layout
    skipped: int


class Encoder(nn.Module):
    """Blocks of one width and the routers that give tokens theirs.

    Args:
        config: Of the model that this is the encoder of.
        num_patches: Tokens of one input, without the class token.
    """

    def __init__(self, config: ModelConfig, num_patches: int) -> None:
        super().__init__()
        self.config, self.num_patches = config, num_patches
        nesting = config.nesting
        blocks = nn.ModuleList(_block(config, layer, num_patches) for layer in range(config.depth))
        routers = len(nesting.router_layers) if nesting.learned else 0
        self.routers = nn.ModuleList(
            Router(config.dim, len(nesting.widths)) for _ in range(routers)
        )
        normed = nesting.learned and nesting.router_input == "normed"
        self.router_norms = nn.ModuleList(
            nn.LayerNorm(config.dim, eps=config.norm_eps) for _ in range(routers if normed else 0)
        )
        gated = config.depth - nesting.router_layers[0] if nesting.learned else 0
        alphas = min(1, gated) if nesting.alpha == "model" else gated
        self.alphas = nn.ModuleList(BoundedScale() for _ in range(alphas))
        # Last: parameters lie in the order in which a pass first uses them, and ranks add up
        # gradients in the other.
        self.blocks = blocks
        self.ranks: Ranks = ALONE
        self.set_effective_capacity(nesting.effective_capacity)

    def set_effective_capacity(self, effective_capacity: float) -> None:
        """Choose the budget of the next passes; see `ViT.set_effective_capacity`."""
        self.plan = _plan(self.config, self.num_patches, effective_capacity)
        for block in self.blocks:
            if isinstance(block, SlicedBlock):
                block.set_width(round(effective_capacity * self.config.hidden))

    @property
    def realised_effective_capacity(self) -> float:
        """The budget that whole tokens come to; blocks that skip tokens are not in it."""
        widths = (0.0 if self.plan.skipped else self.config.nesting.widths[0],)
        return effective_capacity_of(self.plan.counts, widths + self.config.nesting.widths[1:])

    def forward(self, x_BND: Tensor) -> Encoded:
        """Tokens `BND`, the class token first if there is one -> `Encoded`."""
        x_NBD = x_BND.transpose(0, 1).contiguous()
        routed = self.config.nesting.routed
        state = _Sorted(x_NBD, layout=self.plan.full if routed else self.plan.routed)
        router_layers = self.config.nesting.router_layers if routed else ()
        dispatched = []
        for layer, block in enumerate(self.blocks):
            if layer in router_layers:
                self._route(state, router_layers.index(layer))
            gate_NB1 = None
            if state.chosen_NB1 is not None:
                gate_NB1 = self._alpha(layer) * state.chosen_NB1 + 1
            if isinstance(block, SparseBlock):
                state.x_NBD, told = block(state.x_NBD, state.layout, gate_NB1)
                dispatched.append(told)
            else:
                state.x_NBD = block(state.x_NBD, state.layout, gate_NB1)
        return Encoded(state.all_tokens(), tuple(state.routed), tuple(dispatched))

    def macs(self) -> int:
        """Multiply-accumulates of one input at the present budget."""
        config, nesting = self.config, self.config.nesting
        first = nesting.router_layers[0] if nesting.routed else 0
        total = len(self.routers) * linear_macs(self.num_patches, config.dim, len(nesting.widths))
        for layer, block in enumerate(self.blocks):
            layout = self.plan.routed if layer >= first else self.plan.full
            total += _block_macs(block, layout, config)
        return total

    def _alpha(self, layer: int) -> Tensor:
        """alpha of a block behind a router."""
        nesting = self.config.nesting
        behind = 0 if nesting.alpha == "model" else layer - nesting.router_layers[0]
        alpha: Tensor = self.alphas[behind]()
        return alpha

    def _route(self, state: "_Sorted", index: int) -> None:
        """Score the patches, give each its width, and sort."""
        x_BND = state.all_tokens()[self._num_cls :].transpose(0, 1)
        if self.config.nesting.learned:
            if self.router_norms:
                x_BND = self.router_norms[index](x_BND)
            probs_BNE = self.routers[index](x_BND)
        else:
            batch, num_tokens, _ = x_BND.shape
            shape = (batch * self.ranks.parts, num_tokens, len(self.config.nesting.widths))
            probs_BNE = self.ranks.share(torch.rand(shape, device=x_BND.device), axis=0)
        expert_BN = expert_preferred_routing(probs_BNE, self.plan.counts)
        state.sort(
            expert_BN, probs_BNE, self.plan, self._num_cls, gated=self.config.nesting.learned
        )

    @property
    def _num_cls(self) -> int:
        return int(self.config.pool == "cls")


class _Sorted:
    """The tokens on their way through the blocks, and how they are ordered by now."""

    def __init__(self, x_NBD: Tensor, layout: Layout) -> None:
        self.x_NBD, self.layout = x_NBD, layout
        self.resting_NBD: Tensor | None = None
        self.raster_BN: Tensor | None = None
        self.chosen_NB1: Tensor | None = None
        self.routed: list[Routed] = []

    def all_tokens(self) -> Tensor:
        """`NBD`, those that the blocks skip at the end."""
        if self.resting_NBD is None:
            return self.x_NBD
        return torch.cat([self.x_NBD, self.resting_NBD])

    def sort(
        self, expert_BN: Tensor, probs_BNE: Tensor, plan: Plan, num_cls: int, *, gated: bool
    ) -> None:
        """Put patches in the order of their new widths, behind the class token."""
        order_BN = sort_by_width(expert_BN)
        x_NBD = _reorder(self.all_tokens(), order_BN, num_cls)
        active = x_NBD.shape[0] - plan.skipped
        self.x_NBD, self.layout = x_NBD[:active], plan.routed
        self.resting_NBD = x_NBD[active:] if plan.skipped else None
        if gated:
            chosen_BN1 = probs_BNE.gather(2, expert_BN.unsqueeze(-1))
            chosen_NB1 = _reorder(chosen_BN1.transpose(0, 1), order_BN, 0)
            if num_cls:  # the class token is outside of the routing, its factor is 1
                chosen_NB1 = torch.cat([torch.zeros_like(chosen_NB1[:1]), chosen_NB1])
            self.chosen_NB1 = chosen_NB1[:active].to(x_NBD.dtype)
        self._note(expert_BN, probs_BNE.detach())
        self.raster_BN = order_BN if self.raster_BN is None else self.raster_BN.gather(1, order_BN)

    def _note(self, expert_BN: Tensor, probs_BNE: Tensor) -> None:
        """Remember the decision, every patch at its place in the picture."""
        if self.raster_BN is not None:
            expert_BN = torch.empty_like(expert_BN).scatter_(1, self.raster_BN, expert_BN)
            at_BNE = self.raster_BN.unsqueeze(-1).expand_as(probs_BNE)
            probs_BNE = torch.empty_like(probs_BNE).scatter_(1, at_BNE, probs_BNE)
        self.routed.append(Routed(expert_BN, probs_BNE))


def _block(config: ModelConfig, layer: int, num_patches: int) -> nn.Module:
    """The block that the configuration wants at a layer."""
    sizes = (config.dim, config.heads, config.hidden)
    if layer in config.experts.layers(config.depth):
        return SparseBlock(
            *sizes, experts=config.experts, gelu=config.gelu, norm_eps=config.norm_eps
        )
    if layer in config.skipping.layers(config.depth):
        return SkippingBlock(
            *sizes,
            num_tokens=config.skipping.tokens(num_patches),
            gelu=config.gelu,
            norm_eps=config.norm_eps,
        )
    kind = SlicedBlock if config.nesting.slices == "hidden" else NestedBlock
    return kind(*sizes, gelu=config.gelu, norm_eps=config.norm_eps)


def _block_macs(block: nn.Module, layout: Layout, config: ModelConfig) -> int:
    if isinstance(block, SkippingBlock):
        score = linear_macs(layout.segments[-1].stop, config.dim, 1)
        return score + attention_macs(block.layout) + mlp_macs(block.layout, config.hidden)
    if isinstance(block, SparseBlock):
        return attention_macs(layout) + block.mlp.macs(layout)
    hidden = block.width if isinstance(block, SlicedBlock) else config.hidden
    return attention_macs(layout) + mlp_macs(layout, hidden)


@lru_cache(maxsize=1024)  # a training that draws its budget anew each step asks each step
def _plan(config: ModelConfig, num_patches: int, effective_capacity: float) -> Plan:
    """Tokens per expert and where they lie, for a budget."""
    counts = config.nesting.counts(effective_capacity, num_patches)
    with_cls = list(counts)
    # Outside of the routing and full width; where all tokens are alike, as wide as they.
    cls_at = -1 if config.nesting.routed else counts.index(num_patches)
    with_cls[cls_at] += config.pool == "cls"
    full = Layout.of((sum(with_cls),), (config.dim,))
    if config.nesting.slices == "hidden":
        return Plan(counts, full, full, 0)
    skipped = counts[0] if config.nesting.skips else 0
    with_cls[0] -= skipped
    return Plan(counts, full, Layout.of(with_cls, config.dims), skipped)


def _reorder(x_NBD: Tensor, order_BN: Tensor, num_cls: int) -> Tensor:
    """Put each input's patches in `order`, behind the class token."""
    index_NB = order_BN.t()
    if num_cls:
        index_NB = torch.cat([torch.zeros_like(index_NB[:1]), index_NB + 1])
    return x_NBD.gather(0, index_NB.unsqueeze(-1).expand_as(x_NBD))
