"""What every measured loader is given and gives, so that one driver can run them all.

A side is a module beside this one with two names: `prepare(images, to)` writes the images in the
side's own format, and `Loader(setup)` reads them. Each runs in a process of its own (`side`), so
nothing here may import what one side alone needs. A sample's label is its number: whoever gets a
batch knows which samples it holds.
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

SAMPLES_PER_SHARD = 128  # of tars; each worker has many

Batch = tuple[Tensor, Tensor]  # uint8 pixels [B, H, W, 3] and labels [B]
Decoder = Literal["pillow", "simplejpeg"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How a loader is to be opened.

    Attributes:
        data: Folder that the side has prepared.
        decoder: Which of the two transforms of `transform` makes pixels.
        workers: Processes, or threads of a loader that has those.
        batch: Samples of a batch.
        size: Height and width of the crops, pixels.
        state: What `Loader.state` gave in another process: the batch after that one comes first.
    """

    data: Path
    decoder: Decoder
    workers: int
    batch: int
    size: int
    state: Any = None


class Loader(Protocol):
    """One epoch of batches; closing the generator ends what makes them."""

    def __iter__(self) -> Generator[Batch, None, None]: ...

    def state(self) -> Any:
        """As JSON: where the batch stands that came last; None: this loader cannot resume."""

    def close(self) -> None:
        """End its threads and processes."""


def image_files(images: Path) -> list[Path]:
    """The source images, a sample's number being its place."""
    return sorted(images.iterdir())
