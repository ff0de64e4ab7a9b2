"""A layer of sparse experts: many MLPs, of which each token uses a few.

`SparseMlp` is what stands in a block instead of an MLP: it scores the normalised tokens, drops
what does not fit, and adds the chosen experts' weighted outputs to the residual stream. Which
choices fit is decided in `routing`, how features move in `dispatch`, what the experts are and
compute in `bank`; here is the layer's own state and its auxiliary losses.

In a nested model every expert is a nested MLP: a token uses the prefix of its width, and
every width class has slots of its own.

Axes: N tokens sorted by width, B images in groups of I, D model width, E experts, G groups of S
tokens.

Source: arXiv 2106.05974, section 2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mone_core.bank import ExpertBank
from mone_core.block import Gelu, NestedAttention
from mone_core.dispatch import RoutedClass, SlotPlan, by_group, combine, dispatch, plan_slots
from mone_core.dropless import plan_rows
from mone_core.errors import CapacityError, RoutingError
from mone_core.flops import linear_macs
from mone_core.losses import gshard_loss, importance_loss, load_loss, router_z_loss
from mone_core.nested import Layout
from mone_core.ranks import ALONE, Ranks
from mone_core.routing import (
    Assignment,
    Rounding,
    expert_capacity,
    expert_choice,
    top_k_assignment,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Sparse experts (V-MoE): which MLPs become many, and how tokens reach them.

    Attributes:
        placement: "every" `spacing`-th block has experts, or the "last" `spacing` of the
            odd-numbered ones (counted from 0); "none" has no experts.
        spacing: n of Every-n and Last-n.
        num_experts: E.
        k: Experts that a token chooses, K.
        capacity_ratio: Slots over chosen assignments, C.
        routing: Tokens choose their k experts, or each expert chooses its tokens.
        group_images: Images (frames of factorised clips) that compete for the same slots, I; what
            is left over at the end of a batch is a smaller group.
        batch_priority: Fill slots by score instead of by position.
        dropless: Compute every choice of every token: no slots, no capacity (`capacity_ratio` and
            `rounding` mean nothing), nothing dropped. The host waits once per layer for the
            numbers of rows, which no CUDA graph, no XLA device and no whole compiled graph can,
            and the work of ranks is uneven; see `mone_core.dropless`.
        rounding: How C becomes whole slots, see `mone_core.routing.expert_capacity`.
        noise: Standard deviation of the noise on router logits in training, times E.
        importance_weight, load_weight, gshard_weight, z_weight: Weights of the auxiliary
            losses; at 0 a loss is not computed.
    """

    placement: Literal["none", "every", "last"] = "none"
    spacing: int = 2
    num_experts: int = 8
    k: int = 2
    capacity_ratio: float = 1.05
    routing: Literal["tokens_choose", "experts_choose"] = "tokens_choose"
    group_images: int = 8
    batch_priority: bool = False
    dropless: bool = False
    rounding: Rounding = "nearest"
    noise: float = 1.0
    importance_weight: float = 0.005
    load_weight: float = 0.005
    gshard_weight: float = 0.0
    z_weight: float = 0.0

    def layers(self, depth: int) -> tuple[int, ...]:
        """Blocks that have experts, counted from 0 (V-MoE's Every-n and Last-n)."""
        if self.placement == "every":
            return tuple(range(self.spacing - 1, depth, self.spacing))
        if self.placement == "last":
            return tuple(range(1, depth, 2))[-self.spacing :]
        return ()

    def problems(self, depth: int, num_tokens: int) -> Iterator[str]:
        """What is wrong with these values in a model of `depth` blocks, a line each.

        Args:
            num_tokens: Tokens of one image, class token included.
        """
        if self.placement == "none":
            return
        if self.k > self.num_experts:
            yield (
                f"experts.k must be experts.num_experts or fewer, got {self.k} of "
                f"{self.num_experts}"
            )
        elif not self.dropless:
            choices = self.k if self.routing == "tokens_choose" else 1
            try:
                expert_capacity(
                    num_tokens * self.group_images,
                    choices,
                    self.num_experts,
                    self.capacity_ratio,
                    rounding=self.rounding,
                )
            except CapacityError as error:
                yield f"experts: {error}"
        if self.dropless and self.routing == "experts_choose":
            yield (
                "experts.dropless needs experts.routing tokens_choose, got experts_choose: who "
                "chooses tokens must be told how many"
            )
        if self.dropless and self.batch_priority:
            yield (
                "experts.batch_priority picks the choices that are dropped, and experts.dropless "
                "drops none; set one of the two to false"
            )
        most = depth if self.placement == "every" else depth // 2
        if not most:
            yield f"experts.placement last needs a depth of 2 or more, got {depth}"
        elif self.spacing > most:
            yield (
                f"experts.spacing must be at most {most} for placement {self.placement} and "
                f"depth {depth}, got {self.spacing}"
            )
        for name in ("noise", "importance_weight", "load_weight", "gshard_weight", "z_weight"):
            if not (value := getattr(self, name)) >= 0:
                yield f"experts.{name} must be 0 or more, got {value}"
        if self.load_weight and not self.noise and self.routing == "tokens_choose":
            yield (
                "experts.load_weight needs noise to define the load; set it to 0 or "
                "experts.noise above 0"
            )


class Dispatched(NamedTuple):
    """What one layer's router did.

    Attributes:
        aux_loss: Weighted sum of the auxiliary losses; 0 outside of training.
        classes: One per width class present, widest first, for each run of equal groups.
    """

    aux_loss: Tensor
    classes: tuple[RoutedClass, ...]


class SparseBlock(nn.Module):
    """The block of `block.NestedBlock` with sparse experts for its MLP."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        experts: ExpertsConfig,
        gelu: Gelu,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = NestedAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = SparseMlp(dim, hidden, experts, gelu)

    def forward(
        self, x_NBD: Tensor, layout: Layout, gate_NB1: Tensor | None = None
    ) -> tuple[Tensor, Dispatched]:
        """One layer: `NBD` in, `NBD` and what its router did out."""
        x_NBD = self.attention(x_NBD, self.attention_norm(x_NBD), layout)
        out: tuple[Tensor, Dispatched] = self.mlp(x_NBD, self.mlp_norm(x_NBD), layout, gate_NB1)
        return out


class SparseMlp(nn.Module):
    """Sparse experts in the place of an MLP.

    `k`, `capacity_ratio` and `batch_priority` may be changed at any time; no parameter
    depends on them.
    """

    def __init__(self, dim: int, hidden: int, config: ExpertsConfig, gelu: Gelu) -> None:
        super().__init__()
        self.config = config
        self.k, self.capacity_ratio = config.k, config.capacity_ratio
        self.batch_priority = config.batch_priority
        self.router = nn.Linear(dim, config.num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=dim**-0.5)
        self.bank = ExpertBank(config.num_experts, dim, hidden, gelu)
        self.ranks: Ranks = ALONE
        self.where = "sparse layer"

    def spread(self, ranks: Ranks, where: str) -> None:
        """Compute as one of many from now on: keep the experts of this rank, exchange tokens.

        Args:
            ranks: The ranks, this one among them.
            where: Name of this layer, for the errors of an exchange.
        """
        self.ranks, self.where = ranks, where
        self.bank.keep(ranks.held(self.config.num_experts))

    def forward(
        self, residual_NBD: Tensor, x_NBD: Tensor, layout: Layout, gate_NB1: Tensor | None
    ) -> tuple[Tensor, Dispatched]:
        """Send `x` (normalised) through its experts and add the result, gated, to `residual`.

        Returns:
            `NBD`, and what the router did.
        """
        group, batch = self.config.group_images, x_NBD.shape[1]
        rest = batch % group
        if rest == 0 or batch < group:
            return self._groups(residual_NBD, x_NBD, layout, gate_NB1, min(group, batch))
        outs, told = [], []
        for part, size in ((slice(0, batch - rest), group), (slice(batch - rest, None), rest)):
            gate = None if gate_NB1 is None else gate_NB1[:, part]
            out, dispatched = self._groups(
                residual_NBD[:, part], x_NBD[:, part], layout, gate, size
            )
            outs.append(out)
            told.append(dispatched)
        aux_loss = (told[0].aux_loss * (batch - rest) + told[1].aux_loss * rest) / batch
        return torch.cat(outs, dim=1), Dispatched(aux_loss, told[0].classes + told[1].classes)

    def capacity(self, num_tokens: int, of_image: int) -> int:
        """Slots of one expert for the tokens of one width class of a group.

        A class has one slot at least, however few tokens a budget or the rest of a batch leave it;
        what is refused is a whole group that is worth less than one.

        Args:
            num_tokens: Tokens of the class, over all images of the group.
            of_image: Tokens of one image, over all classes.

        Raises:
            CapacityError: A whole group is worth less than one slot, or the layer is dropless.
        """
        config = self.config
        if config.dropless:
            raise CapacityError(
                "experts without a capacity (experts.dropless true) have as many rows as tokens "
                "choose, and no number of slots; set experts.dropless to false"
            )
        choices = self.k if config.routing == "tokens_choose" else 1
        rule = (choices, config.num_experts, self.capacity_ratio)
        whole = of_image * config.group_images
        slots = expert_capacity(whole, *rule, rounding=config.rounding)
        if num_tokens == whole:
            return slots
        few = num_tokens * choices * self.capacity_ratio < config.num_experts
        return expert_capacity(num_tokens, *rule, rounding="ceil" if few else config.rounding)

    def macs(self, layout: Layout) -> int:
        """Multiply-accumulates per image of a whole group: the router, and every slot.

        Of a dropless layer the router, and every choice.
        """
        config = self.config
        num_tokens, images = layout.segments[-1].stop, config.group_images
        hidden = self.bank.up_bias_EF.shape[1]
        scores = linear_macs(num_tokens, layout.dim, config.num_experts)
        if config.dropless:
            in_tokens = sum(each.dim * (each.stop - each.start) for each in layout.segments)
            return scores + 2 * hidden * self.k * in_tokens
        in_slots = sum(
            segment.dim * self.capacity(images * (segment.stop - segment.start), num_tokens)
            for segment in layout.segments
        )
        return scores + round(2 * hidden * config.num_experts * in_slots / images)

    def set_capacity(
        self, *, k: int | None, capacity_ratio: float | None, batch_priority: bool | None
    ) -> None:
        """Change what is not None, from the next forward pass on; see `ViT.set_capacity`."""
        if self.config.routing == "experts_choose" and (k, batch_priority) != (None, None):
            raise RoutingError(
                "k and batch_priority mean nothing where experts choose (experts.routing "
                "experts_choose); set capacity_ratio"
            )
        if self.config.dropless and (capacity_ratio, batch_priority) != (None, None):
            raise RoutingError(
                "capacity_ratio and batch_priority mean nothing where nothing is dropped "
                "(experts.dropless true); set k"
            )
        if k is not None and not (type(k) is int and 1 <= k <= self.config.num_experts):
            raise RoutingError(
                f"k must be a whole number between 1 and the {self.config.num_experts} experts, "
                f"got {k}"
            )
        if capacity_ratio is not None and not 0 < capacity_ratio < math.inf:
            raise CapacityError(f"capacity_ratio must be above 0 and finite, got {capacity_ratio}")
        self.k = self.k if k is None else k
        self.capacity_ratio = self.capacity_ratio if capacity_ratio is None else capacity_ratio
        self.batch_priority = self.batch_priority if batch_priority is None else batch_priority

    def _groups(
        self,
        residual_NBD: Tensor,
        x_NBD: Tensor,
        layout: Layout,
        gate_NB1: Tensor | None,
        group: int,
    ) -> tuple[Tensor, Dispatched]:
        """`forward` for a batch of whole groups."""
        logits_NBE = self.router(x_NBD)
        logits_NBE = logits_NBE.to(torch.promote_types(logits_NBE.dtype, torch.float32))
        noisy_NBE = logits_NBE
        std = self.config.noise / self.config.num_experts
        if self.training and std:
            noisy_NBE = logits_NBE + std * self._noise(logits_NBE)
        plan = self._plan(noisy_NBE.softmax(dim=-1), layout, group)
        weight_RK = plan.weight_RK
        if gate_NB1 is not None:
            weight_RK = weight_RK * gate_NB1.reshape(-1, 1)
        each_y_EQd = self.bank(dispatch(x_NBD, plan), self.ranks, self.where, plan.count_WE)
        out_NBD = combine(residual_NBD, each_y_EQd, weight_RK, plan)
        aux_loss = self._aux_loss(by_group(logits_NBE, group), by_group(noisy_NBE, group), std)
        return out_NBD, Dispatched(aux_loss, tuple(of.routed for of in plan.classes))

    def _noise(self, logits_NBE: Tensor) -> Tensor:
        """Standard normal numbers, drawn for all ranks' images: the same however many ranks."""
        num_tokens, batch, num_experts = logits_NBE.shape
        shape = (num_tokens, batch * self.ranks.parts, num_experts)
        whole = torch.randn(shape, dtype=logits_NBE.dtype, device=logits_NBE.device)
        return self.ranks.share(whole, axis=1)

    def _plan(self, probs_NBE: Tensor, layout: Layout, group: int) -> SlotPlan:
        if self.config.dropless:
            return plan_rows(probs_NBE, layout, group, self.k)
        assign = partial(self._assign, of_image=probs_NBE.shape[0])
        return plan_slots(probs_NBE, layout, group, assign)

    def _assign(self, probs_GSE: Tensor, of_image: int) -> Assignment:
        capacity = self.capacity(probs_GSE.shape[1], of_image)
        if self.config.routing == "experts_choose":
            return expert_choice(probs_GSE, capacity)
        return top_k_assignment(probs_GSE, self.k, capacity, batch_priority=self.batch_priority)

    def _aux_loss(self, logits_GSE: Tensor, noisy_GSE: Tensor, std: float) -> Tensor:
        """Weighted auxiliary losses, those of weight 0 left out so that they cannot be NaN."""
        config = self.config
        total = logits_GSE.new_zeros(())
        if not self.training:
            return total
        if config.routing == "tokens_choose":  # experts that choose are balanced as they are
            if config.importance_weight:
                total = total + config.importance_weight * importance_loss(logits_GSE.softmax(-1))
            if config.load_weight:
                total = total + config.load_weight * load_loss(logits_GSE, noisy_GSE, self.k, std)
            if config.gshard_weight:
                total = total + config.gshard_weight * gshard_loss(noisy_GSE.softmax(-1))
        if config.z_weight:
            total = total + config.z_weight * router_z_loss(logits_GSE)
        return total
