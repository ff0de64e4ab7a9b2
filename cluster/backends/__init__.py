"""What differs between accelerators, behind one small contract (`base.Backend`).

`get_backend` is called inside a worker and gives the one that was asked for. Nothing above
this package asks which it has.
"""

from typing import Literal

from cluster.backends.base import Backend, Placed
from cluster.backends.torch_native import CpuBackend, CudaBackend
from cluster.errors import LaunchError

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
        timeout_s: Seconds after which an exchange of tokens or a sum over experts fails. XLA has no
            such limit.

    Raises:
        LaunchError: The ranks cannot be shared out so, or torch_xla is not installed.
    """
    if device == "cpu":
        return CpuBackend(threads, expert, timeout_s)
    if device == "xla":
        return _xla_backend(expert)
    return CudaBackend(expert, timeout_s)


def _xla_backend(expert: int) -> Backend:
    """Torch_xla is built for one torch alone and lives in an environment of its own."""
    try:
        from cluster.backends.xla import XlaBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch_xla":
            raise
        raise LaunchError(
            "parallel.device xla needs torch_xla, which is not installed here; install "
            "'mone[tpu]' in an environment of its own on every host, or choose cpu or cuda"
        ) from error
    return XlaBackend(expert)
