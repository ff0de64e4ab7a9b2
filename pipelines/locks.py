"""One at a time: locks that the system lets go of when a process ends, however it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.errors import RunError


@contextmanager
def alone(lock: Path, doing: str, *, wait_s: float = 0.0, kept: bool = True) -> Iterator[None]:
    """Hold a lock file within the block.

    Args:
        lock: The file.
        doing: What is done alone, for the error: "training of runs/digits".
        wait_s: Seconds to wait for whoever holds it.
        kept: Leave the file there. It can be removed: whoever has opened it by then and waits finds
            that it has no name any more, and begins again.

    Raises:
        RunError: Somebody else still holds it.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=wait_s)
    except Timeout as error:
        raise RunError(
            f"another {doing} is under way (it holds {lock}); wait for it to end"
        ) from error
    try:
        yield
    finally:
        if not kept:
            lock.unlink(missing_ok=True)  # while it is held: nobody else's then
        held.release()
