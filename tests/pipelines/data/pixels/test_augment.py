"""Changes of colour and shape: every operation against its formula, and what a seed draws."""

import colorsys
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipelines.data.pixels import augment as module
from pipelines.data.pixels.augment import GREY, OPERATIONS, STILL_OPERATIONS, jitter, varies, vary
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.settings import AugmentConfig

SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def picture(width=60, height=50, seed=0):
    """Smooth colours between 20 and 219 with some grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 200, (5, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)))
    return Image.fromarray(smooth + rng.integers(0, 20, smooth.shape, dtype=np.uint8))


def seed_of(sign):
    """A seed whose first number keeps or turns the sign."""
    return next(s for s in range(99) if (SampleRandom(s).uniform() < 0.5) == (sign < 0))


def apply(name, image, magnitude, *, sign=1, frames=1):
    rng = SampleRandom(seed_of(sign))
    return np.asarray(OPERATIONS[name](image, magnitude / 10, rng, frames)).astype(int)


def grey_of(x):
    return x @ [0.299, 0.587, 0.114]


def blend(other, x, factor):
    return np.clip(other + factor * (x - other), 0, 255)


def by_channel(table):
    """A formula of one channel, for all three."""
    return lambda x, magnitude: np.stack([table(x[..., c], magnitude) for c in range(3)], -1)


def stretched(x, _):
    return (x - x.min()) * 255 / (x.max() - x.min())


def equalized(x, _):
    """Levels replaced by their rank, in steps of a 255th of the pixels without the brightest."""
    counts = np.bincount(x.ravel(), minlength=256)
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    below = np.concatenate([[0], counts.cumsum()[:-1]])
    return np.clip((below + step // 2) // step, 0, 255)[x]


def smoothed(x):
    """Weights 1 around 5; the border as it was."""
    out = x.astype(float)
    shifted = [np.roll(x, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    out[1:-1, 1:-1] = ((sum(shifted) + 4 * x) / 13)[1:-1, 1:-1]
    return out


def strength(magnitude):
    return magnitude / 10 * 1.8 + 0.1


FORMULAS = {
    "auto_contrast": by_channel(stretched),
    "equalize": by_channel(equalized),
    "invert": lambda x, _: 255 - x,
    "posterize": lambda x, m: x >> (8 - min(8, int(m / 10 * 4))) << (8 - min(8, int(m / 10 * 4))),
    "solarize": lambda x, m: np.where(x < int(m / 10 * 256), x, 255 - x),
    "solarize_add": lambda x, m: np.where(x < 128, np.minimum(255, x + int(m / 10 * 110)), x),
    "color": lambda x, m: blend(grey_of(x)[..., None], x, strength(m)),
    "contrast": lambda x, m: blend(round(grey_of(x).mean()), x, strength(m)),
    "brightness": lambda x, m: blend(0, x, strength(m)),
    "sharpness": lambda x, m: blend(smoothed(x), x, strength(m)),
}


@pytest.mark.parametrize("magnitude", [0, 3, 10, 15, 20, 30])
@pytest.mark.parametrize("name", FORMULAS)
def test_operations_on_colour_are_their_formulas(name, magnitude):
    """Up to what rounding the other operand by less than one level makes of it."""
    image = picture(seed=magnitude)
    x = np.asarray(image).astype(int)

    difference = np.abs(apply(name, image, magnitude) - FORMULAS[name](x, magnitude))

    blends = name in ("color", "contrast", "sharpness")
    assert difference.max() <= 1 + (abs(1 - strength(magnitude)) if blends else 0)


def moved(x, source):
    """Pixels taken from where `source` says, the nearest; grey where that is outside."""
    height, width, _ = x.shape
    out = np.empty_like(x)
    for row in range(height):
        for column in range(width):
            across, down = source(column + 0.5, row + 0.5)
            inside = 0 <= across < width and 0 <= down < height
            out[row, column] = x[int(down), int(across)] if inside else GREY
    return out


def turned(across, down, degrees, width, height):
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = across - width / 2, down - height / 2
    return cos * x - sin * y + width / 2, sin * x + cos * y + height / 2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [2, 9, 17])
@pytest.mark.parametrize("name", SIGNED)
def test_operations_that_move_pixels_fill_with_grey_what_comes_from_outside(name, magnitude, sign):
    image = picture(61, 50)
    part = sign * magnitude / 10
    sources = {
        "rotate": lambda x, y: turned(x, y, 30 * part, 61, 50),
        "shear_x": lambda x, y: (x + 0.3 * part * y, y),
        "shear_y": lambda x, y: (x, y + 0.3 * part * x),
        "translate_x": lambda x, y: (x + 100 * part, y),
        "translate_y": lambda x, y: (x, y + 100 * part),
    }

    expected = moved(np.asarray(image).astype(int), sources[name])

    wrong = (apply(name, image, magnitude, sign=sign) != expected).any(axis=-1)
    assert wrong.mean() < 0.01  # where the source lies between two pixels


@pytest.mark.parametrize("magnitude", [0, 3, 20])
def test_cutout_paints_a_grey_square_whose_centre_lies_anywhere(magnitude):
    image, half = picture(), int(magnitude / 10 * 40)
    for seed in range(20):
        rng = SampleRandom(seed)
        y, x = rng.below(50), rng.below(60)
        expected = np.array(image)
        expected[max(0, y - half) : y + half, max(0, x - half) : x + half] = GREY

        result = OPERATIONS["cutout"](image, magnitude / 10, SampleRandom(seed), 1)

        assert np.array_equal(np.asarray(result), expected)
    assert np.array_equal(np.asarray(image), np.asarray(picture()))  # not painted on


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_colour_and_one_pixel_are_taken_by_every_operation(name):
    for size in ((1, 1), (1, 9), (8, 8)):
        image = Image.new("RGB", size, (7, 130, 255))
        for magnitude in (0, 10, 30):
            assert apply(name, image, magnitude).shape == (size[1], size[0], 3)


def test_layers_draw_every_operation_equally_often(monkeypatch):
    drawn = Counter()

    def noting(name):
        def note(image, level, rng, frames):
            drawn[name] += 1
            assert (level, frames) == (1.5, 1)
            return image

        return note

    monkeypatch.setattr(module, "OPERATIONS", {name: noting(name) for name in OPERATIONS})
    augment = AugmentConfig(randaugment_layers=3, randaugment_magnitude=15)
    for seed in range(1600):
        vary(picture(4, 4), augment, SampleRandom(seed))

    assert sum(drawn.values()) == 4800
    assert len(drawn) == 16
    assert all(abs(count - 300) < 75 for count in drawn.values())


def test_what_a_seed_draws_is_fixed_for_ever(monkeypatch):
    """The operations, and how many numbers they and the others took."""
    names = []

    def noting(name):
        def note(*args):
            names.append(name)
            return OPERATIONS[name](*args)

        return note

    monkeypatch.setattr(module, "OPERATIONS", {name: noting(name) for name in OPERATIONS})
    augment = AugmentConfig(
        randaugment_layers=8, randaugment_magnitude=9, color_jitter=0.8, grey=0.2
    )
    rng = SampleRandom(11)

    vary(picture(), augment, rng)

    expected = "solarize posterize shear_x invert brightness equalize translate_x solarize_add"
    assert names == expected.split()
    assert rng.word() == 0x9C296A35D300CDF6


def test_nothing_asked_for_changes_nothing_and_draws_nothing():
    image, rng = picture(), SampleRandom(4)

    assert not varies(AugmentConfig())
    assert vary(image, AugmentConfig(), rng) is image
    assert rng.word() == SampleRandom(4).word()
    for asked in ({"randaugment_layers": 1}, {"color_jitter": 0.1}, {"grey": 0.1}):
        assert varies(AugmentConfig(**asked))


@pytest.mark.parametrize("field", ["color_jitter", "grey"])
def test_probabilities_are_those_of_changed_pictures(field):
    image = picture(8, 8)
    changed = [
        vary(image, AugmentConfig(**{field: 0.3}), SampleRandom(seed)) is not image
        for seed in range(1000)
    ]

    assert sum(changed) == pytest.approx(300, abs=58)  # four standard deviations


def test_grey_is_the_luma_of_every_pixel():
    image = picture()

    result = np.asarray(vary(image, AugmentConfig(grey=1.0), SampleRandom(0))).astype(float)

    assert (np.ptp(result, axis=-1) == 0).all()
    assert np.abs(result[..., 0] - grey_of(np.asarray(image))).max() <= 1


def test_jitter_is_brightness_saturation_contrast_and_hue_in_turn():
    for seed in range(6):
        rng = SampleRandom(seed)
        shift, saturation = rng.uniform(-32, 32), rng.uniform(0.6, 1.4)
        contrast, turn = rng.uniform(0.6, 1.4), rng.uniform(-0.2, 0.2)
        image = picture(12, 10, seed)
        x = np.clip(np.asarray(image).astype(float) + shift, 0, 255)
        x = blend(grey_of(x)[..., None], x, saturation)
        x = blend(grey_of(x).mean(), x, contrast)
        expected = np.empty_like(x)
        for at in np.ndindex(x.shape[:2]):
            hue, s, v = colorsys.rgb_to_hsv(*(x[at] / 255))
            expected[at] = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, s, v)) * 255

        result = np.asarray(jitter(image, SampleRandom(seed)))

        difference = np.abs(result - expected)
        assert difference.mean() < 2.5  # every step rounds to 8 bits, hue to a 256th of a turn
        assert difference.max() < 14


def test_jitter_draws_within_its_ranges(monkeypatch):
    ranges = []

    class Noting(SampleRandom):
        def uniform(self, low=0.0, high=1.0):
            ranges.append((low, high))
            return super().uniform(low, high)

    jitter(picture(4, 4), Noting(0))

    assert ranges == [(-32, 32), (0.6, 1.4), (0.6, 1.4), (-0.2, 0.2)]


def clip(frames):
    """Frames with colours of their own, stacked."""
    stacked = np.concatenate([np.asarray(picture(20, 16, seed)) for seed in range(frames)])
    return Image.fromarray(stacked)


def test_operations_that_move_pixels_are_not_drawn_for_clips():
    assert set(OPERATIONS) - set(STILL_OPERATIONS) == set(SIGNED)
    # Black frames above white ones: whoever moves pixels mixes them, or fills with grey.
    frames = np.repeat(np.array([0, 255], np.uint8), 16)[:, None, None]
    image = Image.fromarray(np.broadcast_to(frames, (32, 20, 3)).copy())
    augment = AugmentConfig(randaugment_layers=1, randaugment_magnitude=20)
    for seed in range(300):
        result = np.asarray(vary(image, augment, SampleRandom(seed), frames=2))
        colours = {tuple(colour) for colour in result[:16].reshape(-1, 3)} - {GREY}
        assert len(colours) <= 1


@pytest.mark.parametrize("name", ["cutout", "sharpness", "invert", "color", "brightness"])
def test_every_frame_of_a_clip_is_changed_as_it_would_be_alone(name):
    stacked = clip(3)

    together = apply(name, stacked, 17, frames=3)

    for number in range(3):
        alone = apply(name, picture(20, 16, number), 17)
        assert np.array_equal(together[16 * number : 16 * (number + 1)], alone)


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "contrast"])
def test_statistics_are_those_of_the_whole_clip(name):
    x = np.asarray(clip(3)).astype(int)

    difference = np.abs(apply(name, clip(3), 12, frames=3) - FORMULAS[name](x, 12))

    assert difference.max() <= 1 + abs(1 - strength(12))


def test_a_clip_keeps_equal_frames_equal():
    frame = np.asarray(picture(24, 18))
    image = Image.fromarray(np.concatenate([frame] * 4))
    augment = AugmentConfig(
        randaugment_layers=2, randaugment_magnitude=20, color_jitter=0.8, grey=0.1
    )
    for seed in range(100):
        frames = np.split(np.asarray(vary(image, augment, SampleRandom(seed), frames=4)), 4)
        assert all(np.array_equal(frames[0], other) for other in frames[1:])
