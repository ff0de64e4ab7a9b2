"""From the bytes of an image file to uint8 pixels of a fixed size, for training and for evaluation.

Pure functions: what is random comes from a `SampleRandom` that the caller seeds. Which seed a
sample has is the subject of `order`; which sample failed is said by `stream`.

Conventions where codebases differ:

* EXIF orientation is ignored, as every published ImageNet number does.
* Alpha is dropped without blending; a palette is looked up, CMYK converted by Pillow without
  colour profile, 16-bit grey keeps its upper byte. Of an animation the first frame counts.
* Resampling is bilinear with antialiasing (Pillow's), through a window of the source: pixels
  just outside the window take part at its edges, where crop-then-resize would repeat none.

Axes: H height, W width, 3 red-green-blue.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.order import GOLDEN_GAMMA, WORD_MASK, mix64
from pipelines.errors import DatasetError

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

# Only plain raster readers: Pillow knows others that run programs or fetch other files.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
MAX_PIXELS = 1 << 26
CROP_TRIES = 10


class SampleRandom:
    """The random numbers of one sample in one epoch: splitmix64, a hashed counter.

    Not numpy's Generator, whose distributions may change their stream between versions
    (NEP 19), while a resumed run must repeat its crops to the bit; and making one costs more
    than all the numbers a sample needs.
    """

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & WORD_MASK

    def word(self) -> int:
        """64 random bits as an int."""
        self._state = (self._state + GOLDEN_GAMMA) & WORD_MASK
        return mix64(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high), from 53 random bits."""
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)

    def below(self, limit: int) -> int:
        """An integer in [0, limit); its bias is below limit / 2^64."""
        return (self.word() * limit) >> 64


def decode_rgb(data: bytes) -> Image.Image:
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
        reason = str(error) if data else "it is empty"
        raise DatasetError(f"does not decode as an image: {reason}") from error


def draw_crop(
    width: int,
    height: int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    rng: SampleRandom,
) -> Box:
    """Draw the window of an Inception crop (Szegedy et al. 2014, arXiv 1409.4842).

    Ten tries of a uniform share of the area and a log-uniform width / height ratio; if none
    fits into the image, the largest centred window whose ratio is within `ratio`.

    Args:
        width: Width of the image, pixels.
        height: Height of the image, pixels.
        area: Least and greatest share of the image's area.
        ratio: Least and greatest width / height of the window.
        rng: Random numbers of the sample.

    Returns:
        Left, top, right, bottom in pixels; right and bottom are just outside.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_TRIES):
        target = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.below(width - w + 1), rng.below(height - h + 1)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    image: Image.Image,
    size: int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    rng: SampleRandom,
) -> Image.Image:
    """Resize an Inception crop (`draw_crop`) of an image to `size` x `size` pixels."""
    box = draw_crop(image.width, image.height, area=area, ratio=ratio, rng=rng)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def mirror(image: Image.Image) -> Image.Image:
    """The image with left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def train_transform(
    data: bytes,
    *,
    size: int,
    crop_area: tuple[float, float],
    crop_ratio: tuple[float, float],
    flip: float,
    rng: SampleRandom,
) -> Pixels:
    """Decode, crop at random, resize and perhaps mirror an image for training.

    Args:
        data: An image file.
        size: Height and width of the result, pixels.
        crop_area: Least and greatest share of the image's area that the crop takes.
        crop_ratio: Least and greatest width / height of the crop.
        flip: Probability of exchanging left and right.
        rng: Random numbers of the sample.

    Returns:
        Pixels, uint8, shape [size, size, 3].

    Raises:
        DatasetError: The image does not decode.
    """
    image = random_resized_crop(decode_rgb(data), size, area=crop_area, ratio=crop_ratio, rng=rng)
    return np.asarray(mirror(image) if rng.uniform() < flip else image)


def eval_transform(data: bytes, *, size: int, resize: int) -> Pixels:
    """Decode an image, scale its short side to `resize` and cut out the centre.

    Scaling and cutting are one resampling through the centre's window of the source. An image
    whose short side is `resize` already is only cut: its decoded pixels pass untouched.

    Args:
        data: An image file.
        size: Height and width of the result, pixels, at most `resize`.
        resize: Short side after scaling, pixels.

    Returns:
        Pixels, uint8, shape [size, size, 3].

    Raises:
        DatasetError: The image does not decode.
    """
    image = decode_rgb(data)
    short = min(image.width, image.height)
    wide, high = (round(side * resize / short) for side in (image.width, image.height))
    left, top = (wide - size) // 2, (high - size) // 2
    across, down = image.width / wide, image.height / high
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = np.clip(np.asarray(image), 0, 0xFFFF) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):  # transparency in a palette needs its own step first
        image = image.convert("RGBA")
    return image.convert("RGB")
