"""What differs between accelerators, behind one small contract (`base.Backend`).

`get_backend` is called inside a worker and gives the one that was asked for. Nothing above
this package asks which it has.
"""

from typing import Literal

from cluster.backends.base import Backend, Placed
from cluster.backends.torch_native import CpuBackend, CudaBackend

__all__ = ["Backend", "Placed", "get_backend"]


def get_backend(
    device: Literal["cpu", "cuda", "xla"],
    *,
    threads: int = 1,
    expert: int = 1,
    timeout_s: float = 60,
) -> Backend:
    """The backend of this process.

    Args:
        device: Which accelerator computes.
        threads: Torch threads on CPU.
        expert: Ranks to spread experts over; divides the ranks. Of XLA it is devices.
        timeout_s: Seconds after which an exchange of tokens or a sum over experts fails.

    Raises:
        LaunchError: The ranks cannot be shared out so.
    """
    if device == "cpu":
        return CpuBackend(threads, expert, timeout_s)
    if device == "xla":
        from cluster.backends.xla import XlaBackend  # torch_xla needs an environment of its own

        return XlaBackend(expert)
    return CudaBackend(expert, timeout_s)
