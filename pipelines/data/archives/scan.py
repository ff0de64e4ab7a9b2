"""Looks at every file of a unit of an archive: where its bytes lie, its class, whether it decodes.

Nothing is raised for what an archive holds: a file that is no sample comes with its problem, a
damaged tar with what it lost, so that all can be counted and named. How tars are walked is the
subject of `tars`, what decodes that of `probe`, which units there are that of `sources`, and what
a key is that of `names`.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import pyarrow as pa

from pipelines.data.archives.names import (
    SMALL_CLASSES,
    SUFFIXES,
    is_hidden,
    printable,
    sample_key,
    split_of,
)
from pipelines.data.archives.probe import MAX_BYTES, probe
from pipelines.data.archives.tars import DIRECTORY, Damage, TarEntry, Window, walk
from pipelines.data.sources.base import Media, Member, Source, Unit
from pipelines.storage import Place, StorageError

MAX_DEPTH = 16  # folders below a class; links to a folder above would never end
CLASS_TARS = ("imagenet21k", "imagenet1k")  # layouts whose classes are tars of their own
UNLISTED = "is not in the release's lists"
UNREADABLE = "cannot be read"  # begins a problem that a rerun may well not have
UNPRINTABLE = "has a name that is not printable UTF-8; rename it"
NOWHERE = "is a link that leads nowhere"


def scan(source: Source, unit: Unit) -> Iterator[Member]:
    """Look at every file of a unit.

    Args:
        source: The archive.
        unit: One of its units.

    Yields:
        One member per file, in the tar's order or sorted by path; directories are none. Where a tar
        is damaged, or cannot be read, a last member has the unit's name, a problem, and in `lost`
        the bytes that are lost. Where a tar of many classes is cut off, nobody knows how many.
    """
    reader = _scan_folder if unit.kind == "folder" else _scan_tar
    yield from reader(source, unit)


def _scan_tar(source: Source, unit: Unit) -> Iterator[Member]:
    if printable(unit.path) != unit.path:
        yield _lost(unit, UNPRINTABLE, unit.size)
        return
    place = source.archive / unit.path
    position = unit.start
    try:
        with place.open() as file:
            window = Window(file, unit.start, unit.size)
            for found in walk(window, unit.start):
                if isinstance(found, Damage):
                    is_open = found.open_ended and unit.class_name is None
                    yield _lost(unit, found.problem, None if is_open else found.lost)
                elif found.problem != DIRECTORY:
                    yield _tar_member(source, unit, found, window)
                    position = found.offset + found.size
    except (OSError, pa.ArrowException, StorageError) as error:
        text = f"{UNREADABLE}: {_words(error)}; what follows is lost"
        yield _lost(unit, text, max(0, unit.start + unit.size - position))


def _tar_member(source: Source, unit: Unit, entry: TarEntry, window: Window) -> Member:
    fate = classify(source, unit, entry.name, entry.size)
    member = Member(
        key=fate.key,
        name=f"{unit.name}/{printable(entry.name)}",
        path=unit.path,
        offset=entry.offset,
        size=entry.size,
        class_name=fate.class_name,
        split=fate.split,
        problem=entry.problem or fate.problem,
        lost=entry.lost,
    )
    if member.problem:
        return member
    return _probed(source.media, member, window.read(entry.offset, entry.size), entry.name)


def _scan_folder(source: Source, unit: Unit) -> Iterator[Member]:
    folder = source.archive / unit.path
    for name, size in _files_below(folder, "", 0):
        yield _file_member(source, unit, folder, name, size)


def _files_below(folder: Place, above: str, depth: int) -> Iterator[tuple[str, int | str]]:
    """Every file below a folder by its path in there, with its size; or why there is none."""
    try:
        entries = list(folder.entries())
    except StorageError as error:
        yield above.rstrip("/"), f"{UNREADABLE}: {_words(error)}"
        return
    for entry in entries:
        name = above + entry.name
        if not entry.is_folder:
            yield name, entry.size
        elif depth == MAX_DEPTH:
            yield name, f"lies more than {MAX_DEPTH} folders deep, as a link in a circle would"
        else:
            yield from _files_below(folder / entry.name, f"{name}/", depth + 1)


def _file_member(source: Source, unit: Unit, folder: Place, name: str, size: int | str) -> Member:
    fate = classify(source, unit, name, size if isinstance(size, int) else 0)
    path = f"{unit.path}/{name}" if unit.path else name
    member = Member(
        key=fate.key,
        name=f"{unit.name}/{printable(name)}",
        path=path,
        offset=0,
        size=size if isinstance(size, int) else 0,
        class_name=fate.class_name,
        split=fate.split,
        problem=size if isinstance(size, str) else fate.problem,
    )
    if printable(path) != path:
        return replace(member, path="", problem=member.problem or UNPRINTABLE)
    if member.problem:
        return member
    try:
        data = (folder / name).read_bytes()
    except StorageError as error:
        gone = isinstance(error.__cause__, FileNotFoundError)
        return replace(member, problem=NOWHERE if gone else f"{UNREADABLE}: {_words(error)}")
    return _probed(source.media, replace(member, size=len(data)), data, name)


def _probed(media: Media, member: Member, data: bytes, name: str) -> Member:
    problem, remark = probe(media, data, name)
    return replace(member, problem=problem, remark=remark, crc32=zlib.crc32(data))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What a file's name and size say of it, before its bytes are looked at; see `Member`."""

    key: str
    class_name: str | None
    split: str | None
    problem: str | None


def classify(source: Source, unit: Unit, name: str, size: int) -> Fate:
    """Class, split and key of a file, and what is wrong with its name or size.

    Args:
        source: The archive.
        unit: The unit that holds it.
        name: Its path inside the unit.
        size: Its bytes.
    """
    path = PurePosixPath(name)
    class_name, split, inside, problem = _class_and_split(source, unit, path)
    named = unit.class_name is None and (source.listed is not None or source.layout == "named")
    key = sample_key(None if named else class_name, inside)
    problem = name_problem(source.media, name, size) or problem
    return Fate(key=key, class_name=class_name, split=split, problem=problem)


def _class_and_split(
    source: Source, unit: Unit, path: PurePosixPath
) -> tuple[str | None, str | None, str, str | None]:
    """Class, split, path below the class for the key, and why there is no class."""
    parts = tuple(part for part in path.parts if part != "/")
    if unit.class_name is not None:
        return unit.class_name, unit.split, _below_class(unit, unit.class_name, parts), None
    if source.listed is not None:
        row = source.listed.get(path.stem)
        if row is None:
            return None, unit.split, path.name, UNLISTED
        return row.class_name, row.split or unit.split, path.name, None
    if source.layout == "named":
        class_name, underscore, _ = printable(path.name).partition("_")
        problem = None if underscore else "has no class before a '_' in its name"
        return class_name if underscore else None, unit.split, "/".join(parts), problem
    at, split, problem = _class_folder(source, unit, parts[:-1])
    if at is None:
        return None, split, "/".join(parts), problem
    class_name, below = printable(parts[at]), parts[at + 1 :]
    if source.layout in CLASS_TARS:
        return class_name, split, _below_class(unit, class_name, below), None
    return class_name, split, "/".join(below), None


def _below_class(unit: Unit, class_name: str, parts: tuple[str, ...]) -> str:
    """The path below a class; some class tars hold a folder of the class's name."""
    twice = unit.kind == "tar" and len(parts) > 1 and parts[0] == class_name
    return "/".join(parts[1:] if twice else parts)


def _class_folder(
    source: Source, unit: Unit, folders: tuple[str, ...]
) -> tuple[int | None, str | None, str | None]:
    """Which of the folders above a file is its class, in which split; or why none is."""
    if source.layout not in CLASS_TARS and unit.split is None and source.splits:
        return _below_split(source, folders)
    # Of spooled class tars the first folder is the inner tar.
    at = 0 if source.layout in CLASS_TARS else unit.above
    if len(folders) <= at or is_hidden(folders[: at + 1]):
        return None, unit.split, "lies in no class folder"
    return at, unit.split, None


def _below_split(
    source: Source, folders: tuple[str, ...]
) -> tuple[int | None, str | None, str | None]:
    """The same where folders of classes lie in folders of splits."""
    splits = (split_of(printable(folder)) for folder in folders[:-1])
    at, split = next(((at, split) for at, split in enumerate(splits, 1) if split), (None, None))
    small = split == SMALL_CLASSES and source.layout == "imagenet21k-p"
    if (split in source.splits or small) and not is_hidden(folders[: (at or 0) + 1]):
        return at, split, None
    return None, None, f"lies in no class folder of {' or '.join(source.splits)}"


def name_problem(media: Media, name: str, size: int) -> str | None:
    """What is wrong with a file by its name or size alone."""
    path = PurePosixPath(name)
    if path.name.startswith("."):
        return "is a hidden file"
    if path.suffix.lower() not in SUFFIXES[media]:
        article = "an image" if media == "image" else "a video"
        return f"is not {article} by its name (suffix {printable(path.suffix)!r})"
    if size > MAX_BYTES[media]:
        return f"has {size} bytes, more than the limit of {MAX_BYTES[media]}"
    return None


def _lost(unit: Unit, problem: str, lost: int | None) -> Member:
    """The rest of a unit, as one member that is none."""
    return Member(
        key=sample_key(None, f"{unit.name}/"),
        name=unit.name,
        path=unit.path,
        offset=unit.start,
        size=0,
        class_name=None,
        split=unit.split,
        problem=problem,
        lost=lost,
    )


def _words(error: Exception) -> str:
    """What the system says, on one line, without paths and next steps."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    number = cause.errno if isinstance(cause, OSError) else None
    return os.strerror(number) if number else str(cause or error).splitlines()[0]
