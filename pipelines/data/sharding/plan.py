"""Which samples of an archive go into which shard: arithmetic on hashes, no bytes and no files.

Every key has an order hash. Shards are ranges of it, cut from a histogram, so that deciding takes
the same memory for a hundred samples as for a billion. What was scanned lies in files (`scanned`);
the bytes are `pack`'s, the fanning out over machines `shards`'. A plan depends on archive, seed
and shard size alone.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import Manifest, Resized
from pipelines.data.sources.base import Source, Unit
from pipelines.errors import ArchiveError
from pipelines.storage import Place

SHARD_BYTES = 256 * 2**20
BIN_BITS = 20
BINS = 1 << BIN_BITS
ALL = "all"
HASH_SPLIT = ("train", "val")
DIGEST_CHARS = 16
SHARD_NAME = re.compile(r"shard-(\d{6,})\.tar")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of an archive that becomes a dataset folder of its own.

    Attributes:
        name: "all", a split of the release, or a side of the split by hash.
        out: The dataset folder.
    """

    name: str
    out: Place


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One scan of an archive and what is made of it; travels to every task, once.

    Attributes:
        source: The archive, as what can be scanned.
        units: A hash of every unit of the source and of when it was changed last, see
            `versions.unit_states`; names what was scanned.
        parts: What is made; members of no part are left alone.
        scratch: Folder of what is unfinished: results of scans.
        classes: Class names in label order; None while they are not known yet.
        seed: Seed of the shuffle.
        val_fraction: Share of the samples on the "val" side of a split by hash.
        resized: How images are re-encoded; None: not at all.
    """

    source: Source
    units: tuple[str, ...]
    parts: tuple[Part, ...]
    scratch: Place
    classes: tuple[str, ...] | None
    seed: int
    val_fraction: float = 0.0
    resized: Resized | None = None

    def part_of(self, key: str, split: str | None) -> int | None:
        """Position of the part that a member belongs to; None: it is in none of them.

        A problem that belongs to no split, such as damage, is told with the first part.
        """
        names = [part.name for part in self.parts]
        if names == [ALL]:
            return 0
        if self.source.splits:
            name = split or names[0]
        else:
            held_out = order_hash("split", key) < self.val_fraction * 2**64
            name = HASH_SPLIT[held_out]
        return names.index(name) if name in names else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRange:
    """A shard that will hold the samples whose order hash falls into bins `first` to `last` - 1."""

    number: int
    part: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"shard-{self.number:06d}.tar"


@dataclass(kw_only=True, slots=True)
class PartCount:
    """What was found of one part: numbers alone, added up over the units.

    Attributes:
        samples, bytes: Of the members that become samples, repeated keys included.
        problems: Members that cannot be used.
        lost: Bytes of the archive that damage made unreadable.
        open_ended: Pieces that are cut off, and nobody knows what should follow.
        unlabelled: Samples without a class.
        classes: Class -> samples.
    """

    samples: int = 0
    bytes: int = 0
    problems: int = 0
    lost: int = 0
    open_ended: int = 0
    unlabelled: int = 0
    classes: dict[str, int] = field(default_factory=dict)

    def add(self, other: "PartCount") -> None:
        """Add another unit's numbers."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.problems += other.problems
        self.lost += other.lost
        self.open_ended += other.open_ended
        self.unlabelled += other.unlabelled
        for name, samples in other.classes.items():
            self.classes[name] = self.classes.get(name, 0) + samples

    @property
    def bad(self) -> int:
        """Members that cannot be used, and about how many more the damage has cost."""
        mean = self.bytes / self.samples if self.samples else 0
        return self.problems + (math.ceil(self.lost / mean) if mean else 0)


def order_hash(purpose: int | str, key: str) -> int:
    """64 bits that depend on a purpose (the shuffle's is its seed) and a key alone."""
    digest = hashlib.blake2b(f"{purpose} {key}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def unit_digest(unit: Unit, content: str = "") -> str:
    """A short hash of what tells whether a unit was scanned before.

    Args:
        unit: A piece of an archive.
        content: What else is known about it: a hash of both its ends, or of its list of files.
    """
    told = (unit.kind, unit.path, unit.name, unit.size, unit.start, unit.class_name, unit.split)
    return short_digest([*told, unit.above, content])


def scan_digest(
    source: Source,
    *,
    seed: int,
    parts: Sequence[str],
    val_fraction: float,
    resized: Resized | None = None,
) -> str:
    """A short hash of all that the result of a scan depends on beside the unit."""
    listed = source.listed and [
        [stem, row.class_name, row.split] for stem, row in source.listed.items()
    ]
    told = [source.layout, source.archive.where, source.media, list(source.splits), listed]
    return short_digest([*told, seed, list(parts), val_fraction, resized and resized.short_side])


def short_digest(value: Any) -> str:
    """The first characters of the sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:DIGEST_CHARS]


def shard_count(samples: int, content_bytes: int, samples_per_shard: int) -> int:
    """How many shards to cut: as few as keep to the limits of samples and of 256 MiB."""
    wanted = max(math.ceil(samples / samples_per_shard), math.ceil(content_bytes / SHARD_BYTES))
    return min(wanted, samples)


def cut(
    histogram: NDArray[np.int64], content_bytes: int, samples_per_shard: int
) -> list[tuple[int, int]]:
    """Cut the range of hashes so that all shards are about equal and none is over the limit.

    Args:
        histogram: Samples per bin [BINS]; bin b holds the hashes whose first 20 bits are b.
        content_bytes: Bytes of all samples.
        samples_per_shard: Upper limit; more only where one bin alone holds more.

    Returns:
        First bin and the one behind the last of every shard; none is without samples.
    """
    up_to = np.cumsum(histogram)
    total = int(up_to[-1])
    if not total:
        return []
    limit = max(samples_per_shard, int(histogram.max()))
    count = shard_count(total, content_bytes, samples_per_shard)
    while True:
        targets = total * np.arange(1, count + 1, dtype=np.int64) // count
        ends = np.unique(np.searchsorted(up_to, targets)) + 1  # bins behind each shard's last
        sizes = np.diff(up_to[ends - 1], prepend=0)
        if sizes.max() <= limit:
            return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        count += 1


def grouped(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Positions of neighbours whose sizes add up to at most `most`, or of one that is larger."""
    groups: list[list[int]] = []
    room = 0
    for at, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(at)
        room -= size
    return groups


def check_quality(
    source: Source, count: PartCount, first: str, *, max_bad_fraction: float, kept: str
) -> None:
    """Refuse an archive without samples, cut off, or with too large a share of unusable members.

    Args:
        source: The archive.
        count: What a scan of it found, all parts together.
        first: The first unusable members with their reasons, for the message.
        max_bad_fraction: Share that may be unusable; 1: so may be what nobody can count.
        kept: Where the result of the scan lies, so that a user knows what a rerun costs.

    Raises:
        ArchiveError: Says how many, the limit, and the first with their reasons.
    """
    what = f"archive {source.told}"
    samples = f"{source.media}s"
    if not count.samples and not count.problems:
        raise ArchiveError(f"{what} holds no {samples}: its {len(source.units)} pieces are empty")
    files = count.samples + count.bad
    if not count.samples:
        raise ArchiveError(
            f"{what} holds no {samples}: none of its {files} files can be used: {first}"
        )
    again = f"(what was found is kept in {kept} for the next run)"
    if count.open_ended and max_bad_fraction < 1:
        raise ArchiveError(
            f"{what} is cut off, and nobody can tell how much of it is missing; fetch it again, or "
            f"take what is there with --max-bad-fraction 1 {again}"
        )
    share = count.bad / files
    if share > max_bad_fraction:
        about = "about " if count.lost else ""
        raise ArchiveError(
            f"{about}{count.bad} of the {files} files in {what} cannot be used "
            f"({share:.2%}, the limit is {max_bad_fraction:.2%}): {first}; mend the archive or "
            f"raise --max-bad-fraction {again}"
        )


def check_repeats(
    source: Source, count: PartCount, repeated: Sequence[str], *, max_bad_fraction: float
) -> None:
    """Refuse an archive too many of whose members are left out, those with repeated keys included.

    Args:
        source: The archive.
        count: What a scan of it found, all parts together.
        repeated: Names of the members whose key an earlier member has, in the archive's order.
        max_bad_fraction: Share that may be left out.

    Raises:
        ArchiveError: Says how many, the limit, and the first names.
    """
    files = count.samples + count.bad
    share = (len(repeated) + count.bad) / files if repeated else 0.0
    if share > max_bad_fraction:
        also = f", and {count.bad} cannot be used" if count.bad else ""
        raise ArchiveError(
            f"{len(repeated)} of the {files} files in archive {source.told} have the key of an "
            f"earlier member (class, folders and name, without suffix){also} ({share:.2%} are left "
            f"out, the limit is {max_bad_fraction:.2%}): {', '.join(repeated[:3])}; rename them or "
            "take them out, or raise --max-bad-fraction (the shards are kept for the next run)"
        )


def check_labels(source: Source, part: str, count: PartCount, base: Manifest | None = None) -> None:
    """Refuse a part of which some samples have a class and others have none.

    Args:
        source: The archive.
        part: Name of the part.
        count: What a scan found of it.
        base: The dataset that it is added to, if there is one.

    Raises:
        ArchiveError: Names the part and both numbers, or says which side has no classes.
    """
    if base and base.samples and count.samples and base.labelled == bool(count.unlabelled):
        sides = ("have classes", "have none")
        has, lacks = sides if base.labelled else sides[::-1]
        raise ArchiveError(
            f"archive {source.told}: samples of part {part!r} {lacks}, and those of the dataset "
            f"{has}; make a dataset of its own"
        )
    if count.unlabelled and count.unlabelled < count.samples:
        splits = ", ".join(source.splits) or "none"
        raise ArchiveError(
            f"archive {source.told}: {count.unlabelled} of the {count.samples} samples of part "
            f"{part!r} have no class; shard its splits ({splits}) apart"
        )


def check_splits(
    source: Source, parts: Sequence[str], counts: Sequence[PartCount], classes: Sequence[str] | None
) -> None:
    """Refuse classes that another split of the release has and its train split lacks.

    They are folders that are no classes, such as `val/images`. Of class folders on a disk
    `pipelines.data.sources` tells; here it is what a scan of tars has found.

    Args:
        source: The archive.
        parts: Names of the parts that were scanned.
        counts: What was found of each.
        classes: A given list of classes; None: there is none, and any folder would be a class.

    Raises:
        ArchiveError: Names the part and one of the classes.
    """
    if classes is not None or not source.splits or "train" not in parts:
        return
    known = set(counts[parts.index("train")].classes)
    known |= {unit.class_name or "" for unit in source.units if unit.split == "train"}
    for part, count in zip(parts, counts, strict=True):
        others = sorted(set(count.classes) - known)
        if others:
            raise ArchiveError(
                f"archive {source.told}: {part} has {len(others)} classes that train lacks, "
                f"such as {others[0]!r}; sort its files into the folders of their classes, or name "
                "all classes with --classes"
            )


def check_classes(
    source: Source, found: Mapping[str, int | None], classes: Sequence[str] | None
) -> None:
    """Refuse classes that a given list lacks.

    Args:
        source: The archive.
        found: Class -> samples; None: not counted yet.
        classes: The list; None: every class is fine.

    Raises:
        ArchiveError: Names up to five of them with their numbers of samples.
    """
    unknown = sorted(set(found) - set(classes)) if classes is not None else []
    if not unknown:
        return
    named = [
        f"{name} ({found[name]} samples)" if found[name] is not None else name
        for name in unknown[:5]
    ]
    raise ArchiveError(
        f"archive {source.told} has {len(unknown)} classes that the list of "
        f"{len(classes or ())} classes lacks: {', '.join(named)}"
        f"{', ...' if len(unknown) > 5 else ''}; take them out, add them to the list, or make "
        "a dataset of its own"
    )
