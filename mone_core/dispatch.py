"""Tokens to the slots of their experts, and back.

`plan_slots` turns the choices of a layer's tokens into index tables, `dispatch` copies features of
tokens into slots, `combine` adds the weighted outputs of slots to the residual stream. Who goes
where is decided in `routing`; what happens in a slot is `experts`' business.

Tokens come sorted by width (`nested.Layout`), and every width class has slots of its own in
every expert, a tensor as wide as the class: a class keeps its share of the experts whatever the
others want, and only the features of its width move. A dense model has one class, and this is
plain V-MoE.

Both directions and both gradients are gathers by an index known to both sides: no one-hot
products, no atomic additions, so results are the same in every run.

Axes: N tokens sorted by width, B images in G groups of I, R = N * B rows of which a class has r,
D features of which it has d, E experts, Q slots of an expert over all groups of one class, K
choices of a token, S tokens and C slots of an expert in one group and class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mone_core.nested import Layout, Segment, row_blocks
from mone_core.routing import Assignment


class RoutedClass(NamedTuple):
    """What became of the tokens of one width class in one layer.

    Attributes:
        dim: The width.
        probs_GSE: The probabilities that choices were made from, detached.
        assignment: The choices.
    """

    dim: int
    probs_GSE: Tensor
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class ClassSlots:
    """Where every choice of the tokens of one width class sits, as index tables.

    Attributes:
        rows: The class's rows among all, a row being a token of an image; tables count within.
        dim: Its width d.
        row_EQ: Row of the token in each slot; any row where the slot is empty.
        filled_EQ: Whether the slot is filled.
        choice_EQ: Row * K + choice that fills the slot.
        slot_rK: Slot of every choice, expert * Q + place; another filled one where it was dropped.
        kept_rK: Whether the choice has a slot.
        routed: What the tables were made from.
    """

    rows: slice
    dim: int
    row_EQ: Tensor
    filled_EQ: Tensor
    choice_EQ: Tensor
    slot_rK: Tensor
    kept_rK: Tensor
    routed: RoutedClass


class SlotPlan(NamedTuple):
    """Where every choice of every token sits.

    Attributes:
        classes: One per width class present, widest first.
        weight_RK: Routing weight of every choice, 0 where dropped; carries gradient to the router.
        count_WE: Rows of every class and expert, where rows are not slots but as many as come
            (`dropless`): the tables are then those of one expert, E = 1, and Q = r * K.
    """

    classes: tuple[ClassSlots, ...]
    weight_RK: Tensor
    count_WE: Tensor | None = None


def plan_slots(
    probs_NBE: Tensor, tokens: Layout, group: int, assign: Callable[[Tensor], Assignment]
) -> SlotPlan:
    """Assign the tokens of every width class and group, and number rows and slots.

    Args:
        probs_NBE: Router probabilities, tokens sorted by width.
        tokens: The width classes.
        group: Images that are routed together, I; divides B.
        assign: Probabilities `GSE` of one class, image by image -> its assignment.
    """
    batch = probs_NBE.shape[1]
    classes, weights = [], []
    for segment, (rows, dim) in zip(tokens.segments, row_blocks(tokens, batch), strict=True):
        probs_GSE = by_group(probs_NBE[segment.start : segment.stop], group)
        assignment = assign(probs_GSE)
        routed = RoutedClass(dim, probs_GSE.detach(), assignment)
        by_slot = _by_slot(assignment, segment, group, batch)
        slot_rK, kept_rK, weight_rK = _by_row(assignment, group)
        classes.append(ClassSlots(rows, dim, *by_slot, slot_rK, kept_rK, routed))
        weights.append(weight_rK)
    return SlotPlan(tuple(classes), torch.cat(weights))


def by_group(x_NBE: Tensor, group: int) -> Tensor:
    """All tokens of a group of images together, image by image: `NBE` -> `GSE`."""
    num_tokens, _, num_experts = x_NBE.shape
    x_NGIE = x_NBE.reshape(num_tokens, -1, group, num_experts)
    return x_NGIE.permute(1, 2, 0, 3).flatten(1, 2)


def dispatch(x_NBD: Tensor, plan: SlotPlan) -> tuple[Tensor, ...]:
    """Copy tokens into slots, the features of their width only.

    Returns:
        `EQd` of every width class, contiguous. What is in empty slots is somebody's features:
        `combine` gives them no weight and no gradient.
    """
    out: tuple[Tensor, ...] = _Dispatch.apply(x_NBD, plan)  # type: ignore[no-untyped-call]
    return out


def combine(
    residual_NBD: Tensor, each_y_EQd: Sequence[Tensor], weight_RK: Tensor, plan: SlotPlan
) -> Tensor:
    """Add every token's weighted slots to its first d features; dropped choices add nothing.

    Args:
        residual_NBD: The stream to add to.
        each_y_EQd: Outputs of the experts, one tensor per width class.
        weight_RK: Weight of every choice, 0 where it was dropped.

    Returns:
        `NBD`, a new tensor.
    """
    out: Tensor = _Combine.apply(residual_NBD, weight_RK, plan, *each_y_EQd)  # type: ignore[no-untyped-call]
    return out


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, x_NBD: Tensor, plan: SlotPlan) -> tuple[Tensor, ...]:
        ctx.classes, ctx.shape = plan.classes, x_NBD.shape
        x_RD = x_NBD.reshape(-1, x_NBD.shape[2])
        return tuple(_to_slots(x_RD, of) for of in plan.classes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_EQd: Tensor) -> tuple[Tensor, None]:
        dim = ctx.shape[2]
        grad_x_RD = grads_EQd[0].new_empty(ctx.shape[0] * ctx.shape[1], dim)
        for of, grad_EQd in zip(ctx.classes, grads_EQd, strict=True):
            grad_Pd = grad_EQd.reshape(-1, of.dim)
            kept_rK = of.kept_rK.to(grad_Pd.dtype)
            first, *others = of.slot_rK.unbind(1)
            grad_rd = grad_Pd.index_select(0, first).mul_(kept_rK[:, :1])
            for k, slot in enumerate(others, start=1):
                grad_rd.addcmul_(grad_Pd.index_select(0, slot), kept_rK[:, k : k + 1])
            grad_x_RD[of.rows, : of.dim] = grad_rd
            grad_x_RD[of.rows, of.dim :] = 0
        return grad_x_RD.view(ctx.shape), None


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any, residual_NBD: Tensor, weight_RK: Tensor, plan: SlotPlan, *each_y_EQd: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight_RK, *each_y_EQd)
        ctx.classes = plan.classes
        out_RD = residual_NBD.reshape(-1, residual_NBD.shape[2]).clone()
        for of, y_EQd in zip(plan.classes, each_y_EQd, strict=True):
            y_Pd, weight_rK = y_EQd.reshape(-1, of.dim), weight_RK[of.rows]
            for k, slot in enumerate(of.slot_rK.unbind(1)):
                y_rd = y_Pd.index_select(0, slot)
                out_RD[of.rows, : of.dim].addcmul_(y_rd, weight_rK[:, k : k + 1])
        return out_RD.view(residual_NBD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBD: Tensor) -> tuple[Tensor | None, ...]:
        weight_RK, *each_y_EQd = ctx.saved_tensors
        grad_RD = grad_NBD.reshape(-1, grad_NBD.shape[2])
        grad_weight_RK = torch.empty_like(weight_RK)
        grads_EQd = []
        for of, y_EQd in zip(ctx.classes, each_y_EQd, strict=True):
            y_Pd, grad_rd = y_EQd.reshape(-1, of.dim), grad_RD[of.rows, : of.dim]
            for k, slot in enumerate(of.slot_rK.unbind(1)):
                y_rd = y_Pd.index_select(0, slot)
                grad_weight_RK[of.rows, k] = (grad_rd * y_rd).sum(dim=1) * of.kept_rK[:, k]
            weight_EQ = weight_RK[of.rows].take(of.choice_EQ) * of.filled_EQ
            grads_EQd.append(_to_slots(grad_RD, of, weight_EQ).to(y_EQd.dtype))
        return grad_NBD, grad_weight_RK, None, *grads_EQd


def _to_slots(x_RD: Tensor, of: ClassSlots, weight_EQ: Tensor | None = None) -> Tensor:
    """A class's rows into its slots, `EQd`, times a weight per slot."""
    x_Pd = x_RD[of.rows, : of.dim].index_select(0, of.row_EQ.flatten())
    x_EQd = x_Pd.view(*of.row_EQ.shape, of.dim)
    return x_EQd if weight_EQ is None else x_EQd * weight_EQ.unsqueeze(-1)


def _by_slot(
    assignment: Assignment, segment: Segment, group: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, filled or not, and choice of every slot of one class, each `EQ`."""
    choices = assignment.slot_GSK.shape[2]
    device = assignment.slot_GSK.device
    token_N = torch.arange(segment.stop - segment.start, device=device)
    image_GI = torch.arange(batch, device=device).view(-1, group)
    row_GS = (token_N * batch + image_GI.unsqueeze(-1)).flatten(1)
    choice_GEC = assignment.choice_GEC
    token_GEC = choice_GEC // choices
    row_GEC = row_GS.gather(1, token_GEC.flatten(1)).view_as(token_GEC)
    choice_GEC = row_GEC * choices + choice_GEC % choices
    row, filled, choice = (
        each.transpose(0, 1).flatten(1) for each in (row_GEC, assignment.filled_GEC, choice_GEC)
    )
    return row, filled, choice


def _by_row(assignment: Assignment, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slot, kept or not, and weight of every choice of one class, each `rK`."""
    groups, _, choices = assignment.slot_GSK.shape
    capacity = assignment.choice_GEC.shape[2]
    group_G11 = torch.arange(groups, device=assignment.slot_GSK.device).view(-1, 1, 1)
    expert, place = assignment.slot_GSK // capacity, assignment.slot_GSK % capacity
    slot_GSK = (expert * groups + group_G11) * capacity + place
    slot, kept, weight = (
        each.view(groups, group, -1, choices).permute(2, 0, 1, 3).reshape(-1, choices)
        for each in (slot_GSK, assignment.kept_GSK, assignment.weight_GSK)
    )
    return slot, kept, weight
