"""Linear layers that use a prefix of their width, a different one for each token.

Tokens come sorted by width, widest first, in the layout `[N, B, D]`, so that every width
class is one contiguous block of rows and every operand of a nested layer is a view: a block of
tokens times a prefix of the weights. Nothing is masked, padded or gathered. Which token has
which width is decided elsewhere (`routing`), and how the layers make a block in `block`.

Two layers make the whole: `nested_in` reads the first d features of a token and writes
all outputs; `nested_out` reads all inputs, writes the first d features and adds them to the
residual stream, whose other features stay as they were. `nested_mlp` is one after the other
with GELU between. How a single product is computed is in `gemm`.

Axes: N tokens sorted by width, B images, D model width, F hidden width, R = N * B rows.

Every product, of either pass, runs per width class. The gradient of a weight is a sum over
classes of different prefixes: the widest class writes, the others add to their prefix, always in
this order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mone_core.errors import CapacityError
from mone_core.gemm import gelu, gelu_grad, linear, linear_grad_input, linear_grad_parameters


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of every image are computed at the first `dim` features."""

    start: int
    stop: int
    dim: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the width classes lie along N, the widest first; classes without tokens are left out.

    Attributes:
        dim: Full width D, whether a token has it or not.
    """

    dim: int
    segments: tuple[Segment, ...]

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
        segments = []
        start = 0
        for count, dim in zip(reversed(counts), reversed(dims), strict=True):
            if count:
                segments.append(Segment(start, start + count, dim))
                start += count
        return cls(dim=dims[-1], segments=tuple(segments))

    @property
    def reach(self) -> int:
        """Width of the widest class present: past it no token reads or writes a feature."""
        return self.segments[0].dim


def nested_in(x_NBD: Tensor, weight_FD: Tensor, bias_F: Tensor, layout: Layout) -> Tensor:
    """Each token's first d features -> all F outputs: `x[:d] @ weight[:, :d].T + bias`.

    Returns:
        `NBF`, contiguous.

    Source: arXiv 2407.19985, eq. 5 to 7 (in-projections of attention and MLP).
    """
    operands = as_autocast(x_NBD, weight_FD, bias_F)
    out: Tensor = _NestedIn.apply(*operands, layout)  # type: ignore[no-untyped-call]
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
        `NBD`, contiguous, a new tensor, of the residual's dtype.

    Source: arXiv 2407.19985, eq. 1 (gate) and 5 to 7 (out-projections).
    """
    operands = as_autocast(h_NBF, weight_DF, bias_D)
    out: Tensor = _NestedOut.apply(  # type: ignore[no-untyped-call]
        residual_NBD, gate_NB1, *operands, layout
    )
    return out


def nested_mlp(
    residual_NBD: Tensor,
    x_NBD: Tensor,
    up_FD: Tensor,
    up_bias_F: Tensor,
    down_DF: Tensor,
    down_bias_D: Tensor,
    layout: Layout,
    gate_NB1: Tensor | None = None,
    *,
    approximate: str = "tanh",
) -> Tensor:
    """`nested_out` of the GELU of `nested_in`, one width class at a time.

    A class's hidden layer is still in the cache when its GELU and its way out come. Without
    gradients no more than one class of it exists at any time.

    Args:
        approximate: Of GELU, as in torch: "tanh", or "none" for the erf form.

    Returns:
        `NBD`, contiguous, a new tensor, of the residual's dtype.
    """
    operands = as_autocast(x_NBD, up_FD, up_bias_F, down_DF, down_bias_D)
    inputs = (residual_NBD, gate_NB1, *operands)
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out: Tensor = _NestedMlp.apply(  # type: ignore[no-untyped-call]
        *inputs, layout, approximate, learning
    )
    return out


class MlpWeights(NamedTuple):
    """Weights of a two-layer perceptron, or of a stack of them, or their gradients."""

    up_FD: Tensor
    up_bias_F: Tensor
    down_DF: Tensor
    down_bias_D: Tensor

    def prefix(self, dim: int) -> "MlpWeights":
        """Views of what tokens of the first `dim` features use."""
        return MlpWeights(
            self.up_FD[..., :dim],
            self.up_bias_F,
            self.down_DF[..., :dim, :],
            self.down_bias_D[..., :dim],
        )

    def empty_gradients(self, reach: int) -> "MlpWeights":
        """Room for gradients: the widest class writes all up to `reach`; zero from there on."""
        up_FD, down_DF = _zero_past(self.up_FD, reach, -1), _zero_past(self.down_DF, reach, -2)
        down_bias_D = _zero_past(self.down_bias_D, reach, -1)
        return MlpWeights(up_FD, torch.empty_like(self.up_bias_F), down_DF, down_bias_D)


class KeptRows(NamedTuple):
    """What the backward pass of a perceptron needs of one block of rows."""

    slope_rF: Tensor  # of GELU, or whatever else `gelu_grad` takes
    act_rF: Tensor


def mlp_rows(
    x_rd: Tensor,
    weights: MlpWeights,
    approximate: str,
    *,
    learning: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, KeptRows]:
    """A perceptron on one block of rows of one width; what is kept is void unless learning.

    A stack of blocks goes through a stack of perceptrons, one each.
    """
    h_rF = linear(x_rd, weights.up_FD, weights.up_bias_F)
    act_rF = torch.empty_like(h_rF) if learning else h_rF
    gelu(h_rF, approximate, out=act_rF)
    y_rd = linear(act_rF, weights.down_DF, weights.down_bias_D, out=out)
    return y_rd, KeptRows(h_rF, act_rF)


def mlp_rows_backward(
    grad_rd: Tensor,
    x_rd: Tensor,
    kept: KeptRows,
    weights: MlpWeights,
    approximate: str,
    *,
    grad_weights: MlpWeights,
    accumulate: bool,
    grad_x_rd: Tensor,
) -> None:
    """Write the gradient of `x`, and write or add the gradients of the weights."""
    w, g = weights, grad_weights
    linear_grad_parameters(grad_rd, kept.act_rF, g.down_DF, g.down_bias_D, accumulate=accumulate)
    grad_rF = linear_grad_input(grad_rd, w.down_DF)
    gelu_grad(grad_rF, kept.slope_rF, approximate, out=grad_rF)
    linear_grad_parameters(grad_rF, x_rd, g.up_FD, g.up_bias_F, accumulate=accumulate)
    linear_grad_input(grad_rF, w.up_FD, out=grad_x_rd)


class _NestedIn(Function):
    @staticmethod
    def forward(
        ctx: Any, x_NBD: Tensor, weight_FD: Tensor, bias_F: Tensor, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(x_NBD, weight_FD)
        ctx.layout = layout
        num_tokens, batch, _ = x_NBD.shape
        x_RD = _rows(x_NBD)
        out_RF = x_RD.new_empty(x_RD.shape[0], weight_FD.shape[0])
        for rows, dim in row_blocks(layout, batch):
            linear(x_RD[rows, :dim], weight_FD[:, :dim], bias_F, out=out_RF[rows])
        return out_RF.view(num_tokens, batch, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBF: Tensor) -> tuple[Tensor | None, ...]:
        x_NBD, weight_FD = ctx.saved_tensors
        x_RD, grad_RF = _rows(x_NBD), _rows(grad_NBF)
        grad_x_RD = torch.empty_like(x_RD)
        grad_FD = _zero_past(weight_FD, ctx.layout.reach, 1)
        grad_F = grad_RF.new_empty(grad_RF.shape[1])
        for rows, dim in row_blocks(ctx.layout, x_NBD.shape[1]):
            grad_rF, x_rd = grad_RF[rows], x_RD[rows, :dim]
            linear_grad_parameters(
                grad_rF, x_rd, grad_FD[:, :dim], grad_F, accumulate=rows.start > 0
            )
            linear_grad_input(grad_rF, weight_FD[:, :dim], out=grad_x_RD[rows, :dim])
            grad_x_RD[rows, dim:].zero_()
        return grad_x_RD.view(x_NBD.shape), grad_FD, grad_F, None


class _NestedOut(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_NBD: Tensor,
        gate_NB1: Tensor | None,
        h_NBF: Tensor,
        weight_DF: Tensor,
        bias_D: Tensor,
        layout: Layout,
    ) -> Tensor:
        h_RF = _rows(h_NBF)
        stream = _Stream(residual_NBD, gate_NB1)
        for rows, dim in row_blocks(layout, h_NBF.shape[1]):
            stream.add(rows, linear(h_RF[rows], weight_DF[:dim], bias_D[:dim]))
        ctx.save_for_backward(gate_NB1, h_NBF, weight_DF, *stream.branches)
        ctx.layout = layout
        return stream.out_RD.view(residual_NBD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBD: Tensor) -> tuple[Tensor | None, ...]:
        gate_NB1, h_NBF, weight_DF, *branches = ctx.saved_tensors
        h_RF = _rows(h_NBF)
        stream = _StreamGradient(grad_NBD, gate_NB1, branches)
        grad_h_RF = torch.empty_like(h_RF)
        grad_DF = _zero_past(weight_DF, ctx.layout.reach, 0)
        grad_D = _zero_past(weight_DF[:, 0], ctx.layout.reach, 0)
        for rows, dim in row_blocks(ctx.layout, h_NBF.shape[1]):
            grad_rd = stream.of_branch(rows, dim, h_RF.dtype)
            linear_grad_parameters(
                grad_rd, h_RF[rows], grad_DF[:dim], grad_D[:dim], accumulate=rows.start > 0
            )
            linear_grad_input(grad_rd, weight_DF[:dim], out=grad_h_RF[rows])
        return grad_NBD, stream.of_gate(), grad_h_RF.view(h_NBF.shape), grad_DF, grad_D, None


class _NestedMlp(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_NBD: Tensor,
        gate_NB1: Tensor | None,
        x_NBD: Tensor,
        up_FD: Tensor,
        up_bias_F: Tensor,
        down_DF: Tensor,
        down_bias_D: Tensor,
        layout: Layout,
        approximate: str,
        learning: bool,
    ) -> Tensor:
        weights = MlpWeights(up_FD, up_bias_F, down_DF, down_bias_D)
        x_RD = _rows(x_NBD)
        stream = _Stream(residual_NBD, gate_NB1)
        kept: list[Tensor] = []
        for rows, dim in row_blocks(layout, x_NBD.shape[1]):
            of_dim = weights.prefix(dim)
            branch_rd, keep = mlp_rows(x_RD[rows, :dim], of_dim, approximate, learning=learning)
            stream.add(rows, branch_rd)
            kept.extend(keep if learning else ())
        if learning:
            ctx.save_for_backward(gate_NB1, x_NBD, *weights, *kept, *stream.branches)
        ctx.layout, ctx.approximate = layout, approximate
        return stream.out_RD.view(residual_NBD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NBD: Tensor) -> tuple[Tensor | None, ...]:
        gate_NB1, x_NBD, *saved = ctx.saved_tensors
        weights, kept = MlpWeights(*saved[:4]), saved[4 : 4 + 2 * len(ctx.layout.segments)]
        stream = _StreamGradient(grad_NBD, gate_NB1, saved[4 + len(kept) :])
        x_RD = _rows(x_NBD)
        grad_x_RD = torch.empty_like(x_RD)
        grad_weights = weights.empty_gradients(ctx.layout.reach)
        for index, (rows, dim) in enumerate(row_blocks(ctx.layout, x_NBD.shape[1])):
            mlp_rows_backward(
                stream.of_branch(rows, dim, x_RD.dtype),
                x_RD[rows, :dim],
                KeptRows(*kept[2 * index : 2 * index + 2]),
                weights.prefix(dim),
                ctx.approximate,
                grad_weights=grad_weights.prefix(dim),
                accumulate=index > 0,
                grad_x_rd=grad_x_RD[rows, :dim],
            )
            grad_x_RD[rows, dim:].zero_()
        grad_x_NBD = grad_x_RD.view(x_NBD.shape)
        return grad_NBD, stream.of_gate(), grad_x_NBD, *grad_weights, None, None, None


class _Stream:
    """The residual stream, to which width classes add their branches, each through its gate."""

    def __init__(self, residual_NBD: Tensor, gate_NB1: Tensor | None) -> None:
        self.residual_RD = _rows(residual_NBD)
        self.gate_R1 = None if gate_NB1 is None else _rows(gate_NB1)
        self.out_RD = torch.empty_like(self.residual_RD)
        self.branches: list[Tensor] = []  # as they were before the gate: its gradient needs them

    def add(self, rows: slice, branch_rd: Tensor) -> None:
        """Add one class's branch; features past its width are the residual's own."""
        dim = branch_rd.shape[1]
        residual_rd, out_rD = self.residual_RD[rows, :dim], self.out_RD[rows]
        # Straight into place; the compiler traces no strided `out`, and plans the copy itself.
        out_rd = None if torch.compiler.is_compiling() else out_rD[:, :dim]
        if self.gate_R1 is None:
            sum_rd = torch.add(residual_rd, branch_rd, out=out_rd)
        else:
            sum_rd = torch.addcmul(residual_rd, branch_rd, self.gate_R1[rows], out=out_rd)
            self.branches.append(branch_rd)
        if out_rd is None:
            out_rD[:, :dim].copy_(sum_rd)
        out_rD[:, dim:].copy_(self.residual_RD[rows, dim:])


class _StreamGradient:
    """The gradient of `_Stream`, taken apart class by class, widest first."""

    def __init__(
        self, grad_NBD: Tensor, gate_NB1: Tensor | None, branches: Sequence[Tensor]
    ) -> None:
        self.grad_RD = _rows(grad_NBD)
        self.gate = gate_NB1
        self.branches = iter(branches)
        self.grads_of_gate: list[Tensor] = []

    def of_branch(self, rows: slice, dim: int, dtype: torch.dtype) -> Tensor:
        """Gradient of the branch of the next class."""
        grad_rd = self.grad_RD[rows, :dim]
        if self.gate is not None:
            self.grads_of_gate.append((grad_rd * next(self.branches)).sum(1))
            grad_rd = grad_rd * _rows(self.gate)[rows]
        return grad_rd.to(dtype)

    def of_gate(self) -> Tensor | None:
        """Gradient of the gate, once all classes are through."""
        if self.gate is None:
            return None
        return torch.cat(self.grads_of_gate).view(self.gate.shape).to(self.gate.dtype)


def _rows(t_NBX: Tensor) -> Tensor:
    """`NBX` as a matrix of N * B rows, without a copy where memory allows."""
    return t_NBX.reshape(-1, t_NBX.shape[-1])


def row_blocks(layout: Layout, batch: int = 1) -> list[tuple[slice, int]]:
    """Rows of each width class in the flattened [N * B, ...] matrix, and its width."""
    return [(slice(s.start * batch, s.stop * batch), s.dim) for s in layout.segments]


def _zero_past(weight: Tensor, reach: int, dim: int) -> Tensor:
    """Room for a weight's gradient, zero past the widest class present."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad.narrow(dim, reach, weight.shape[dim] - reach).zero_()
    return grad


def as_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands of a product in the dtype that autocast asks for, where it is on.

    Autocast casts the operands of torch's own layers and does not know these. What it leaves
    alone is left alone here: the residual stream, and float64.
    """
    device = operands[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in operands)
