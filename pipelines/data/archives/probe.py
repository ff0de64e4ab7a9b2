"""Whether the bytes of a file are a sample: it decodes completely, and what is unusual about it.

Decoding is that of training (`decode`, `video`), so what passes here does not fail there.
Which files are looked at, and what becomes of the answer, is the subject of `scan`.
"""

import io
import warnings
from pathlib import PurePosixPath

from PIL import ExifTags, Image, TiffImagePlugin

from pipelines.data.archives.names import IMAGE_KINDS
from pipelines.data.pixels.decode import FORMATS, decode_rgb
from pipelines.data.pixels.video import probe_video
from pipelines.data.sources.base import Found, Media
from pipelines.errors import DatasetError

MAX_BYTES: dict[Media, int] = {"image": 256 << 20, "video": 1 << 30}
SMALL_SIDE = 32  # the cleaned copy of winter21 has none below
LONGEST_SIDE = 65_500  # pixels, of a JPEG as libjpeg writes it
LONG = f"has a side above {LONGEST_SIDE} pixels"
_GREY_MODES = ("1", "L", "LA", "I", "F")


def probe(media: Media, data: bytes, name: str = "") -> Found:
    """Decode a file completely.

    Args:
        media: What it should be.
        data: The whole file.
        name: Its name, to remark on a suffix that misleads; empty: not known.

    Returns:
        Why it does not decode, or what is unusual about it; texts are few, so that they count.
    """
    if not data:
        return Found("is empty", None)
    if media == "video":
        return probe_video(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it can read nevertheless
        return _probe_image(data, PurePosixPath(name).suffix.lower())


def _probe_image(data: bytes, suffix: str) -> Found:
    try:
        decode_rgb(data)
        remarks = _image_remarks(data, suffix)
    except DatasetError as error:
        return Found(" ".join(str(error).split()), None)
    except MemoryError:
        return Found("does not decode as an image: it takes more memory than there is", None)
    return Found(None, "; ".join(remarks) or None)


def _image_remarks(data: bytes, suffix: str) -> list[str]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = "JPEG" if image.format == "MPO" else image.format  # JPEGs of several pictures
        named = IMAGE_KINDS.get(suffix, kind)
        checks = {
            f"is {kind}, not {named} as its name says": kind != named,
            "is CMYK": image.mode == "CMYK",
            "is greyscale": image.mode.split(";")[0] in _GREY_MODES,
            "has alpha, which is dropped": image.has_transparency_data,
            "has more than 8 bits a channel, which are reduced to 8": _is_deep(image, data),
            "has several frames, of which the first counts": _has_frames(image),
            f"has EXIF orientation {_orientation(image)}, which is ignored": _orientation(image)
            not in (0, 1),
            f"has a side below {SMALL_SIDE} pixels": min(image.size) < SMALL_SIDE,
            LONG: max(image.size) > LONGEST_SIDE,
        }
    return [text for text, applies in checks.items() if applies]


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """More than 8 bits; Pillow turns 16-bit colour into 8 bits without telling."""
    if image.format == "PNG":
        return data[24] == 16  # in IHDR, which is always the first chunk
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))
        return bool(max(bits if isinstance(bits, tuple) else (bits,)) > 8)
    return image.mode.startswith(("I", "F"))


def _has_frames(image: Image.Image) -> bool:
    """More than one picture, as far as the file's bytes make sense behind the first."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # noqa: BLE001 - foreign bytes that no training will look at
        return True


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 0: none, or EXIF that cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 0)
    except Exception:  # noqa: BLE001 - foreign bytes that no training will look at
        return 0
    return value if isinstance(value, int) and 1 <= value <= 8 else 0
