"""What a sharding call will make, and what is refused before any work is done.

Archives are told apart by the names, sizes and both ends of their pieces, folders by the names
and sizes of their files; a dataset folder is compared with what the same call would have made.
Nothing is written here.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pipelines.data.archives.names import printable
from pipelines.data.archives.scan import MAX_DEPTH
from pipelines.data.manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    Resized,
    SourceRecord,
    read_manifest,
)
from pipelines.data.sharding.pack import UNFINISHED
from pipelines.data.sharding.plan import (
    ALL,
    HASH_SPLIT,
    SHARD_NAME,
    Part,
    short_digest,
    unit_digest,
)
from pipelines.data.sources.base import Source, Unit
from pipelines.errors import DatasetError, UsageError
from pipelines.storage import Place, plain_errors

FIRST_BYTES = 4096
LAST_BYTES = 32 * 1024  # more than the 10 KiB that tars are padded to
LOOKS_AT_ONCE = 16
_BY_HASH = re.compile(rf"({'|'.join(HASH_SPLIT)}) of a split by hash at (\S+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides about a dataset beside its archive; see `shards.write_shards`."""

    seed: int
    samples_per_shard: int
    val_fraction: float
    classes: tuple[str, ...] | None
    resized: Resized | None

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UsageError(
                f"samples per shard must be 1 or more, got {self.samples_per_shard}; "
                "4096 suits images of 100 kB"
            )
        if not 0 <= self.val_fraction < 1:
            raise UsageError(
                f"the validation fraction is a share from 0 to below 1, got {self.val_fraction}"
            )
        resized = self.resized
        if resized and (resized.short_side < 1 or not 1 <= resized.quality <= 100):
            raise UsageError(
                f"images are resized to a short side of 1 pixel or more with a quality from 1 to "
                f"100, got {resized.short_side} and {resized.quality}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of a dataset that a call makes, or finds made.

    Attributes:
        part: Of the archive.
        base: The dataset as it was; None: it is new.
        record: What the manifest will say of the archive.
        done: It was made before: nothing is to be done.
    """

    part: Part
    base: Manifest | None
    record: SourceRecord
    done: bool

    @property
    def first_shard(self) -> int:
        """Number of the first new shard."""
        numbers = [shard_number(shard.name) for shard in self.base.shards] if self.base else []
        return max(numbers, default=-1) + 1


def shard_number(name: str) -> int:
    """The number in a shard's file name."""
    found = SHARD_NAME.fullmatch(name)
    return int(found[1]) if found else -1


def unit_digests(source: Source) -> tuple[str, ...]:
    """A short hash of the name, size and both ends (or list of files) of every unit.

    The same wherever the archive lies: it goes into the manifest.
    """
    return tuple(digest for digest, _ in unit_states(source))


def unit_states(source: Source) -> tuple[tuple[str, str], ...]:
    """Of every unit its digest, and a hash of that and of when its files were changed last.

    The second tells whether what was scanned still holds: a tar that was damaged in its middle has
    the name, the size and both ends of the one that it is replaced by.
    """
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return tuple(pool.map(partial(_unit_state, source.archive), source.units))


def _unit_state(archive: Place, unit: Unit) -> tuple[str, str]:
    place = archive / unit.path
    if unit.kind == "tar":
        changed = str(place.changed())
        digest = unit_digest(unit, _ends(place, unit.start, unit.size))
        return digest, short_digest([digest, changed])
    files, times = hashlib.sha256(), hashlib.sha256()
    for line, when in _files_below(place, "", 0):
        files.update(line.encode(errors="surrogateescape"))
        times.update(b"%d " % when)
    digest = unit_digest(unit, files.hexdigest())
    return digest, short_digest([digest, times.hexdigest()])


def _ends(place: Place, start: int, size: int) -> str:
    """A hash of a file's first and last bytes: tars are padded, so that sizes alone say little."""
    last = max(0, size - LAST_BYTES)
    with plain_errors(place), place.open() as file:
        ends = file.read_at(min(FIRST_BYTES, size), start) + file.read_at(size - last, start + last)
    return hashlib.sha256(ends).hexdigest()


def _ends_of_file(place: Place) -> str:
    return _ends(place, 0, place.size())


def _files_below(folder: Place, prefix: str, depth: int) -> Iterator[tuple[str, int]]:
    """Names and sizes, and when changed; of folders that a scan skips, too, the name alone."""
    for entry in folder.entries():
        if not entry.is_folder:
            yield f"{prefix}{entry.name} {entry.size}\n", entry.changed
        elif depth == MAX_DEPTH:
            yield f"{prefix}{entry.name}/\n", 0
        else:
            yield from _files_below(folder / entry.name, f"{prefix}{entry.name}/", depth + 1)


def fingerprint(source: Source, units: tuple[str, ...], part: str) -> str:
    """A hash that tells archives apart, and parts of them."""
    stream = source.stream and [
        source.stream.size,
        [[path, _ends_of_file(source.archive / path)] for path in source.stream.paths],
    ]
    listed = source.listed and short_digest(
        [[stem, row.class_name, row.split] for stem, row in source.listed.items()]
    )
    told = json.dumps([source.layout, units, stream, listed, part])
    return hashlib.sha256(told.encode()).hexdigest()


def check_part(source: Source, part: str, settings: Settings) -> None:
    """Refuse a part that the archive does not have, and resizing what is no image.

    Raises:
        UsageError: Names the part and those there are.
    """
    if settings.resized and source.media != "image":
        raise UsageError(
            f"archive {source.told} holds {source.media}s, and only images can be resized; "
            "leave out --resize"
        )
    val_fraction = settings.val_fraction
    if val_fraction and source.splits:
        raise UsageError(
            f"archive {source.told} has splits of its own ({', '.join(source.splits)}); leave "
            f"out the validation fraction of {val_fraction}"
        )
    parts = source.splits or (HASH_SPLIT if val_fraction else ())
    if part != ALL and part not in parts:
        raise UsageError(
            f"archive {source.told} has no part {part!r}; choose {' or '.join((ALL, *parts))}"
            f"{'' if parts else ', or give a validation fraction'}"
        )


def new_version(source: Source, units: tuple[str, ...], part: Part, settings: Settings) -> Version:
    """A dataset's first version, unless the same call has made it.

    Raises:
        DatasetError: The folder holds something else, or a dataset made in another way.
    """
    record = _record(source, units, part, settings, version=1)
    if not (part.out / MANIFEST).is_file():
        _check_folder(part.out, known=())
        return Version(part=part, base=None, record=record, done=False)
    manifest = read_manifest(part.out)
    _check_same(source, part.out, manifest, record, settings)
    return Version(part=part, base=manifest, record=record, done=True)


def next_version(source: Source, units: tuple[str, ...], part: Part, settings: Settings) -> Version:
    """A finished dataset's next version, unless the archive was added before.

    Raises:
        DatasetError: The folder is no finished dataset, lacks shards, holds other things, or was
            split in another way.
    """
    base = read_manifest(part.out)
    if base.media != source.media:
        raise DatasetError(
            f"{part.out} holds {base.media}s and archive {source.archive} {source.media}s; "
            "make a dataset of its own"
        )
    record = _record(source, units, part, settings, version=base.version + 1)
    _check_split(source, part.out, base, record)
    _check_folder(part.out, known=tuple(shard.name for shard in base.shards))
    _check_present(part.out, base)
    done = any(old.fingerprint == record.fingerprint for old in base.sources)
    return Version(part=part, base=base, record=record, done=done)


def without_empty(source: Source, out: Place, versions: tuple[Version, ...]) -> tuple[Version, ...]:
    """Versions without those of parts that a compressed archive turned out not to have.

    Which parts it has is known once it was read. A call that has ended made no folder of the
    others; one that was interrupted has left what is unfinished.
    """
    ended = any(version.done for version in versions) and not (out / UNFINISHED).is_folder()
    if not source.stream or not ended:
        return versions
    return tuple(
        version
        for version in versions
        if version.base or (version.part.out / UNFINISHED).is_folder()
    )


def _record(
    source: Source, units: tuple[str, ...], part: Part, settings: Settings, *, version: int
) -> SourceRecord:
    side = part.name in HASH_SPLIT and not source.splits
    name = f"{part.name} of a split by hash at {settings.val_fraction}" if side else part.name
    return SourceRecord(
        name=printable(source.archive.name),
        layout=source.layout,
        part=name,
        fingerprint=fingerprint(source, units, name),
        version=version,
        samples_per_shard=settings.samples_per_shard,
        units=units,
    )


def side_of(manifest: Manifest) -> tuple[str, float] | None:
    """Which side of which split by hash a dataset is, and the share held out; None: of none."""
    sides = (_side(record.part) for record in manifest.sources)
    return next((side for side in sides if side is not None), None)


def _side(part: str) -> tuple[str, float] | None:
    found = _BY_HASH.fullmatch(part)
    return (found[1], float(found[2])) if found else None


def _check_split(source: Source, out: Place, base: Manifest, record: SourceRecord) -> None:
    """Refuse a part by which samples of one side of a split would come to the other."""
    now = _side(record.part)
    was = next((old.part for old in base.sources if _side(old.part) != now), None)
    if was is None:
        return
    side = _side(was)
    if side is None:
        next_step = "leave out --val-fraction, or make a dataset of its own"
    else:
        each = f", folder by folder ({', '.join(source.splits)})," if source.splits else ""
        next_step = f"add it{each} to {out.parent} with --append --val-fraction {side[1]}"
    raise DatasetError(
        f"{out} holds {was!r} and would be given {record.part!r} of archive {source.archive}: "
        f"samples that are held out for validation would be trained on; {next_step}"
    )


def _check_folder(out: Place, *, known: tuple[str, ...]) -> None:
    """Refuse a folder with anything in it but a dataset's own files; dot files do not count."""
    if out.is_file():
        raise DatasetError(f"{out} is a file; choose an empty folder")
    if not out.is_folder():
        return
    ours = {*known, MANIFEST, INDEX} if known else set()
    unfinished = (out / UNFINISHED).is_folder()
    for name in (entry.name for entry in out.entries()):
        half_made = unfinished and (name == INDEX or SHARD_NAME.fullmatch(name))
        if not (name in ours or half_made or name.startswith(".")):
            next_step = "move it away" if known else "choose an empty folder"
            raise DatasetError(f"{out} holds something else (first {name}); {next_step}")


def _check_same(
    source: Source, out: Place, manifest: Manifest, record: SourceRecord, settings: Settings
) -> None:
    """Refuse a finished folder unless this same call would have made it."""
    made = {old.fingerprint: old for old in manifest.sources}
    if record.fingerprint not in made:
        names = ", ".join(f"{old.name}, {old.part}" for old in manifest.sources)
        raise DatasetError(
            f"{out} was made from another archive or part ({names}); add {source.archive} to it "
            "as a new version with --append, or choose an empty folder"
        )
    was_cut = made[record.fingerprint].samples_per_shard
    for what, was, now in (
        ("seed", manifest.seed, settings.seed),
        ("classes", manifest.classes, settings.classes or source.classes or manifest.classes),
        ("resize", manifest.resized, settings.resized),
        ("samples per shard", was_cut, settings.samples_per_shard),
    ):
        if was != now:
            told = f"{was}, now {now}" if isinstance(was, int) else "others than now"
            raise DatasetError(
                f"{out} was made with other settings ({what}: {told}); choose an empty folder or "
                "the same settings"
            )
    _check_present(out, manifest)


def _check_present(out: Place, manifest: Manifest) -> None:
    """A quick look, sizes only; `verify` reads the bytes."""
    there = {entry.name: entry.size for entry in out.entries() if not entry.is_folder}
    for shard in manifest.shards:
        if there.get(shard.name) != shard.bytes:
            raise DatasetError(
                f"{out / shard.name} is missing or not {shard.bytes} bytes long as {MANIFEST} "
                "says; restore it, or remove the folder and make the shards again"
            )
