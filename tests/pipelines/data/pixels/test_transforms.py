"""Pixels out of image files: against slow references, and by their statistics."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.pixels.augment import vary
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.pixels.transforms import (
    draw_crop,
    eval_image,
    mirror,
    resized,
    train_image,
)
from pipelines.data.settings import AugmentConfig
from pipelines.errors import DatasetError

SAMPLE = Path(__file__).parents[5] / "shared/data/imagenet-sample"
AREA, RATIO = (0.05, 1.0), (0.75, 4 / 3)
DECODERS = ["pillow", "simplejpeg"]


def train(data, *, rng=None, size=32, decoder="pillow", **augment):
    augment = AugmentConfig(**augment)
    return train_image(
        data, size=size, augment=augment, decoder=decoder, rng=rng or SampleRandom(1)
    )


def between_four(pixels, width, height):
    """Bilinear sampling without antialiasing, a pixel at a time; edges are repeated."""
    high, wide = pixels.shape[:2]
    out = np.empty((height, width, 3))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * high / height - 0.5, (j + 0.5) * wide / width - 0.5
            top, left = math.floor(y), math.floor(x)
            out[i, j] = sum(
                (1 - abs(y - row))
                * (1 - abs(x - column))
                * pixels[min(max(row, 0), high - 1), min(max(column, 0), wide - 1)]
                for row in (top, top + 1)
                for column in (left, left + 1)
            )
    return out.round()


def differences(one, other):
    """Mean and greatest difference of two pictures."""
    difference = np.abs(one.astype(int) - other.astype(int))
    return difference.mean(), difference.max()


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


def test_crops_spread_as_torchvisions_do():
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


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("seed", range(8))
def test_training_is_the_slow_crop_then_resize(noise, encode, seed, decoder):
    image = noise(120, 90, seed=seed)
    box = draw_crop(120, 90, area=AREA, ratio=RATIO, rng=SampleRandom(seed))
    data = encode(image)
    decoded = Image.open(io.BytesIO(data))
    slow = decoded.crop(box).resize((24, 24), Image.Resampling.BILINEAR)

    fast = train(data, size=24, decoder=decoder, flip=0.0, rng=SampleRandom(seed))

    assert differences(fast, np.asarray(slow))[1] <= (decoder == "simplejpeg")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("size", "to"), [((333, 250), 24), ((40, 31), 48), ((60, 60), 7)])
def test_without_antialiasing_a_pixel_lies_between_four_of_the_crop(
    noise, encode, size, to, kind, decoder
):
    grain = np.random.default_rng(0).integers(0, 64, (size[1], size[0], 3), dtype=np.uint8)
    data = encode(Image.fromarray(np.asarray(noise(*size)) // 2 + grain), kind)
    box = draw_crop(*size, area=AREA, ratio=RATIO, rng=SampleRandom(4))
    slow = between_four(np.asarray(Image.open(io.BytesIO(data)).crop(box)), to, to)

    fast = train(data, size=to, decoder=decoder, antialias=False, flip=0.0, rng=SampleRandom(4))

    assert fast.flags.c_contiguous
    assert differences(fast, slow)[1] <= 1
    smooth = train(data, size=to, decoder=decoder, flip=0.0, rng=SampleRandom(4))
    shrinks = box[2] - box[0] > 2 * to
    assert (differences(fast, smooth)[0] > 2) == shrinks


def test_without_antialiasing_both_decoders_give_the_same_pixels_to_the_bit(noise, encode):
    augment = {"antialias": False, "flip": 0.5, "randaugment_layers": 2, "grey": 0.3}
    for seed in range(10):
        data = encode(noise(200 - seed, 150 + seed, seed=seed))
        pillow, fast = (
            train(data, decoder=decoder, rng=SampleRandom(seed), **augment) for decoder in DECODERS
        )
        assert np.array_equal(pillow, fast)


@pytest.mark.parametrize("shape", [(1, 1), (20, 31), (224, 224), (3, 40_000)])
def test_mirroring_exchanges_left_and_right_exactly(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)

    assert np.array_equal(mirror(pixels), pixels[:, ::-1])
    assert np.array_equal(np.asarray(mirror(Image.fromarray(pixels))), pixels[:, ::-1])


@pytest.mark.parametrize(
    ("size", "to"),
    [((1, 1), (7, 5)), ((300, 1), (9, 9)), ((5, 4), (64, 64)), ((333, 500), (224, 224))],
)
def test_torch_resizes_as_pillow_does(size, to):
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = np.asarray(resized(Image.fromarray(pixels), *to))

    result = resized(pixels, *to)

    assert result.shape == expected.shape == (to[1], to[0], 3)
    assert result.flags.c_contiguous  # a batch takes it in one copy
    assert differences(result, expected)[1] <= 1


def test_a_decoding_thread_starts_no_threads_of_its_own(noise, encode):
    """Torch would start a pool for every thread that asks for much at once."""
    code = (
        "import sys, threading, torch\n"
        "from pathlib import Path\n"
        "from pipelines.data.pixels.random import SampleRandom\n"
        "from pipelines.data.settings import AugmentConfig\n"
        "from pipelines.data.pixels.transforms import eval_image, train_image\n"
        "torch.set_num_threads(4)\n"
        "data = sys.stdin.buffer.read()\n"
        "def decode():\n"
        "    before = len(list(Path('/proc/self/task').iterdir()))\n"
        "    augment = AugmentConfig(flip=1.0)\n"
        "    train_image(data, size=384, augment=augment, decoder='simplejpeg',\n"
        "                rng=SampleRandom(0))\n"
        "    augment = AugmentConfig(crop_area=(1.0, 1.0), antialias=False)\n"
        "    train_image(data, size=384, augment=augment, decoder='pillow', rng=SampleRandom(0))\n"
        "    eval_image(data, size=384, resize=400, decoder='simplejpeg')\n"
        "    print(len(list(Path('/proc/self/task').iterdir())) - before)\n"
        "thread = threading.Thread(target=decode)\n"
        "thread.start()\n"
        "thread.join()\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        input=encode(noise(1200, 900)),
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )

    assert done.stdout.strip() == b"0"


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_flip_probability_is_that_of_mirrored_results(noise, encode, decoder):
    data = encode(noise(40, 40))
    mirrored = 0
    for seed in range(400):
        plain = train(data, decoder=decoder, flip=0.0, rng=SampleRandom(seed))
        result = train(data, decoder=decoder, flip=0.3, rng=SampleRandom(seed))
        changed = not np.array_equal(result, plain)
        assert np.array_equal(result, plain[:, ::-1] if changed else plain)
        mirrored += changed

    assert mirrored == pytest.approx(120, abs=37)  # four standard deviations
    always = train(data, decoder=decoder, flip=1.0)
    assert np.array_equal(always, train(data, decoder=decoder, flip=0.0)[:, ::-1])


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

    result = eval_image(encode(image, "PNG"), size=short, resize=short, decoder="pillow")

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

    fast = eval_image(encode(image, "PNG"), size=size, resize=resize, decoder="pillow")

    mean, most = differences(fast, slow)
    assert most <= 1  # Pillow takes the window in float32
    assert mean < 0.02


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (40, 40), (36, 90)])
def test_both_decoders_evaluate_the_same_pixels(noise, encode, size):
    data = encode(noise(*size, seed=5))
    pillow, fast = (eval_image(data, size=32, resize=36, decoder=d) for d in DECODERS)

    assert fast.shape == pillow.shape == (32, 32, 3)
    assert differences(fast, pillow)[1] <= (0 if min(size) == 36 else 2)


def test_evaluation_takes_every_shape_of_image(encode):
    for width, height in [(1, 1), (1, 400), (397, 2), (7, 5), (223, 449), (333, 1013)]:
        data = encode(Image.new("RGB", (width, height), (9, 80, 200)), "PNG")

        assert (eval_image(data, size=24, resize=27, decoder="pillow") == [9, 80, 200]).all()


def test_a_thin_image_is_not_scaled_beyond_its_centre(noise, encode):
    """All of this one would be 64 x 3,840,000 pixels."""
    data = encode(noise(1, 60_000))

    pillow, fast = (eval_image(data, size=64, resize=64, decoder=d) for d in DECODERS)

    assert np.array_equal(pillow, fast)


def test_draws_come_in_the_order_crop_flip_variation(noise, encode):
    data = encode(noise(60, 50))
    augment = AugmentConfig(flip=0.5, randaugment_layers=2, randaugment_magnitude=8, grey=0.5)
    for seed in range(20):
        rng = SampleRandom(seed)
        box = draw_crop(60, 50, area=augment.crop_area, ratio=augment.crop_ratio, rng=rng)
        image = Image.open(io.BytesIO(data)).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        if rng.uniform() < 0.5:
            image = mirror(image)
        expected = np.asarray(vary(image, augment, rng))

        result = train_image(
            data, size=32, augment=augment, decoder="pillow", rng=SampleRandom(seed)
        )

        assert np.array_equal(result, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("augment", [{}, {"randaugment_layers": 3, "grey": 0.3, "mixup": 0.5}])
def test_what_is_drawn_does_not_depend_on_the_decoder(noise, encode, kind, augment):
    """Afterwards both have drawn equally many numbers."""
    data = encode(noise(80, 70), kind)
    for seed in range(10):
        rngs = [SampleRandom(seed), SampleRandom(seed)]
        for decoder, rng in zip(DECODERS, rngs, strict=True):
            assert train(data, rng=rng, decoder=decoder, **augment).shape == (32, 32, 3)
        assert rngs[0].word() == rngs[1].word()


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of ImageNet is not at hand")
def test_real_photos_give_the_same_pixels_by_both_decoders():
    """One of 255 at most in training; two where Pillow resizes an evaluation's window."""
    means = []
    for seed, path in enumerate(sorted(SAMPLE.glob("*.JPEG"))[::9]):
        data = path.read_bytes()
        pillow, fast = (
            train(data, size=224, decoder=decoder, rng=SampleRandom(seed)) for decoder in DECODERS
        )
        assert differences(pillow, fast)[1] <= 1
        means.append(differences(pillow, fast)[0])
        pillow, fast = (
            eval_image(data, size=224, resize=256, decoder=decoder) for decoder in DECODERS
        )
        assert differences(pillow, fast)[1] <= 2
        means.append(differences(pillow, fast)[0])
    assert sum(means) / len(means) < 0.04


@pytest.mark.parametrize("decoder", DECODERS)
def test_bytes_that_are_no_image_are_refused(decoder):
    with pytest.raises(DatasetError, match="does not decode as an image: cannot identify"):
        train(b"no image", decoder=decoder)
    with pytest.raises(DatasetError, match="does not decode as an image: it is empty"):
        eval_image(b"", size=8, resize=9, decoder=decoder)


def test_crop_shares_of_thin_images_never_leave_the_image():
    for width, height in [(1, 900), (900, 1), (2, 3), (17, 640)]:
        for seed in range(200):
            left, top, right, bottom = draw_crop(
                width, height, area=AREA, ratio=RATIO, rng=SampleRandom(seed)
            )
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert math.isfinite((right - left) / (bottom - top))
