"""What differs between accelerators, behind one small contract (`base.Backend`).

`get_backend` is called inside a worker and gives the one that was asked for. Nothing above
this package asks which it has.
"""

from typing import Literal

from cluster.backends.base import Backend
from cluster.backends.torch_native import CpuBackend, CudaBackend

__all__ = ["Backend", "get_backend"]


def get_backend(device: Literal["cpu", "cuda"], *, threads: int = 1) -> Backend:
    """The backend of this process.

    Args:
        device: Which accelerator computes.
        threads: Torch threads on CPU.
    """
    return CpuBackend(threads) if device == "cpu" else CudaBackend()
