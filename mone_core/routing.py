"""Which nested expert handles which token, and which sparse expert.

Nested (MoNE): a `Router` scores tokens, `expert_preferred_routing` gives each its width, and
`sort_by_width` turns that into the order in which a model keeps its tokens from then on.
Sparse (V-MoE): `top_k_assignment` or `expert_choice` gives tokens places in experts of limited
capacity. No features are moved (`dispatch`) or computed (`nested`, `experts`) here.

Axes: B images (or frames), N tokens of one image, D model width, E experts; for sparse experts
G groups of S tokens that compete with each other, K choices of a token, C slots of an expert.

Counts and capacities are Python integers, so every shape is known before a step is traced: no
host sync, no recompilation.

Source: arXiv 2407.19985, section 4 and algorithm 1; arXiv 2106.05974, sections 2 and 3 and the
public code of the latter for the order in which slots fill.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mone_core.errors import CapacityError, RoutingError

Rounding = Literal["nearest", "ceil", "ceil4", "ceil8"]

# 100 * 1 * 1.1 / 10 comes out a hair above 11, and its ceiling must not be 12.
_CEIL_GUARD = 1e-6


class Router(nn.Module):
    """Scores every token for every expert: linear, bias, softmax over experts (section 4.1).

    Args:
        dim: Model width D.
        num_experts: E.

    Shape: `x_BND` -> probabilities `BNE`, in float32 at least. The scores themselves have the
    model's dtype: in bfloat16 close ones may tie.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, num_experts)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Probabilities of every expert, adding up to 1 for each token."""
        logits_BNE = self.score(x_BND)
        at_least_float32 = torch.promote_types(logits_BNE.dtype, torch.float32)
        probs_BNE: Tensor = logits_BNE.softmax(dim=-1, dtype=at_least_float32)
        return probs_BNE


def expert_preferred_routing(probs_BNE: Tensor, counts: Sequence[int]) -> Tensor:
    """Let experts pick tokens in turn, widest first, each until its count is full.

    Every token is picked exactly once; equal scores go to the token that comes earlier here (at
    a model's second router: in the order of the first).

    Args:
        probs_BNE: Router probabilities, narrowest expert first.
        counts: Tokens per expert and image; adds up to N.

    Returns:
        Expert index of every token, shape BN, int64.

    Raises:
        RoutingError: `counts` does not share out exactly N tokens among E experts.

    Source: arXiv 2407.19985, algorithm 1.
    """
    _, num_tokens, num_experts = probs_BNE.shape
    if len(counts) != num_experts or sum(counts) != num_tokens:
        raise RoutingError(
            f"counts {tuple(counts)} share out {sum(counts)} tokens among {len(counts)} experts, "
            f"but the scores are for {num_tokens} tokens and {num_experts} experts"
        )
    expert_BN = torch.zeros(probs_BNE.shape[:2], dtype=torch.int64, device=probs_BNE.device)
    open_BNE = probs_BNE.detach()
    for expert in reversed(range(1, num_experts)):  # expert 0 takes whatever is left
        # A stable sort, not topk: topk leaves the order of equal scores open.
        by_score_BN = open_BNE[..., expert].sort(dim=1, descending=True, stable=True).indices
        picked_BK = by_score_BN[:, : counts[expert]]
        expert_BN = expert_BN.scatter(1, picked_BK, expert)
        taken_BN1 = (expert_BN > 0).unsqueeze(-1)
        open_BNE = probs_BNE.detach().masked_fill(taken_BN1, float("-inf"))
    return expert_BN


def sort_by_width(expert_BN: Tensor) -> Tensor:
    """Positions of an image's tokens, widest expert first, original order within an expert.

    Args:
        expert_BN: Expert index of every token.

    Returns:
        Token positions `order_BN`, int64: `tokens.gather(1, order)` puts them in that order.
    """
    return expert_BN.sort(dim=1, descending=True, stable=True).indices


class Assignment(NamedTuple):
    """Who sits where: choices of tokens, and the same seen from the slots of experts.

    Attributes:
        expert_GSK: Expert of every choice. Choice 0 is a token's favourite; where experts
            choose, choice e is expert e.
        slot_GSK: Slot that the choice got, expert * C + place. Where it was dropped, the last
            slot of its expert, which is full: whoever reads it finds something real.
        kept_GSK: Whether the choice got a slot.
        weight_GSK: Routing weight of the choice, 0 where it was dropped; carries gradient.
        choice_GEC: Choice that fills each slot, as token * K + k; choice 0 where it is empty.
        filled_GEC: Whether the slot is filled.
    """

    expert_GSK: Tensor
    slot_GSK: Tensor
    kept_GSK: Tensor
    weight_GSK: Tensor
    choice_GEC: Tensor
    filled_GEC: Tensor


def expert_capacity(
    num_tokens: int, k: int, num_experts: int, capacity_ratio: float, *, rounding: Rounding
) -> int:
    """Slots of one expert for a group of tokens: `num_tokens * k * capacity_ratio / num_experts`.

    Never more than `num_tokens`, since no token takes two slots of one expert.

    Args:
        num_tokens: Tokens that are routed together, S.
        k: Choices of a token; 1 where experts choose.
        num_experts: E.
        capacity_ratio: Slots over choices, C of the paper.
        rounding: "nearest" is the paper's formula (halves go to the even number, as Python
            rounds); "ceil4" the public code's, up to a multiple of four; "ceil" and "ceil8"
            round up to whole numbers and multiples of eight.

    Raises:
        CapacityError: Less than one slot comes out, the ratio is not a positive number, or
            the rounding does not exist.

    Source: arXiv 2106.05974, section 2.
    """
    if rounding not in get_args(Rounding):
        raise CapacityError(
            f"rounding {rounding!r} does not exist; it must be one of {get_args(Rounding)}"
        )
    if not 0 < capacity_ratio < math.inf:
        raise CapacityError(f"capacity ratio must be above 0 and finite, got {capacity_ratio}")
    exact = num_tokens * k * capacity_ratio / num_experts
    if rounding == "nearest":
        slots = round(exact)
    else:
        multiple = {"ceil": 1, "ceil4": 4, "ceil8": 8}[rounding]
        slots = multiple * math.ceil(exact / multiple - _CEIL_GUARD)
    if slots < 1:
        raise CapacityError(
            f"an expert gets {exact:.3g} slots for {num_tokens} tokens (k {k}, {num_experts} "
            f"experts, capacity ratio {capacity_ratio}); it needs 1 or more: raise the "
            f"capacity ratio, route more images together, or round up"
        )
    return min(slots, num_tokens)


def top_k_assignment(
    probs_GSE: Tensor, k: int, capacity: int, *, batch_priority: bool = False
) -> Assignment:
    """Let tokens choose their k best experts; a full expert drops the choices that come later.

    All first choices are placed before any second choice. Within a rank tokens come in their
    order, or (batch priority routing) by their largest probability, the largest first. Weights
    are not renormalised. Equal probabilities go to the lower expert and the earlier token.

    Args:
        probs_GSE: Probability of every expert.
        k: Experts per token, K, 1 to E.
        capacity: Slots per expert and group, C.
        batch_priority: Place by score.

    Raises:
        RoutingError: `k` or `capacity` is out of range.

    Source: arXiv 2106.05974, sections 2.2 and 3 (algorithms 1 and 2).
    """
    num_experts = probs_GSE.shape[2]
    if not 1 <= k <= num_experts:
        raise RoutingError(f"k must lie between 1 and the {num_experts} experts, got {k}")
    if capacity < 1:
        raise RoutingError(f"capacity must be 1 or more slots, got {capacity}")
    # A stable sort, not topk: topk leaves the order of equal scores open.
    by_score_GSE = probs_GSE.detach().sort(dim=2, descending=True, stable=True)
    expert_GSK = by_score_GSE.indices[..., :k]
    expert_GKS = expert_GSK.transpose(1, 2)
    if batch_priority:
        order_GS = by_score_GSE.values[..., 0].sort(dim=1, descending=True, stable=True).indices
        order_GKS = order_GS.unsqueeze(1).expand_as(expert_GKS)
        in_order_GKS = _places(expert_GKS.gather(2, order_GKS), num_experts)
        place_GKS = torch.empty_like(in_order_GKS).scatter_(2, order_GKS, in_order_GKS)
    else:
        place_GKS = _places(expert_GKS, num_experts)
    place_GSK = place_GKS.transpose(1, 2)
    kept_GSK = place_GSK < capacity
    slot_GSK = expert_GSK * capacity + place_GSK.clamp(max=capacity - 1)
    weight_GSK = probs_GSE.gather(2, expert_GSK).where(kept_GSK, 0)
    choice_GQ, filled_GQ = _fill(slot_GSK.flatten(1), kept_GSK.flatten(1), num_experts * capacity)
    seats = (-1, num_experts, capacity)
    return Assignment(
        expert_GSK, slot_GSK, kept_GSK, weight_GSK, choice_GQ.view(seats), filled_GQ.view(seats)
    )


def expert_choice(probs_GSE: Tensor, capacity: int) -> Assignment:
    """Let every expert choose the tokens that score highest for it; all slots are filled.

    A token may be chosen by no expert or by several. Equal probabilities go to the earlier token.

    Args:
        probs_GSE: Probability of every expert.
        capacity: Tokens that each expert takes from a group, C, 1 to S.

    Raises:
        RoutingError: `capacity` is out of range.

    Source: arXiv 2202.09368, section 3.2.
    """
    _, num_tokens, num_experts = probs_GSE.shape
    if not 1 <= capacity <= num_tokens:
        raise RoutingError(
            f"capacity must lie between 1 and the {num_tokens} tokens of a group, got {capacity}"
        )
    by_score_GES = probs_GSE.detach().transpose(1, 2).sort(dim=2, descending=True, stable=True)
    token_GEC = by_score_GES.indices[..., :capacity]
    place_C = torch.arange(capacity, device=probs_GSE.device)
    place_GES = torch.full_like(by_score_GES.indices, capacity)
    place_GES = place_GES.scatter(2, token_GEC, place_C.expand_as(token_GEC))
    place_GSE = place_GES.transpose(1, 2)
    expert_E = torch.arange(num_experts, device=probs_GSE.device)
    kept_GSE = place_GSE < capacity
    return Assignment(
        expert_GSK=expert_E.expand_as(probs_GSE),
        slot_GSK=expert_E * capacity + place_GSE.clamp(max=capacity - 1),
        kept_GSK=kept_GSE,
        weight_GSK=probs_GSE.where(kept_GSE, 0),
        choice_GEC=token_GEC * num_experts + expert_E[:, None],
        filled_GEC=torch.ones_like(token_GEC, dtype=torch.bool),
    )


def _places(expert_GKS: Tensor, num_experts: int) -> Tensor:
    """How many earlier choices want the same expert, in the order K-major then S."""
    wanted_GQ = expert_GKS.flatten(1)
    shape = (*wanted_GQ.shape, num_experts)
    wants_GQE = torch.zeros(shape, dtype=torch.int32, device=wanted_GQ.device)
    wants_GQE.scatter_(2, wanted_GQ.unsqueeze(-1), 1)
    so_far_GQE = wants_GQE.cumsum(dim=1, dtype=torch.int32)
    place_GQ = so_far_GQE.gather(2, wanted_GQ.unsqueeze(-1)).squeeze(-1) - 1
    return place_GQ.long().view_as(expert_GKS)


def _fill(slot_GQ: Tensor, kept_GQ: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """The choice in every slot and whether there is one, from the slot of every choice."""
    groups, num_choices = slot_GQ.shape
    # Dropped choices all land in one slot past the end, which is then cut off.
    target_GQ = slot_GQ.where(kept_GQ, num_slots)
    choice_Q = torch.arange(num_choices, device=slot_GQ.device)
    empty = torch.full((groups, num_slots + 1), -1, device=slot_GQ.device)
    choice_GP = empty.scatter(1, target_GQ, choice_Q.expand(groups, -1))[:, :num_slots]
    return choice_GP.clamp(min=0), choice_GP >= 0
