"""XLA devices (TPU, and virtual ones on a processor) through torch-xla's SPMD mode.

One process a host drives all of its devices. Training sees whole batches, losses and gradients;
a model sees one device's part of them and takes the devices for its ranks, so that it needs no
word about XLA. How tensors get from one view to the other is in `xla_devices`.

The two files are the only ones that import torch_xla.
"""

from collections.abc import Callable, Collection, Sequence

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor, nn

from cluster.backends.xla_devices import ALL, DATA, EXPERT, Cut, Devices, PlacedOnXla, along
from cluster.errors import LaunchError
from cluster.topology import Mesh

# Slots `[E, W * Q, d]` of all W devices: with those whose tokens fill them, or with their experts.
_BY_TOKEN: Cut = ((), ALL, ())
_BY_EXPERT: Cut = (EXPERT, DATA, ())


class XlaBackend:
    """The XLA devices of this process, together with those of all others.

    A rank is a process: it feeds images, and all devices share those of all processes. Make one
    before the first tensor on a device and the first backward pass, on whatever device.

    Args:
        expert: Devices that the experts of a layer are spread over.

    Raises:
        LaunchError: The devices cannot be arranged so.
    """

    fused_updates = False  # the compiler fuses
    host_ranks = 1

    def __init__(self, expert: int) -> None:
        if not xr.is_spmd():
            xr.use_spmd()
        # Asking for devices also starts their client, which autograd must find at its first use.
        self.mesh = Mesh.of(xr.global_runtime_device_count(), expert)
        self.expert_ranks = expert
        self.rank, self.world = xr.process_index(), xr.process_count()
        self.device = torch_xla.device()
        self._devices = Devices(self.mesh)
        self._devices_here: int = xr.addressable_runtime_device_count()
        self._sent_bytes = 0
        self.take_part(0, 1)

    @property
    def sent_bytes(self) -> int:
        """Bytes given to exchanges by the devices of this process so far."""
        return self._sent_bytes * self._devices_here

    def place(
        self, model: nn.Module, experts: Collection[str], blocks: Collection[nn.Module] = ()
    ) -> PlacedOnXla:
        model = model.to(self.device)
        used: dict[str, Cut] = {}
        for name, parameter in model.named_parameters():
            used[name] = along(parameter, 0, EXPERT if name in experts else ())
            split = blocks and name not in experts and self._divides(parameter)
            # The compiler gathers what is split, where it is used.
            self._devices.keep(parameter, along(parameter, 0, ALL) if split else used[name])
        return PlacedOnXla(model, self._devices, used)

    def put(self, images: Tensor) -> Tensor:
        """This process's part of something with images along the first axis -> that of all."""
        sharding = self._devices.sharding(along(images, 0, ALL))
        whole: Tensor = xm.send_cpu_data_to_device(images, self.device, sharding)[0]
        return whole

    def seed(self, seed: int) -> None:
        """Begin a sequence of random numbers on the devices, the same for all processes."""
        torch_xla.manual_seed(seed)

    def submit(self) -> None:
        """Let the devices start on what was asked of them since the last time.

        Until then operations are only written down: what lies between two calls is one program.
        """
        torch_xla.sync()

    @property
    def parts(self) -> int:
        """Outside of a placed model a loss is of all devices' images; inside each has its own."""
        return self._of * (self.mesh.world if self._devices.inside else 1)

    def take_part(self, index: int, of: int) -> None:
        self._index, self._of = index, of

    def share(self, whole: Tensor, axis: int) -> Tensor:
        size = whole.shape[axis] // self._of
        part = whole.narrow(axis, self._index * size, size)
        return self._devices.enter(part, along(part, axis, ALL))

    def held(self, num_experts: int) -> range:
        """All: tensors of which each device has its part."""
        self.mesh.experts(0, num_experts)
        return range(num_experts)

    def to_experts(self, x_EQd: Tensor, where: str) -> Callable[[], Tensor]:  # noqa: ARG002
        return self._exchange(x_EQd, _BY_TOKEN, _BY_EXPERT)

    def to_tokens(self, y_EQd: Tensor, where: str) -> Callable[[], Tensor]:  # noqa: ARG002
        return self._exchange(y_EQd, _BY_EXPERT, _BY_TOKEN)

    def send_rows(
        self,
        rows: Tensor,  # noqa: ARG002
        sent: Sequence[int],  # noqa: ARG002
        come: Sequence[int],  # noqa: ARG002
        where: str,
    ) -> Callable[[], Tensor]:
        raise LaunchError(
            f"{where}: XLA programs have fixed shapes and cannot send any number of rows; set "
            f"model.experts.dropless to false"
        )

    def stacked(self, local: Tensor) -> Tensor:
        """It is the tensor of all experts already."""
        return local

    def sum_over_ranks(self, values: Tensor, what: str) -> Tensor:  # noqa: ARG002
        if self.world == 1:
            return values.clone()
        mine = values.cpu().unsqueeze(0)
        others = mine.new_zeros(self._devices_here - 1, *values.shape)
        return self.put(torch.cat([mine, others])).sum(0)

    def sum_over_images(self, values: Tensor, what: str) -> Tensor:  # noqa: ARG002
        """What a placed model returns is of all images already."""
        return values.clone()

    def sum_over_experts(self, values: Tensor, what: str) -> Tensor:  # noqa: ARG002
        """Whoever computed the values saw all experts."""
        return values.clone()

    def barrier(self, what: str) -> None:
        self.sum_over_ranks(torch.zeros(1), what).cpu()

    def synchronize(self) -> None:
        torch_xla.sync()
        xm.wait_device_ops()

    def _divides(self, parameter: Tensor) -> bool:
        """Whether all devices can have an equal part of it."""
        return parameter.ndim > 0 and parameter.shape[0] % self.mesh.world == 0

    def _exchange(self, part: Tensor, before: Cut, after: Cut) -> Callable[[], Tensor]:
        """The same tensor cut in another way; when it travels is for the compiler to decide."""
        if self.expert_ranks == 1:
            return lambda: part
        self._sent_bytes += part.nbytes
        arrived = self._devices.enter(self._devices.leave(part, before), after)
        return lambda: arrived
