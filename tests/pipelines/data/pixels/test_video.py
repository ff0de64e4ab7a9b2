"""Frames of video files: exactly the ones asked for, out of every container and codec.

The reference decodes everything with plain PyAV and indexes. Numbers drawn into the frames show in
the pixels which frame came out.
"""

import io
import threading
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from PIL import Image

from pipelines.data.pixels import video as module
from pipelines.data.pixels.video import open_video, probe_video, read_frames
from pipelines.errors import DatasetError
from tests.pipelines.data.pixels.hostile_videos import (
    NAMES,
    encode,
    hostile_video,
    number_of,
    numbered_frame,
    overwritten,
    turned_on_the_way,
)

DATA = Path(__file__).parents[5] / "shared" / "data"
REAL = (
    [
        path
        for folder in ("video-raw", "asl-gestures", "derived-clips-k400", "derived-motion-ssv2")
        for path in sorted((DATA / folder).rglob("*"))
        if path.suffix in (".mp4", ".mov", ".mkv", ".avi", ".webm")
    ]
    if DATA.is_dir()
    else []
)

B_FRAMES = {"g": "24", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0"}
CODECS = {
    "h264 with B-frames": lambda: encode(count=200, options=B_FRAMES),
    "h264 open GOP": lambda: encode(
        count=200, options={"x264-params": "keyint=24:bframes=3:open-gop=1:scenecut=0"}
    ),
    "h264 GOP of 12": lambda: encode(count=200, options={"g": "12"}),
    "h264 keyframes alone": lambda: encode(count=200, options={"g": "1"}),
    "h264 in mpegts": lambda: encode(count=200, container="mpegts", options=B_FRAMES),
    "h264 in flv": lambda: encode(count=200, container="flv", options=B_FRAMES),
    "hevc": lambda: encode("libx265", count=200, options={"x265-params": "keyint=24:log-level=0"}),
    "vp8": lambda: encode("libvpx", container="webm", count=200, options={"g": "30"}),
    "vp9": lambda: encode(
        "libvpx-vp9",
        container="webm",
        count=200,
        options={"g": "30", "deadline": "realtime", "lag-in-frames": "16", "auto-alt-ref": "1"},
    ),
    "av1": lambda: encode("libsvtav1", count=100, options={"preset": "10", "crf": "15", "g": "32"}),
    "mpeg4 in avi": lambda: encode("mpeg4", container="avi", count=200, options={"g": "12"}),
    "mpeg4 with B-frames in avi": lambda: encode(
        "mpeg4", container="avi", count=200, options={"g": "12", "bf": "2"}
    ),
    "mpeg4 with B-frames in mp4": lambda: encode("mpeg4", count=200, options={"bf": "2"}),
    "mpeg2": lambda: encode("mpeg2video", container="mpeg", count=200, rate=25),
    "10 bits": lambda: encode(count=200, pixels="yuv420p10le"),
}


def chosen(total: int) -> list[list[int]]:
    """Clips that begin and end anywhere, singles, repeats, and an order that jumps."""
    last = total - 1
    return [
        [0],
        [last],
        list(range(total)),
        list(range(total // 3, total, 2))[:32],
        list(range(min(5, last), total, 31)),
        [last, 0, total // 2, total // 2, min(1, last)],
    ]


@pytest.mark.parametrize("name", CODECS)
def test_exactly_the_frames_asked_for_come_out(name: str):
    data = CODECS[name]()

    with open_video(data) as video:
        for indices in chosen(video.info.frames):
            assert [number_of(frame) for frame in video.read(indices)] == indices


@pytest.mark.parametrize("name", CODECS)
def test_the_pixels_are_those_of_decoding_everything(name: str):
    data = CODECS[name]()
    every = decode_all(data)
    indices = list(range(3, len(every), 17))

    _, pixels = read_frames(data, indices)

    np.testing.assert_array_equal(pixels, [every[index] for index in indices])


@pytest.mark.parametrize(
    "path",
    REAL or [pytest.param(Path(), marks=pytest.mark.skip(reason="no ../shared/data here"))],
    ids=lambda path: path.name,
)
def test_a_real_file_reads_as_decoding_everything_does(path: Path):
    data = path.read_bytes()
    with open_video(data) as video:
        total, size = video.info.frames, video.info.scaled(None)
        indices = [*range(total // 2, min(total, total // 2 + 16), 2), total - 1, 0, total // 3]
        assert not video.info.variable_rate
        pixels = video.read(indices)

    assert probe_video(data).problem is None
    reference = decode_all(data, size)
    assert len(reference) == total
    np.testing.assert_array_equal(pixels, [reference[index] for index in indices])


def test_a_file_read_from_memory_that_is_mapped_reads_the_same():
    data = encode(count=30)

    _, from_bytes = read_frames(data, [3, 7])
    _, from_view = read_frames(memoryview(data), [3, 7])

    np.testing.assert_array_equal(from_bytes, from_view)


def test_threads_give_the_same_pixels():
    data = CODECS["h264 with B-frames"]()
    _, expected = read_frames(data, range(0, 64, 2), short_side=48)
    got: list[np.ndarray] = []
    threads = [
        threading.Thread(
            target=lambda: got.append(read_frames(data, range(0, 64, 2), short_side=48)[1])
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(got) == 4
    for pixels in got:
        np.testing.assert_array_equal(pixels, expected)


def test_a_variable_frame_rate_is_read_by_time():
    """Equal steps of the clock: frame i is what stands on the screen in the middle of step i."""
    times = [0, 40, 80, 120, 640, 680, 720, 1500, 1540, 1580, 1620, 2600]
    data = encode(container="matroska", count=len(times), times=times)
    with open_video(data) as video:
        assert video.info.variable_rate
        numbers = [number_of(frame) for frame in video.read(range(video.info.frames))]
    with av.open(io.BytesIO(data)) as container:
        end = times[-1] + max(p.duration for p in container.demux(video=0) if p.pts == times[-1])
    step = end / len(times)
    middles = [(i + 0.5) * step for i in range(len(times))]
    assert numbers == [max(n for n, time in enumerate(times) if time <= at) for at in middles]


@pytest.mark.parametrize("at", [0, 7, 23])
def test_a_dropped_frame_makes_no_variable_rate(at: int):
    times = [40 * n for n in range(25) if n != at]
    data = encode(container="matroska", count=24, times=times)

    with open_video(data) as video:
        assert not video.info.variable_rate
        assert [number_of(f) for f in video.read(range(24))] == list(range(24))


def test_times_rounded_to_milliseconds_make_no_variable_rate():
    data = encode("libvpx", container="webm", count=60, rate=24)

    with open_video(data) as video:
        assert not video.info.variable_rate
        assert video.info.rate == pytest.approx(24, rel=0.01)


def test_a_rotated_video_comes_out_upright():
    data = hostile_video("rotated.mov")
    _, pixels = read_frames(data, [5])

    assert pixels.shape == (1, 128, 64, 3)
    assert number_of(np.rot90(pixels[0], -1)) == 5 or number_of(np.rot90(pixels[0])) == 5


def test_real_phone_videos_are_turned_as_players_do():
    """Both films show keys with the letters upright; the second was held across."""
    folder = DATA / "video-raw" / "decord"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    shapes = [
        read_frames((folder / name).read_bytes(), [0])[1].shape
        for name in ("video_0.mov", "video_90.mov")
    ]

    assert shapes == [(1, 320, 568, 3), (1, 568, 320, 3)]


def test_a_video_that_asks_to_be_turned_on_the_way_stays_as_its_clip_began():
    data = turned_on_the_way()
    with av.open(io.BytesIO(data)) as container:
        assert [frame.rotation for frame in container.decode(video=0)].index(90) == 12

    with open_video(data) as video:
        whole = video.read(range(24))

    assert whole.shape == (24, 64, 128, 3)
    assert [number_of(whole[place]) for place in (0, 23)] == [0, 11]


def test_pixels_that_are_not_square_become_square():
    data = encode(count=3, aspect=Fraction(2, 1))
    info, pixels = read_frames(data, [2])

    assert info.aspect == (2, 1)
    assert pixels.shape == (1, 64, 256, 3)
    assert number_of(pixels[0]) == 2


def test_a_short_side_scales_the_whole_frame():
    data = encode(count=3)

    assert read_frames(data, [0], short_side=96)[1].shape == (1, 96, 192, 3)
    assert read_frames(data, [0], short_side=33)[1].shape == (1, 33, 66, 3)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("box", [(10, 4, 50, 34), (0, 0, 40, 40), (24, 0, 64, 40), (1, 1, 39, 39)])
def test_a_cut_keeps_its_window_alone(rotation: int, box: tuple[int, int, int, int]):
    """Within a pixel of the source, to which the window is rounded."""
    data = encode(frames=smooth(9), rotation=rotation)
    asked: list[tuple[int, int]] = []

    def cut(width: int, height: int) -> tuple[int, int, int, int]:
        asked.append((width, height))
        return box

    left, top, right, bottom = box
    with open_video(data) as video:
        whole = video.read([8, 1], short_side=64).astype(np.int16)
        part = video.read([8, 1], short_side=64, cut=cut)

    assert asked == [whole.shape[2:0:-1]]
    assert part.shape == (2, bottom - top, right - left, 3)
    assert np.abs(whole[:, top:bottom, left:right] - part).mean() < 6


@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p", "yuv420p10le", "yuv444p"])
def test_a_cut_at_even_pixels_without_scaling_is_exact(pixels: str):
    data = encode(frames=smooth(3), pixels=pixels)
    with open_video(data) as video:
        whole = video.read([2])
        part = video.read([2], cut=lambda *_size: (20, 10, 84, 74))

    inner = (slice(None), slice(2, -2), slice(2, -2))  # colour is smoothed across the edge
    np.testing.assert_array_equal(part[inner], whole[:, 10:74, 20:84][inner])


def test_the_picture_lies_where_the_cut_says():
    """The best match of a window is where it was asked for, to a pixel of the source."""
    data = encode(frames=smooth(2))
    with open_video(data) as video:
        whole = video.read([0], short_side=96)[0].astype(np.int16)
        part = video.read([0], short_side=96, cut=lambda *_size: (61, 23, 125, 87))[0]

    def apart(left: int, top: int) -> float:
        return float(np.abs(whole[top : top + 64, left : left + 64] - part).mean())

    places = [(left, top) for left in range(50, 72) for top in range(12, 33)]
    left, top = min(places, key=lambda place: apart(*place))
    assert abs(left - 61) <= 1
    assert abs(top - 23) <= 1


def test_colours_are_those_of_an_accurate_conversion_and_not_darker():
    data = encode(frames=smooth(4), pixels="yuv444p", options={"qp": "0"})
    _, pixels = read_frames(data, range(4), short_side=80)
    sized = [
        Image.fromarray(each).resize((133, 80), Image.Resampling.BILINEAR) for each in smooth(4)
    ]

    difference = pixels.astype(np.int16) - np.stack([np.asarray(each) for each in sized])
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 0.7
    assert np.abs(difference).mean() < 1


def test_scaling_while_converting_is_close_to_scaling_afterwards():
    """The resize is fused into the conversion; Pillow's antialiased one differs by rounding."""
    data = encode(frames=smooth(12))
    _, plain = read_frames(data, [6])
    _, fused = read_frames(data, [6], short_side=72)

    size = (fused.shape[2], fused.shape[1])
    apart = Image.fromarray(plain[0]).resize(size, Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(apart, np.int16) - fused[0])
    assert difference.mean() < 0.5


@pytest.mark.parametrize("name", CODECS)
def test_frames_marked_as_keyframes_that_are_none_are_found_all_the_same(name: str):
    """As in an mp4 that has lost its table of keyframes."""
    with open_video(CODECS[name]()) as video:
        for packet in video._packets:
            packet.is_keyframe = True
        for indices in chosen(video.info.frames):
            assert [number_of(frame) for frame in video.read(indices)] == indices


def test_what_nothing_needs_is_not_decoded():
    data = CODECS["h264 with B-frames"]()
    with open_video(data) as video:
        fed = count_packets(video)
        video.read(range(100, 110, 2))

    assert len(fed) < 30  # of 200: from the keyframe at 96 on


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sound alone.mp4", "only audio"),
        ("sound alone.webm", "only audio"),
        ("no frames.mkv", "does not decode as a video: it "),
        ("empty.mp4", "it is empty"),
        ("zeros.mp4", "it is none of mov,matroska"),
        ("photo.mp4", "it is none of mov,matroska"),
        ("playlist.mp4", "it is none of mov,matroska"),
        ("huge.avi", "its frames have no size, or over 33554432 pixels"),
        ("a year.mkv", "is refused: it lasts 31536000 s"),
        ("needle.mkv", "is refused: one side is more than 32 times the other"),
    ],
)
def test_what_is_no_video_is_refused_with_its_reason(name: str, reason: str):
    with pytest.raises(DatasetError, match=reason):
        read_frames(hostile_video(name), [0])
    assert reason in (probe_video(hostile_video(name)).problem or "")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("damaged.mp4", "frames (invalid data found when processing input)"),
        ("damaged.avi", "damaged after"),
        ("cut off.mp4", "is cut off: its last 29"),
        ("cut off.webm", "is cut off: its last 1000 bytes are missing"),
        ("cut off.avi", "is cut off: its last 4000 bytes are missing"),
        ("huge.webm", "damaged after 0 of 4 frames"),
    ],
)
def test_damage_is_found_before_a_video_is_kept(name: str, problem: str):
    assert problem in (probe_video(hostile_video(name)).problem or "")


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        ("one frame.mp4", "has a single frame"),
        ("three frames.mp4", None),
        ("rotated.mov", "is rotated by 270"),
        ("variable rate.mkv", "has a variable frame rate"),
        ("10 bits.mp4", "has 10 bits a channel, which are reduced to 8"),
        ("av1.mp4", None),
        ("hevc.mp4", None),
        ("odd.mp4", None),
        ("wide pixels.mp4", "has pixels that are not square"),
    ],
)
def test_unusual_videos_are_kept_with_a_remark(name: str, remark: str | None):
    assert probe_video(hostile_video(name)) == (None, remark)


@pytest.mark.timeout(120)
def test_no_damage_crashes_or_hangs_and_every_refusal_is_ours():
    """Noise anywhere in any file: pixels, or a reason; the whole of it under a time limit."""
    rng = np.random.default_rng(3)
    for name in NAMES:
        data = hostile_video(name)
        for share in rng.uniform(0, 1, 6 if data else 0):
            for bad in (overwritten(data, share=share, count=12), data[: int(len(data) * share)]):
                assert probe_video(bad) is not None
                with suppress(DatasetError), open_video(bad) as video:
                    video.read([0, video.info.frames - 1])


def test_damage_where_the_chosen_frames_are_is_refused_not_hidden():
    data = hostile_video("damaged.mp4")

    with pytest.raises(DatasetError, match="does not decode as a video"):
        read_frames(data, [12])


def test_a_codec_that_nobody_knows_is_refused():
    data = encode(count=2).replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC")

    with pytest.raises(DatasetError, match="does not decode as a video: its codec is not known"):
        read_frames(data, [0])


@pytest.mark.parametrize("name", ["h264 GOP of 12", "mpeg4 in avi"])
def test_frames_that_the_decoder_leaves_out_are_refused(monkeypatch, name: str):
    monkeypatch.setattr(module.Video, "_feed", lambda *_packets: iter(()))
    data = CODECS[name]()

    with pytest.raises(DatasetError, match=r"frame 3 of 200 is missing|it has no frames"):
        read_frames(data, [3])
    assert "200 of 200 frames are missing" in (probe_video(data).problem or "")


def test_frames_that_cannot_be_converted_are_refused(monkeypatch):
    def refuse(*_frame: object) -> None:
        raise av.error.ArgumentError(22, "no such conversion")

    monkeypatch.setattr(module.FrameWriter, "put", refuse)

    with pytest.raises(DatasetError, match="does not become RGB: no such conversion"):
        read_frames(encode(count=2), [0])


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("MAX_FRAMES", 10, "more than 10 frames"),
        ("MAX_PIXELS", 1000, r"frames of 128x64 pixels \(at most 1000 a frame"),
        ("MAX_VIDEO_PIXELS", 10_000, "24 frames of 128x64 pixels"),
    ],
)
def test_more_than_the_limits_is_refused_before_decoding(monkeypatch, limit, value, reason):
    data = encode(count=24)
    monkeypatch.setattr(module, limit, value)

    with pytest.raises(DatasetError, match=reason):
        read_frames(data, [0])


def decode_all(data: bytes, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """The obvious way: every frame in the order of the times shown, as players turn it."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
        if container.format.name != "avi":
            frames.sort(key=lambda frame: frame.pts)
    width, height = size or (frames[0].width, frames[0].height)
    accurate = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
    return [
        np.rot90(
            frame.reformat(width, height, "gbrp", interpolation=accurate).to_ndarray(),
            frame.rotation // 90,
        )
        for frame in frames
    ]


def smooth(count: int) -> Sequence[np.ndarray]:
    """Frames of a slow wave of colours."""
    y, x = np.mgrid[0:96, 0:160]
    waves = (np.sin((x + 2 * y + 3 * n) / 30) for n in range(count))
    colours = ([127 + 100 * wave, 127 - 80 * wave, 90 + 60 * wave] for wave in waves)
    return [np.stack(each, -1).astype(np.uint8) for each in colours]


def count_packets(video: module.Video) -> list[object]:
    """Every packet that the decoder is fed with, from now on."""
    fed: list[object] = []
    feed = video._feed

    def watched(packets, wanted=None):
        packets = list(packets)
        fed.extend(packets)
        return feed(packets, wanted)

    video._feed = watched  # type: ignore[method-assign]
    return fed


def test_the_numbers_in_the_frames_can_be_read():
    assert [number_of(numbered_frame(n)) for n in range(256)] == list(range(256))
    assert number_of(np.zeros((64, 128, 3), np.uint8)) == -1
