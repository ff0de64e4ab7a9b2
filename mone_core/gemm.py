"""Matrix products on flat rows, and the GELU that follows them: what nested layers compute with.

Who calls which product for which rows is decided in `nested`. Here is only how one product is
done: by torch's own float32 BLAS or by oneDNN, which some processors run twice as fast. The
choice is one setting of the process and never depends on a timing inside a step: two runs with
the same setting add up in the same order, to the last bit.

Axes: R rows, K features in, M features out, F hidden features. All operands of a product may have
one more axis in front, of experts, which is one product for each.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from mone_core.errors import ConfigError

GemmName = Literal["torch", "onednn"]

# gelu(x) = x * sigmoid(x * (_LINEAR + _CUBIC * x**2)): the tanh form, since tanh(u) is
# sigmoid(2 * u) twice, less 1.
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR

# Elements of a GELU's operands that are worked on together: 1 MiB each in float32, in cache.
_IN_CACHE = 2**18

# oneDNN must be this much faster to be advised: less is within the noise of a short timing.
_WORTH_IT = 1.1

_chosen: GemmName = "torch"


def use_gemm(name: GemmName) -> None:
    """Choose for the whole process what computes float32 products on a processor.

    Args:
        name: "torch" (the default), or "onednn": taken wherever it can compute the product;
            other dtypes and devices stay with torch.

    Raises:
        ConfigError: No such choice, or this build of torch has no oneDNN.
    """
    global _chosen
    if name not in get_args(GemmName):
        raise ConfigError("use_gemm", [f"gemm must be one of {get_args(GemmName)}, got {name!r}"])
    if name == "onednn" and not has_onednn():
        raise ConfigError("use_gemm", ["this build of torch has no oneDNN; use gemm 'torch'"])
    _chosen = name


def chosen_gemm() -> GemmName:
    """What `use_gemm` chose last."""
    return _chosen


@contextmanager
def gemm(name: GemmName) -> Iterator[None]:
    """`use_gemm` for the length of a `with` block; backward passes belong inside."""
    before = _chosen
    use_gemm(name)
    try:
        yield
    finally:
        use_gemm(before)


def has_onednn() -> bool:
    """Whether this build of torch can multiply through oneDNN. Its entry is private to torch."""
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built_in and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fastest_gemm() -> GemmName:
    """Measure which choice trains faster on this processor, in well under a second.

    For a launcher, once, before training; write the answer down with the run, since a resumed
    run is the same to the last bit only under the same choice.
    """
    if not has_onednn():
        return "torch"
    x_RK, weight_MK = torch.ones(256, 768), torch.ones(1536, 768)  # and no random number is drawn
    grad_MK, grad_M = torch.empty_like(weight_MK), torch.empty(1536)

    def seconds(name: GemmName) -> float:
        with gemm(name):
            start = time.perf_counter()
            y_RM = linear(x_RK, weight_MK, None)
            linear_grad_input(y_RM, weight_MK)
            linear_grad_parameters(y_RM, x_RK, grad_MK, grad_M, accumulate=False)
            return time.perf_counter() - start

    rounds = [(seconds("torch"), seconds("onednn")) for _ in range(9)]
    torch_s, onednn_s = (min(times) for times in zip(*rounds, strict=True))
    return "onednn" if torch_s > _WORTH_IT * onednn_s else "torch"


def linear(
    x_RK: Tensor, weight_MK: Tensor, bias_M: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias`, into `out` where it is given. Operands may be strided views."""
    if _by_onednn(x_RK):
        return _onednn(x_RK, weight_MK, bias_M, out)
    return _by_torch(bias_M, x_RK, weight_MK.mT, out)


def linear_grad_input(grad_RM: Tensor, weight_MK: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gradient `RK` of a linear layer's input, into `out` where it is given."""
    if _by_onednn(grad_RM):
        return _onednn(grad_RM, weight_MK.t(), None, out)
    return _by_torch(None, grad_RM, weight_MK, out)


def linear_grad_parameters(
    grad_RM: Tensor, x_RK: Tensor, weight_MK: Tensor, bias_M: Tensor, *, accumulate: bool
) -> None:
    """Write the gradients of a linear layer's weight and bias, or add them to what is there."""
    if accumulate:
        bias_M.add_(grad_RM.sum(-2))
    else:
        torch.sum(grad_RM, dim=-2, out=bias_M)
    if not _by_onednn(grad_RM):
        _by_torch(weight_MK if accumulate else None, grad_RM.mT, x_RK, weight_MK)
    elif accumulate:
        weight_MK.add_(_onednn(grad_RM.t(), x_RK.t(), None, None))
    else:
        _onednn(grad_RM.t(), x_RK.t(), None, weight_MK)


def gelu(h_RF: Tensor, approximate: str, *, out: Tensor) -> None:
    """Write gelu(h) to `out`, which may be `h` itself; else leave in `h` what `gelu_grad` needs.

    Torch's tanh form takes most of its time for the tanh itself. The same as a sigmoid, in
    operations that stay in the cache, takes half; where torch fuses it all into one kernel
    (accelerators) or would round in between (16 bits), torch's own is taken.
    """
    if not _gelu_in_parts(h_RF, approximate):
        torch.ops.aten.gelu.out(h_RF, approximate=approximate, out=out)
        return
    rows = max(1, _IN_CACHE // h_RF.shape[-1])
    linear_term = torch.tensor(_LINEAR, dtype=h_RF.dtype, device=h_RF.device)
    for h_rF, out_rF in zip(torch.split(h_RF, rows), torch.split(out, rows), strict=True):
        s_rF = torch.addcmul(linear_term, h_rF, h_rF, value=_CUBIC).mul_(h_rF).sigmoid_()
        torch.mul(h_rF, s_rF, out=out_rF)
        if out is not h_RF:
            # The slope, s + gelu * (1 - s) * d(argument of the sigmoid)/dh, in the place of h.
            inner_rF = torch.addcmul(linear_term, h_rF, h_rF, value=3 * _CUBIC)
            torch.addcmul(out_rF, out_rF, s_rF, value=-1, out=h_rF)
            torch.addcmul(s_rF, h_rF, inner_rF, out=h_rF)


def gelu_grad(grad_RF: Tensor, kept_RF: Tensor, approximate: str, *, out: Tensor) -> None:
    """Write `grad` times the slope of gelu to `out`; `kept` is what `gelu` left in its input."""
    if _gelu_in_parts(grad_RF, approximate):
        torch.mul(grad_RF, kept_RF, out=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            grad_RF, kept_RF, approximate=approximate, grad_input=out
        )


def _by_onednn(x: Tensor) -> bool:
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 2
    return _chosen == "onednn" and fits


def _by_torch(added: Tensor | None, left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    if out is not None and torch.compiler.is_compiling():
        # The compiler traces no product into a strided view; it plans such copies itself.
        return out.copy_(_by_torch(added, left, right, None))
    stacked = left.ndim == 3
    if added is None:
        return (torch.bmm if stacked else torch.mm)(left, right, out=out)
    if not stacked:
        return torch.addmm(added, left, right, out=out)
    if added.ndim == 2:  # a bias of each
        added = added.unsqueeze(1)
    return torch.baddbmm(added, left, right, out=out)


def _onednn(x_RK: Tensor, weight_MK: Tensor, bias_M: Tensor | None, out: Tensor | None) -> Tensor:
    # A strided weight is a thousand times slower there than its copy; a strided x is harmless.
    made: Tensor = torch.ops.mkldnn._linear_pointwise(
        x_RK, weight_MK.contiguous(), bias_M, "none", [], ""
    )
    return made if out is None else out.copy_(made)


def _gelu_in_parts(h_RF: Tensor, approximate: str) -> bool:
    at_least_float32 = h_RF.dtype in (torch.float32, torch.float64)
    return approximate == "tanh" and h_RF.device.type == "cpu" and at_least_float32
