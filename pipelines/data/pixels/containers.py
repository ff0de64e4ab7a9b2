"""How long a video file says it is: one that was cut off is shorter than its own headers say.

FFmpeg plays what is left of such a file and reports no error, so that a transfer that broke
would go unnoticed. Nothing else of a container is read here (`video`).
"""

from pipelines.data.pixels.decode import FileBytes

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"moof")


def missing_bytes(data: FileBytes) -> int:
    """How many bytes a file lacks that it says it has; 0: none, or it does not say.

    Args:
        data: An mp4 or mov, a webm or mkv, or an AVI; anything else does not say.
    """
    if data[4:8] in _BOXES:
        return max(0, _mp4_end(data) - len(data))
    if data[:4] == _EBML:
        return max(0, _matroska_end(data) - len(data))
    if data[:4] == b"RIFF":
        return max(0, 8 + int.from_bytes(data[4:8], "little") - len(data))
    return 0


def _mp4_end(data: FileBytes) -> int:
    """Where the last of the top-level boxes ends: 32 bits of size, or 64 behind the name."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: up to the end of the file; anything else is no box
            return 0
        at += size
    return at


def _matroska_end(data: FileBytes) -> int:
    """Where the segment ends that follows the header; 0 where its size is left open."""
    _, at, size = _element(data, 0)
    name, at, size = _element(data, at + size)
    return at + size if name == _SEGMENT and size else 0


def _element(data: FileBytes, at: int) -> tuple[bytes, int, int]:
    """Name, first byte and size of an EBML element; leading zero bits tell a number's length."""
    name = bytes(data[at : at + _length(data, at)])
    at += len(name)
    length = _length(data, at)
    bits = 7 * length
    size = int.from_bytes(data[at : at + length], "big") & ((1 << bits) - 1)
    return name, at + length, 0 if size == (1 << bits) - 1 else size


def _length(data: FileBytes, at: int) -> int:
    return 9 - data[at].bit_length() if at < len(data) else 0
