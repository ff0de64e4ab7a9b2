"""Making a run's data when it is not there: the embedded digits, drawn and sharded."""

from pathlib import Path

from cluster.session import ray_session
from pipelines.config import DataConfig
from pipelines.data.digits import write_digit_archives
from pipelines.data.manifest import MANIFEST
from pipelines.data.plan import Part
from pipelines.data.shards import ShardingReport, write_shards
from pipelines.terminal import Terminal

COPIES_TRAIN, COPIES_VAL = 12, 3


def ensure_data(config: DataConfig, terminal: Terminal, *, verbose: bool = False) -> None:
    """Make the dataset that `config.embedded` names, unless `config.root` holds one.

    Without an embedded one this does nothing: who reads the data says what is missing.
    """
    if config.embedded is None or (config.root / "val" / MANIFEST).is_file():
        return
    archive = config.root / "archive"
    draw_digits(archive)
    with ray_session(verbose=verbose):
        shard_both(archive / "train", archive / "val", config.root, terminal)
    terminal.say(f"made the embedded {config.embedded} -> {config.root}")


def draw_digits(archive: Path) -> None:
    """The embedded archive as every command draws it, as synset tars."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    write_digit_archives(archive, copies_train=COPIES_TRAIN, copies_val=COPIES_VAL)


def shard_both(
    train: Path, val: Path, root: Path, terminal: Terminal
) -> tuple[ShardingReport, ShardingReport]:
    """Shard a training and a validation archive into `root/train` and `root/val`.

    Labels are the training archive's synsets in both. Ray must be running.
    """
    made = shard_with_progress(train, root / "train", terminal)
    classes = made.manifest.classes
    return made, shard_with_progress(val, root / "val", terminal, classes=classes)


def shard_with_progress(
    archive: Path, out: Path, terminal: Terminal, *, classes: tuple[str, ...] | None = None
) -> ShardingReport:
    """`write_shards` behind a progress bar."""
    with terminal.meter(f"sharding {out.name}", "parts") as meter:

        def progress(what: str, done: int, total: int) -> None:
            meter.update(done, total, what)

        return write_shards(archive, out, classes=classes, progress=progress)


def shard_split(
    archive: Path, root: Path, val_fraction: float, terminal: Terminal
) -> tuple[ShardingReport, ShardingReport]:
    """Shard one archive into `root/train` and `root/val`, held out by a hash of each key."""
    reports = []
    parts: tuple[Part, ...] = ("train", "val")
    for part in parts:
        with terminal.meter(f"sharding {part}", "parts") as meter:
            reports.append(
                write_shards(
                    archive,
                    root / part,
                    part=part,
                    val_fraction=val_fraction,
                    progress=lambda what, done, total: meter.update(done, total, what),
                )
            )
    return reports[0], reports[1]
