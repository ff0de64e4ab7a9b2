"""Training clips from video files per core, against the plain way with PyAV.

The plain way decodes every frame from the first to the clip's last one, makes an RGB array of each
by `to_ndarray`, and indexes; a second one does so for the whole video. Both leave out what ours
does besides: resize, crop, checks. Time is processor time of the whole process, so that what else
the machine does counts little, and threads that a library starts count fully.

The videos are one real film (or moving noise, where ../shared/data is absent) in three encodings.
"""

import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.data.pixels.clips import clip_frames, start_limit, train_clip
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.settings import AugmentConfig, ClipConfig
from tests.benchmarks.harness import BenchRow, Case, Setting, aligned, compare, main

FILM = Path(__file__).parents[3] / "shared" / "data" / "video-raw" / "mmaction2" / "demo.mp4"
FRAMES = 280
CLIPS = ((32, 2), (32, 1), (16, 1))  # frames and stride
SEEDS = range(6)  # clips that one run takes, each from another start
SIZE, RESIZE = 224, 256
ENCODINGS = {
    "h264 few keyframes": ("libx264", "mp4", {"g": "250"}),
    "h264 GOP 12": ("libx264", "mp4", {"g": "12"}),
    "VP9 webm": ("libvpx-vp9", "webm", {"g": "128", "deadline": "realtime", "cpu-used": "5"}),
}


def measure(setting: Setting) -> list[BenchRow]:
    """Rows of every encoding and clip: the plain way, the whole video, ours."""
    film = _film()
    rows = []
    for name, (codec, container, options) in ENCODINGS.items():
        data = _encoded(film, codec, container, options)
        for frames, stride in CLIPS:
            rows += _compared(name, data, frames, stride, setting)
    return rows


def _compared(name: str, data: bytes, frames: int, stride: int, setting: Setting) -> list[BenchRow]:
    what = f"{name} {frames}x{stride}"
    plain = Case(case="video/plain", shape=what, run=lambda: _plain(data, frames, stride))
    others = [
        Case(
            case="video/plain whole",
            shape=f"{what} whole",
            run=lambda: _plain(data, frames, stride, whole=True),
        ),
        Case(case="video/clip", shape=f"{what} clip", run=lambda: _ours(data, frames, stride)),
    ]
    rows = compare(plain, others, setting, clock=time.process_time)
    count = len(SEEDS)
    return [
        replace(row, dtype="uint8", measures={"clips_per_s": 1e3 * count / row.median_ms})
        for row in rows
    ]


def _ours(data: bytes, frames: int, stride: int) -> None:
    clip = ClipConfig(stride=stride, scale_jitter=(0.9, 1.33))
    for seed in SEEDS:
        pixels = train_clip(
            data,
            frames=frames,
            size=SIZE,
            resize=RESIZE,
            clip=clip,
            augment=AugmentConfig(),
            rng=SampleRandom(seed),
        )
        assert pixels.shape == (frames, SIZE, SIZE, 3)


def _plain(data: bytes, frames: int, stride: int, *, whole: bool = False) -> None:
    for seed in SEEDS:
        start = SampleRandom(seed).below(start_limit(FRAMES, frames, stride))
        indices = clip_frames(FRAMES, start, frames, stride)
        arrays: list[NDArray[np.uint8]] = []
        with av.open(io.BytesIO(data)) as container:
            container.streams.video[0].thread_type = "NONE"
            for frame in container.decode(video=0):
                arrays.append(frame.to_ndarray(format="rgb24"))
                if len(arrays) > indices[-1] and not whole:
                    break
        assert np.stack([arrays[index] for index in indices]).shape[0] == frames


def _film() -> list[NDArray[np.uint8]]:
    """Frames of 340x256: a real film, or noise that moves over noise that stands still."""
    if FILM.is_file():
        with av.open(str(FILM)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    rng = np.random.default_rng(0)
    still, moving = (
        np.repeat(np.repeat(rng.integers(0, 256, (60, 90, 3), np.uint8), 8, axis=0), 8, axis=1)
        for _ in range(2)
    )
    frames = []
    for number in range(FRAMES):
        frame = still[:256, :340].copy()
        frame[60:190, 80:260] = moving[number // 2 : number // 2 + 130, number : number + 180]
        frames.append(frame)
    return frames


def _encoded(
    film: Sequence[NDArray[np.uint8]], codec: str, container: str, options: dict[str, str]
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = film[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in film[:FRAMES]:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def show(rows: Sequence[BenchRow]) -> str:
    """Clips per second and core of the three ways, and how often faster ours is."""
    head = ("video and clip", "plain/s", "whole/s", "ours/s", "over plain", "over whole")
    body = []
    for plain, whole, ours in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        speeds = [row.measures["clips_per_s"] for row in (plain, whole, ours)]
        cells = [f"{speed:.1f}" for speed in speeds]
        cells += [f"{speeds[2] / speed:.2f}" for speed in speeds[:2]]
        body.append((plain.shape, *cells))
    return aligned([head, *body], words=1)


if __name__ == "__main__":
    main("video", measure, show)
