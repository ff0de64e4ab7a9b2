"""Decoding: what counts as an image, and two decoders that give the same pixels."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipelines.data.pixels import decode
from pipelines.data.pixels.decode import decode_rgb, decode_window, jpeg_header, upper_rows
from pipelines.errors import DatasetError

SAMPLE = Path(__file__).parents[5] / "shared/data/imagenet-sample"
SAMPLINGS = ["444", "422", "420", "411", "440"]


def whole(width, height):
    return 0, 0, width, height


def by_both(data, window=whole):
    """The pixels that Pillow and simplejpeg decode."""
    return [np.asarray(decode_window(data, window, decoder=d)) for d in ("pillow", "simplejpeg")]


def grain(width, height, seed=0):
    """Noise from pixel to pixel on top of smooth colours: no two rows alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)))
    return smooth + rng.integers(0, 56, (height, width, 3), dtype=np.uint8)


def jpeg(pixels, sampling="420", **options):
    colorspace = "GRAY" if pixels.shape[2] == 1 else "RGB"
    subsampling = "Gray" if pixels.shape[2] == 1 else sampling
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), 90, colorspace, colorsubsampling=subsampling, **options
    )


def pillow_jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


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
    assert np.array_equal(*by_both(encode(image, kind)))


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
    assert {pixels.shape for pixels in by_both(file.getvalue())} == {(20, 40, 3)}


def test_bytes_that_are_no_image_say_why(noise, encode):
    jpeg = encode(noise(64, 64))

    with pytest.raises(DatasetError, match="does not decode as an image: it is empty"):
        decode_rgb(b"")
    with pytest.raises(DatasetError, match=r"as an image: cannot identify image file$"):
        decode_rgb(b"not an image")
    with pytest.raises(DatasetError, match=r"does not decode as an image: .*[Tt]runcated"):
        decode_rgb(jpeg[: len(jpeg) // 2])
    with pytest.raises(DatasetError, match="does not decode as an image"):
        decode_rgb(encode(noise(64, 64), "PNG")[:60])


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_window_of_a_file_that_is_cut_off_is_refused_wherever_it_lies(noise, encode, decoder):
    jpeg = encode(noise(64, 64))

    with pytest.raises(DatasetError, match=r"does not decode as an image: .*[Tt]runcated"):
        decode_window(jpeg[:-200], lambda *_: (0, 0, 8, 8), decoder=decoder)


def test_formats_that_can_run_programs_are_not_even_tried():
    with pytest.raises(DatasetError, match="cannot identify"):
        decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(noise, encode, monkeypatch, decoder):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)

    with pytest.raises(
        DatasetError,
        match=r"40x30 pixels is refused as a decompression bomb \(at most 1000 pixels\)",
    ):
        decode_window(encode(noise(40, 30)), whole, decoder=decoder)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (16, 16), (17, 33), (95, 70)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_both_decoders_give_the_same_pixels(sampling, size):
    data = jpeg(grain(*size), sampling)

    pillow, fast = by_both(data)

    assert np.array_equal(pillow, fast)
    assert np.array_equal(pillow, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
        {"comment": b"\xff\xd8\xff\xc0 looks like a head", "exif": bytes(400)},
        {"icc_profile": bytes(70_000)},
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_every_kind_of_jpeg_decodes_the_same_in_every_window(options, grey):
    pixels = grain(70, 61)
    data = pillow_jpeg(pixels[..., 0] if grey else pixels, **options)
    expected = np.asarray(decode_rgb(data))

    for bottom in range(1, 62):
        window = (bottom % 5, bottom // 2, 70 - bottom % 7, bottom)
        left, top, right, bottom = window
        for pixels_of_one in by_both(data, lambda *_, window=window: window):
            assert np.array_equal(pixels_of_one, expected[top:bottom, left:right])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rows_below_the_window_are_not_decoded_and_change_nothing_above(sampling):
    """Colours of lower resolution are interpolated with the row below: that one is decoded too."""
    data = jpeg(grain(50, 83), sampling)
    expected = np.asarray(decode_rgb(data))
    header = jpeg_header(data)

    for rows in range(1, 84):
        upper = np.asarray(decode_rgb(upper_rows(data, header, rows)))
        assert np.array_equal(upper[:rows], expected[:rows])
        assert upper.shape[0] == 83 or upper.shape[0] <= rows + 8
        assert upper.shape[0] < 83 or rows > 83 * 3 / 4


def test_files_that_are_more_than_one_plain_scan_stay_whole():
    plain = jpeg(grain(40, 60))
    others = {
        "progressive": pillow_jpeg(grain(40, 60), progressive=True),
        "with restarts": pillow_jpeg(grain(40, 60), restart_marker_rows=1),
        "cut off": plain[:-1],
        "followed by something": plain + b"\x00",
        "with a marker inside": plain[:-200] + b"\xff\x92" + plain[-200:],
    }

    assert len(upper_rows(plain, jpeg_header(plain), 8)) == len(plain)
    assert upper_rows(plain, jpeg_header(plain), 8) != plain
    for kind, data in others.items():
        assert upper_rows(data, jpeg_header(data), 8) is data, kind


def test_a_head_is_read_only_of_the_common_kinds_of_jpeg(noise, encode):
    assert jpeg_header(encode(noise(41, 30)))[:2] == (41, 30)
    assert jpeg_header(pillow_jpeg(grain(41, 30), progressive=True)).progressive
    assert jpeg_header(encode(noise(41, 30, mode="CMYK"))) is None
    assert jpeg_header(encode(noise(41, 30), "PNG")) is None
    assert jpeg_header(b"") is None
    data = encode(noise(41, 30))
    for marker in (0xC3, 0xC9, 0xCA):  # lossless, arithmetic, progressive arithmetic
        assert jpeg_header(data.replace(b"\xff\xc0", bytes([0xFF, marker]))) is None
    twelve_bits = bytearray(data)
    twelve_bits[data.index(b"\xff\xc0") + 4] = 12
    assert jpeg_header(twelve_bits) is None


def test_a_sampling_of_colours_that_simplejpeg_has_no_name_for_is_pillows():
    data = bytearray(jpeg(grain(40, 60), "444"))
    data[data.index(b"\xff\xc0") + 11] = 0x14  # a quarter of the rows for colours

    pillow, fast = by_both(bytes(data), lambda *_: (0, 0, 40, 9))

    assert np.array_equal(pillow, fast)
    assert np.array_equal(pillow, np.asarray(decode_rgb(data))[:9])


def outcome(data, decoder, window):
    """Pixels, or that there are none."""
    try:
        return np.asarray(decode_window(data, window, decoder=decoder)).tobytes()
    except DatasetError:
        return None


def test_damage_is_judged_alike_by_both_decoders():
    """Bytes overwritten, cut out or doubled: both mend the file to the same pixels, or neither."""
    rng = random.Random(5)
    files = [jpeg(grain(48, 40, seed), SAMPLINGS[seed % 5]) for seed in range(5)]
    files += [pillow_jpeg(grain(48, 40), progressive=True)]
    mended = refused = 0
    for trial in range(600):
        data = bytearray(files[trial % len(files)])
        at = rng.randrange(2, len(data))
        if trial % 3 == 0:
            data[at] = rng.randrange(256)
        elif trial % 3 == 1:
            del data[at : at + rng.randrange(1, 40)]
        else:
            data[at:at] = data[max(0, at - 30) : at]
        bottom = rng.randrange(1, 17)

        def window(width, height, bottom=bottom):
            return 0, 0, min(width, 9), min(height, bottom)

        with warnings.catch_warnings(action="ignore"):  # Pillow's, of EXIF and the like
            pillow, fast = (outcome(bytes(data), d, window) for d in ("pillow", "simplejpeg"))
        assert pillow == fast, trial
        mended, refused = mended + (fast is not None), refused + (fast is None)
    assert min(mended, refused) > 50


def test_a_file_cut_off_anywhere_is_judged_alike_by_both_decoders():
    data = jpeg(grain(24, 24))
    for end in range(len(data)):
        for last in (b"", b"\xff\xd9"):

            def window(width, height):
                return 0, 0, min(width, 5), min(height, 5)

            pillow, fast = (outcome(data[:end] + last, d, window) for d in ("pillow", "simplejpeg"))
            assert pillow == fast, (end, last)
            assert fast is None or last


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of ImageNet is not at hand")
def test_real_photos_decode_to_the_same_pixels_by_both_decoders():
    for number, path in enumerate(sorted(SAMPLE.glob("*.JPEG"))[::7]):
        data, part = path.read_bytes(), (number % 10 + 1) / 10

        def window(width, height, part=part):
            return width // 3, int(height * part) // 2, width, max(1, int(height * part))

        expected = np.asarray(decode_rgb(data))
        left, top, right, bottom = window(expected.shape[1], expected.shape[0])
        for pixels in by_both(data, window):
            assert np.array_equal(pixels, expected[top:bottom, left:right])
        assert np.array_equal(by_both(data)[1], expected)
