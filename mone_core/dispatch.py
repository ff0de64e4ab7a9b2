"""Tokens to the slots of their experts, and back.

`plan_slots` turns the choices of a layer's tokens into index tables, `dispatch` copies features of
tokens into slots, `combine` adds the weighted outputs of slots to the residual stream. Who goes
where is decided in `routing`; what happens in a slot is `experts`' business.

Tokens come sorted by width (`nested.Layout`), and every width class has slots of its own in
every expert: a class keeps its share of the experts whatever the others want, and only the
features of its width move. A dense model has one class, and this is plain V-MoE.

Both directions and both gradients are gathers by an index known to both sides: no one-hot
products, no atomic additions, so results are the same in every run.

Axes: N tokens sorted by width, B images in G groups of I, R = N * B rows, D features, E experts,
Q slots of one expert over all groups and classes, K choices of a token, S tokens and C slots
of an expert in one group and class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mone_core.nested import Layout, Segment, row_blocks
from mone_core.routing import Assignment


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """Where every choice of every token sits, as index tables.

    Attributes:
        tokens: Width classes along N.
        slots: The same classes along Q, in every expert.
        row_EQ: Row of the token in each slot; any row where the slot is empty.
        filled_EQ: Whether the slot is filled.
        choice_EQ: Row * K + choice that fills the slot.
        slot_RK: Slot of every choice, expert * Q + place; another filled one where it was dropped.
        kept_RK: Whether the choice has a slot.
        weight_RK: Routing weight, 0 where dropped; carries gradient to the router.
        assignments: What the tables were made from, one per class, widest first.
    """

    tokens: Layout
    slots: Layout
    row_EQ: Tensor
    filled_EQ: Tensor
    choice_EQ: Tensor
    slot_RK: Tensor
    kept_RK: Tensor
    weight_RK: Tensor
    assignments: tuple[Assignment, ...]


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
    assignments = []
    for segment in tokens.segments:
        assignments.append(assign(by_group(probs_NBE[segment.start : segment.stop], group)))
    capacities = tuple(each.choice_GEC.shape[2] for each in assignments)
    slots = _slot_layout(tokens, tuple(batch // group * capacity for capacity in capacities))
    num_slots = slots.segments[-1].stop
    by_slot = [
        _by_slot(each, segment, group, batch)
        for each, segment in zip(assignments, tokens.segments, strict=True)
    ]
    by_row = [
        _by_row(each, place, num_slots, group)
        for each, place in zip(assignments, slots.segments, strict=True)
    ]
    row, filled, choice = (torch.cat(parts, dim=1) for parts in zip(*by_slot, strict=True))
    slot, kept, weight = (torch.cat(parts) for parts in zip(*by_row, strict=True))
    return SlotPlan(tokens, slots, row, filled, choice, slot, kept, weight, tuple(assignments))


def by_group(x_NBE: Tensor, group: int) -> Tensor:
    """All tokens of a group of images together, image by image: `NBE` -> `GSE`."""
    num_tokens, _, num_experts = x_NBE.shape
    x_NGIE = x_NBE.reshape(num_tokens, -1, group, num_experts)
    return x_NGIE.permute(1, 2, 0, 3).flatten(1, 2)


def dispatch(x_NBD: Tensor, plan: SlotPlan) -> Tensor:
    """Copy tokens into slots, the features of their width only.

    Returns:
        `EQD`. Features past a class's width, and whatever is in empty slots, are
        not to be read: `combine` gives them no weight and no gradient.
    """
    out: Tensor = _Dispatch.apply(x_NBD, plan)  # type: ignore[no-untyped-call]
    return out


def combine(residual_NBD: Tensor, y_EQD: Tensor, weight_RK: Tensor, plan: SlotPlan) -> Tensor:
    """Add every token's weighted slots to its first d features; dropped choices add nothing.

    Args:
        residual_NBD: The stream to add to.
        y_EQD: Outputs of the experts.
        weight_RK: Weight of every choice, 0 where `plan.kept_RK` is not set.

    Returns:
        `NBD`, a new tensor.
    """
    out: Tensor = _Combine.apply(residual_NBD, y_EQD, weight_RK, plan)  # type: ignore[no-untyped-call]
    return out


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, x_NBD: Tensor, plan: SlotPlan) -> Tensor:
        ctx.plan, ctx.shape = plan, x_NBD.shape
        x_RD = x_NBD.reshape(-1, x_NBD.shape[2])
        return _to_slots(x_RD, plan, None, x_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_EQD: Tensor) -> tuple[Tensor, None]:
        plan: SlotPlan = ctx.plan
        grad_PD = grad_EQD.reshape(-1, grad_EQD.shape[2])
        kept_RK = plan.kept_RK.to(grad_PD.dtype)
        grad_x_RD = grad_PD.new_empty(plan.slot_RK.shape[0], grad_PD.shape[1])
        for rows, dim in row_blocks(plan.tokens, ctx.shape[1]):
            first, *others = plan.slot_RK[rows].unbind(1)
            grad_rd = grad_PD[:, :dim].index_select(0, first).mul_(kept_RK[rows, :1])
            for k, slot in enumerate(others, start=1):
                grad_rd.addcmul_(grad_PD[:, :dim].index_select(0, slot), kept_RK[rows, k : k + 1])
            grad_x_RD[rows, :dim] = grad_rd
            grad_x_RD[rows, dim:] = 0
        return grad_x_RD.view(ctx.shape), None


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any, residual_NBD: Tensor, y_EQD: Tensor, weight_RK: Tensor, plan: SlotPlan
    ) -> Tensor:
        ctx.save_for_backward(y_EQD, weight_RK)
        ctx.plan = plan
        y_PD = y_EQD.reshape(-1, y_EQD.shape[2])
        out_RD = residual_NBD.reshape(-1, residual_NBD.shape[2]).clone()
        for rows, dim in row_blocks(plan.tokens, residual_NBD.shape[1]):
            for k, slot in enumerate(plan.slot_RK[rows].unbind(1)):
                y = y_PD[:, :dim].index_select(0, slot)
                out_RD[rows, :dim].addcmul_(y, weight_RK[rows, k : k + 1])
        return out_RD.view(residual_NBD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y_EQD, weight_RK = ctx.saved_tensors
        plan: SlotPlan = ctx.plan
        y_PD = y_EQD.reshape(-1, y_EQD.shape[2])
        grad_RD = grad_NBD.reshape(-1, grad_NBD.shape[2])
        grad_weight_RK = torch.empty_like(weight_RK)
        for rows, dim in row_blocks(plan.tokens, grad_NBD.shape[1]):
            for k, slot in enumerate(plan.slot_RK[rows].unbind(1)):
                y_rd = y_PD[:, :dim].index_select(0, slot)
                grad_weight_RK[rows, k] = (grad_RD[rows, :dim] * y_rd).sum(dim=1)
        grad_weight_RK *= plan.kept_RK
        weight_EQ = weight_RK.take(plan.choice_EQ) * plan.filled_EQ
        grad_y_EQD = _to_slots(grad_RD, plan, weight_EQ, y_EQD.dtype)
        return grad_NBD, grad_y_EQD, grad_weight_RK, None


def _to_slots(x_RD: Tensor, plan: SlotPlan, weight_EQ: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows into slots, `EQD`, times a weight per slot; features past a class's width stay unset."""
    num_experts, num_slots = plan.row_EQ.shape
    out_EQD = x_RD.new_empty(num_experts, num_slots, x_RD.shape[1], dtype=dtype)
    for at, dim in row_blocks(plan.slots):
        x_rd = x_RD[:, :dim].index_select(0, plan.row_EQ[:, at].flatten())
        x_EQd = x_rd.view(num_experts, -1, dim)
        if weight_EQ is not None:
            x_EQd = x_EQd * weight_EQ[:, at, None]
        out_EQD[:, at, :dim] = x_EQd
    return out_EQD


def _by_slot(
    assignment: Assignment, segment: Segment, group: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, filled or not, and choice of every slot of one class, each `EQ`."""
    choices = assignment.slot_GSK.shape[2]
    groups = batch // group
    device = assignment.slot_GSK.device
    token_N = torch.arange(segment.start, segment.stop, device=device)
    image_GI = torch.arange(batch, device=device).view(groups, group)
    row_GS = (token_N * batch + image_GI.unsqueeze(-1)).flatten(1)
    choice_GEC = assignment.choice_GEC
    token_GEC = choice_GEC // choices
    row_GEC = row_GS.gather(1, token_GEC.flatten(1)).view_as(token_GEC)
    choice_GEC = row_GEC * choices + choice_GEC % choices
    row, filled, choice = (
        each.transpose(0, 1).flatten(1) for each in (row_GEC, assignment.filled_GEC, choice_GEC)
    )
    return row, filled, choice


def _by_row(
    assignment: Assignment, slots: Segment, num_slots: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slot, kept or not, and weight of every choice of one class, each `RK`."""
    groups, _, choices = assignment.slot_GSK.shape
    capacity = assignment.choice_GEC.shape[2]
    group_G11 = torch.arange(groups, device=assignment.slot_GSK.device).view(-1, 1, 1)
    expert = assignment.slot_GSK // capacity
    place = assignment.slot_GSK % capacity
    slot_GSK = expert * num_slots + slots.start + group_G11 * capacity + place
    slot, kept, weight = (
        each.view(groups, group, -1, choices).permute(2, 0, 1, 3).reshape(-1, choices)
        for each in (slot_GSK, assignment.kept_GSK, assignment.weight_GSK)
    )
    return slot, kept, weight


def _slot_layout(tokens: Layout, slots: tuple[int, ...]) -> Layout:
    """The classes of `tokens`, widest first, with so many slots each."""
    dims = [segment.dim for segment in tokens.segments]
    if dims[0] < tokens.dim:
        dims, slots = [tokens.dim, *dims], (0, *slots)
    return Layout.of(slots[::-1], dims[::-1])
