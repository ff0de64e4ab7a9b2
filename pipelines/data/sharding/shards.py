"""Archives into WebDataset shards, in parallel with Ray Data.

Three passes. A compressed archive is *spooled*: decompressed once, front to back. *Scan* decodes
every file and notes where it lies, a Parquet file per unit (`scanned`). *Write* cuts the range of
order hashes into shards (`plan`), and one task per shard gathers its samples by their offsets
(`pack`). Ray Data carries numbers of units and ranges of hashes; bytes go from archive to shard
inside one task, never through the driver or the object store. The driver keeps a histogram, a few
numbers per unit and the names of what is skipped, however many samples there are. Archive and
output must be where every Ray node sees them under the same name. Ray must be running
(`cluster.session`). The order of the passes is `making`'s.

The output's bytes depend on archive, seed and shard size alone. Index and manifest are written
last; an interrupted run is continued. What is refused at once is `versions`' subject.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray
import ray.data

from cluster.session import cluster_cpus
from pipelines.data.archives.names import printable
from pipelines.data.manifest import MANIFEST, Resized, read_manifest
from pipelines.data.sharding.making import (
    Making,
    Progress,
    ShardingReport,
    classes_of_units,
    folders_of,
    left_over,
)
from pipelines.data.sharding.pack import PackJob
from pipelines.data.sharding.plan import ALL, HASH_SPLIT, Part, ShardJob, check_classes, grouped
from pipelines.data.sharding.versions import (
    Settings,
    Version,
    check_part,
    new_version,
    next_version,
    unit_digests,
    without_empty,
)
from pipelines.data.sources.base import Source
from pipelines.errors import DatasetError, PipelineError
from pipelines.locks import alone
from pipelines.storage import Place, plain_errors

__all__ = [
    "Progress",
    "ShardingReport",
    "add_archive",
    "add_parts",
    "parts_of",
    "write_parts",
    "write_shards",
]

SAMPLES_PER_SHARD = 4096
LOCK = ".shard.lock"
TASKS_PER_CPU = 8  # a Ray Data task costs about 20 ms; so few still keep all CPUs busy
TASK_BYTES = 256 * 2**20  # a few seconds of decoding: progress is seen, a crash costs little


def write_shards(
    source: Source,
    out: Place,
    *,
    part: str = ALL,
    val_fraction: float = 0.0,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_bad_fraction: float = 0.01,
    classes: tuple[str, ...] | None = None,
    resized: Resized | None = None,
    progress: Progress | None = None,
) -> ShardingReport:
    """Make a dataset folder out of an archive; continue it if a run was interrupted.

    Args:
        source: The archive, from `pipelines.data.sources.find_source`.
        out: Folder to make; it may exist if it is empty, unfinished or made by this same call.
        part: "all"; one of the archive's own splits; or, with `val_fraction`, the "train" or "val"
            side of a split by a hash of the key.
        val_fraction: Share of the samples that this split holds out for "val".
        seed: Seed of the global shuffle.
        samples_per_shard: Upper limit; shards are cut evenly below it, and below 256 MiB.
        max_bad_fraction: Share of the archive's members that may be unusable.
        classes: Class names in label order, so that two datasets agree on labels; by default the
            release's own list, or else the classes found, sorted. A class without samples is fine.
        resized: Re-encode images; None: keep their bytes.
        progress: Called with ("spool", bytes done, all), ("scan", units done, all) and
            ("write", shards done, all).

    Raises:
        ArchiveError: The archive is damaged, without samples or mostly bad, or has a class
            outside `classes`.
        DatasetError: `out` holds something else, or a shard cannot be written.
        RunError: Another run writes into `out`.
        UsageError: A part or setting that cannot be.
    """
    settings = Settings(
        seed=seed,
        samples_per_shard=samples_per_shard,
        val_fraction=val_fraction,
        classes=classes,
        resized=resized,
    )
    parts = (Part(name=part, out=out.absolute()),)
    (report,) = _make(source, out, parts, settings, max_bad_fraction, progress, new_version)
    return report


def write_parts(
    source: Source,
    out: Place,
    *,
    val_fraction: float = 0.0,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_bad_fraction: float = 0.01,
    classes: tuple[str, ...] | None = None,
    resized: Resized | None = None,
    progress: Progress | None = None,
) -> tuple[ShardingReport, ...]:
    """Make a dataset folder of every part of an archive, which is scanned once for all of them.

    With `val_fraction` the folders are `out/train` and `out/val`; of a release that has splits of
    its own there is one per split; else it is `out` itself. For the rest see `write_shards`.
    """
    settings = Settings(
        seed=seed,
        samples_per_shard=samples_per_shard,
        val_fraction=val_fraction,
        classes=classes,
        resized=resized,
    )
    parts = parts_of(source, out, val_fraction)
    return _make(source, out, parts, settings, max_bad_fraction, progress, new_version)


def add_archive(
    source: Source,
    out: Place,
    *,
    part: str = ALL,
    val_fraction: float = 0.0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> ShardingReport:
    """Add an archive to a finished dataset as its next version; old shards are not touched.

    Samples whose key the dataset has already are skipped and counted. Classes, seed and size of
    images stay those of the dataset. Units of an archive that has grown since it was added are not
    looked at again. An archive that was added before, or brings nothing new, does nothing.

    Args:
        source: The archive; it has no class that the dataset lacks.
        out: Dataset folder with a manifest.
        part: As in `write_shards`, like what follows.

    Raises:
        ArchiveError: The archive is damaged, without samples or mostly bad, or has a class that
            the dataset lacks.
        DatasetError: `out` is no finished dataset or lacks shards.
        UsageError: A part or setting that cannot be.
    """
    parts = (Part(name=part, out=out.absolute()),)
    return _add(source, out, parts, val_fraction, samples_per_shard, max_bad_fraction, progress)[0]


def add_parts(
    source: Source,
    out: Place,
    *,
    val_fraction: float = 0.0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> tuple[ShardingReport, ...]:
    """Add every part of an archive to the folder that `write_parts` made of that part."""
    parts = parts_of(source, out, val_fraction)
    return _add(source, out, parts, val_fraction, samples_per_shard, max_bad_fraction, progress)


def parts_of(source: Source, out: Place, val_fraction: float) -> tuple[Part, ...]:
    """The parts of an archive, and the folder of each; see `write_parts`."""
    names = source.splits or (HASH_SPLIT if val_fraction else ())
    folder = out.absolute()
    if not names:
        return (Part(name=ALL, out=folder),)
    return tuple(Part(name=name, out=folder / name) for name in names)


def _add(
    source: Source,
    out: Place,
    parts: tuple[Part, ...],
    val_fraction: float,
    samples_per_shard: int,
    max_bad_fraction: float,
    progress: Progress | None,
) -> tuple[ShardingReport, ...]:
    there = [part for part in parts if (part.out / MANIFEST).is_file()]
    if not (source.stream and there):  # which parts a compressed archive has is not known yet
        there = list(parts)
    bases = [read_manifest(part.out) for part in there]
    first = bases[0]
    if any((base.classes, base.seed) != (first.classes, first.seed) for base in bases):
        raise DatasetError(
            f"the parts of {out} differ in classes or seed; add to each of them apart"
        )
    settings = Settings(
        seed=first.seed,
        samples_per_shard=samples_per_shard,
        val_fraction=val_fraction,
        classes=first.classes,
        resized=first.resized,
    )

    def version_of(
        source: Source, units: tuple[str, ...], part: Part, settings: Settings
    ) -> Version:
        version = next_version if part in there else new_version
        return version(source, units, part, settings)

    return _make(source, out, parts, settings, max_bad_fraction, progress, version_of)


def _make(
    source: Source,
    out: Place,
    parts: tuple[Part, ...],
    settings: Settings,
    max_bad_fraction: float,
    progress: Progress | None,
    version_of: Callable[[Source, tuple[str, ...], Part, Settings], Version],
) -> tuple[ShardingReport, ...]:
    """Check and make a version of every part: the first, or the next."""
    for part in parts:
        check_part(source, part.name, settings)
    check_classes(source, classes_of_units(source), settings.classes or source.classes)
    units = unit_digests(source)
    making = Making(
        settings, max_bad_fraction=max_bad_fraction, progress=progress, fan_out=_fan_out
    )
    return _alone(
        making,
        source,
        out.absolute(),
        lambda: tuple(version_of(source, units, part, settings) for part in parts),
    )


def _alone(
    making: Making, source: Source, out: Place, planned: Callable[[], tuple[Version, ...]]
) -> tuple[ShardingReport, ...]:
    """Make what is planned; another run into any of the same folders would mix its shards in."""
    versions = without_empty(source, out, planned())
    with ExitStack() as held:
        if not all(version.done for version in versions) or left_over(out, versions):
            for folder in folders_of(out, versions):
                held.enter_context(_held(folder))
            # Another run may have ended in between.
            versions = without_empty(source, out, planned())
        return making.make(source, out, versions)


@contextmanager
def _held(folder: Place) -> Iterator[None]:
    """Have a folder of this machine alone; an object store has no locks."""
    path = folder.local
    if path is None:
        yield
        return
    made = not path.exists()
    try:
        with ExitStack() as held:
            with plain_errors(folder):
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(alone(path / LOCK, f"sharding into {folder}", kept=False))
            yield
    finally:
        if made:
            with suppress(OSError):
                path.rmdir()  # which nothing came into


# What Ray runs.


def _fan_out(
    task: Callable[[Any, Any], Any],
    job: ShardJob | PackJob,
    work: Sequence[Any],
    sizes: Sequence[int],
    kept: Place,
) -> Iterator[tuple[int, Any]]:
    """Run a task on every item with Ray Data; see `making.FanOut`.

    Raises:
        DatasetError: Some item failed; all others are done by then.
    """
    if not work:
        return
    cpus = max(1, cluster_cpus())  # a cluster that grows with its work begins with none
    most = min(TASK_BYTES, sum(sizes) // (TASKS_PER_CPU * cpus))
    blocks = [
        pa.table({"at": group, "item": [json.dumps(work[at]) for at in group]})
        for group in grouped(sizes, most)
    ]
    answers = ray.data.from_arrow(blocks).map_batches(
        _run,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_kwargs={"task": task, "sent": [ray.put(job)]},
    )
    errors: list[tuple[int, str]] = []
    for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
        columns = (column.to_pylist() for column in batch.columns)
        for at, answer, error in zip(*columns, strict=True):
            if error is None:
                yield at, json.loads(answer)
            else:
                errors.append((at, error))
    if errors:
        raise DatasetError(
            f"{min(errors)[1]} ({len(errors)} of {len(work)} pieces of work failed; what is "
            f"finished is kept in {kept}: mend this and run the same again)"
        )


def _run(batch: pa.Table, *, task: Callable[[Any, Any], Any], sent: list[Any]) -> pa.Table:
    """Do the items of one block."""
    job = _received(sent[0])
    told = [_told(task, job, json.loads(item)) for item in batch["item"].to_pylist()]
    answers, errors = zip(*told, strict=True)
    return pa.table(
        [batch["at"], pa.array(answers, pa.string()), pa.array(errors, pa.string())],
        names=["at", "answer", "error"],
    )


@lru_cache(maxsize=2)
def _received(sent: Any) -> Any:
    """A job, taken from the object store once per process."""
    return ray.get(sent)


def _told(task: Callable[[Any, Any], Any], job: Any, item: Any) -> tuple[str | None, str | None]:
    """The answer, or the error; not raised, since Ray would wrap it in its own, pages long."""
    try:
        return json.dumps(task(job, item)), None
    except PipelineError as error:
        return None, printable(str(error))
    except OSError as error:  # of results of scans: what is read and written is told with its name
        return None, printable(str(error))
