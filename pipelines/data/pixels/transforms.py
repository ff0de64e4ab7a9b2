"""From the bytes of an image file to uint8 pixels of a fixed size, for training and for evaluation.

Pure functions: what is random comes from a `SampleRandom` that the caller seeds. Which seed a
sample has is the subject of `order`, how bytes are decoded of `decode`, what else is varied of
`augment`; which sample failed is said by `rows`.

Resampling is bilinear with antialiasing (Pillow's, or torch's, which is the same up to rounding:
one of 255 at most); a random crop may be resampled without (torch's for both decoders, since Pillow
has none), as TensorFlow does by default. The crop is cut out first, so that no pixel outside of it
takes part; the centre of an evaluation is cut out last.

Axes: H height, W width, 3 red-green-blue.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.data.pixels.augment import varies, vary
from pipelines.data.pixels.decode import MAX_PIXELS, Box, FileBytes, Pixels, decode_window
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.settings import AugmentConfig

__all__ = ["Pixels", "draw_crop", "eval_image", "mirror", "resized", "sampled", "train_image"]

CROP_TRIES = 10
# Torch shares larger pieces of a flip among threads, a pool of them for each thread that decodes.
_ONE_THREAD = 32_767


def train_image(
    data: FileBytes, *, size: int, augment: AugmentConfig, decoder: str, rng: SampleRandom
) -> Pixels:
    """Decode, crop at random, resize, perhaps mirror and vary an image for training.

    Args:
        data: An image file.
        size: Height and width of the result, pixels.
        augment: How much is varied.
        decoder: "pillow" or "simplejpeg", see `ReadConfig`. What is drawn does not depend on it.
        rng: Random numbers of the sample; drawn in the order crop, flip, `augment.vary`.

    Returns:
        Pixels, uint8, shape [size, size, 3].

    Raises:
        DatasetError: The image does not decode.
    """
    crop = partial(draw_crop, area=augment.crop_area, ratio=augment.crop_ratio, rng=rng)
    window = decode_window(data, crop, decoder=decoder)
    picture = resized(window, size, size) if augment.antialias else sampled(window, size, size)
    if rng.uniform() < augment.flip:
        picture = mirror(picture)
    if varies(augment):
        picture = vary(_as_image(picture), augment, rng)
    return np.asarray(picture)


def eval_image(data: FileBytes, *, size: int, resize: int, decoder: str) -> Pixels:
    """Decode an image, scale its short side to `resize` and cut out the centre.

    An image whose short side is `resize` already is only cut: its decoded pixels pass untouched.

    Args:
        data: An image file.
        size: Height and width of the result, pixels, at most `resize`.
        resize: Short side after scaling, pixels.
        decoder: "pillow" or "simplejpeg", see `ReadConfig`.

    Returns:
        Pixels, uint8, shape [size, size, 3].

    Raises:
        DatasetError: The image does not decode.
    """
    picture = decode_window(data, _all_of_it, decoder=decoder)
    width, height = _size(picture)
    short = min(width, height)
    wide, high = round(width * resize / short), round(height * resize / short)
    left, top = (wide - size) // 2, (high - size) // 2
    if wide * high > MAX_PIXELS:  # of a thin image; Pillow makes no more of it than the centre
        picture = _as_image(picture)
    if isinstance(picture, Image.Image):  # both steps at once, through the centre's window
        across, down = width / wide, height / high
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return np.asarray(resized(picture, wide, high))[top : top + size, left : left + size]


def draw_crop(
    width: int,
    height: int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    rng: SampleRandom,
) -> Box:
    """Draw the window of an Inception crop (Szegedy et al. 2014, arXiv 1409.4842).

    The paper leaves open how; this is torchvision's rule. Ten tries of a uniform share of the area
    and a log-uniform width / height ratio; if none fits into the image, the largest centred window
    whose ratio is within `ratio`. TensorFlow's sampler, which big_vision and V-MoE use, draws the
    ratio itself uniformly, then a height.

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


def resized(picture: Image.Image | Pixels, width: int, height: int) -> Image.Image | Pixels:
    """All of a picture at another size; pixels stay an array, an image an image."""
    if isinstance(picture, Image.Image):
        return picture.resize((width, height), Image.Resampling.BILINEAR)
    return _interpolated(np.ascontiguousarray(picture), width, height, antialias=True)


def sampled(picture: Image.Image | Pixels, width: int, height: int) -> Pixels:
    """All of a picture at another size: each pixel lies between four of the picture's.

    Whatever lies between these is left out where a picture shrinks to less than half.
    """
    return _interpolated(np.array(picture), width, height, antialias=False)


def _interpolated(source_HW3: Pixels, width: int, height: int, *, antialias: bool) -> Pixels:
    # Torch takes its fast path for bytes only if the picture is a channels-last batch without gaps,
    # and answers in the same layout. The copy was numpy's, which stays in this thread.
    source_13HW = torch.from_numpy(source_HW3.reshape(1, *source_HW3.shape)).permute(0, 3, 1, 2)
    out_13HW = F.interpolate(source_13HW, (height, width), mode="bilinear", antialias=antialias)
    out_HW3: Pixels = out_13HW.permute(0, 2, 3, 1)[0].numpy()
    return out_HW3


def mirror(picture: Image.Image | Pixels) -> Image.Image | Pixels:
    """The picture with left and right exchanged."""
    if isinstance(picture, Image.Image):
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    source_HW3 = torch.from_numpy(picture)
    out_HW3 = torch.empty_like(source_HW3)
    rows = max(1, _ONE_THREAD // (3 * source_HW3.shape[1]))
    for top in range(0, source_HW3.shape[0], rows):
        # Ten times as fast as numpy's view with a negative stride.
        out_HW3[top : top + rows] = source_HW3[top : top + rows].flip(1)
    flipped: Pixels = out_HW3.numpy()
    return flipped


def _all_of_it(width: int, height: int) -> Box:
    return 0, 0, width, height


def _size(picture: Image.Image | Pixels) -> tuple[int, int]:
    """Width and height."""
    if isinstance(picture, Image.Image):
        return picture.size
    return picture.shape[1], picture.shape[0]


def _as_image(picture: Image.Image | Pixels) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
