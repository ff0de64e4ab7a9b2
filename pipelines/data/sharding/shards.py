"""Archives into WebDataset shards, in parallel with Ray Data.

Two passes. *Check* walks through every tar and finds where each member lies and whether it
decodes; *write* cuts the good members, in an order hashed from seed and key, into shards, and
lets one task per shard gather its members by their offsets. Ray Data carries descriptions of
work (tars, members, offsets) and fans them out; image bytes go from tar to shard inside one
task and never through the driver or the object store. Archive and output folder must be on a
file system that every Ray node sees under the same path. Ray must be running
already (`cluster.session`).

The output's bytes depend on archive, seed and shard size alone. Index and manifest are written
last; an interrupted run is continued. What goes where is `plan`'s subject, the bytes are
`pack`'s, the formats `manifest`'s, and reading `stream`'s.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.session import cluster_cpus
from pipelines.data.archive import class_names, find_tars, fingerprint
from pipelines.data.manifest import (
    INDEX,
    INDEX_SCHEMA,
    MANIFEST,
    Manifest,
    SkippedSample,
    SourceRecord,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)
from pipelines.data.pack import (
    SHARD_NAME,
    UNFINISHED,
    clear_all_but_whole,
    read_side_file,
    write_shard,
)
from pipelines.data.plan import (
    MEMBERS,
    Part,
    PlannedShard,
    ShardJob,
    check_quality,
    mark_repeats,
    plan_shards,
    shard_count,
    skipped_samples,
    tar_rows,
)
from pipelines.errors import ArchiveError, DatasetError

Progress = Callable[[str, int, int], None]

SAMPLES_PER_SHARD = 4096
SCAN_TASKS_PER_CPU = 8  # a Ray Data task costs about 20 ms; so few still keep all CPUs busy


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingReport:
    """What a call made.

    Attributes:
        folder: The dataset folder.
        manifest: The dataset as it is now.
        samples: Samples that this call added.
        skipped: Members that this call left out, with reasons.
        kept_shards: Whole shards of an interrupted run that were kept.
        did_nothing: Everything was there already; nothing was written.
    """

    folder: Path
    manifest: Manifest
    samples: int
    skipped: tuple[SkippedSample, ...]
    kept_shards: int
    did_nothing: bool


def write_shards(
    archive: Path,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_bad_fraction: float = 0.01,
    classes: tuple[str, ...] | None = None,
    part: Part = "all",
    val_fraction: float = 0.0,
    progress: Progress | None = None,
) -> ShardingReport:
    """Make a dataset folder out of an archive; continue it if a run was interrupted.

    Args:
        archive: Folder of synset tars.
        out: Folder to make; it may exist if it is empty, unfinished or made by this same call.
        seed: Seed of the global shuffle.
        samples_per_shard: Upper limit; shards are cut evenly below it, and below 256 MiB of images.
        max_bad_fraction: Share of the archive's members that may be unusable.
        classes: Synsets in label order, so that two datasets agree on labels; by default those
            of the archive, sorted. A synset without a tar is fine.
        part: All samples, or the "train" or "val" side of a split by a hash of the key.
        val_fraction: Share of the samples that this split holds out for "val".
        progress: Called with ("check", tars done, all) and ("write", shards done, all).

    Raises:
        ArchiveError: The archive is missing, damaged, without images or mostly bad.
        DatasetError: `out` holds something else, or the archive has a synset outside `classes`.
    """
    tars = find_tars(archive)
    job = ShardJob(
        archive=archive,
        out=out.resolve(),
        tars=tars,
        source=_source(archive, tars, version=1, part=(part, val_fraction)),
        classes=tuple(tar.stem for tar in tars) if classes is None else classes,
        seed=seed,
        samples_per_shard=samples_per_shard,
        max_bad_fraction=max_bad_fraction,
        first_shard=0,
        part=part,
        val_fraction=val_fraction,
    )
    _check_classes(job)
    if not (out / MANIFEST).is_file():
        _check_folder(job.out, known=())
        return _make_version(job, None, progress)
    manifest = read_manifest(out)
    _check_same(job, manifest)
    return _nothing(job, manifest, ())


def add_archive(
    archive: Path,
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> ShardingReport:
    """Add an archive to a finished dataset as its next version; old shards are not touched.

    Samples whose key the dataset has already are skipped and named. Classes and seed stay
    those of the dataset. An archive that was added before, or brings nothing new, does nothing.

    Args:
        archive: Folder of synset tars, each of a class that the dataset knows.
        out: Dataset folder with a manifest.
        samples_per_shard: As in `write_shards`.
        max_bad_fraction: As in `write_shards`, of this archive's members.
        progress: As in `write_shards`.

    Raises:
        ArchiveError: The archive is missing, damaged, without images or mostly bad.
        DatasetError: `out` is no finished dataset, lacks shards, or does not know a synset.
    """
    base = read_manifest(out)
    tars = find_tars(archive)
    job = ShardJob(
        archive=archive,
        out=out.resolve(),
        tars=tars,
        source=_source(archive, tars, version=base.version + 1),
        classes=base.classes,
        seed=base.seed,
        samples_per_shard=samples_per_shard,
        max_bad_fraction=max_bad_fraction,
        first_shard=len(base.shards),
    )
    _check_classes(job)
    _check_folder(job.out, known=tuple(shard.name for shard in base.shards))
    _check_present(job.out, base)
    if any(source.fingerprint == job.source.fingerprint for source in base.sources):
        return _nothing(job, base, ())
    return _make_version(job, base, progress)


def _source(
    archive: Path,
    tars: tuple[Path, ...],
    *,
    version: int,
    part: tuple[Part, float] = ("all", 0.0),
) -> SourceRecord:
    """An archive, or a part of it, as the manifest remembers it."""
    which, share = part
    print_ = fingerprint(tars) if which == "all" else f"{fingerprint(tars)} {which} of {share}"
    return SourceRecord(name=archive.resolve().name, fingerprint=print_, version=version)


def _nothing(
    job: ShardJob, manifest: Manifest, skipped: tuple[SkippedSample, ...]
) -> ShardingReport:
    return ShardingReport(
        folder=job.out,
        manifest=manifest,
        samples=0,
        skipped=skipped,
        kept_shards=len(manifest.shards),
        did_nothing=True,
    )


# What is refused before any work is done.


def _check_classes(job: ShardJob) -> None:
    unknown = sorted({tar.stem for tar in job.tars} - set(job.classes))
    if unknown:
        raise DatasetError(
            f"archive {job.archive} has {len(unknown)} synsets that the dataset's "
            f"{len(job.classes)} classes lack (first {unknown[0]}); take their tars out, or "
            "make a new dataset of all"
        )


def _check_folder(out: Path, *, known: tuple[str, ...]) -> None:
    """Refuse a folder with anything in it but a dataset's own files; dot files do not count."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DatasetError(f"{out} is a file; choose an empty folder")
    ours = {*known, MANIFEST, INDEX} if known else set()
    unfinished = (out / UNFINISHED).is_dir()
    for name in sorted(path.name for path in out.iterdir()):
        half_made = unfinished and (name == INDEX or SHARD_NAME.fullmatch(name))
        if not (name in ours or half_made or name.startswith(".")):
            next_step = "move it away" if known else "choose an empty folder"
            raise DatasetError(f"{out} holds something else (first {name}); {next_step}")


def _check_same(job: ShardJob, manifest: Manifest) -> None:
    """Refuse a finished folder unless this same call would have made it."""
    made = {source.fingerprint: source.version for source in manifest.sources}
    if job.source.fingerprint not in made:
        names = ", ".join(source.name for source in manifest.sources)
        raise DatasetError(
            f"{job.out} was made from another archive ({names}); add {job.archive} to it as a new "
            "version with --append, or choose an empty folder"
        )
    for what, was, now in (
        ("seed", manifest.seed, job.seed),
        ("classes", manifest.classes, job.classes),
        ("shards", *_shard_counts(job, manifest, made[job.source.fingerprint])),
    ):
        if was != now:
            told = f"{was}, now {now}" if isinstance(was, int) else "others than now"
            raise DatasetError(
                f"{job.out} was made with other settings ({what}: {told}); "
                "choose an empty folder or the same settings"
            )
    _check_present(job.out, manifest)


def _shard_counts(job: ShardJob, manifest: Manifest, version: int) -> tuple[int, int]:
    """How many shards a version has, and how many it would have with this job's settings."""
    numbers = [n for n, shard in enumerate(manifest.shards) if shard.version == version]
    index = read_index(job.out)
    sizes = index.filter(pc.is_in(index["shard"], pa.array(numbers, pa.int32())))["jpg_size"]
    return len(numbers), shard_count(len(sizes), pc.sum(sizes).as_py(), job.samples_per_shard)


def _check_present(out: Path, manifest: Manifest) -> None:
    """A quick look, sizes only; `verify` reads the bytes."""
    for shard in manifest.shards:
        path = out / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise DatasetError(
                f"{path} is missing or not {shard.bytes} bytes long as {MANIFEST} says; "
                "restore it, or remove the folder and make the shards again"
            )


# One dataset version, from archive to manifest.


def _make_version(
    job: ShardJob, base: Manifest | None, progress: Progress | None
) -> ShardingReport:
    members = _scan(job, progress)
    check_quality(job, members)
    index = read_index(job.out).slice(0, base.samples) if base else INDEX_SCHEMA.empty_table()
    members = mark_repeats(members, index["key"])
    skipped = skipped_samples(job, members)
    plan = plan_shards(job, members)
    if base and not plan:
        return _nothing(job, base, skipped)
    _make_folder(job.out)
    missing = clear_all_but_whole(job, plan)
    _write(job, missing, progress)
    manifest = _finish(job, base, index, plan, skipped)
    return ShardingReport(
        folder=job.out,
        manifest=manifest,
        samples=sum(shard.members.num_rows for shard in plan),
        skipped=skipped,
        kept_shards=len(plan) - len(missing),
        did_nothing=False,
    )


def _make_folder(out: Path) -> None:
    try:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise DatasetError(f"{out} cannot be made ({why}); choose another folder") from error


def _scan(job: ShardJob, progress: Progress | None) -> pa.Table:
    """Every member of every tar, in the archive's order, with what is wrong with it."""
    tasks = min(len(job.tars), SCAN_TASKS_PER_CPU * cluster_cpus())
    cuts = [len(job.tars) * i // tasks for i in range(tasks + 1)]
    work = [pa.table({"tar": range(*cut)}) for cut in itertools.pairwise(cuts)]
    damages: dict[int, str] = {}
    members: dict[int, pa.Table] = {}
    for batch in _fan_out(_scan_tars, work, job):
        for tar, damage, rows in zip(*batch.columns, strict=True):
            members[tar.as_py()] = pa.Table.from_struct_array(rows.values)
            if damage.is_valid:
                damages[tar.as_py()] = damage.as_py()
        if progress:
            progress("check", len(members), len(job.tars))
    if damages:
        raise ArchiveError(_damages(job, damages))
    return pa.concat_tables([members[tar] for tar in sorted(members)]).combine_chunks()


def _damages(job: ShardJob, damages: dict[int, str]) -> str:
    """The first damaged tar's message, and the names of the others: one scan tells of all."""
    first, *others = sorted(damages)
    names = ", ".join(job.tars[tar].name for tar in others[:3])
    more = f" (and {len(others)} more damaged: {names})" if others else ""
    return damages[first] + more


def _write(job: ShardJob, shards: list[PlannedShard], progress: Progress | None) -> None:
    """Have every shard written, in parallel."""
    done = 0
    errors: list[str] = []
    for batch in _fan_out(_write_planned, [shard.work() for shard in shards], job):
        done += batch.num_rows
        errors += [error for error in batch["error"].to_pylist() if error]
        if progress:
            progress("write", done, len(shards))
    if errors:
        raise DatasetError(
            f"{min(errors)}; {len(shards) - len(errors)} finished shards are kept in {job.out}, "
            "mend this and run the same again"
        )


def _finish(
    job: ShardJob,
    base: Manifest | None,
    index: pa.Table,
    plan: list[PlannedShard],
    skipped: tuple[SkippedSample, ...],
) -> Manifest:
    """Gather the side files into index and manifest, the manifest last."""
    _, records, tables = zip(*(read_side_file(job, shard.name) for shard in plan), strict=True)
    shards = (base.shards if base else ()) + records
    manifest = Manifest(
        version=job.source.version,
        classes=job.classes,
        names=base.names if base else class_names(job.archive, job.classes),
        sources=(*(base.sources if base else ()), job.source),
        seed=job.seed,
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
        skipped=(base.skipped if base else ()) + skipped,
    )
    write_index(job.out, pa.concat_tables([index, *tables]).combine_chunks())
    write_manifest(job.out, manifest)
    shutil.rmtree(job.out / UNFINISHED, ignore_errors=True)  # no reader minds what is left
    return manifest


# What Ray runs.


def _fan_out(
    task: Callable[..., pa.Table], work: list[pa.Table], job: ShardJob
) -> Iterator[pa.Table]:
    """Run a task on every table of work with Ray Data; small answers come back in any order."""
    if not work:
        return
    answers = ray.data.from_arrow(work).map_batches(
        task,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_kwargs={"job": job},
    )
    yield from answers.iter_batches(batch_size=None, batch_format="pyarrow")


def _scan_tars(batch: pa.Table, *, job: ShardJob) -> pa.Table:
    """Scan some tars: per tar its number, what damage it has (or null), and its members."""
    answers = [_scan_one(job, tar) for tar in batch["tar"].to_pylist()]
    tars, damages, members = zip(*answers, strict=True)
    return pa.table(
        {
            "tar": pa.array(tars, pa.int32()),
            "damage": pa.array(damages, pa.string()),
            "members": pa.array(members, pa.list_(MEMBERS)),
        }
    )


def _scan_one(job: ShardJob, tar: int) -> tuple[int, str | None, list[dict[str, Any]]]:
    """Damage is told, not raised: Ray would wrap an error in its own, pages long."""
    try:
        return tar, None, tar_rows(job, tar)
    except ArchiveError as error:
        return tar, str(error), []


def _write_planned(batch: pa.Table, *, job: ShardJob) -> pa.Table:
    """Write the planned shards; per shard null, or what went wrong."""
    errors = [_try_to_write(job, shard) for shard in batch.to_pylist()]
    return pa.table({"error": pa.array(errors, pa.string())})


def _try_to_write(job: ShardJob, shard: dict[str, Any]) -> str | None:
    try:
        write_shard(job, shard)
    except OSError as error:
        return f"{job.out / shard['name']} was not written: {error.strerror or error}"
    return None
