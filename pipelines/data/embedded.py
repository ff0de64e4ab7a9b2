"""Making a run's data when it is not there: embedded digits or clips, drawn and sharded.

What is drawn, see `digits` and `motion`; how archives become shards, see `shards`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from cluster.session import ray_session
from pipelines.config import DataConfig
from pipelines.data.digits import write_digit_archives
from pipelines.data.manifest import MANIFEST
from pipelines.data.motion import write_motion_archive
from pipelines.data.sharding.shards import ShardingReport, write_parts, write_shards
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Source
from pipelines.errors import DatasetError, RunError
from pipelines.locks import alone
from pipelines.storage import Place, place, plain_errors
from pipelines.terminal import Terminal

Embedded = Literal["digits", "motion"]

COPIES_TRAIN, COPIES_VAL = 12, 3
VAL_FRACTION = 0.1
_SPLITS = ("train", "val")
MAKING_LOCK = ".making.lock"  # in `data.root`
_WAIT_SECONDS = 1800.0  # for another to draw and shard, which takes a minute or two


def ensure_data(config: DataConfig, terminal: Terminal, *, verbose: bool = False) -> None:
    """Make the dataset that `config.embedded` names, unless `config.root` holds one.

    Of several that find none at once, one makes it; the others wait and use it. Without an
    embedded one this does nothing: who reads the data says what is missing.

    Raises:
        DatasetError: The data would have to be made in an object store.
        RunError: Another has been making it for half an hour.
    """
    root = place(config.root)
    if config.embedded is None or _is_made(root):
        return
    if root.local is None:
        raise DatasetError(
            f"data.root {root} holds no dataset, and data.embedded {config.embedded} is made in "
            f"folders of this machine only; name a folder, or shard an archive to {root} first"
        )
    with _one_after_another(root.local / MAKING_LOCK, f"making of {root}", terminal):
        if _is_made(root):
            return
        archive = root.local / "archive"
        draw(config.embedded, archive, terminal)
        with ray_session(verbose=verbose):
            shard_embedded(config.embedded, archive, root, terminal)
        terminal.say(f"made the embedded {config.embedded} -> {root}")


def _is_made(root: Place) -> bool:
    return (root / "val" / MANIFEST).is_file()  # the part that is made last


def draw(name: Embedded, archive: Path, terminal: Terminal) -> None:
    """Draw an embedded archive as every command does, unless it is there or another draws it."""
    lock = archive.with_name(f".{archive.name}.lock")
    with _one_after_another(lock, f"drawing of {archive}", terminal):
        if name == "digits":
            write_digit_archives(archive, copies_train=COPIES_TRAIN, copies_val=COPIES_VAL)
            return
        with terminal.meter("drawing", "clips") as meter:
            write_motion_archive(archive, progress=meter.update)


@contextmanager
def _one_after_another(lock: Path, doing: str, terminal: Terminal) -> Iterator[None]:
    """Hold a lock within the block; whoever has to wait for it is told so."""
    with ExitStack() as held:
        with plain_errors(place(lock.parent)):
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(alone(lock, doing))
            except RunError:
                terminal.say(f"waiting for another {doing}")
                held.enter_context(alone(lock, doing, wait_s=_WAIT_SECONDS))
        yield


def shard_embedded(
    name: Embedded, archive: Path, root: Place, terminal: Terminal
) -> tuple[ShardingReport, ...]:
    """Shard an embedded archive into `root/train` and `root/val`. Ray must be running."""
    if name == "motion":
        return shard_archive(find_source(place(archive)), root, terminal)
    train, val = (find_source(place(archive / split)) for split in _SPLITS)
    made = shard_with_progress(train, root / "train", terminal)
    classes = made.manifest.classes  # the labels of one are those of the other
    return made, shard_with_progress(val, root / "val", terminal, classes=classes)


def shard_with_progress(
    source: Source, out: Place, terminal: Terminal, *, classes: tuple[str, ...] | None = None
) -> ShardingReport:
    """`write_shards` behind a progress bar."""
    with terminal.meter(f"sharding {out.name}", "parts") as meter:
        return write_shards(
            source,
            out,
            classes=classes,
            progress=lambda what, done, total: meter.update(done, total, what),
        )


def shard_archive(source: Source, root: Place, terminal: Terminal) -> tuple[ShardingReport, ...]:
    """Shard an archive into `root/train` and `root/val`.

    The release's own splits are kept if it has these two (and others with them); else a share is
    held out by a hash of each key. Ray must be running.
    """
    with terminal.meter("sharding", "parts") as meter:
        return write_parts(
            source,
            root,
            val_fraction=held_out(source),
            progress=lambda what, done, total: meter.update(done, total, what),
        )


def held_out(source: Source) -> float:
    """Share of an archive's samples that a hash of each key holds out; 0: it has own splits."""
    return 0.0 if set(_SPLITS) <= set(source.splits) else VAL_FRACTION
