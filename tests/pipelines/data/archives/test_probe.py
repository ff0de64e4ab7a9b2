"""What is an image, and what is unusual about one: as training's own decoder sees it."""

import io
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pipelines.data.archives.probe import probe
from pipelines.data.pixels import decode
from pipelines.data.sources.base import Found
from tests.raw_archives import encoded, jpeg, picture


def test_a_plain_jpeg_has_neither_problem_nor_remark() -> None:
    assert probe("image", jpeg(), "n01_1.JPEG") == Found(None, None)
    assert probe("image", jpeg()) == Found(None, None)


def test_what_is_no_image_has_a_problem_without_addresses_of_memory() -> None:
    assert probe("image", b"") == Found("is empty", None)
    found = probe("image", b"<html>404</html>", "n01_1.JPEG")
    assert found == Found("does not decode as an image: cannot identify image file", None)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_a_cut_off_image_of_any_kind_is_a_problem(kind: str) -> None:
    data = encoded(picture(1, (90, 80)), kind)
    assert probe("image", data).problem is None
    problem = probe("image", data[: len(data) // 2]).problem
    assert problem is not None
    assert problem.startswith("does not decode as an image: ")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("mode", "kind", "remark"),
    [
        ("CMYK", "JPEG", "is CMYK"),
        ("L", "JPEG", "is greyscale"),
        ("1", "PNG", "is greyscale"),
        ("LA", "PNG", "is greyscale; has alpha, which is dropped"),
        ("RGBA", "PNG", "has alpha, which is dropped"),
        ("P", "PNG", None),
        (
            "I;16",
            "PNG",
            "is greyscale; has more than 8 bits a channel, which are reduced to 8",
        ),
    ],
)
def test_unusual_pixels_are_kept_with_a_remark(mode: str, kind: str, remark: str | None) -> None:
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture().convert(mode)
    assert probe("image", encoded(image, kind)) == Found(None, remark)


def test_16_bit_colour_is_told_though_pillow_hides_it() -> None:
    pixels = np.zeros((33, 33 * 6 + 1), np.uint8).tobytes()
    parts = [
        PngImagePlugin.o32(33) * 2 + bytes([16, 2, 0, 0, 0]),
        zlib.compress(pixels),
    ]
    png = io.BytesIO()
    png.write(b"\x89PNG\r\n\x1a\n")
    for name, content in zip((b"IHDR", b"IDAT", b"IEND"), (*parts, b""), strict=True):
        PngImagePlugin.putchunk(png, name, content)
    found = probe("image", png.getvalue())
    assert found == Found(None, "has more than 8 bits a channel, which are reduced to 8")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_a_name_that_misleads_is_told(kind: str) -> None:
    found = probe("image", encoded(picture(), kind), "n01_1.JPEG")
    assert found.remark == f"is {kind}, not JPEG as its name says"


def test_a_jpeg_of_several_pictures_is_a_jpeg() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(1)])
    found = probe("image", data, "n01_1.JPEG")
    assert found == Found(None, "has several frames, of which the first counts")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    data = encoded(picture(), kind, save_all=True, append_images=[picture(1), picture(2)])
    assert probe("image", data).remark == "has several frames, of which the first counts"


@pytest.mark.parametrize(("orientation", "told"), [(1, False), (3, True), (6, True), (99, False)])
def test_exif_orientation_is_told_where_it_would_turn_the_image(
    orientation: int, told: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    remark = probe("image", encoded(picture(), "JPEG", exif=exif)).remark
    expected = f"has EXIF orientation {orientation}, which is ignored" if told else None
    assert remark == expected


def test_exif_that_cannot_be_read_is_no_problem() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    assert probe("image", data) == Found(None, None)


@pytest.mark.parametrize("size", [(1, 1), (31, 400), (400, 31)])
def test_a_small_side_is_told(size: tuple[int, int]) -> None:
    assert probe("image", encoded(picture(0, size))) == Found(None, "has a side below 32 pixels")


def test_a_side_that_no_jpeg_can_have_is_told() -> None:
    remarks = "has a side below 32 pixels; has a side above 65500 pixels"
    assert probe("image", encoded(picture(0, (65_501, 2)), "PNG")) == Found(None, remarks)


def test_a_bomb_is_refused_by_its_header(png_header: Callable[[int, int], bytes]) -> None:
    problem = probe("image", png_header(9000, 9000)).problem
    assert problem is not None
    assert "an image of 9000x9000 pixels is refused as a decompression bomb" in problem
    huge = probe("image", png_header(60000, 60000)).problem
    assert huge is not None
    assert "bomb" in huge


@pytest.fixture
def png_header() -> Callable[[int, int], bytes]:
    """Makes a PNG that claims any size and holds no pixels."""

    def make(width: int, height: int) -> bytes:
        file = io.BytesIO()
        file.write(b"\x89PNG\r\n\x1a\n")
        head = PngImagePlugin.o32(width) + PngImagePlugin.o32(height) + bytes([8, 2, 0, 0, 0])
        PngImagePlugin.putchunk(file, b"IHDR", head)
        PngImagePlugin.putchunk(file, b"IDAT", b"")
        return file.getvalue()

    return make


def test_what_passes_decodes_in_training_and_what_does_not_does_not() -> None:
    files = [jpeg(), jpeg()[:-50], encoded(picture(), "PNG")[:200], b"GIF89a", bytes(100)]
    files += [encoded(picture().convert(mode), "TIFF") for mode in ("L", "CMYK", "RGB", "RGBA")]
    for data in files:
        try:
            decode.decode_rgb(data)
        except decode.DatasetError:
            assert probe("image", data).problem is not None
        else:
            assert probe("image", data).problem is None


def files_of_all_kinds() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    more = [picture(1), picture(2)]
    files = [encoded(picture(), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")]
    files += [
        encoded(picture(), kind, save_all=True, append_images=more)
        for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO")
    ]
    files += [encoded(picture(), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    return [*files, encoded(picture().convert("CMYK")), encoded(picture().convert("P"), "PNG")]


FILES = files_of_all_kinds()


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FILES), st.data())
def test_any_changed_bytes_give_an_answer(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        changed[at] = draw.draw(st.integers(0, 255))
    found = probe("image", bytes(changed), "n01_1.JPEG")
    assert found.problem is None or found.remark is None
    for text in found:
        assert text is None or (text and "\n" not in text and " at 0x" not in text)
