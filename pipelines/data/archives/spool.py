"""Makes plain tars of a compressed archive, since only these can be read at an offset.

The stream is read once, front to back, and its members are written one after the other into
segments of about 1 GiB: plain tars with the members' own bytes, `<class>/<name>` for those of inner
tars. A segment is whole or absent. Which member goes into which segment depends on the stream
alone, so a run that was killed finds its finished segments, decompresses up to their end without
writing, and goes on with the same bytes.

What is no sample by its name or kind is written without data, as a note of the problem; so is
damage. `scan` reads the notes (`tars.PROBLEM_RECORD`) and tells them as if it had seen the archive.
"""

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, ClassVar

from pydantic import ConfigDict

from pipelines.data.archives.inflate import Inflated
from pipelines.data.archives.names import is_tar, printable
from pipelines.data.archives.scan import UNLISTED, name_problem
from pipelines.data.archives.tars import (
    BLOCK,
    DIRECTORY,
    LOST_RECORD,
    LOST_UNKNOWN,
    PROBLEM_RECORD,
    Bytes,
    Damage,
    TarEntry,
    padding,
    walk,
)
from pipelines.data.sources.base import Source, Stream, Unit
from pipelines.data.sources.peek import folders_above, sample_folders, splits_of
from pipelines.errors import ArchiveError
from pipelines.files import as_json, parse_json
from pipelines.storage import Place, plain_errors

SEGMENT_BYTES = 1 << 30
CHUNK_BYTES = 1 << 20
STATE = "spool.json"
_SEGMENT = re.compile(r"segment-\d{6,}\.tar")
GIB = 1 << 30
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a folder of segments belongs to, in `spool.json`.

    Attributes:
        stream: A hash of the names and sizes of the compressed files, of when they were changed
            last, and of how they are read.
        sizes: Bytes of every segment, once all are written; None: they are not.
        splits: Those that were found in a tree of class folders.
        above: How many folders of such a tree are above those of the classes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    stream: str
    sizes: tuple[int, ...] | None
    splits: tuple[str, ...] = ()
    above: int = 0


def spool(
    source: Source,
    to: Place,
    *,
    progress: Progress | None = None,
    segment_bytes: int = SEGMENT_BYTES,
) -> Source:
    """Decompress an archive into segments that can be scanned apart from each other.

    Args:
        source: An archive with a stream.
        to: Folder of its own for the segments; what an earlier run of the same archive left is
            gone on with, what belongs to another archive is removed.
        progress: Called with ("spool", compressed bytes read, all).
        segment_bytes: A segment ends with the member that reaches this size.

    Returns:
        The source with `to` as its archive and the segments as its units.

    Raises:
        ArchiveError: The disk has too little room, or `to` holds something else or was changed.
        StorageError: The archive cannot be read or a segment not written.
    """
    stream = source.stream
    assert stream is not None, "only a compressed archive is spooled"
    digest = _digest(source, stream, segment_bytes)
    state = _begin(to, digest)
    if state.sizes is None:
        kept = _kept(to)
        _check_room(source, stream, to, sum(kept))
        to_disk = _Segments(to, kept, segment_bytes)
        with to_disk, Inflated([source.archive / path for path in stream.paths]) as inflated:
            found = _copy(source, stream, inflated, to_disk, progress or _silent)
        (above,) = folders_above([found], [""])
        sizes, splits = tuple(to_disk.sizes), splits_of(found)
        state = replace(state, sizes=sizes, splits=splits, above=above)
        (to / STATE).write_bytes(as_json(state))
    there = tuple(split for split in source.splits if split in state.splits)
    return replace(
        source,
        archive=to.absolute(),
        units=_units(source, state),
        splits=there if _is_tree(source, stream) and there else source.splits,
        stream=None,
        packed=source.archive,
    )


def _silent(what: str, done: int, total: int) -> None:
    """Where nobody wants to see progress."""


def _digest(source: Source, stream: Stream, segment_bytes: int) -> str:
    places = {path: source.archive / path for path in stream.paths}
    files = [f"{path} {place.size()} {place.changed()}" for path, place in places.items()]
    listed = "" if source.listed is None else " ".join(sorted(source.listed))
    told = [source.archive.where, source.layout, source.media, stream.nested, segment_bytes, listed]
    return hashlib.sha256(
        "\n".join(map(str, [*told, *files])).encode("utf-8", "surrogateescape")
    ).hexdigest()


def _begin(to: Place, digest: str) -> State:
    """The state of a folder of segments; a fresh one for an empty folder or another archive."""
    if (to / STATE).is_file():
        content = (to / STATE).read_bytes()
        state = parse_json(content, State, name=str(to / STATE), otherwise=_changed)
        if state.stream == digest:
            return state
    _clear(to)
    state = State(stream=digest, sizes=None)
    (to / STATE).write_bytes(as_json(state))
    return state


def _clear(to: Place) -> None:
    """Remove what a run left, also one that was killed at its first file or while it cleared."""
    if not to.is_folder():
        return
    for name in (entry.name for entry in to.entries()):
        if not (name == STATE or _SEGMENT.fullmatch(name) or name.startswith(".")):
            raise ArchiveError(
                f"{to} holds files that are no part of a spooled archive (first {name}); take them "
                "out or give another folder"
            )
    to.remove()


def _changed(why: str) -> ArchiveError:
    return ArchiveError(f"{why}; remove the folder and run the same command again")


def _segment_name(number: int) -> str:
    return f"segment-{number:06d}.tar"


def _kept(to: Place) -> list[int]:
    """Bytes of the segments that an earlier run finished, from the first on without a gap."""
    there = {entry.name: entry.size for entry in to.entries()}
    sizes: list[int] = []
    while (name := _segment_name(len(sizes))) in there:
        sizes.append(there[name])
    return sizes


def _check_room(source: Source, stream: Stream, to: Place, kept: int) -> None:
    """What is decompressed takes at least the compressed size: JPEGs shrink by about 1 %."""
    if to.local is None:
        return
    free, needed = shutil.disk_usage(to.local).free, stream.size - kept
    if free < needed:
        raise ArchiveError(
            f"{to} has {free / GIB:.1f} GiB free, and archive {source.archive} takes "
            f"{needed / GIB:.1f} GiB or more when decompressed; make room, or choose an output on "
            "a larger disk"
        )


def _units(source: Source, state: State) -> tuple[Unit, ...]:
    return tuple(
        Unit(
            kind="tar",
            path=_segment_name(number),
            name=_archive_name(source),
            size=size,
            above=state.above,
        )
        for number, size in enumerate(state.sizes or ())
    )


def _is_tree(source: Source, stream: Stream) -> bool:
    """Whether its folders tell splits and classes, and not lists or inner tars."""
    return source.listed is None and not stream.nested


def _archive_name(source: Source) -> str:
    """What messages call the members' archive: segments are nobody's business."""
    return printable(source.archive.name)


def _copy(
    source: Source, stream: Stream, inflated: Inflated, out: "_Segments", progress: Progress
) -> set[tuple[str, ...]]:
    """Write all members; the folders of a tree in which samples lie."""
    folders: set[tuple[str, ...]] = set()
    for found in walk(inflated, 0):
        entry = found.entry if isinstance(found, Damage) else found
        if stream.nested and entry is not None:  # one that is cut off has members too
            _copy_inner(source, inflated, entry, out, lambda: _tell(progress, inflated, stream))
        elif isinstance(found, TarEntry):
            _copy_member(source, inflated, found, found.name, out)
            if _is_tree(source, stream) and (above := sample_folders(found.name)):
                folders.add(above)
        if isinstance(found, Damage) and inflated.problem is None:  # else it is told below
            lost = None if found.open_ended else found.lost
            out.note(_archive_name(source), found.problem, lost)
        _tell(progress, inflated, stream)
    if inflated.problem is not None:
        problem = f"{inflated.problem}; what followed is lost"
        out.note(_archive_name(source), problem, inflated.lost)
    return folders


def _tell(progress: Progress, inflated: Inflated, stream: Stream) -> None:
    progress("spool", inflated.consumed, stream.size)


class _Inner:
    """A tar within a stream of tars, as `tars.Bytes`."""

    def __init__(self, outer: Inflated, start: int, size: int) -> None:
        self.end: int | None = start + size
        self._outer, self._behind = outer, start + size

    @property
    def stop(self) -> int | None:
        outer = self._outer.stop
        return self._behind if outer is None else min(self._behind, outer)

    def read(self, offset: int, size: int) -> bytes:
        return self._outer.read(offset, max(0, min(size, self._behind - offset)))


def _copy_inner(
    source: Source,
    inflated: Inflated,
    outer: TarEntry,
    out: "_Segments",
    tell: Callable[[], None],
) -> None:
    """The members of one class's tar; whatever else lies in the outer tar is no sample."""
    if outer.problem is not None or not is_tar(outer.name):
        return
    name = PurePosixPath(outer.name).stem
    inner = _Inner(inflated, outer.offset, outer.size)
    for found in walk(inner, outer.offset):
        if isinstance(found, Damage):
            out.note(f"{name}.tar", found.problem, found.lost)
        else:
            _copy_member(source, inner, found, f"{name}/{found.name}", out)
            tell()


def _copy_member(source: Source, data: Bytes, entry: TarEntry, name: str, out: "_Segments") -> None:
    """One member with its bytes, or a note of why it is no sample."""
    if entry.problem == DIRECTORY:
        return
    problem = entry.problem or name_problem(source.media, name, entry.size)
    if source.listed is not None and PurePosixPath(name).stem not in source.listed:
        problem = problem or UNLISTED
    if problem is not None:
        out.note(name, problem, 0)
        return
    with out.member(name, entry.size) as write:
        at, end = entry.offset, entry.offset + entry.size
        while at < end and (chunk := data.read(at, min(CHUNK_BYTES, end - at))):
            write(chunk)
            at += len(chunk)


class _Segments:
    """Writes members into segments one after the other; those that are there are only counted.

    Args:
        to: Their folder.
        kept: Bytes of the segments that are there.
        limit: A segment ends with the member that reaches so many bytes.
    """

    def __init__(self, to: Place, kept: list[int], limit: int) -> None:
        self.sizes: list[int] = []  # of the segments that are finished
        self._to, self._kept, self._limit = to, kept, limit
        self._scratch = tempfile.TemporaryDirectory() if to.local is None else None
        self._file: BinaryIO | None = None
        self._size = 0

    def __enter__(self) -> "_Segments":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._file is not None:
                with suppress(OSError):  # of a segment given up; what ends the block tells why
                    self._file.close()
            if self._scratch is not None:
                self._scratch.cleanup()

    @contextmanager
    def member(self, name: str, size: int) -> Iterator[Callable[[bytes], None]]:
        """Write a member; one whose data come short is taken back."""
        start = self._size
        info = tarfile.TarInfo(name)
        info.size = size
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        data_at = self._size
        yield self._write
        if self._size - data_at < size:
            self._take_back(start)
            return
        self._write(bytes(padding(size)))
        self._finish_if_full()

    def note(self, name: str, problem: str, lost: int | None) -> None:
        """Write what could not be kept, and why, as a member without data; `lost` as `Member`'s."""
        info = tarfile.TarInfo(name)
        info.pax_headers = {PROBLEM_RECORD: problem}
        if lost != 0:
            info.pax_headers[LOST_RECORD] = LOST_UNKNOWN if lost is None else str(lost)
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        self._finish_if_full()

    def _write(self, content: bytes) -> None:
        if len(self.sizes) >= len(self._kept):
            with plain_errors(self._to):
                if self._file is None:
                    self._file = self._temporary().open("wb")
                self._file.write(content)
        self._size += len(content)

    def _take_back(self, size: int) -> None:
        if self._file is not None:
            self._file.seek(size)
            self._file.truncate()
        self._size = size

    def _temporary(self) -> Path:
        folder = self._to.local or Path(self._scratch.name if self._scratch else "")
        return folder / f".{_segment_name(len(self.sizes))}.tmp"

    def _finish_if_full(self) -> None:
        if self._size >= self._limit:
            self._finish()

    def _finish(self) -> None:
        """Close a segment that has members, flush it to disk and put it in place."""
        if not self._size:
            return
        self._write(bytes(2 * BLOCK))
        place = self._to / _segment_name(len(self.sizes))
        if self._file is not None:
            with plain_errors(self._to):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            place.put(self._temporary())
            self._file = None
        elif self._size != self._kept[len(self.sizes)]:
            raise _changed(
                f"{place} has {self._kept[len(self.sizes)]} bytes where {self._size} were written"
            )
        self.sizes.append(self._size)
        self._size = 0
