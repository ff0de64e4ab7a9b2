"""Changes of colour and shape beyond crop and flip: RandAugment, colour jitter, grey.

RandAugment (arXiv 1909.13719) with the operations, ranges and grey filling of the TensorFlow form
that the ViT, V-MoE and ViViT recipes use: a magnitude of 10 is the end of the ranges that
AutoAugment searched, and larger ones go on beyond. Where that form and Pillow's differ, Pillow's
holds: `contrast` turns towards the image's mean grey (TensorFlow's towards a grey that depends on
the number of pixels alone, 196 for 224 x 224), and colours are rounded a step earlier or later.

Colour jitter has the ranges of ViViT's recipe for Kinetics; grey takes all colour away.

A clip comes as its frames stacked on top of each other and is varied as one image: what depends on
an image's histogram or mean (`auto_contrast`, `equalize`, `contrast`) depends on the whole clip's,
as in ViViT. Operations that move pixels are left out; `cutout` hits the same place of every frame
and `sharpness` treats each frame alone.
"""

from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

from pipelines.data.pixels.random import SampleRandom
from pipelines.data.settings import AugmentConfig

GREY = (128, 128, 128)  # fills what an operation leaves empty
_SCALE = 10.0  # the magnitude at which the ranges below end
_LEVELS = 256

Operation = Callable[[Image.Image, float, SampleRandom, int], Image.Image]


def varies(augment: AugmentConfig) -> bool:
    """Whether `vary` does anything."""
    return bool(augment.randaugment_layers or augment.color_jitter or augment.grey)


def vary(
    image: Image.Image, augment: AugmentConfig, rng: SampleRandom, *, frames: int = 1
) -> Image.Image:
    """Apply RandAugment, then colour jitter, then grey, as far as they are asked for.

    Args:
        image: An RGB image, or so many frames of equal height stacked on top of each other.
        augment: What is asked for. What is not asked for draws no random numbers.
        rng: Random numbers of the sample.
        frames: Frames in `image`.

    Returns:
        An image of the same size.
    """
    names = tuple(OPERATIONS if frames == 1 else STILL_OPERATIONS)
    for _ in range(augment.randaugment_layers):
        operation = OPERATIONS[names[rng.below(len(names))]]
        image = operation(image, augment.randaugment_magnitude / _SCALE, rng, frames)
    if augment.color_jitter and rng.uniform() < augment.color_jitter:
        image = jitter(image, rng)
    if augment.grey and rng.uniform() < augment.grey:
        image = ImageOps.grayscale(image).convert("RGB")
    return image


def jitter(image: Image.Image, rng: SampleRandom) -> Image.Image:
    """Change brightness, saturation, contrast and hue, in this order."""
    shift = round(rng.uniform(-32, 32))
    image = _by_level(image, lambda level: level + shift)
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.6, 1.4))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.4))
    hue, saturation, value = image.convert("HSV").split()
    turn = round(_LEVELS * rng.uniform(-0.2, 0.2))
    hue = hue.point([(level + turn) % _LEVELS for level in range(_LEVELS)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _by_level(image: Image.Image, change: Callable[[int], int]) -> Image.Image:
    """The image with every level of every colour replaced."""
    table = [min(255, max(0, change(level))) for level in range(_LEVELS)]
    return image.point(table * 3)


def _signed(amount: float, rng: SampleRandom) -> float:
    return -amount if rng.uniform() < 0.5 else amount


def _frame_by_frame(
    image: Image.Image, frames: int, change: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """The image with each of its frames changed by itself."""
    if frames == 1:
        return change(image)
    out, height = Image.new("RGB", image.size), image.height // frames
    for top in range(0, image.height, height):
        out.paste(change(image.crop((0, top, image.width, top + height))), (0, top))
    return out


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The image whose pixel (x, y) is the source's at (ax + by + c, dx + ey + f), the nearest."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY
    )


def _auto_contrast(
    image: Image.Image, _level: float, _rng: SampleRandom, _frames: int
) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, _level: float, _rng: SampleRandom, _frames: int) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, _level: float, _rng: SampleRandom, _frames: int) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, level: float, rng: SampleRandom, _frames: int) -> Image.Image:
    return image.rotate(_signed(30.0 * level, rng), Image.Resampling.NEAREST, fillcolor=GREY)


def _posterize(image: Image.Image, level: float, _rng: SampleRandom, _frames: int) -> Image.Image:
    lost = 8 - min(8, int(4 * level))  # lowest bits
    return _by_level(image, lambda value: value >> lost << lost)


def _solarize(image: Image.Image, level: float, _rng: SampleRandom, _frames: int) -> Image.Image:
    return ImageOps.solarize(image, int(256 * level))


def _solarize_add(
    image: Image.Image, level: float, _rng: SampleRandom, _frames: int
) -> Image.Image:
    addition = int(110 * level)
    return _by_level(image, lambda value: value + addition if value < 128 else value)


def _strength(level: float) -> float:
    """How much of the image's own colour, contrast and so on is left; above 1 it grows."""
    return 1.8 * level + 0.1


def _color(image: Image.Image, level: float, _rng: SampleRandom, _frames: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_strength(level))


def _contrast(image: Image.Image, level: float, _rng: SampleRandom, _frames: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_strength(level))


def _brightness(image: Image.Image, level: float, _rng: SampleRandom, _frames: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_strength(level))


def _sharpness(image: Image.Image, level: float, _rng: SampleRandom, frames: int) -> Image.Image:
    def sharpened(frame: Image.Image) -> Image.Image:
        return ImageEnhance.Sharpness(frame).enhance(_strength(level))

    return _frame_by_frame(image, frames, sharpened)


def _shear_x(image: Image.Image, level: float, rng: SampleRandom, _frames: int) -> Image.Image:
    return _moved(image, (1.0, _signed(0.3 * level, rng), 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Image.Image, level: float, rng: SampleRandom, _frames: int) -> Image.Image:
    return _moved(image, (1.0, 0.0, 0.0, _signed(0.3 * level, rng), 1.0, 0.0))


def _translate_x(image: Image.Image, level: float, rng: SampleRandom, _frames: int) -> Image.Image:
    return _moved(image, (1.0, 0.0, _signed(100.0 * level, rng), 0.0, 1.0, 0.0))


def _translate_y(image: Image.Image, level: float, rng: SampleRandom, _frames: int) -> Image.Image:
    return _moved(image, (1.0, 0.0, 0.0, 0.0, 1.0, _signed(100.0 * level, rng)))


def _cutout(image: Image.Image, level: float, rng: SampleRandom, frames: int) -> Image.Image:
    """Paint a square grey whose centre lies anywhere in the image."""
    half, height = int(40 * level), image.height // frames
    y, x = rng.below(height), rng.below(image.width)
    top, bottom = max(0, y - half), min(height, y + half)
    out = image.copy()
    for start in range(0, image.height, height):
        out.paste(GREY, (max(0, x - half), start + top, min(image.width, x + half), start + bottom))
    return out


# The order decides which number draws which operation: it is part of what a seed means.
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "cutout": _cutout,
    "solarize_add": _solarize_add,
}
_MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
STILL_OPERATIONS: dict[str, Operation] = {
    name: operation for name, operation in OPERATIONS.items() if name not in _MOVING
}
