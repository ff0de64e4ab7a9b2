"""Linear layers that use a prefix of their width, a different one for each token.

Tokens come sorted by width, widest first, in the layout `[N, B, D]`, so that every width
class is one contiguous block of rows and every operand of a nested layer is a view: a block of
tokens times a prefix of the weights. Nothing is masked, padded or gathered. Which token has
which width is decided elsewhere (`routing`), and how the layers make a block in `block`.

Two layers make the whole: `nested_in` reads the first d features of a token and writes
all outputs; `nested_out` reads all inputs, writes the first d features and adds them to the
residual stream, whose other features stay as they were.

Axes: N tokens sorted by width, B images, D model width, F hidden width, R = N * B rows.

How the gradients are cut: a product that contracts over the nested dimension runs per
width class, one that produces it runs per *band* of features, where band [low, high) belongs to
the tokens at least `high` wide. Either way each element of a result is written once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mone_core.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of every image are computed at the first `dim` features."""

    start: int
    stop: int
    dim: int


@dataclass(frozen=True, slots=True)
class Band:
    """Features [low, high) are computed for the first `tokens` tokens of every image."""

    low: int
    high: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the width classes lie along N, and the feature bands along D.

    Classes without tokens are left out. Features past the widest class present have no band:
    no token reads or writes them.
    """

    dim: int
    segments: tuple[Segment, ...]
    bands: tuple[Band, ...]

    @classmethod
    def of(cls, counts: Sequence[int], dims: Sequence[int]) -> "Layout":
        """Lay out classes of `counts` tokens at `dims` features, both narrowest first.

        Raises:
            CapacityError: Counts and dims do not pair up, or dims do not rise.
        """
        paired = len(counts) == len(dims) and list(dims) == sorted(set(dims))
        if not paired or not any(counts) or min(counts) < 0:
            raise CapacityError(
                f"need one count (0 or more, one above 0) per nested dim and rising dims, got "
                f"counts {tuple(counts)} for dims {tuple(dims)}"
            )
        segments, bands = [], []
        start = 0
        for count, dim in zip(reversed(counts), reversed(dims), strict=True):
            if count:
                segments.append(Segment(start, start + count, dim))
                start += count
        low = 0
        for segment in reversed(segments):
            bands.append(Band(low, segment.dim, segment.stop))
            low = segment.dim
        return cls(dim=dims[-1], segments=tuple(segments), bands=tuple(bands))


def nested_in(x_NBD: Tensor, weight_FD: Tensor, bias_F: Tensor, layout: Layout) -> Tensor:
    """Each token's first d features -> all F outputs: `x[:d] @ weight[:, :d].T + bias`.

    Returns:
        `NBF`, contiguous.

    Source: arXiv 2407.19985, eq. 5 to 7 (in-projections of attention and MLP).
    """
    out: Tensor = _NestedIn.apply(x_NBD, weight_FD, bias_F, layout)  # type: ignore[no-untyped-call]
    return out


def nested_out(
    residual_NBD: Tensor,
    h_NBF: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor,
    layout: Layout,
    gate_NB1: Tensor | None = None,
) -> Tensor:
    """All F inputs -> each token's first d features, gated and added to the residual stream.

    Computes `residual[:d] + gate * (h @ weight[:d].T + bias[:d])`; features past d are the
    residual's own.

    Args:
        gate_NB1: One factor per token; None is 1.

    Returns:
        `NBD`, contiguous, a new tensor.

    Source: arXiv 2407.19985, eq. 1 (gate) and 5 to 7 (out-projections).
    """
    out: Tensor = _NestedOut.apply(  # type: ignore[no-untyped-call]
        residual_NBD, h_NBF, weight_DF, bias_D, gate_NB1, layout
    )
    return out


class _NestedIn(Function):
    @staticmethod
    def forward(
        ctx: Any, x_NBD: Tensor, weight_FD: Tensor, bias_F: Tensor, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(x_NBD, weight_FD)
        ctx.layout = layout
        num_tokens, batch, _ = x_NBD.shape
        x_RD = x_NBD.reshape(num_tokens * batch, -1)
        out_RF = x_RD.new_empty(x_RD.shape[0], weight_FD.shape[0])
        for rows, dim in _row_blocks(layout, batch):
            torch.addmm(bias_F, x_RD[rows, :dim], weight_FD[:, :dim].t(), out=out_RF[rows])
        return out_RF.view(num_tokens, batch, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBF: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_NBD, weight_FD = ctx.saved_tensors
        num_tokens, batch, width = x_NBD.shape
        x_RD = x_NBD.reshape(num_tokens * batch, width)
        grad_RF = grad_NBF.reshape(num_tokens * batch, -1)
        grad_x_RD = torch.empty_like(x_RD)
        for rows, dim in _row_blocks(ctx.layout, batch):
            torch.mm(grad_RF[rows], weight_FD[:, :dim], out=grad_x_RD[rows, :dim])
            grad_x_RD[rows, dim:].zero_()
        grad_weight_FD = _empty_past_bands(weight_FD, ctx.layout, dim=1)
        for band in ctx.layout.bands:
            rows, columns = slice(band.tokens * batch), slice(band.low, band.high)
            torch.mm(grad_RF[rows].t(), x_RD[rows, columns], out=grad_weight_FD[:, columns])
        return grad_x_RD.view_as(x_NBD), grad_weight_FD, grad_RF.sum(0), None


class _NestedOut(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_NBD: Tensor,
        h_NBF: Tensor,
        weight_DF: Tensor,
        bias_D: Tensor,
        gate_NB1: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        num_tokens, batch, width = residual_NBD.shape
        h_RF = h_NBF.reshape(num_tokens * batch, -1)
        gate_R1 = None if gate_NB1 is None else gate_NB1.reshape(-1, 1)
        out_RD = residual_NBD.reshape(-1, width).clone()
        branches = []  # each class's branch before the gate: the gate's gradient needs it
        for rows, dim in _row_blocks(layout, batch):
            branch = torch.addmm(bias_D[:dim], h_RF[rows], weight_DF[:dim].t())
            if gate_R1 is None:
                out_RD[rows, :dim].add_(branch)
            else:
                out_RD[rows, :dim].addcmul_(branch, gate_R1[rows])
                branches.append(branch)
        ctx.save_for_backward(h_NBF, weight_DF, gate_NB1, *branches)
        ctx.layout = layout
        return out_RD.view(num_tokens, batch, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBD: Tensor) -> tuple[Tensor | None, ...]:
        h_NBF, weight_DF, gate_NB1, *branches = ctx.saved_tensors
        num_tokens, batch, width = grad_NBD.shape
        h_RF = h_NBF.reshape(num_tokens * batch, -1)
        grad_RD = grad_NBD.reshape(-1, width)
        grad_gate = None
        if gate_NB1 is not None:
            grad_gate = _gate_gradient(grad_RD, branches, ctx.layout, batch).view_as(gate_NB1)
            grad_RD = grad_RD * gate_NB1.reshape(-1, 1)
        grad_h_RF = torch.empty_like(h_RF)
        for rows, dim in _row_blocks(ctx.layout, batch):
            torch.mm(grad_RD[rows, :dim], weight_DF[:dim], out=grad_h_RF[rows])
        grad_weight_DF = _empty_past_bands(weight_DF, ctx.layout, dim=0)
        grad_bias_D = _empty_past_bands(weight_DF[:, 0], ctx.layout, dim=0)
        for band in ctx.layout.bands:
            rows, columns = slice(band.tokens * batch), slice(band.low, band.high)
            torch.mm(grad_RD[rows, columns].t(), h_RF[rows], out=grad_weight_DF[columns])
            torch.sum(grad_RD[rows, columns], dim=0, out=grad_bias_D[columns])
        return grad_NBD, grad_h_RF.view_as(h_NBF), grad_weight_DF, grad_bias_D, grad_gate, None


def _row_blocks(layout: Layout, batch: int) -> list[tuple[slice, int]]:
    """Rows of each width class in the flattened [N * B, ...] matrix, and its width."""
    return [(slice(s.start * batch, s.stop * batch), s.dim) for s in layout.segments]


def _empty_past_bands(weight: Tensor, layout: Layout, *, dim: int) -> Tensor:
    """Room for a weight's gradient: bands write the rest, zero past the widest class present."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    unused = layout.dim - layout.bands[-1].high
    grad.narrow(dim, layout.dim - unused, unused).zero_()
    return grad


def _gate_gradient(
    grad_RD: Tensor, branches: Sequence[Tensor], layout: Layout, batch: int
) -> Tensor:
    """Gradient of each token's gate: its branch times the gradient of its output."""
    grad_gate_R = grad_RD.new_empty(grad_RD.shape[0])
    for (rows, dim), branch in zip(_row_blocks(layout, batch), branches, strict=True):
        torch.sum(grad_RD[rows, :dim] * branch, dim=1, out=grad_gate_R[rows])
    return grad_gate_R
