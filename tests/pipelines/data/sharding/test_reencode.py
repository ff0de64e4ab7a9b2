"""Images made smaller on request: sizes, colours, and the same bytes every time."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipelines.data.manifest import Resized
from pipelines.data.sharding.reencode import reencode, shrunk
from pipelines.errors import DatasetError

SMALL = Resized(short_side=32, quality=90)


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((500, 375), (43, 32)),
        ((375, 500), (32, 43)),
        ((32, 900), (32, 900)),
        ((31, 40), (31, 40)),
        ((64, 64), (32, 32)),
        ((10_000, 33), (9697, 32)),
    ],
)
def test_the_short_side_shrinks_and_never_grows(size: tuple[int, int], to: tuple[int, int]) -> None:
    assert shrunk(size, 32) == to


def test_a_photograph_stays_what_it_was_but_smaller(
    noise: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    image = noise(96, 128)
    data, sizes = reencode(encode(image, "PNG"), SMALL)
    small = Image.open(io.BytesIO(data))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (32, 43))
    assert sizes.told() == {"from": (96, 128), "to": (32, 43), "quality": 90}
    expected = np.asarray(image.resize((32, 43), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(small, float) - expected).mean() < 4
    assert reencode(encode(image, "PNG"), SMALL)[0] == data


def test_fine_stripes_become_grey_and_not_a_pattern() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    file = io.BytesIO()
    Image.fromarray(stripes).convert("RGB").save(file, "PNG")
    small = np.asarray(Image.open(io.BytesIO(reencode(file.getvalue(), SMALL)[0])), float)
    assert abs(small.mean() - 127.5) < 3
    assert small.std() < 6


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"), ("I;16", "PNG"), ("1", "BMP")],
)
def test_every_kind_of_colour_becomes_rgb(
    noise: Callable[..., Image.Image], encode: Callable[..., bytes], mode: str, kind: str
) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((64, 64), 200 * 257, np.uint16))
    else:
        image = noise(64, 64).convert(mode)
    small = Image.open(io.BytesIO(reencode(encode(image, kind), SMALL)[0]))
    assert (small.mode, small.size) == ("RGB", (32, 32))
    if mode == "I;16":
        assert np.abs(np.asarray(small, float) - 200).max() < 3


def test_a_picture_lying_on_its_side_stays_so(noise: Callable[..., Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    noise(96, 64).save(file, "JPEG", exif=exif)
    small = Image.open(io.BytesIO(reencode(file.getvalue(), SMALL)[0]))
    assert small.size == (48, 32)
    assert not small.getexif()


def test_a_lower_quality_takes_fewer_bytes(
    noise: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    data = encode(noise(200, 200), "PNG")
    sizes = [
        len(reencode(data, Resized(short_side=100, quality=quality))[0]) for quality in (95, 30)
    ]
    assert sizes[0] > sizes[1]


def test_what_does_not_decode_is_told() -> None:
    with pytest.raises(DatasetError, match="does not decode as an image"):
        reencode(b"<html>", SMALL)
