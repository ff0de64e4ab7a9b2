"""Walks through tars: where every entry's bytes lie, and where a damaged tar stops making sense.

Python's `tarfile` ends quietly at a damaged header and takes the rest for absent. Here a walk ends
at the end-of-archive blocks, with nothing but zeros behind them, or it ends in a `Damage` that says
at which byte and how much is lost; what stands before the damage is told first. Nothing is
unpacked, and at most one header is held. What the entries mean is told elsewhere (`scan`).

Understood are ustar, GNU (long names, base-256 numbers, sparse) and PAX headers, from any byte of
any file that can be read at an offset: inner tars are walked where they lie in an outer one.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

BLOCK = 512
AHEAD_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of a long name or PAX header; real ones have a few hundred
LARGEST_PLAIN = 8**11 - 1  # bytes of a member that a header tells without base-256 or PAX
DIRECTORY = "is a directory"

# Our own PAX records, which `spool` writes for what it could not keep.
PROBLEM_RECORD = "MONE.problem"
LOST_RECORD = "MONE.lost"
LOST_UNKNOWN = "unknown"

_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS = b"L", b"K", b"x", b"g", b"X"
_EXTENDED = (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TarEntry:
    """One entry of a tar.

    Attributes:
        name: As it stands in the tar, decoded as UTF-8; other bytes are lone surrogates.
        offset: Byte of the file where its data begin.
        size: Bytes of data.
        problem: Why it is no plain file, or None; `DIRECTORY` for a directory.
        lost: Bytes that a note of `spool` says are lost, None: nobody knows how many; else 0.
    """

    name: str
    offset: int
    size: int
    problem: str | None
    lost: int | None = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """Where a walk had to stop before the end.

    Attributes:
        position: Byte of the file where the next header should stand.
        problem: What is wrong, to be put after the tar's name.
        lost: Bytes from there to where the tar should end.
        entry: The entry that is cut off, if it is known; its data end too early.
        open_ended: The tar is cut off where its file ends, so that nobody knows what should follow.
    """

    position: int
    problem: str
    lost: int
    entry: TarEntry | None = None
    open_ended: bool = False


class Bytes(Protocol):
    """What a walk reads from: bytes by offset, fewer only where the file ends."""

    @property
    def end(self) -> int | None:
        """First byte behind the tar, as it should be; None: a stream ends where it ends."""

    @property
    def stop(self) -> int | None:
        """Where the bytes really end, at most `end`; None: not known yet."""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on; fewer than `size` only where they end."""


class Window:
    """A stretch of a file that is read mostly front to back, in large pieces.

    Args:
        file: An open file.
        start: First byte of the stretch.
        size: Bytes of the stretch as they should be; the file may end before.
        ahead: Bytes to read at once where fewer are asked for; small for walks that skip data.
    """

    def __init__(
        self, file: pa.NativeFile, start: int, size: int, *, ahead: int = AHEAD_BYTES
    ) -> None:
        self.end = start + size
        self.stop = min(self.end, max(start, file.size()))
        self._file, self._ahead = file, ahead
        self._held, self._held_at = b"", start

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on; fewer than `size` only at the end of stretch or file."""
        first = offset - self._held_at
        if first >= 0 and first + size <= len(self._held):
            return self._held[first : first + size]
        left = self.stop - offset
        if left <= 0:  # an object store refuses to read there, where a disk gives nothing
            return b""
        if size >= self._ahead:
            return bytes(self._file.read_at(min(size, left), offset))
        self._held = bytes(self._file.read_at(min(self._ahead, left), offset))
        self._held_at = offset
        return self._held[:size]


def walk(data: Bytes, start: int) -> Iterator[TarEntry | Damage]:
    """The entries of a tar in order, then a `Damage` if it does not end as a tar ends.

    An entry's data are not read; the caller may, before it takes the next entry.

    Args:
        data: What the tar lies in.
        start: Byte where it begins.

    Yields:
        Every entry whose header is whole, and whose data end within the tar.
    """
    position = start
    while True:
        try:
            step = _next_entry(data, position)
        except _NotATarError as error:
            yield _damage(data, position, str(error), error.entry)
            return
        except (ValueError, OverflowError, tarfile.TarError):
            yield _damage(data, position, "no tar header")
            return
        if step is None:
            yield from _check_end(data, position)
            return
        entry, position = step
        yield entry


class _NotATarError(Exception):
    """What stands where a header should; ends a walk."""

    def __init__(self, why: str, entry: TarEntry | None = None) -> None:
        super().__init__(why)
        self.entry = entry


def _next_entry(data: Bytes, position: int) -> tuple[TarEntry, int] | None:
    """The entry whose headers begin at a position, and where the next begins; None: zeros."""
    pax: dict[str, bytes] = {}
    long_name: bytes | None = None
    first = True
    while True:
        block = data.read(position, BLOCK)
        if len(block) < BLOCK:
            raise _NotATarError("cut off")
        if first and not any(block):
            return None
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if info.size < 0:
            raise _NotATarError("a negative size")
        position += BLOCK
        if info.type not in _EXTENDED:
            return _entry(data, info, block, position, pax, long_name)
        content = _extended(data, info, position)
        position += _padded(info.size)
        first = False
        if info.type == _LONG_NAME:
            long_name = content.split(b"\0", 1)[0]
        elif info.type in (_PAX, _PAX_SOLARIS):
            pax |= _pax_records(content)


def _extended(data: Bytes, info: tarfile.TarInfo, position: int) -> bytes:
    if info.size > MAX_HEADER_BYTES:
        raise _NotATarError(f"a header of {info.size} bytes")
    content = data.read(position, info.size)
    if len(content) < info.size:
        raise _NotATarError("cut off")
    return content


def _entry(
    data: Bytes,
    info: tarfile.TarInfo,
    block: bytes,
    position: int,
    pax: dict[str, bytes],
    long_name: bytes | None,
) -> tuple[TarEntry, int]:
    """Put a header and the extended ones before it together."""
    size = _true_size(info, pax)
    sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax)
    if info.type == tarfile.GNUTYPE_SPARSE and block[482]:
        position = _behind_sparse_map(data, position)
    name = pax.get("path", long_name)
    text = info.name if name is None else name.decode("utf-8", "surrogateescape")
    if info.type == tarfile.AREGTYPE and text.endswith("/"):
        info.type = tarfile.DIRTYPE
    if info.type in _WITHOUT_DATA:
        size = 0
    entry = TarEntry(
        name=text,
        offset=position,
        size=size,
        problem=_kind_problem(info, text, sparse) or _note(pax),
        lost=_lost(pax),
    )
    if data.stop is not None and position + size > data.stop:
        raise _NotATarError("cut off", entry)
    return entry, position + _padded(size)


def _true_size(info: tarfile.TarInfo, pax: dict[str, bytes]) -> int:
    """The size of a header, or that of its PAX records where the header's own has no room."""
    if "size" not in pax:
        return info.size
    size = _number(pax["size"])
    if size <= LARGEST_PLAIN and size != info.size:
        raise _NotATarError("two sizes for one member")
    return size


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise _NotATarError("a PAX record without its number")
    return int(text)


def _note(pax: dict[str, bytes]) -> str | None:
    note = pax.get(PROBLEM_RECORD)
    return None if note is None else note.decode("utf-8", "backslashreplace")


def _lost(pax: dict[str, bytes]) -> int | None:
    told = pax.get(LOST_RECORD, b"0")
    return None if told == LOST_UNKNOWN.encode() else _number(told)


def _pax_records(content: bytes) -> dict[str, bytes]:
    """Records of the form "<length> <key>=<value>\\n"."""
    records = {}
    while content and content[0]:
        digits, space, _ = content.partition(b" ")
        length = _number(digits)
        record = content[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (space and equals and value.endswith(b"\n") and length <= len(content)):
            raise _NotATarError("a damaged PAX header")
        records[key.decode("utf-8", "backslashreplace")] = value[:-1]
        content = content[length:]
    return records


def _behind_sparse_map(data: Bytes, position: int) -> int:
    """Skip the blocks that go on with an old GNU sparse map; each tells whether one follows."""
    more = True
    while more:
        block = data.read(position, BLOCK)
        if len(block) < BLOCK:
            raise _NotATarError("cut off")
        more = bool(block[504])
        position += BLOCK
    return position


def _kind_problem(info: tarfile.TarInfo, name: str, sparse: bool) -> str | None:
    if info.isdir():
        return DIRECTORY
    if info.issym() or info.islnk():
        return "is a link"
    if sparse:
        return "is a sparse file"
    if not info.isfile():
        return "is not a plain file"
    if name.startswith("/"):
        return "has an absolute path as its name"
    if ".." in name.split("/"):
        return "has a name that leads outside, with '..'"
    return None


def padding(size: int) -> int:
    """Bytes of zeros behind a member's data, up to the next header."""
    return -size % BLOCK


def _padded(size: int) -> int:
    return size + padding(size)


def _damage(data: Bytes, position: int, why: str, entry: TarEntry | None = None) -> Damage:
    """Word the end of a walk at `position`, where a header should stand."""
    stop = position if data.stop is None else data.stop
    is_cut = why == "cut off" or stop < position + BLOCK
    text = (
        f"is cut off: it ends at byte {stop}; what followed is lost"
        if is_cut
        else f"is damaged: {why} at byte {position} of {stop}; what follows is lost"
    )
    end = stop if data.end is None else data.end
    return Damage(
        position=position,
        problem=text,
        lost=max(0, end - position),
        entry=entry,
        open_ended=is_cut and end == stop,
    )


def _check_end(data: Bytes, position: int) -> Iterator[Damage]:
    """Nothing but zeros may stand from the end-of-archive blocks to the end of the file."""
    at, more = position + BLOCK, False
    while chunk := data.read(at, AHEAD_BYTES):
        at += len(chunk)
        more = more or any(chunk)
        if more and data.end is not None:
            break
    if more:
        yield Damage(
            position=position,
            problem=f"goes on after its end-of-archive blocks at byte {position}, as joined "
            "tars do; what follows is lost: pack it again as one tar",
            lost=(at if data.end is None else data.end) - position,
        )
