"""The end of sharding: side files of finished shards into index and manifest, the manifest last.

One shard's rows are in memory at a time. A new dataset is none until its manifest is there. Of an
addition the index goes first, too: a reader that opens the dataset between the two is told that
they differ, and where a run was killed there the same run again puts it right. What makes the side
files is `pack`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.data.manifest import (
    MANIFEST,
    Manifest,
    ShardRecord,
    SkippedSample,
    classes_sha256,
    index_shards,
    read_manifest,
    seal,
    write_index,
    write_manifest,
)
from pipelines.data.sharding.pack import KNOWN, UNFINISHED, Repeat, read_side_file
from pipelines.data.sharding.plan import SHARD_NAME, ShardJob, ShardRange
from pipelines.data.sharding.scanned import file_stems, problems
from pipelines.data.sharding.versions import Version, shard_number
from pipelines.errors import RunError
from pipelines.storage import Place

CLAIM = "made-of"  # in the folder of what is unfinished: whose it is
NO_FILE = "has no file"


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What passes by while the index is written."""

    per_class: np.ndarray
    records: list[ShardRecord] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    known: int = 0
    remarks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A finished version: its manifest, what it left out, and classes it has no samples of.

    Attributes:
        skipped: What was left out and is named.
        known: Samples that the dataset had already.
    """

    manifest: Manifest
    skipped: tuple[SkippedSample, ...]
    known: int
    empty_classes: int


def finish(
    job: ShardJob,
    version: Version,
    shards: Sequence[ShardRange],
    part: int,
    bad_units: Sequence[int],
) -> Finished:
    """Write index and manifest of a version whose shards all have their side files.

    Args:
        job: What was made of which archive; its classes are known.
        version: The version.
        shards: Its shards, those without samples included.
        part: Position of its part in the job.
        bad_units: Units that hold members with a problem.

    Raises:
        RunError: Another run has changed the dataset since the version was planned.
    """
    check_base(version)
    out, base, classes = version.part.out, version.base, job.classes or ()
    tally = _Tally(per_class=np.zeros(len(classes), np.int64))
    index_sha256 = write_index(out, _index(version, shards, tally))
    skipped = skipped_samples(job, version, part, tally.repeats, bad_units)
    labelled = bool(tally.per_class.any()) or not tally.records
    records = (*(base.shards if base else ()), *tally.records)
    names = job.source.names
    bare = Manifest(
        version=version.record.version,
        media=job.source.media,
        labelled=labelled,
        classes=classes,
        classes_sha256=classes_sha256(classes),
        names=base.names if base else tuple(names.get(name, name) for name in classes if names),
        sources=(*(base.sources if base else ()), version.record),
        seed=job.seed,
        samples=sum(record.samples for record in records),
        bytes=sum(record.bytes for record in records),
        shards=records,
        skipped=(*(base.skipped if base else ()), *skipped, *_known(version, tally.known)),
        remarks=dict(
            sorted(((Counter(base.remarks) if base else Counter()) + tally.remarks).items())
        ),
        resized=job.resized,
        index_sha256=index_sha256,
    )
    manifest = seal(bare)
    check_base(version)  # the index of a large dataset takes a while
    write_manifest(out, manifest)
    empty = int((tally.per_class == 0).sum()) if labelled else 0
    return Finished(manifest=manifest, skipped=skipped, known=tally.known, empty_classes=empty)


def check_base(version: Version) -> None:
    """Refuse to finish a version of a dataset that is no longer what it was planned on.

    Locks keep other runs out on one machine, and in an object store there are none.

    Raises:
        RunError: Names the dataset.
    """
    out = version.part.out
    found = read_manifest(out).digest if (out / MANIFEST).is_file() else None
    if found != (version.base.digest if version.base else None):
        raise RunError(
            f"{out} was changed by another run while this one was under way, and is left as that "
            f"one made it; check it with `mone verify {out}` and run the same command again"
        )


def _index(version: Version, shards: Iterable[ShardRange], tally: _Tally) -> Iterator[pa.Table]:
    """The old shards' rows as they were, and the new ones', whose numbers close up."""
    out, base = version.part.out, version.base
    if base:
        yield from index_shards(out, range(len(base.shards)))
    position = len(base.shards) if base else 0
    for shard in shards:
        side, rows = read_side_file(out, shard.name)
        tally.repeats += side.repeats
        tally.known += side.known
        if not side.record:
            continue
        tally.records.append(side.record)
        labels = rows["label"].to_numpy()
        tally.per_class += np.bincount(labels[labels >= 0], minlength=len(tally.per_class))
        tally.remarks.update(rows["remark"].drop_null().to_pylist())
        number = pa.repeat(pa.scalar(position, pa.int32()), rows.num_rows)
        yield rows.set_column(rows.schema.get_field_index("shard"), "shard", number)
        position += 1


def skipped_samples(
    job: ShardJob,
    version: Version,
    part: int,
    repeats: Iterable[Repeat],
    bad_units: Sequence[int],
) -> tuple[SkippedSample, ...]:
    """What a version leaves out, in the archive's order; then rows of lists without a file."""
    found = [(repeat.unit, repeat.seq, repeat.name, repeat.reason) for repeat in repeats]
    for unit in bad_units:
        found += [
            (unit, row["seq"], row["name"], row["reason"])
            for row in problems(job, unit)
            if row["part"] == part
        ]
    told = [(name, reason) for _, _, name, reason in sorted(found)]
    told += [(stem, NO_FILE) for stem in _without_file(job, part)]
    return tuple(
        SkippedSample(member=name, reason=reason, version=version.record.version)
        for name, reason in told
    )


def _known(version: Version, number: int) -> tuple[SkippedSample, ...]:
    """One entry for all: an archive that has grown brings everything again that it had."""
    record = version.record
    member = f"{number} samples of {record.name}"
    return (SkippedSample(member=member, reason=KNOWN, version=record.version),) if number else ()


def _without_file(job: ShardJob, part: int) -> list[str]:
    """What the release lists of a part and does not hold."""
    if job.source.listed is None:
        return []
    missing = {
        stem for stem, row in job.source.listed.items() if job.part_of(stem, row.split) == part
    }
    for unit in range(len(job.units)):
        missing.difference_update(file_stems(job, unit))
    return sorted(missing)


def left_out(out: Place, shards: Iterable[ShardRange]) -> tuple[list[Repeat], int]:
    """What finished shards left out, and how many samples that the dataset has already."""
    sides = [read_side_file(out, shard.name)[0] for shard in shards]
    return [repeat for side in sides for repeat in side.repeats], sum(side.known for side in sides)


def claim(out: Place, versions: Sequence[Version]) -> None:
    """Say that what is unfinished in a folder is these versions'; shards may lie beside it then."""
    (out / UNFINISHED / CLAIM).write_bytes(_told(versions))


def is_left_over(out: Place, versions: Sequence[Version]) -> bool:
    """Whether a folder holds what is unfinished of these versions and of no later ones."""
    told = out / UNFINISHED / CLAIM
    return told.is_file() and told.read_bytes() == _told(versions)


def _told(versions: Sequence[Version]) -> bytes:
    return "".join(f"{version.record.fingerprint}\n" for version in versions).encode()


def clear(out: Place) -> None:
    """Remove what is unfinished, and last whose it is, so that a run that is killed is told."""
    unfinished = out / UNFINISHED
    if unfinished.is_folder():
        for entry in list(unfinished.entries()):
            if entry.name != CLAIM:
                (unfinished / entry.name).remove()
    unfinished.remove()


def clear_all_but(version: Version, shards: Iterable[ShardRange]) -> None:
    """Remove shards and side files that an interrupted run left and this one does not make."""
    out = version.part.out
    if not out.is_folder():
        return
    mine = {shard.name for shard in shards}
    for entry in list(out.entries()):
        name = entry.name
        new = SHARD_NAME.fullmatch(name) and shard_number(name) >= version.first_shard
        if (new and name not in mine) or _is_temporary(name):
            (out / name).remove()
    unfinished = out / UNFINISHED
    if unfinished.is_folder():
        for entry in list(unfinished.entries()):
            name = entry.name.removesuffix(".parquet")
            if _is_temporary(entry.name) or (SHARD_NAME.fullmatch(name) and name not in mine):
                (unfinished / entry.name).remove()


def _is_temporary(name: str) -> bool:
    return name.startswith(".shard-") and name.endswith(".tmp")
