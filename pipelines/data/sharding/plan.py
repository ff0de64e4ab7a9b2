"""Which members of an archive become samples, and which shard each goes into.

Works on arrow tables of descriptions (`MEMBERS`), never on image bytes: the writing is `pack`'s,
the fanning out over machines `shards`'. A plan depends on archive, seed and shard size alone.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.archive import DIRECTORY, scan_tar
from pipelines.data.manifest import SkippedSample, SourceRecord
from pipelines.errors import ArchiveError

SHARD_BYTES = 256 * 2**20
REPEATED = "has the key of an earlier member"
KNOWN = "is in the dataset already (same key)"
MEMBERS = pa.struct(
    [
        ("tar", pa.int32()),  # position in ShardJob.tars
        ("label", pa.int32()),
        ("key", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("problem", pa.string()),  # null: a sample
        ("order", pa.uint64()),  # hash that shuffles
    ]
)


Part = Literal["all", "train", "val"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One dataset version in the making; travels to every task.

    Attributes:
        archive: As the user called it, for messages.
        out: The dataset folder, absolute.
        tars: The archive's tars, absolute, sorted.
        source: What the manifest will say about the archive.
        classes: Synsets in label order.
        seed: Seed of the shuffle.
        samples_per_shard: Upper limit.
        max_bad_fraction: Share of the members that may be unusable.
        first_shard: Number of the first new shard.
        part: Which members to take: all, or one side of the split that holds out validation.
        val_fraction: Share of the members that this split holds out.
    """

    archive: Path
    out: Path
    tars: tuple[Path, ...]
    source: SourceRecord
    classes: tuple[str, ...]
    seed: int
    samples_per_shard: int
    max_bad_fraction: float
    first_shard: int
    part: Part = "all"
    val_fraction: float = 0.0

    def member_name(self, row: dict[str, Any]) -> str:
        """A member as messages and manifest call it: tar, slash, name in the tar."""
        return f"{self.tars[row['tar']].name}/{row['member']}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """What a shard will hold, and a hash of that."""

    number: int
    name: str
    digest: str
    members: pa.Table

    def work(self) -> pa.Table:
        """The plan as one row, which Ray Data cannot split."""
        rows = self.members.to_struct_array().combine_chunks()
        members = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)
        return pa.table(
            [[self.number], [self.name], [self.digest], members],
            names=["number", "name", "digest", "members"],
        )


def tar_rows(job: ShardJob, tar: int) -> list[dict[str, Any]]:
    """Every member of a tar, if it is of the job's part, as a row of `MEMBERS`.

    Raises:
        ArchiveError: The tar is damaged or cannot be read.
    """
    path = job.tars[tar]
    label = job.classes.index(path.stem)
    return [
        {
            "tar": tar,
            "label": label,
            "key": member.key,
            "member": member.name,
            "offset": member.offset,
            "size": member.size,
            "problem": member.problem,
            "order": _hash(job.seed, member.key),
        }
        for member in scan_tar(path)
        if _in_part(job, member.key)
    ]


def _in_part(job: ShardJob, key: str) -> bool:
    """Which side of the split a sample is on depends on its key alone, for good."""
    if job.part == "all":
        return True
    held_out = _hash("split", key) < job.val_fraction * 2**64
    return held_out == (job.part == "val")


def _hash(purpose: int | str, key: str) -> int:
    digest = hashlib.blake2b(f"{purpose} {key}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def check_quality(job: ShardJob, members: pa.Table) -> None:
    """Refuse an archive without images, or with too large a share of unusable members.

    Directories are not counted; whatever else is no image that decodes is.

    Raises:
        ArchiveError: Says how many, the limit, and the first three with their reasons.
    """
    files = members.filter(pc.fill_null(pc.not_equal(members["problem"], DIRECTORY), True))
    bad = files.filter(pc.is_valid(files["problem"]))
    tars = f"{len(job.tars)} tars"
    if files.num_rows == 0:
        raise ArchiveError(
            f"archive {job.archive} holds no images: its {tars} are empty; fetch it again"
        )
    first = "; ".join(
        f"{job.member_name(row)} {row['problem']}" for row in bad.slice(0, 3).to_pylist()
    )
    if bad.num_rows == files.num_rows:
        raise ArchiveError(
            f"archive {job.archive} holds no images: none of the {files.num_rows} files in its "
            f"{tars} can be used: {first}"
        )
    share = bad.num_rows / files.num_rows
    if share > job.max_bad_fraction:
        raise ArchiveError(
            f"{bad.num_rows} of the {files.num_rows} files in archive {job.archive} cannot be used "
            f"({share:.2%}, the limit is {job.max_bad_fraction:.2%}): {first}; mend the archive or "
            "raise max_bad_fraction"
        )


def mark_repeats(members: pa.Table, known_keys: pa.ChunkedArray) -> pa.Table:
    """Give a problem to images whose key the dataset, or an earlier member, has already."""
    rows = members.append_column("row", pa.array(range(members.num_rows), pa.int64()))
    images = rows.filter(pc.is_null(rows["problem"]))
    first = images.group_by("key").aggregate([("row", "min")])["row_min"].combine_chunks()
    known = pc.is_in(rows["key"], value_set=known_keys.combine_chunks())
    nothing = pa.scalar(None, pa.string())
    problem = pc.coalesce(
        rows["problem"],
        pc.if_else(known, KNOWN, nothing),
        pc.if_else(pc.is_in(rows["row"], value_set=first), nothing, REPEATED),
    )
    return members.set_column(members.schema.get_field_index("problem"), "problem", problem)


def skipped_samples(job: ShardJob, members: pa.Table) -> tuple[SkippedSample, ...]:
    """The members that have a problem, for the manifest, in the archive's order."""
    return tuple(
        SkippedSample(
            member=job.member_name(row), reason=row["problem"], version=job.source.version
        )
        for row in members.filter(pc.is_valid(members["problem"])).to_pylist()
    )


def shard_count(samples: int, image_bytes: int, samples_per_shard: int) -> int:
    """How many shards to cut: as few as keep to the limits of samples and of 256 MiB."""
    wanted = max(math.ceil(samples / samples_per_shard), math.ceil(image_bytes / SHARD_BYTES))
    return min(wanted, samples)


def plan_shards(job: ShardJob, members: pa.Table) -> list[PlannedShard]:
    """Shuffle the members without a problem by hash, and cut them evenly into shards."""
    images = members.filter(pc.is_null(members["problem"]))
    by_hash = [("order", "ascending"), ("key", "ascending")]
    images = images.take(pc.sort_indices(images, sort_keys=by_hash))
    total = images.num_rows
    count = shard_count(total, pc.sum(images["size"]).as_py() or 0, job.samples_per_shard)
    cuts = [total * i // count for i in range(count + 1)] if count else []
    return [
        _planned(job, job.first_shard + i, images.slice(start, end - start))
        for i, (start, end) in enumerate(itertools.pairwise(cuts))
    ]


def _planned(job: ShardJob, number: int, members: pa.Table) -> PlannedShard:
    digest = hashlib.sha256(repr((job.source, job.classes, number)).encode())
    for column in members.columns:
        digest.update(repr(column.to_pylist()).encode())
    return PlannedShard(
        number=number,
        name=f"shard-{number:06d}.tar",
        digest=digest.hexdigest(),
        members=members,
    )
