"""The border between all of a tensor and one device's part of it, in torch-xla's SPMD mode.

Outside of a placed model a tensor is the whole of it, wherever its parts lie: batch, loss,
gradients, optimizer. Inside, code sees what one device sees (*manual sharding*), just as a rank on
gloo or NCCL does. What crosses says how it is cut, and from that the compiler makes the
collectives: all-to-all where slots change hands, all-reduce where gradients leave.

The partitioner left to itself would do worse: layers flatten tokens and images into rows, images
last, and rows cut along images are nothing that it can express, so it would gather them all.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from cluster.errors import LaunchError
from cluster.topology import Mesh

# How a tensor is cut: for each of its axes the axes of the mesh, () where it is whole.
Cut = tuple[tuple[str, ...], ...]

DATA, EXPERT = ("data",), ("expert",)
ALL = DATA + EXPERT


def along(tensor: Tensor, axis: int, axes: tuple[str, ...]) -> Cut:
    """Cut along one axis."""
    return tuple(axes if each == axis else () for each in range(tensor.ndim))


class Devices:
    """All devices as a table, and the ways over the border.

    Attributes:
        inside: Whether the code that runs now is a placed model's.
    """

    def __init__(self, table: Mesh) -> None:
        self.table = table
        self.inside = False
        self.mesh = xs.Mesh(list(range(table.world)), (table.data, table.expert), ALL)
        self._sizes = {"data": table.data, "expert": table.expert}

    def sharding(self, cut: Cut) -> xs.ShardingSpec:
        """For a tensor of which every process has its own part along the first axis."""
        return xs.ShardingSpec(self.mesh, _spec(cut), minibatch=True)

    def keep(self, parameter: Tensor, cut: Cut) -> None:
        """Let every device hold its part, from the upload on."""
        xs.mark_sharding(parameter, self.mesh, _spec(cut))

    def enter(self, whole: Tensor, cut: Cut) -> Tensor:
        """All of it -> the part of a device."""
        if self.table.world == 1:
            return whole.clone()
        # A clone, because the mark changes what it is given. And not `mark_sharding`, which
        # fetches what is on the devices already and uploads it again.
        marked = xs.annotate_custom_sharding(whole.clone(), self.mesh, _spec(cut))
        part: Tensor = torch_xla._XLAC._spmd_full_to_shard_shape(marked.global_tensor)
        return part

    def leave(self, part: Tensor, cut: Cut) -> Tensor:
        """The part of a device -> all of it."""
        if self.table.world == 1:
            return part.clone()
        shape = [
            size * prod(self._sizes[axis] for axis in axes)
            for size, axes in zip(part.shape, cut, strict=True)
        ]
        joined = xs.disable_manual_sharding(part.clone(), _spec(cut), shape, mesh=self.mesh)
        whole: Tensor = joined.global_tensor
        return whole


class PlacedOnXla:
    """A model written as one rank's part, computed by all devices at once; see `base.Placed`.

    What it takes and returns is of all images: tensors with images along the first axis, or means
    over images.
    """

    def __init__(self, core: nn.Module, devices: Devices, cuts: dict[str, Cut]) -> None:
        self._core, self._devices, self._cuts = core, devices, cuts

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass.

        Raises:
            LaunchError: The devices cannot share the images evenly.
        """
        world = self._devices.table.world
        for images in inputs:
            if images.shape[0] % world:
                raise LaunchError(
                    f"{images.shape[0]} images at once cannot be shared out over {world} devices; "
                    f"set train.batch_size to a multiple of {world} times train.microbatches"
                )
        shares = [self._enter(images, along(images, 0, ALL)) for images in inputs]
        parameters = {
            name: self._enter(parameter, self._cuts[name])
            for name, parameter in self._core.named_parameters()
        }
        self._devices.inside = True
        try:
            output = functional_call(self._core, parameters, tuple(shares))
        finally:
            self._devices.inside = False
        return _mapped(self._leave, output)

    def zero_gradients(self) -> None:
        """Begin a step."""
        for parameter in self._core.parameters():
            parameter.grad = None

    def last_backward(self) -> None:
        """Nothing to do: gradients cross the border as sums."""

    def finish_gradients(self) -> None:
        """Nothing to do either."""

    def _enter(self, whole: Tensor, cut: Cut) -> Tensor:
        part: Tensor = _Enter.apply(whole, self._devices, cut)  # type: ignore[no-untyped-call]
        return part

    def _leave(self, part: Tensor) -> Tensor:
        of_each = part if part.ndim else part.unsqueeze(0)
        whole: Tensor = _Leave.apply(of_each, self._devices)  # type: ignore[no-untyped-call]
        return whole if part.ndim else whole.mean()


class _Enter(Function):
    """Into one device's view; its gradient comes out summed over devices that had the same."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, devices: Devices, cut: Cut) -> Tensor:
        ctx.devices, ctx.cut = devices, cut
        return devices.enter(whole, cut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        used = {axis for axes in ctx.cut for axis in axes}
        alike = tuple(axis for axis in ALL if axis not in used)
        if not alike:
            return ctx.devices.leave(grad, ctx.cut), None, None
        return ctx.devices.leave(grad.unsqueeze(0), (alike, *ctx.cut)).sum(0), None, None


class _Leave(Function):
    """Out of it, one device's images behind another's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, devices: Devices) -> Tensor:
        ctx.devices = devices
        return devices.leave(part, along(part, 0, ALL))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.devices.enter(grad, along(grad, 0, ALL)), None


def _spec(cut: Cut) -> tuple[tuple[str, ...] | None, ...]:
    """As torch_xla writes it."""
    return tuple(axes or None for axes in cut)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same tuples of tuples (named ones too), every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if not isinstance(value, tuple):
        return value
    each = [_mapped(change, part) for part in value]
    return type(value)(*each) if hasattr(value, "_fields") else tuple(each)
