"""The MLPs of a layer of sparse experts: E of them, each on its own rows, wherever it is.

What is in the rows is `dispatch`'s business, the product of one MLP `nested`'s. Here is how the
rows of all experts and width classes are computed, and exchanged on the way. Rows are slots, of
every expert as many (`SlotExchange`), or what tokens chose (`dropless.RowExchange`).

Axes: E experts, Q slots of an expert, d features of one width class, D model width, F hidden width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mone_core.block import Gelu
from mone_core.dropless import exchange_rows
from mone_core.nested import KeptRows, MlpWeights, as_autocast, mlp_rows, mlp_rows_backward
from mone_core.ranks import ALONE, Arriving, Ranks


class ExpertBank(nn.Module):
    """E two-layer perceptrons, each nested in and out; where ranks share them, those of one rank.

    All start from the same weights, as V-MoE's do; routing alone tells them apart.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.up_weight_EFD = nn.Parameter(_equal(num_experts, hidden, dim))
        self.up_bias_EF = nn.Parameter(torch.zeros(num_experts, hidden))
        self.down_weight_EDF = nn.Parameter(_equal(num_experts, dim, hidden))
        self.down_bias_ED = nn.Parameter(torch.zeros(num_experts, dim))

    def keep(self, experts: range) -> None:
        """Let go of all experts but these."""
        for name, weight in list(self.named_parameters()):
            held = weight.detach()[experts.start : experts.stop].clone()
            setattr(self, name, nn.Parameter(held, requires_grad=weight.requires_grad))

    def forward(
        self,
        each_x_EQd: Sequence[Tensor],
        ranks: Ranks = ALONE,
        where: str = "",
        count_WE: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Every expert on its own rows, wherever it is: a tensor per width class, in and out.

        Args:
            each_x_EQd: This rank's slots of all experts, widest class first, contiguous. Where
                rows are counted, `[1, P, d]`: those of all experts, sorted by expert.
            ranks: Over which the experts are spread.
            where: Name of the layer, for the errors of an exchange.
            count_WE: Rows of every class and expert; None where each has Q slots.
        """
        weights = (self.up_weight_EFD, self.up_bias_EF, self.down_weight_EDF, self.down_bias_ED)
        inputs = as_autocast(*weights, *each_x_EQd)
        learning = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
        exchange: Exchange = (
            SlotExchange(ranks, where)
            if count_WE is None
            else exchange_rows(count_WE, ranks, where)
        )
        how = _How(self.approximate, learning, exchange)
        out: tuple[Tensor, ...] = _Bank.apply(how, *inputs)  # type: ignore[no-untyped-call]
        return out


class Exchange(Protocol):
    """How the rows of all width classes come to their experts and go back."""

    def to_experts(self, each_x: Sequence[Tensor], what: str) -> list[Arriving]:
        """Start to send all classes, widest first: while one is computed the next ones travel."""
        ...

    def to_tokens(self, index: int, y: Tensor, what: str) -> Arriving:
        """Start to send one class back."""
        ...

    def parts(self, index: int, rows: Tensor) -> Sequence[Tensor]:
        """What is computed one by one of the rows of a class that came."""
        ...

    def experts(self, stacked: MlpWeights) -> list[MlpWeights]:
        """The weights, or gradients, that go with `parts`."""
        ...


class SlotExchange(NamedTuple):
    """Every expert has as many slots as any other: all shapes are known beforehand."""

    ranks: Ranks
    where: str

    def to_experts(self, each_x: Sequence[Tensor], what: str) -> list[Arriving]:
        return [
            self.ranks.to_experts(x_EQd.contiguous(), self._name(x_EQd, what)) for x_EQd in each_x
        ]

    def to_tokens(self, index: int, y: Tensor, what: str) -> Arriving:  # noqa: ARG002 - all alike
        return self.ranks.to_tokens(y, self._name(y, what))

    def parts(self, index: int, rows: Tensor) -> Sequence[Tensor]:  # noqa: ARG002
        return _parts(rows)

    def experts(self, stacked: MlpWeights) -> list[MlpWeights]:
        return [MlpWeights(*each) for each in zip(*map(_parts, stacked), strict=True)]

    def _name(self, x_EQd: Tensor, what: str) -> str:
        return f"{self.where}, width {x_EQd.shape[2]}, {what}"


def _parts(stacked: Tensor) -> Sequence[Tensor]:
    """Experts one by one where their hidden layers then stay in cache, elsewhere all at once."""
    return stacked.unbind() if stacked.device.type == "cpu" else (stacked,)


class _How(NamedTuple):
    """What a bank's passes are told besides tensors."""

    approximate: str
    learning: bool
    exchange: Exchange


class _Bank(Function):
    """Class by class, so that classes travel while others are computed; the widest goes first.

    The exchange is in here, in both directions of both passes, because the gradients of weights
    are sums over classes: the widest writes them, the others add to their prefix.
    """

    @staticmethod
    def forward(ctx: Any, how: _How, *inputs: Tensor) -> tuple[Tensor, ...]:
        weights, each_x = MlpWeights(*inputs[:4]), inputs[4:]
        exchange = how.exchange
        arriving = exchange.to_experts(each_x, "inputs")
        returning: list[Arriving] = []
        kept: list[Tensor] = []
        for index, arrive in enumerate(arriving):
            all_x = arrive()
            all_y = torch.empty_like(all_x)
            kept.append(all_x)
            rows = (exchange.parts(index, each) for each in (all_x, all_y))
            experts = exchange.experts(weights.prefix(all_x.shape[-1]))
            for x, y, expert in zip(*rows, experts, strict=True):
                if x.numel():  # no product is made of no rows: oneDNN refuses
                    _, keep = mlp_rows(x, expert, how.approximate, learning=how.learning, out=y)
                    kept.extend(keep if how.learning else ())
            returning.append(exchange.to_tokens(index, all_y, "outputs"))
        if how.learning:
            ctx.save_for_backward(*weights, *kept)
        ctx.how = how
        return tuple(arrive() for arrive in returning)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_EQd: Tensor) -> tuple[Tensor | None, ...]:
        saved, how, exchange = ctx.saved_tensors, ctx.how, ctx.how.exchange
        weights, kept = MlpWeights(*saved[:4]), iter(saved[4:])
        grad_weights = weights.empty_gradients(grads_EQd[0].shape[2])
        arriving = exchange.to_experts(grads_EQd, "gradients of outputs")
        returning: list[Arriving] = []
        for index, arrive in enumerate(arriving):
            all_grad, all_x = arrive(), next(kept)
            all_grad_x = torch.empty_like(all_x)
            rows = (exchange.parts(index, each) for each in (all_grad, all_x, all_grad_x))
            prefixes = (each.prefix(all_x.shape[-1]) for each in (weights, grad_weights))
            experts = (exchange.experts(each) for each in prefixes)
            for grad, x, grad_x, expert, grad_expert in zip(*rows, *experts, strict=True):
                if x.numel():
                    mlp_rows_backward(
                        grad,
                        x,
                        KeptRows(next(kept), next(kept)),
                        expert,
                        how.approximate,
                        grad_weights=grad_expert,
                        accumulate=index > 0,
                        grad_x_rd=grad_x,
                    )
                elif index == 0:
                    _zero(grad_expert)
            returning.append(exchange.to_tokens(index, all_grad_x, "gradients of inputs"))
        return None, *grad_weights, *(arrive() for arrive in returning)


def _zero(gradients: MlpWeights) -> None:
    for each in gradients:
        each.zero_()


def _equal(num_experts: int, fan_out: int, fan_in: int) -> Tensor:
    """Xavier-uniform weights, the same for every expert."""
    one = nn.init.xavier_uniform_(torch.empty(fan_out, fan_in))
    return one.repeat(num_experts, 1, 1)
