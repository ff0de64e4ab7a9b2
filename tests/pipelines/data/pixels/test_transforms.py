"""Pixels out of image files: against slow references, and by their statistics."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from pipelines.data import transforms
from pipelines.data.transforms import (
    SampleRandom,
    decode_rgb,
    draw_crop,
    eval_transform,
    mirror,
    random_resized_crop,
    train_transform,
)
from pipelines.errors import DatasetError

AREA, RATIO = (0.05, 1.0), (0.75, 4 / 3)


def train(data, **changes):
    settings = {"size": 32, "crop_area": AREA, "crop_ratio": RATIO, "flip": 0.5} | changes
    return train_transform(data, **{"rng": SampleRandom(1)} | settings)


def test_random_numbers_are_fixed_for_ever_by_their_seed():
    rng = SampleRandom(0)

    assert [rng.word() for _ in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert SampleRandom(0).uniform() == (0xE220A8397B1DCDAF >> 11) / 2**53
    assert SampleRandom(0).below(1000) == 0xE220A8397B1DCDAF * 1000 // 2**64


def test_random_numbers_are_even_and_stay_in_range():
    rng = SampleRandom(5)
    uniform = np.array([rng.uniform(2.0, 4.0) for _ in range(20_000)])
    below = np.bincount([rng.below(7) for _ in range(21_000)])

    assert uniform.min() >= 2.0
    assert uniform.max() < 4.0
    assert uniform.mean() == pytest.approx(3.0, abs=0.02)
    assert len(below) == 7
    assert np.abs(below - 3000).max() < 250


def test_crops_stay_inside_the_image_and_within_the_asked_area_and_ratio():
    for seed in range(2000):
        left, top, right, bottom = draw_crop(
            500, 375, area=(0.2, 0.6), ratio=RATIO, rng=SampleRandom(seed)
        )
        assert 0 <= left < right <= 500
        assert 0 <= top < bottom <= 375
        share = (right - left) * (bottom - top) / (500 * 375)
        assert 0.2 - 0.005 < share < 0.6 + 0.005
        assert RATIO[0] - 0.01 < (right - left) / (bottom - top) < RATIO[1] + 0.01


def test_crops_spread_as_the_paper_asks():
    """Where every try fits: area uniform, log ratio uniform, places even."""
    boxes = np.array(
        [
            draw_crop(999, 999, area=(0.1, 0.5), ratio=RATIO, rng=SampleRandom(s))
            for s in range(4000)
        ]
    )
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = np.quantile(width * height / 999**2, [0.25, 0.5, 0.75])
    log_ratio = np.quantile(np.log(width / height), [0.25, 0.5, 0.75])

    assert area == pytest.approx([0.2, 0.3, 0.4], abs=0.012)
    assert log_ratio == pytest.approx(np.log(4 / 3) * np.array([-0.5, 0, 0.5]), abs=0.015)
    assert (boxes[:, 0] / (999 - width)).mean() == pytest.approx(0.5, abs=0.02)
    assert (boxes[:, 1] / (999 - height)).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 100, (433, 0, 566, 100)),  # too wide: full height at the greatest ratio
        (100, 1000, (0, 433, 100, 566)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_an_image_that_no_crop_fits_gives_its_largest_centred_window(width, height, expected):
    box = draw_crop(width, height, area=(0.9, 1.0), ratio=RATIO, rng=SampleRandom(0))

    assert box == expected


@pytest.mark.parametrize("seed", range(8))
def test_a_resized_crop_is_the_slow_crop_then_resize_away_from_its_edges(noise, seed):
    image = noise(120, 90, seed=seed)
    box = draw_crop(120, 90, area=AREA, ratio=RATIO, rng=SampleRandom(seed))

    fast = random_resized_crop(image, 24, area=AREA, ratio=RATIO, rng=SampleRandom(seed))
    slow = image.crop(box).resize((24, 24), Image.Resampling.BILINEAR)

    difference = np.abs(np.asarray(fast, int) - np.asarray(slow, int))[1:-1, 1:-1]
    assert difference.max() <= 1  # the filter's weights are rounded from other offsets
    assert difference.mean() < 0.01


def test_mirroring_exchanges_left_and_right_exactly(noise):
    image = noise(31, 20)

    assert np.array_equal(np.asarray(mirror(image)), np.asarray(image)[:, ::-1])


def test_the_flip_probability_is_that_of_mirrored_results(noise, encode):
    data = encode(noise(40, 40))
    mirrored = 0
    for seed in range(400):
        plain = train(data, flip=0.0, rng=SampleRandom(seed))
        result = train(data, flip=0.3, rng=SampleRandom(seed))
        changed = not np.array_equal(result, plain)
        assert np.array_equal(result, plain[:, ::-1] if changed else plain)
        mirrored += changed

    assert mirrored == pytest.approx(120, abs=37)  # four standard deviations
    always = train(data, flip=1.0)
    assert np.array_equal(always, train(data, flip=0.0)[:, ::-1])


def test_training_pixels_are_a_function_of_bytes_and_seed(noise, encode):
    data = encode(noise(64, 48))

    first = train(data)
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, train(data))
    assert not np.array_equal(first, train(data, rng=SampleRandom(2)))


@pytest.mark.parametrize("size", [(32, 32), (33, 48), (48, 32), (500, 40), (32, 1000)])
def test_an_image_of_the_right_scale_is_only_cut_by_evaluation(noise, encode, size):
    image = noise(*size)
    short = min(size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2

    result = eval_transform(encode(image, "PNG"), size=short, resize=short)

    untouched = np.asarray(image)[top : top + short, left : left + short]
    assert np.array_equal(result, untouched)


@pytest.mark.parametrize(
    ("width", "height", "size", "resize"),
    [(500, 375, 224, 256), (375, 500, 224, 224), (64, 64, 32, 36), (50, 201, 64, 73)],
)
def test_evaluation_is_the_slow_resize_then_centre_crop(noise, encode, width, height, size, resize):
    image = noise(width, height, seed=3)
    scale = resize / min(width, height)
    scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    slow = np.asarray(scaled.crop((left, top, left + size, top + size)))

    fast = eval_transform(encode(image, "PNG"), size=size, resize=resize)

    difference = np.abs(fast.astype(int) - slow)
    assert difference.max() <= 1  # Pillow takes the window in float32
    assert difference.mean() < 0.02


def test_evaluation_takes_every_shape_of_image(encode):
    for width, height in [(1, 1), (1, 400), (397, 2), (7, 5), (223, 449), (333, 1013)]:
        data = encode(Image.new("RGB", (width, height), (9, 80, 200)), "PNG")

        assert (eval_transform(data, size=24, resize=27) == [9, 80, 200]).all()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("1", "PNG"), ("RGBA", "PNG")],
)
def test_every_colour_kind_becomes_rgb(noise, encode, mode, kind):
    image = noise(40, 30, mode=mode)

    decoded = decode_rgb(encode(image, kind))

    assert decoded.mode == "RGB"
    assert decoded.size == (40, 30)
    difference = np.abs(np.asarray(decoded, int) - np.asarray(image.convert("RGB"), int))
    assert difference.mean() < 3  # JPEG's own loss


def test_a_palette_with_transparency_loses_only_its_transparency(encode):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=b"\x00\x80")

    assert np.asarray(decode_rgb(file.getvalue())).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_sixteen_bit_grey_keeps_its_upper_byte(encode):
    grey = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)

    decoded = np.asarray(decode_rgb(encode(Image.fromarray(grey), "PNG")))

    assert decoded[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_exif_orientation_is_ignored(noise):
    image, file = noise(40, 20), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    image.save(file, "JPEG", exif=exif)

    assert decode_rgb(file.getvalue()).size == (40, 20)


def test_bytes_that_are_no_image_say_why(noise, encode):
    whole = encode(noise(64, 64))

    with pytest.raises(DatasetError, match="does not decode as an image: it is empty"):
        decode_rgb(b"")
    with pytest.raises(DatasetError, match="does not decode as an image: cannot identify"):
        decode_rgb(b"not an image")
    with pytest.raises(DatasetError, match=r"does not decode as an image: .*[Tt]runcated"):
        decode_rgb(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="does not decode as an image"):
        decode_rgb(encode(noise(64, 64), "PNG")[:60])


def test_formats_that_can_run_programs_are_not_even_tried():
    with pytest.raises(DatasetError, match="cannot identify"):
        decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(noise, encode, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 1000)

    with pytest.raises(
        DatasetError,
        match=r"40x30 pixels is refused as a decompression bomb \(at most 1000 pixels\)",
    ):
        decode_rgb(encode(noise(40, 30)))


def test_crop_shares_of_thin_images_never_leave_the_image():
    for width, height in [(1, 900), (900, 1), (2, 3), (17, 640)]:
        for seed in range(200):
            left, top, right, bottom = draw_crop(
                width, height, area=AREA, ratio=RATIO, rng=SampleRandom(seed)
            )
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert math.isfinite((right - left) / (bottom - top))
