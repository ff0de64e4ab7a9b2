"""From the bytes of an image file to RGB pixels of its own size.

What is done with the pixels is the subject of `transforms`, what is done with bytes that are no
image of `rows`.

Conventions where codebases differ:

* EXIF orientation is ignored, as every published ImageNet number does.
* Alpha is dropped without blending; a palette is looked up, CMYK converted by Pillow without
  colour profile, 16-bit grey keeps its upper byte. Of an animation the first frame counts.

Two decoders give the same pixels to the bit: Pillow, and `simplejpeg` for what it knows, that is
JPEGs of 8 bits with Huffman coding in grey or three colours. Everything else is Pillow's: other
formats, CMYK, and files with damage, of which Pillow decides whether it can be mended.
"""

import io
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import DatasetError

Pixels = NDArray[np.uint8]
FileBytes = bytes | bytearray | memoryview
Box = tuple[int, int, int, int]

# Only plain raster readers: Pillow knows others that run programs or fetch other files.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
MAX_PIXELS = 1 << 26

# Markers of a JPEG (ITU-T T.81, table B.1).
_START, _SCAN, _PROGRESSIVE = 0xD8, 0xDA, 0xC2
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # Huffman coding, not lossless
_TABLES = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})  # and comments
# To look through a file and copy it takes as long as to decode a fifteenth of it.
_WORTH_IT = 7 / 8
_MARKER = re.compile(rb"\xff[^\x00]")  # in what is coded, 0xFF is followed by 0


class JpegHeader(NamedTuple):
    """What the head of a JPEG says, as far as it matters here.

    Attributes:
        width, height: Pixels.
        frame_at: Byte where the frame header starts, which states the height.
        scan_at: Byte where the first scan starts.
        components: 1: grey, or 3 colours.
        progressive: No row is complete before the last scan.
        rows_below: Rows that colour of lower resolution needs below a pixel.
    """

    width: int
    height: int
    frame_at: int
    scan_at: int
    components: int
    progressive: bool
    rows_below: int


def decode_rgb(data: FileBytes) -> Image.Image:
    """Decode an image file of any colour kind to 8-bit RGB.

    Args:
        data: A JPEG, or any other of `FORMATS` whatever its name says.

    Raises:
        DatasetError: The bytes are no image, damaged, cut off, or larger than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DatasetError(
                f"an image of {image.width}x{image.height} pixels is refused as a "
                f"decompression bomb (at most {MAX_PIXELS} pixels)"
            )
        image.load()
        return image if image.mode == "RGB" else _to_rgb(image)
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make Pillow raise a dozen different classes
        # Pillow ends with the object that it read from, another address in every process.
        reason = str(error).split(" <_io.BytesIO", 1)[0] if data else "it is empty"
        raise DatasetError(f"does not decode as an image: {reason}") from error


def decode_window(
    data: FileBytes, window: Callable[[int, int], Box], *, decoder: str
) -> Image.Image | Pixels:
    """Decode a window of an image file; of most JPEGs only the rows down to the window's end.

    Args:
        data: As for `decode_rgb`.
        window: From the image's width and height to left, top, right and bottom; called once.
        decoder: "pillow", or "simplejpeg" for what it can take.

    Returns:
        The window's pixels; if simplejpeg decoded them a view, shape [height, width, 3].

    Raises:
        DatasetError: As `decode_rgb` does.
    """
    header = jpeg_header(data)
    if header is None:
        image = decode_rgb(data)
        return image.crop(window(*image.size))
    left, top, right, bottom = box = window(header.width, header.height)
    needed = upper_rows(data, header, bottom)
    if decoder == "simplejpeg":
        try:
            return _fast(needed, strict=needed is data)[top:bottom, left:right]
        except (ValueError, KeyError):  # KeyError: a sampling of colours that it has no name for
            pass
    image = decode_rgb(needed)
    return image if box == (0, 0, *image.size) else image.crop(box)


def _fast(data: FileBytes, *, strict: bool) -> Pixels:
    """The pixels of a JPEG; ValueError or KeyError if it is damaged or of an odd kind.

    Args:
        data: A JPEG.
        strict: Refuse what can be mended, too. Of a file that was shortened, what follows the last
            row counts as such damage; its head is in order all the same, or what simplejpeg calls
            mended would be memory that nobody wrote.
    """
    if not strict:
        simplejpeg.decode_jpeg_header(data)
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=strict)
    return pixels


def upper_rows(data: FileBytes, header: JpegHeader, rows: int) -> FileBytes:
    """The same JPEG, said to be only so high that its first `rows` rows decode to the same pixels.

    Entropy coding makes up most of decoding and can be left early, though not entered late. Only
    a file that is one scan without any marker inside, with its end in place, is shortened: in any
    other what follows may matter.
    """
    rows += header.rows_below
    if header.progressive or rows > header.height * _WORTH_IT:
        return data
    # A scan of all components with all their coefficients at full precision.
    at, count = header.scan_at, header.components
    whole = bytes(data[at + 2 : at + 5]) == bytes([0, 6 + 2 * count, count])
    whole &= bytes(data[at + 5 + 2 * count : at + 8 + 2 * count]) == b"\x00\x3f\x00"
    marker = _MARKER.search(data, at + 2)
    if not whole or marker is None or marker.group() != b"\xff\xd9" or marker.end() < len(data):
        return data
    shorter = bytearray(data)
    shorter[header.frame_at + 5 : header.frame_at + 7] = rows.to_bytes(2)
    return shorter


def jpeg_header(data: FileBytes) -> JpegHeader | None:
    """Read the head of a JPEG that both decoders know; None for all other bytes."""
    if len(data) < 4 or data[0] != 0xFF or data[1] != _START:
        return None
    frame_at, at = 0, 2
    try:
        while data[at] == 0xFF:
            marker = data[at + 1]
            if marker == 0xFF:  # a byte that only fills
                at += 1
                continue
            if marker == _SCAN:
                return _frame(data, frame_at, at) if frame_at else None
            if marker in _FRAMES:
                frame_at = at
            elif marker not in _TABLES:
                return None
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:
        pass
    return None


def _frame(data: FileBytes, at: int, scan_at: int) -> JpegHeader | None:
    """The frame header that starts at byte `at`; None if it is not of the common kind."""
    height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
    components = data[at + 9]
    if data[at + 4] != 8 or components not in (1, 3) or not 0 < width * height <= MAX_PIXELS:
        return None
    tallest = max(data[at + 11 + 3 * i] & 15 for i in range(components))
    progressive = data[at + 1] == _PROGRESSIVE
    return JpegHeader(width, height, at, scan_at, components, progressive, 2 * tallest)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = np.clip(np.asarray(image), 0, 0xFFFF) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):  # transparency in a palette needs its own step first
        image = image.convert("RGBA")
    return image.convert("RGB")
