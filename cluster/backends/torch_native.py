"""CPU (gloo) and CUDA (NCCL) through torch's own device and process groups."""

import os
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cluster.backends.collectives import Collectives, Group, named_failure
from cluster.backends.gradients import PlacedModel
from cluster.backends.sharded import ShardedModel
from cluster.topology import Mesh

PATIENCE_S = 1800.0  # that ranks wait at a barrier for one that writes or checks large files


class _TorchBackend:
    """The common part: one process group if one was started, none otherwise."""

    device: torch.device
    fused_updates = True

    def __init__(self, expert: int, timeout_s: float) -> None:
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        # Ray Train sets the variable, as torchrun does; without either a process counts alone.
        self.host_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if distributed else 1
        self.mesh = Mesh.of(self.world, expert)
        self.expert_ranks = expert
        self.parts, self._part = self.world, self.rank
        self._collectives = Collectives(self.rank)
        self._everyone = Group(tuple(range(self.world)), dist.group.WORLD if distributed else None)
        rows = [self.mesh.row(rank) for rank in range(0, self.world, expert)]
        self._row = self._group(rows, timeout_s)
        self._column = self._group([self.mesh.column(rank) for rank in range(expert)], timeout_s)
        self._patient = self._group([self._everyone.ranks], PATIENCE_S, "gloo")

    @property
    def sent_bytes(self) -> int:
        """Bytes handed to all-to-alls so far."""
        return self._collectives.sent_bytes

    def place(
        self, model: nn.Module, experts: Collection[str], blocks: Collection[nn.Module] = ()
    ) -> PlacedModel | ShardedModel:
        model = model.to(self.device)
        groups = {"everyone": self._everyone, "replicas": self._column}
        if blocks and not self._everyone.alone:
            return ShardedModel(model, experts, blocks, self._collectives, **groups)
        return PlacedModel(model, experts, self._collectives, **groups)

    def put(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def submit(self) -> None:
        """Operations start when they are called."""

    def take_part(self, index: int, of: int) -> None:
        self.parts, self._part = self.world * of, self.rank * of + index

    def share(self, whole: Tensor, axis: int) -> Tensor:
        size = whole.shape[axis] // self.parts
        return whole.narrow(axis, self._part * size, size)

    def held(self, num_experts: int) -> range:
        return self.mesh.experts(self.rank, num_experts)

    def to_experts(self, x_EQd: Tensor, where: str) -> Callable[[], Tensor]:
        if self._row.alone:
            return lambda: x_EQd
        num_experts, num_slots, dim = x_EQd.shape
        x_ReQd = x_EQd.view(self.expert_ranks, -1, num_slots, dim)
        arrive = self._collectives.start_all_to_all(x_ReQd, self._row, f"all-to-all of {where}")
        # To every expert the slots of all ranks: a copy only where a rank has several experts.
        return lambda: arrive().transpose(0, 1).reshape(num_experts // self.expert_ranks, -1, dim)

    def to_tokens(self, y_EQd: Tensor, where: str) -> Callable[[], Tensor]:
        if self._row.alone:
            return lambda: y_EQd
        held, num_slots, dim = y_EQd.shape
        y_eRQd = y_EQd.view(held, self.expert_ranks, -1, dim)
        y_ReQd = y_eRQd.transpose(0, 1).contiguous()
        arrive = self._collectives.start_all_to_all(y_ReQd, self._row, f"all-to-all of {where}")
        return lambda: arrive().view(-1, num_slots // self.expert_ranks, dim)

    def send_rows(
        self, rows: Tensor, sent: Sequence[int], come: Sequence[int], where: str
    ) -> Callable[[], Tensor]:
        if self._row.alone:
            return lambda: rows
        return self._collectives.start_all_to_all(
            rows, self._row, f"all-to-all of {where}", sizes=(sent, come)
        )

    def stacked(self, local: Tensor) -> Tensor:
        if self.world == 1:
            return local
        return DTensor.from_local(
            local, self._device_mesh, [Replicate(), Shard(0)], run_check=False
        )

    def sum_over_ranks(self, values: Tensor, what: str) -> Tensor:
        return self._collectives.sum(values, self._everyone, what)

    def sum_over_images(self, values: Tensor, what: str) -> Tensor:
        return self.sum_over_ranks(values, what)

    def sum_over_experts(self, values: Tensor, what: str) -> Tensor:
        return self._collectives.sum(values, self._row, what)

    def barrier(self, what: str) -> None:
        self._collectives.barrier(self._patient, what)

    def _group(
        self, ranks: list[tuple[int, ...]], timeout_s: float, transport: str | None = None
    ) -> Group:
        """This rank's one of several groups that share out all ranks."""
        mine = next(each for each in ranks if self.rank in each)
        if len(mine) == 1:
            return Group(mine, None)
        with named_failure(self.rank, "forming groups of ranks"):
            handle, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
                [list(each) for each in ranks],
                timeout=timedelta(seconds=timeout_s),
                backend=transport,
            )
        return Group(mine, handle)

    @cached_property
    def _device_mesh(self) -> DeviceMesh:
        """The table of ranks as DTensors know it, with groups that nothing is sent over."""
        shape = (self.mesh.data, self.mesh.expert)
        return DeviceMesh(
            self.device.type,
            torch.arange(self.world).view(shape),
            mesh_dim_names=("data", "expert"),
        )


class CpuBackend(_TorchBackend):
    """CPU cores; gloo between processes.

    Args:
        threads: Torch threads of this process. Fixed, because sums over another number of
            threads come out in other bits.
        expert: Ranks to spread experts over.
        timeout_s: Seconds after which a collective fails.
    """

    def __init__(self, threads: int, expert: int, timeout_s: float) -> None:
        super().__init__(expert, timeout_s)
        torch.set_num_threads(threads)
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing to wait for: CPU work is done when the call returns."""


class CudaBackend(_TorchBackend):
    """The CUDA device that the launcher gave this process; NCCL between processes."""

    def __init__(self, expert: int, timeout_s: float) -> None:
        super().__init__(expert, timeout_s)
        self.device = torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
