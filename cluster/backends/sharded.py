"""Dense weights split over all ranks, and gathered block by block while they compute.

Torch's FSDP2 does the work; it is told to add gradients up and divide by nothing. Between passes a
rank holds its part alone of a dense weight, its gradient and whatever an optimizer keeps of it:
a `DTensor` of all ranks. What cannot be split so goes the way of `gradients`: experts, which
different ranks add up, and scalars.
"""

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from cluster.backends.collectives import Collectives, Group, named_failure
from cluster.backends.gradients import Gradients

# Newer torch warns of the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_add_up = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ShardedModel:
    """A model on one device that holds its part of the dense weights; see `base.Placed`.

    Gradients of several backward passes are added up whole, and split by the last of them.

    Args:
        model: Already on its device; its dense parameters become parts of themselves.
        experts: Names of the parameters that only `replicas` hold.
        blocks: Parts of the model that compute one after another; what none of them has is
            gathered for as long as the model computes.
        everyone: All ranks, two or more.
        replicas: The ranks with the same experts as this one.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Collection[str],
        blocks: Iterable[nn.Module],
        collectives: Collectives,
        *,
        everyone: Group,
        replicas: Group,
    ) -> None:
        named = dict(model.named_parameters())
        whole = {name: p for name, p in named.items() if name in experts or p.ndim == 0}
        for name, parameter in named.items():
            if name not in whole:
                collectives.broadcast(parameter.detach(), everyone, "sharing the first weights")
        self._whole = Gradients(whole, experts, collectives, everyone=everyone, replicas=replicas)
        self._model, self._root = model, _split(model, blocks, set(whole.values()), everyone)
        self._parts = [p for p in model.parameters() if isinstance(p, DTensor)]
        # A write into a view that a block returns would lose gradients, and nobody writes.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass."""
        return self._model(*inputs)

    def zero_gradients(self) -> None:
        """Begin a step."""
        for part in self._parts:
            part.grad = None
        self._root.set_requires_gradient_sync(False)
        self._whole.zero()

    def last_backward(self) -> None:
        """Let the next backward pass add up over ranks what it finishes."""
        self._root.set_requires_gradient_sync(True)
        self._whole.last_backward()

    def finish_gradients(self) -> None:
        """Wait for all; what no backward pass reached is zero, as it is to the other placing."""
        self._whole.finish()
        for part in self._parts:
            if part.requires_grad and part.grad is None:
                part.grad = torch.zeros_like(part)


def _split(
    model: nn.Module, blocks: Iterable[nn.Module], whole: set[nn.Parameter], everyone: Group
) -> FSDPModule:
    """Leave to this rank its part of every parameter of a model that is not to stay whole."""
    assert everyone.handle is not None
    mesh = DeviceMesh.from_group(everyone.handle, next(model.parameters()).device.type)
    names = {module: name for name, module in model.named_modules()}
    for module in (*blocks, model):
        # The model itself lets go after its forward pass as well: an evaluation has no other.
        part = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # not every transport can do more
        name = names[module] or "the model"
        gather = _Gather(f"gathering the weights of {name}")
        add_up = _AddUp(f"adding up the gradients of {name}")
        part.set_custom_all_gather(gather)  # type: ignore[arg-type]
        part.set_custom_reduce_scatter(add_up)  # type: ignore[arg-type]
    return part


class _Exchange:
    """What torch asks of an exchange, with an error that says who was at what.

    Torch calls it without looking at its class, and keeps the classes to derive from private.

    Args:
        what: What is done, for errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for what is sent or received."""
        return torch.empty(size, dtype=dtype, device=device)


class _Gather(_Exchange):
    """The parts of all ranks, behind each other, on every rank."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        with named_failure(dist.get_rank(), self._what):
            work: dist.Work | None = _all_gather(output_tensor, input_tensor, group, async_op)
        return work


class _AddUp(_Exchange):
    """Of the sum over all ranks to every rank its part."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        with named_failure(dist.get_rank(), self._what):
            work: dist.Work | None = _add_up(output_tensor, input_tensor, op, group, async_op)
        return work
