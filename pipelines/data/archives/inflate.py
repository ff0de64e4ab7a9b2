"""The bytes of a compressed archive, from front to back: gzip, perhaps in parts and members.

What can be decompressed before a damage is given, then the stream ends and says why. Memory is a
few MiB. Tars are walked in it as in a file (`tars.Bytes`), only never backward.
"""

import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pyarrow as pa

from pipelines.storage import Place, plain_errors

READ_BYTES = 4 << 20
FEED_BYTES = 64 << 10
PIECE_BYTES = 1 << 20
_GZIP = 31  # zlib's number for a gzip header and its checksum
_MAGIC = b"\x1f\x8b"


class Inflated:
    """A gzip stream that lies in one file, or in several one after the other.

    Attributes:
        end: None, since its length is not known before it ends.
        stop: Where it ended, in decompressed bytes; None: not yet.
        problem: Why it ended too early; None: it has not, or not yet.
        lost: Compressed bytes that could not be read; None: it is cut off, and nobody knows how
            many should follow; 0 for a stream that is whole.
        consumed: Compressed bytes read so far.
    """

    end: int | None = None

    def __init__(self, places: Sequence[Place]) -> None:
        self.stop: int | None = None
        self.problem: str | None = None
        self.lost: int | None = 0
        self.consumed = 0
        self._places = list(places)
        self._file: pa.NativeFile | None = None
        self._raw, self._raw_at = b"", 0
        self._machine = zlib.decompressobj(_GZIP)
        self._begun = False  # a gzip member whose end has not come yet
        self._at = 0  # decompressed byte at which `_piece` begins
        self._piece, self._next = b"", 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on, fewer only where the stream ends.

        Args:
            offset: Decompressed byte, not before the end of what was read last.
            size: Bytes.
        """
        now = self._at + self._next
        if offset < now:
            raise ValueError(f"a stream is not read backward, from {now} to {offset}")
        skip = offset - now
        while skip > 0 and self._fill():
            step = min(skip, len(self._piece) - self._next)
            self._next += step
            skip -= step
        pieces = []
        while size > 0 and skip == 0 and self._fill():
            piece = self._piece[self._next : self._next + size]
            self._next += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _fill(self) -> bool:
        """Have at least a byte at hand; False: the stream has ended."""
        while self._next == len(self._piece):
            self._at += len(self._piece)
            self._piece, self._next = b"", 0
            if self.stop is not None:
                return False
            self._piece = self._inflate()
            if self.problem is not None or (not self._piece and self._ended()):
                self.stop = self._at + len(self._piece)
        return True

    def _ended(self) -> bool:
        return not self._left() and not self._read()

    def _inflate(self) -> bytes:
        """Some decompressed bytes; none does not mean the end."""
        if self._machine.eof:
            self._begin_member()
        if not self._left() and not self._read():
            return self._last_bytes()
        feed = self._raw[self._raw_at : self._raw_at + FEED_BYTES]
        before = self._machine.copy()
        try:
            piece = self._machine.decompress(feed, PIECE_BYTES)
        except zlib.error as error:
            return self._up_to_damage(before, feed, error)
        unused = len(self._machine.unused_data) or len(self._machine.unconsumed_tail)
        self._raw_at += len(feed) - unused
        self._begun = not self._machine.eof
        return piece

    def _last_bytes(self) -> bytes:
        """What the decompressor still holds when the files have ended."""
        piece = self._machine.decompress(b"", PIECE_BYTES) if self._begun else b""
        self._begun = self._begun and not self._machine.eof
        if not piece and self._begun:
            self.problem, self.lost = "is cut off: its compressed data end too early", None
        return piece

    def _up_to_damage(self, machine: "zlib._Decompress", feed: bytes, error: zlib.error) -> bytes:
        """Byte by byte, so that all is kept that stands before the damage."""
        pieces = []
        at = 0
        try:
            for at in range(len(feed)):
                pieces.append(machine.decompress(feed[at : at + 1]))
        except zlib.error:
            self._raw_at += at
        behind = self._file.size() - self._file.tell() if self._file is not None else 0
        self.lost = self._left() + behind + sum(place.size() for place in self._places)
        byte = self.consumed - self._left()
        words = str(error).rpartition(": ")[2]
        self.problem = f"is damaged: its compressed data break off at byte {byte} ({words})"
        return b"".join(pieces)

    def _begin_member(self) -> None:
        """Behind a gzip member: another one, zeros, or nothing."""
        while self._left() or self._read():
            rest = self._raw[self._raw_at :].lstrip(b"\0")
            self._raw_at = len(self._raw) - len(rest)
            if rest:
                self._machine = zlib.decompressobj(_GZIP)
                return

    def _left(self) -> int:
        return len(self._raw) - self._raw_at

    def _read(self) -> bool:
        """The next compressed bytes; False: there are no more."""
        while self._file is not None or self._places:
            if self._file is None:
                self._place = self._places.pop(0)
                self._file = self._place.open()
            with plain_errors(self._place):
                self._raw, self._raw_at = bytes(self._file.read(READ_BYTES)), 0
            self.consumed += len(self._raw)
            if self._raw:
                return True
            self._file.close()
            self._file = None
        return False
