"""Images made smaller on request, before they go into shards: the one place that re-encodes.

The short side becomes at most what was asked for; an image that is small enough keeps its size,
and becomes a JPEG all the same. Colours become RGB as everywhere (`decode`), and EXIF orientation
is not applied, as nowhere. The same bytes in give the same bytes out.
"""

import io
from dataclasses import dataclass

from PIL import Image

from pipelines.data.archives.probe import LONGEST_SIDE
from pipelines.data.manifest import Resized
from pipelines.data.pixels.decode import decode_rgb
from pipelines.errors import DatasetError

TOO_LONG = f"would have a side above the {LONGEST_SIDE} pixels of a JPEG when resized"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What was done to an image: `from_` and `to` are width and height, `quality` the JPEG's."""

    from_: tuple[int, int]
    to: tuple[int, int]
    quality: int

    def told(self) -> dict[str, object]:
        """As the sample's json says it."""
        return {"from": self.from_, "to": self.to, "quality": self.quality}


def reencode(data: bytes, resized: Resized) -> tuple[bytes, Sizes]:
    """An image file as an RGB JPEG whose short side is at most `resized.short_side`.

    Args:
        data: Any image file that decodes.
        resized: Short side in pixels, JPEG quality.

    Raises:
        DatasetError: The bytes do not decode, or the image is too long for a JPEG.
    """
    image = decode_rgb(data)
    size = shrunk(image.size, resized.short_side)
    if max(size) > LONGEST_SIDE:
        raise DatasetError(TOO_LONG)
    small = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    # Pillow would otherwise copy what the file said of itself, such as its orientation.
    small.save(file, "JPEG", quality=resized.quality, exif=b"", icc_profile=None)
    return file.getvalue(), Sizes(from_=image.size, to=size, quality=resized.quality)


def refused(data: bytes, resized: Resized) -> str | None:
    """Why an image cannot be re-encoded, as `scan` says what is wrong with it; None: it can."""
    try:
        reencode(data, resized)
    except DatasetError as error:
        return str(error)
    return None


def shrunk(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Width and height with the short side at most `short_side`, proportions kept."""
    least = min(size)
    if least <= short_side:
        return size
    width, height = (max(1, round(side * short_side / least)) for side in size)
    return width, height
