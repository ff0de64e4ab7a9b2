"""Makes small video files of every kind that archives hold, good and bad, with PyAV.

Frames carry their own number in black and white blocks, so that a test sees in the pixels which
frame it got, whatever a codec did to them. Every file is made once per session.
"""

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from numpy.typing import NDArray
from PIL import Image

BITS = 8  # of the number in a frame
WIDTH, HEIGHT = 128, 64  # of most videos: 8 x 2 blocks of 16 x 32


def numbered_frame(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A frame whose upper half shows `number` as 8 blocks, white for 1, the lower half inverted."""
    upper = np.array([255 * (number >> bit & 1) for bit in reversed(range(BITS))], np.uint8)
    blocks = np.repeat(np.array_split(np.arange(width), BITS)[0].size, BITS)
    row = np.resize(np.repeat(upper, blocks), width)
    half = np.tile(row, (height // 2, 1))
    grey = np.concatenate([half, np.tile(255 - row, (height - height // 2, 1))])
    return np.repeat(grey[..., None], 3, axis=2)


def number_of(frame: NDArray[np.uint8]) -> int:
    """The number that a decoded frame shows; -1 where its two halves do not agree."""
    height, width = frame.shape[:2]
    block = width // BITS
    centres = [block * bit + block // 2 for bit in range(BITS)]
    halves = [frame[row, centres, 1] > 127 for row in (height // 4, height - height // 4)]
    if (halves[0] == halves[1]).any():
        return -1
    return int("".join("1" if bit else "0" for bit in halves[0]), 2)


def encode(
    codec: str = "libx264",
    *,
    container: str = "mp4",
    frames: Sequence[NDArray[np.uint8]] | None = None,
    count: int = 48,
    times: Sequence[int] | None = None,
    rate: int = 24,
    pixels: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    options: dict[str, str] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
) -> bytes:
    """A video file of numbered frames, or of given ones.

    Args:
        codec, container, pixels, options: FFmpeg's names.
        frames: What it shows; None: `count` numbered frames.
        times: When each frame is shown, in 1000ths of a second; None: `rate` a second.
        rate: Frames a second.
        size: Width and height of numbered frames.
        rotation: Degrees, in the metadata.
        aspect: Width over height of a pixel.
    """
    width, height = size
    shown = frames or [numbered_frame(number, width, height) for number in range(count)]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1  # more of them make other files
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels_HW3 in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def turned_on_the_way() -> bytes:
    """24 frames, of which the stream itself says that the 13th is to be turned by 90 degrees."""
    upright = encode(count=12, options={"g": "12", "bf": "0"})
    halves = [
        _annex_b(upright),
        _annex_b(upright, ",h264_metadata=display_orientation=insert:rotate=90"),
    ]
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(b"".join(halves)), format="h264") as joined,
        av.open(file, "w", format="mpegts") as out,
    ):
        stream = out.add_stream_from_template(joined.streams.video[0])
        for number, packet in enumerate(joined.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = 3600 * number
                packet.stream = stream
                out.mux(packet)
    return file.getvalue()


def _annex_b(data: bytes, more: str = "") -> bytes:
    """The bare stream of an H.264 video, perhaps filtered."""
    with av.open(io.BytesIO(data)) as video:
        stream = video.streams.video[0]
        change = BitStreamFilterContext(f"h264_mp4toannexb{more}", stream)
        return b"".join(
            bytes(changed) for packet in video.demux(stream) for changed in change.filter(packet)
        )


def sound(*, container: str = "mp4", codec: str = "aac") -> bytes:
    """A file with a sound track alone."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=48000, layout="mono")
        for number in range(20):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts = 48000, 1024 * number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def overwritten(data: bytes, *, share: float = 0.5, count: int = 2000) -> bytes:
    """The file with noise over `count` bytes that begin at a share of it.

    x264's files differ a little from call to call, so the noise must not have to hit one place: of
    the small videos here it covers several frames with the lengths before them.
    """
    start = int(len(data) * share)
    noise = np.random.default_rng(0).bytes(count)
    return data[:start] + noise[: len(data) - start] + data[start + count :]


def _busy(count: int = 24) -> list[NDArray[np.uint8]]:
    """Frames of moving noise, so that a file has bytes to be damaged in every frame."""
    coarse = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    large = np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1)
    return [np.ascontiguousarray(large[n : n + 96, 2 * n : 2 * n + 160]) for n in range(count)]


def _huge_container() -> bytes:
    """An AVI whose headers say 60000 x 60000 pixels; its codec believes them."""
    data = encode("ffv1", container="avi", count=4)
    old = b"".join(side.to_bytes(4, "little") for side in (WIDTH, HEIGHT))
    return data.replace(old, b"".join((60000).to_bytes(4, "little") for _ in range(2)))


def _huge_stream() -> bytes:
    """A webm of harmless size whose VP8 frames say 16383 x 16383 pixels."""
    data = encode("libvpx", container="webm", count=4)
    start = b"\x9d\x01\x2a"
    old = start + WIDTH.to_bytes(2, "little") + HEIGHT.to_bytes(2, "little")
    return data.replace(old, start + 2 * (16383).to_bytes(2, "little"))


def _lasting_a_year() -> bytes:
    return encode(container="matroska", count=3, times=[0, 1000, 31_536_000_000])


def _without_frames() -> bytes:
    """An mp4 whose video stream has a header and no packet."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        out.start_encoding()
    return file.getvalue()


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbered_frame(5)).save(file, "JPEG")
    return file.getvalue()


def _playlist() -> bytes:
    """A list that makes FFmpeg open other files, if it is let."""
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


_IRREGULAR = [0, 40, 80, 120, 640, 680, 720, 1500, 1540, 1580, 1620, 2600]

_MAKERS: dict[str, Callable[[], bytes]] = {
    "sound alone.mp4": sound,
    "sound alone.webm": lambda: sound(container="webm", codec="libopus"),
    "no frames.mkv": _without_frames,
    "one frame.mp4": lambda: encode(count=1),
    "three frames.mp4": lambda: encode(count=3),
    "rotated.mov": lambda: encode(container="mov", rotation=90),
    "variable rate.mkv": lambda: encode(container="matroska", count=12, times=_IRREGULAR),
    "damaged.mp4": lambda: overwritten(encode(frames=_busy())),
    "damaged.avi": lambda: overwritten(encode("mpeg4", container="avi", frames=_busy())),
    "cut off.mp4": lambda: encode(frames=_busy())[:-4000],
    "cut off.webm": lambda: encode("libvpx-vp9", container="webm", frames=_busy(8))[:-1000],
    "cut off.avi": lambda: encode("mpeg4", container="avi", frames=_busy())[:-4000],
    "10 bits.mp4": lambda: encode(pixels="yuv420p10le"),
    "av1.mp4": lambda: encode("libsvtav1", count=12),
    "hevc.mp4": lambda: encode("libx265", options={"x265-params": "log-level=none"}),
    "odd.mp4": lambda: encode(pixels="yuv444p", size=(131, 67), count=8),
    "wide pixels.mp4": lambda: encode(aspect=Fraction(2, 1), count=8),
    "empty.mp4": lambda: b"",
    "zeros.mp4": lambda: bytes(100_000),
    "photo.mp4": _jpeg,
    "playlist.mp4": _playlist,
    "huge.avi": _huge_container,
    "huge.webm": _huge_stream,
    "a year.mkv": _lasting_a_year,
    "needle.mkv": lambda: encode("ffv1", container="matroska", size=(2048, 8), count=1),
}
NAMES = tuple(_MAKERS)


@cache
def hostile_video(name: str) -> bytes:
    """The bytes of one of `NAMES`."""
    return _MAKERS[name]()
