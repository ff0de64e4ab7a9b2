"""Sparse experts without a capacity: every choice of every token is computed, none is dropped.

`plan_rows` is `dispatch.plan_slots` with rows in the place of slots: the choices of a width class
lie sorted by their experts, one next to the other, none of them empty; `dispatch` and `combine` go
by the same tables. How many rows an expert has is then known to the device alone, so
`exchange_rows` tells every rank how many come to it, and the host waits for these numbers:
once in the forward pass of a layer and never in the backward pass (once more where a batch leaves
a smaller group, see `ExpertsConfig.group_images`). A static capacity knows every shape beforehand
and waits for nothing; this ends the capture of a CUDA graph, breaks a compiled one in two, and is
not there on XLA. What ranks compute is as uneven as what their experts are chosen for.

Axes: W width classes, N tokens sorted by width, B images in groups of I, E experts, e of them held
by a rank, R expert ranks, K choices of a token, r rows of a class, P = r * K choices of them, or
what came of all ranks' to one; G groups of S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mone_core.dispatch import ClassSlots, RoutedClass, SlotPlan, by_group
from mone_core.nested import Layout, MlpWeights, row_blocks
from mone_core.ranks import Arriving, Ranks
from mone_core.routing import Assignment


def plan_rows(probs_NBE: Tensor, tokens: Layout, group: int, k: int) -> SlotPlan:
    """Let tokens choose their k best experts, and sort the choices of every class by expert.

    Choices and weights are those of `routing.top_k_assignment`. The order within an expert is that
    of the rows.

    Args:
        probs_NBE: Router probabilities, tokens sorted by width.
        tokens: The width classes.
        group: Images that are reported together, I; divides B.
        k: Experts per token, K, 1 to E.
    """
    batch = probs_NBE.shape[1]
    classes, weights, counts = [], [], []
    for segment, (rows, dim) in zip(tokens.segments, row_blocks(tokens, batch), strict=True):
        probs_nBE = probs_NBE[segment.start : segment.stop]
        # A stable sort, not topk: topk leaves the order of equal scores open.
        best_nBE = probs_nBE.detach().sort(dim=2, descending=True, stable=True).indices
        expert_nBK = best_nBE[..., :k]
        weight_nBK = probs_nBE.gather(2, expert_nBK)
        choice_P, slot_P, count_E = _sorted_by_expert(expert_nBK.flatten(), probs_NBE.shape[2])
        slot_rK = slot_P.view(-1, k)
        routed = RoutedClass(
            dim,
            by_group(probs_nBE.detach(), group),
            _assignment(expert_nBK, slot_rK.view_as(expert_nBK), weight_nBK, count_E, group),
        )
        classes.append(
            ClassSlots(
                rows=rows,
                dim=dim,
                row_EQ=(choice_P // k).unsqueeze(0),
                filled_EQ=torch.ones_like(choice_P, dtype=torch.bool).unsqueeze(0),
                choice_EQ=choice_P.unsqueeze(0),
                slot_rK=slot_rK,
                kept_rK=torch.ones_like(slot_rK, dtype=torch.bool),
                routed=routed,
            )
        )
        weights.append(weight_nBK.flatten(0, 1))
        counts.append(count_E)
    return SlotPlan(tuple(classes), torch.cat(weights), torch.stack(counts))


def _sorted_by_expert(expert_P: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choices in the order of their experts, the place of each there, and `E` counts."""
    by_expert = expert_P.sort(stable=True)
    choice_P = by_expert.indices
    place_P = torch.arange(len(choice_P), device=expert_P.device)
    slot_P = torch.empty_like(choice_P).scatter_(0, choice_P, place_P)
    # Not bincount, whose shape depends on values and which adds atomically.
    expert_E = torch.arange(num_experts + 1, device=expert_P.device)
    return choice_P, slot_P, torch.searchsorted(by_expert.values, expert_E).diff()


def _assignment(
    expert_nBK: Tensor, slot_nBK: Tensor, weight_nBK: Tensor, count_E: Tensor, group: int
) -> Assignment:
    """The choices by group; of slots that are kept free for choices there are none, C is 0."""
    expert_GSK, slot_GSK, weight_GSK = (
        by_group(each, group) for each in (expert_nBK, slot_nBK, weight_nBK)
    )
    none_GEC = expert_GSK.new_empty(len(expert_GSK), len(count_E), 0)
    return Assignment(
        expert_GSK=expert_GSK,
        slot_GSK=slot_GSK,
        kept_GSK=torch.ones_like(expert_GSK, dtype=torch.bool),
        weight_GSK=weight_GSK,
        choice_GEC=none_GEC,
        filled_GEC=none_GEC.bool(),
    )


@dataclass(frozen=True, slots=True)
class ClassRows:
    """How many rows of one width class go where.

    Attributes:
        sent: Rows from here to every rank.
        come: Rows from every rank to here.
        of_experts: Rows of every expert that is held here, of all ranks.
        by_expert_P: Where each of the rows in the order of experts lies among those that came,
            which are in the order of ranks; None where that is the same order.
        by_rank_P: The way back.
    """

    sent: list[int]
    come: list[int]
    of_experts: list[int]
    by_expert_P: Tensor | None
    by_rank_P: Tensor | None


@dataclass(frozen=True, slots=True)
class RowExchange:
    """How a bank's rows come to their experts and go back, where they are as many as come.

    Attributes:
        ranks: Over which the experts are spread.
        where: Name of the layer, for errors.
        classes: Widest first.
    """

    ranks: Ranks
    where: str
    classes: tuple[ClassRows, ...]

    def to_experts(self, each_x_1Pd: Sequence[Tensor], what: str) -> list[Arriving]:
        """Start to send all classes, widest first; rows come in the order of experts."""
        return [
            self._send(x_1Pd.contiguous().flatten(0, 1), of, what)
            for of, x_1Pd in zip(self.classes, each_x_1Pd, strict=True)
        ]

    def to_tokens(self, index: int, y_Pd: Tensor, what: str) -> Arriving:
        """Start to send one class back."""
        of = self.classes[index]
        y_Pd = _in_order(y_Pd, of.by_rank_P)
        arrive = self.ranks.send_rows(y_Pd, of.come, of.sent, self._name(y_Pd, what))
        return lambda: arrive().unsqueeze(0)

    def parts(self, index: int, rows_Pd: Tensor) -> Sequence[Tensor]:
        """Those of one class that each expert has."""
        return torch.split(rows_Pd, self.classes[index].of_experts)

    def experts(self, stacked: MlpWeights) -> list[MlpWeights]:
        """The weights, or gradients, that go with `parts`: one by one on all devices."""
        return [MlpWeights(*each) for each in zip(*stacked, strict=True)]

    def _send(self, x_Pd: Tensor, of: ClassRows, what: str) -> Arriving:
        arrive = self.ranks.send_rows(x_Pd, of.sent, of.come, self._name(x_Pd, what))
        return lambda: _in_order(arrive(), of.by_expert_P)

    def _name(self, rows_Pd: Tensor, what: str) -> str:
        return f"{self.where}, width {rows_Pd.shape[1]}, {what}"


def exchange_rows(count_WE: Tensor, ranks: Ranks, where: str) -> RowExchange:
    """Tell every rank how many rows come to it, and wait for what the others tell.

    All classes go in one exchange.

    Args:
        count_WE: This rank's rows of every class and expert.
        ranks: Over which the experts are spread.
        where: Name of the layer, for errors.
    """
    num_ranks = ranks.expert_ranks
    sent_RWe = count_WE.view(len(count_WE), num_ranks, -1).transpose(0, 1).contiguous()
    one_each = [1] * num_ranks
    come_RWe = ranks.send_rows(sent_RWe, one_each, one_each, f"{where}, numbers of rows")()
    # The one place where the host waits: nothing else in a layer reads a number.
    on_host = torch.stack([sent_RWe, come_RWe]).transpose(1, 2).tolist()
    classes = [
        _class_rows(sent_Re, come_Re, come_RWe[:, index])
        for index, (sent_Re, come_Re) in enumerate(zip(*on_host, strict=True))
    ]
    return RowExchange(ranks, where, tuple(classes))


def _class_rows(sent: list[list[int]], come: list[list[int]], come_Re: Tensor) -> ClassRows:
    """One class's part, `come` both on the host and on the device."""
    come_of_ranks = [sum(of_rank) for of_rank in come]
    by_expert_P = by_rank_P = None
    if min(come_Re.shape) > 1:
        total = sum(come_of_ranks)
        by_expert_P, by_rank_P = _regrouped(come_Re, total), _regrouped(come_Re.t(), total)
    return ClassRows(
        sent=[sum(of_rank) for of_rank in sent],
        come=come_of_ranks,
        of_experts=[sum(of_expert) for of_expert in zip(*come, strict=True)],
        by_expert_P=by_expert_P,
        by_rank_P=by_rank_P,
    )


def _regrouped(count_XY: Tensor, total: int) -> Tensor:
    """Blocks of rows lie x by x and in there y by y: where to read them to have them y by y.

    Args:
        count_XY: Rows of every block.
        total: Rows of all, which the host must know.
    """
    first_YX = (count_XY.flatten().cumsum(0).view_as(count_XY) - count_XY).t()
    count_YX = count_XY.t().flatten()
    shift_YX = first_YX.flatten() - (count_YX.cumsum(0) - count_YX)
    place_P = torch.arange(total, device=count_XY.device)
    return place_P + shift_YX.repeat_interleave(count_YX, output_size=total)


def _in_order(rows_Pd: Tensor, place_P: Tensor | None) -> Tensor:
    return rows_Pd if place_P is None else rows_Pd.index_select(0, place_P)
