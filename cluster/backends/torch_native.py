"""CPU (gloo) and CUDA (NCCL) through torch's own device and process group."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class _TorchBackend:
    """The common part: one process group if one was started, none otherwise."""

    device: torch.device

    def __init__(self) -> None:
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1

    def place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        if self.world == 1:
            return model
        # Every parameter is used at every budget, and buckets as views save a copy of gradients.
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.clone()
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


class CpuBackend(_TorchBackend):
    """CPU cores; gloo between processes.

    Args:
        threads: Torch threads of this process. Fixed, because sums over another number of
            threads come out in other bits.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing to wait for: CPU work is done when the call returns."""


class CudaBackend(_TorchBackend):
    """The CUDA device that the launcher gave this process; NCCL between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
