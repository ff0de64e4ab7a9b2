"""From the bytes of a video file to chosen frames as uint8 pixels, by PyAV (FFmpeg).

Which frames make a clip, and how clips are cropped, is the subject of `clips`.

How a frame is found. Containers lie about seeking, so nothing here seeks: all packets of the video
stream are read first (undecoded, about 1 % of the time that decoding takes), which tells how
many frames there are and when each is shown. To get frames, the packets from the last keyframe
before them are decoded; should that not give exactly the frames wanted, all packets from the
first one are, and only if that fails too is the file refused. Frames that are not wanted and that
no other frame needs are not decoded at all, and only wanted ones become RGB.

Conventions where players and codebases differ:

* Frame i of N is the one shown in the middle of the i-th of N equal parts of the video's time: with
  a variable frame rate, equal steps are equal times. Where that is nowhere more than one frame
  from the i-th frame stored, as with a constant rate, rounded times or a dropped frame, it is the
  i-th stored. Frames that come without usable times (AVI has none) are counted in the order
  in which the decoder gives them.
* Rotation by metadata (quarter turns) and pixels that are not square are put right, as players
  do; the first video stream that is no cover counts.
* More than 8 bits are rounded to 8, without tone mapping; alpha is dropped.
* A damaged file is refused whole: decoders hide damage by copying from neighbouring frames.

Axes: T frames, H height, W width, 3 red-green-blue.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines.data.pixels.containers import missing_bytes
from pipelines.data.pixels.decode import Box, FileBytes, Pixels
from pipelines.data.pixels.frames import FrameWriter
from pipelines.data.sources.base import Found
from pipelines.errors import DatasetError

# Demuxers that read one file and nothing else: others follow links to files and servers.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf"
MAX_PIXELS = 1 << 25  # of one frame; 8K is just below
MAX_FRAMES = 1 << 16  # 36 minutes at 30 frames a second
MAX_VIDEO_PIXELS = 1 << 37  # of all frames: 36 minutes of 1080p
MAX_SECONDS = 6 * 3600
MAX_ASPECT = 32

# Decoders that can leave out a frame which no other needs when told so before its packet.
_SKIPPING = frozenset({"h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "vp8", "vp9"})
_OPTIONS = {"format_whitelist": FORMATS, "max_pixels": str(MAX_PIXELS)}
_STRICT = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
VideoPacket: TypeAlias = "Packet[VideoStream]"  # generic for the type checker alone


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What the container says of a video, before anything is decoded.

    Attributes:
        frames: Number of frames.
        width, height: Of a decoded frame, pixels, before rotation.
        aspect: Width over height of one pixel, as two integers.
        rate: Frames per second, on average; 0.0: not known.
        variable_rate: Whether frames are shown for so different times that equal steps in time
            are not equal steps in frames.
        bits: Bits per colour.
        codec: FFmpeg's name of the decoder, such as "h264".
    """

    frames: int
    width: int
    height: int
    aspect: tuple[int, int]
    rate: float
    variable_rate: bool
    bits: int
    codec: str

    def scaled(self, short_side: int | None) -> tuple[int, int]:
        """Width and height, before rotation, with square pixels and a given short side.

        Args:
            short_side: Pixels; None: that of the file.
        """
        wide, high = self.width * self.aspect[0], self.height * self.aspect[1]
        short = min(wide, high)
        to = short_side or min(self.width, self.height)
        return (wide * to + short // 2) // short, (high * to + short // 2) // short


class Video:
    """An open video; made by `open_video`. One thread at a time."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._codec = _prepare(stream.codec_context)
        self._packets = _read_packets(container, stream)
        pts = [packet.pts for packet in self._packets if not packet.is_discard]
        known = sorted({each for each in pts if each is not None})
        # Without distinct times the only order is the decoder's. AVI's times are guesses.
        self._timed = container.format.name != "avi" and len(known) == len(pts)
        self._shown = known if self._timed else list(range(len(pts)))
        self._place = {packet.pts: place for place, packet in enumerate(self._packets)}
        self._span = self._last_end() - self._shown[0] if self._timed else 0
        self._clock = self._make_clock()
        self.info = self._describe(stream)
        _check_limits(self.info, self._seconds(stream))

    def at(self, index: int) -> int:
        """Which of the stored frames, in the order shown, is frame `index` of the clock."""
        return index if self._clock is None else self._clock[index]

    def read(
        self,
        indices: Sequence[int],
        *,
        short_side: int | None = None,
        cut: Callable[[int, int], Box] | None = None,
        mirror: bool = False,
    ) -> Pixels:
        """Decode frames, upright and with square pixels, in the order asked for.

        Args:
            indices: Frames of the clock, 0 to `info.frames` - 1, in any order; repeats are
                decoded once.
            short_side: Pixels of the short side after scaling; None: as in the file.
            cut: Told the width and height of the scaled, upright frame, says which window
                (left, top, right, bottom) to keep. None: all.
            mirror: Exchange left and right of what is kept.

        Returns:
            Pixels, uint8, shape [T, H, W, 3].

        Raises:
            DatasetError: A frame does not decode.
        """
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(self._shown[self.at(index)], []).append(place)
        writer = FrameWriter(len(indices), self.info.scaled(short_side), cut, mirror)
        try:
            for shown, frame in self._decode(sorted(places)):
                writer.put(places[shown], frame)
        except av.FFmpegError as error:  # of a conversion; decoding words its own
            raise DatasetError(f"does not become RGB: {_reason(error)}") from error
        return writer.pixels

    def decode_all(self) -> Iterator[VideoFrame]:
        """Every frame, in the order in which the decoder gives them; strict about damage.

        Raises:
            DatasetError: The stream is damaged.
        """
        done = 0
        try:
            for frame in self._feed(self._packets):
                yield frame
                done += 1
        except (av.FFmpegError, ValueError) as error:
            total = self.info.frames
            raise DatasetError(
                f"does not decode as a video: damaged after {done} of {total} frames "
                f"({_reason(error)})"
            ) from error

    def lacking(self, given: Set[int | None]) -> int:
        """How many of the frames that the container announces are not among those given.

        An AVI may announce frames that only repeat the one before; these are not missed.

        Args:
            given: Times of all frames that were decoded.
        """
        if not self._timed:
            return 0 if given else self.info.frames
        return len(set(self._shown) - given)

    def _decode(self, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """The wanted frames, named by their times (or numbers); a later one of a name counts."""
        if not self._timed:
            yield from self._counted(wanted)
            return
        groups = self._by_keyframe(wanted)
        for number, (start, times) in enumerate(groups):
            complete = yield from self._from_keyframe(start, times)
            if not complete:
                yield from self._from_first({time for _, left in groups[number:] for time in left})
                return

    def _by_keyframe(self, wanted: list[int]) -> list[tuple[int, set[int]]]:
        """For each packet that decoding can begin at, the wanted frames that follow it."""
        keys = sorted(
            (packet.pts, place)
            for place, packet in enumerate(self._packets)
            if packet.is_keyframe and packet.pts is not None
        )
        groups: dict[int, set[int]] = {}
        for time in wanted:
            before = bisect_right(keys, (time, len(self._packets)))
            groups.setdefault(keys[before - 1][1] if before else 0, set()).add(time)
        return sorted(groups.items())

    def _from_keyframe(
        self, start: int, times: set[int]
    ) -> Generator[tuple[int, VideoFrame], None, bool]:
        """Decode as little as gives the wanted frames; returns whether it gave them all."""
        first, left = self._packets[start].pts or 0, set(times)
        packets = self._packets[start : self._end(times)]
        if start:  # what is shown before a keyframe needs frames before it, and is not wanted
            packets = [p for p in packets if p.pts is not None and p.pts >= first]
        try:
            for number, frame in enumerate(self._feed(packets, times)):
                if number == 0 and start and not (frame.key_frame and frame.pts == first):
                    return False  # the container calls a keyframe what is none
                if frame.pts in left:
                    left.discard(frame.pts)
                    yield frame.pts, frame
        except av.FFmpegError:
            return False
        return not left

    def _from_first(self, times: set[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Decode everything up to the last wanted frame, trusting no keyframe."""
        left = set(times)
        for frame in self._strictly(self._packets[: self._end(times)]):
            if frame.pts in left:
                left.discard(frame.pts)
                yield frame.pts, frame
        if left:
            missing, total = self._shown.index(min(left)), len(self._shown)
            raise DatasetError(f"does not decode as a video: frame {missing} of {total} is missing")

    def _counted(self, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Frames by their number in the decoder's order; after the last one it is repeated."""
        left = iter(wanted)
        number: int | None = next(left)
        frame = None
        for count, frame in enumerate(self._strictly(self._packets)):
            if count == number:
                yield count, frame
                number = next(left, None)
                if number is None:
                    return
        if frame is None or number is None:
            raise DatasetError("does not decode as a video: it has no frames")
        yield from ((later, frame) for later in (number, *left))

    def _strictly(self, packets: list[VideoPacket]) -> Iterator[VideoFrame]:
        try:
            yield from self._feed(packets)
        except av.FFmpegError as error:
            raise DatasetError(f"does not decode as a video: {_reason(error)}") from error

    def _feed(
        self, packets: Iterable[VideoPacket], wanted: set[int] | None = None
    ) -> Iterator[VideoFrame]:
        """Decode packets from a clean state; with `wanted`, leave out what nothing needs."""
        codec = self._codec
        if codec.is_open:
            codec.flush_buffers()
        codec.skip_frame, skips = "DEFAULT", False
        can_skip = wanted is not None and codec.name in _SKIPPING
        for packet in packets:
            skip = can_skip and packet.pts not in (wanted or ())
            if skip != skips:
                codec.skip_frame, skips = "NONREF" if skip else "DEFAULT", skip
            yield from codec.decode(packet)
        yield from codec.decode(None)

    def _end(self, times: set[int]) -> int:
        """Just after the last packet, in decoding order, of the given frames."""
        return 1 + max(self._place[time] for time in times)

    def _make_clock(self) -> list[int] | None:
        """The stored frame in the middle of each equal part of the time; None: the i-th in all."""
        shown, count = self._shown, len(self._shown)
        if self._span <= 0:
            return None
        middles = (shown[0] + (2 * i + 1) * self._span // (2 * count) for i in range(count))
        clock = [max(0, bisect_right(shown, middle) - 1) for middle in middles]
        if all(-1 <= stored - i <= 1 for i, stored in enumerate(clock)):
            return None
        return clock

    def _last_end(self) -> int:
        """When the last frame ends, in units of the stream's time base."""
        first, last = self._shown[0], self._shown[-1]
        mean = (last - first) // max(1, len(self._shown) - 1)
        return last + (self._packets[self._place[last]].duration or mean)

    def _seconds(self, stream: VideoStream) -> float:
        return float(self._span * (stream.time_base or 0))

    def _describe(self, stream: VideoStream) -> VideoInfo:
        codec, count = self._codec, len(self._shown)
        aspect = stream.sample_aspect_ratio or codec.sample_aspect_ratio
        seconds = self._seconds(stream)
        rate = count / seconds if seconds else float(stream.average_rate or 0)
        pixel = codec.format
        return VideoInfo(
            frames=count,
            width=codec.width,
            height=codec.height,
            aspect=(aspect.numerator, aspect.denominator) if aspect else (1, 1),
            rate=rate,
            variable_rate=self._clock is not None,
            bits=max((part.bits for part in pixel.components), default=8) if pixel else 8,
            codec=codec.name,
        )


@contextmanager
def open_video(data: FileBytes) -> Iterator[Video]:
    """Open the bytes of a video file; nothing is decoded yet.

    Args:
        data: A file of one of `FORMATS`, whatever its name says.

    Raises:
        DatasetError: The bytes are no video, have no video stream or frames, or exceed a limit.
    """
    if not data:
        raise DatasetError("does not decode as a video: it is empty")
    try:
        container = av.open(io.BytesIO(data), metadata_errors="replace", options=_OPTIONS)
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise DatasetError(
            f"does not decode as a video: it is none of {FORMATS} ({_reason(error)})"
        ) from error
    assert isinstance(container, InputContainer)
    with container:
        try:
            video = Video(container, _choose_stream(container))
        except (av.FFmpegError, ValueError, OverflowError) as error:
            raise DatasetError(f"does not decode as a video: {_reason(error)}") from error
        yield video


def _choose_stream(container: InputContainer) -> VideoStream:
    """The first moving picture; a cover is none."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    kind = "only audio" if container.streams.audio else "no video stream"
    raise DatasetError(f"does not decode as a video: it has {kind}")


def read_frames(
    data: FileBytes, indices: Sequence[int], *, short_side: int | None = None
) -> tuple[VideoInfo, Pixels]:
    """Frames of a video, see `Video.read`; for those who need them once.

    Raises:
        DatasetError: The bytes are no video, or a frame does not decode.
    """
    with open_video(data) as video:
        return video.info, video.read(indices, short_side=short_side)


def _prepare(codec: VideoCodecContext | None) -> VideoCodecContext:
    if codec is None:
        raise DatasetError("does not decode as a video: its codec is not known")
    codec.thread_type = "NONE"  # the callers' threads decode a video each
    codec.thread_count = 1
    codec.options = dict(_STRICT)
    return codec


def _read_packets(container: InputContainer, stream: VideoStream) -> list[VideoPacket]:
    """All packets that are shown or needed, in decoding order, from the first keyframe on."""
    packets: list[VideoPacket] = []
    with suppress(EOFError):  # a file without packets ends before it begins
        for packet in container.demux(stream):
            if packet.size and (packets or packet.is_keyframe):
                packets.append(packet)
            if len(packets) > MAX_FRAMES:
                raise DatasetError(f"is refused: it has more than {MAX_FRAMES} frames")
    if not any(not packet.is_discard for packet in packets):
        raise DatasetError("does not decode as a video: it has no frames")
    return packets


def _check_limits(info: VideoInfo, seconds: float) -> None:
    size = info.width * info.height
    wide, high = info.width * info.aspect[0], info.height * info.aspect[1]
    if not size:
        raise DatasetError(
            f"does not decode as a video: its frames have no size, or over {MAX_PIXELS} pixels"
        )
    if size > MAX_PIXELS or size * info.frames > MAX_VIDEO_PIXELS:
        raise DatasetError(
            f"is refused: {info.frames} frames of {info.width}x{info.height} pixels (at most "
            f"{MAX_PIXELS} a frame and {MAX_VIDEO_PIXELS} in all)"
        )
    if max(wide, high) > MAX_ASPECT * min(wide, high):
        raise DatasetError(f"is refused: one side is more than {MAX_ASPECT} times the other")
    if seconds > MAX_SECONDS:
        raise DatasetError(f"is refused: it lasts {seconds:.0f} s (at most {MAX_SECONDS} s)")


def _reason(error: Exception) -> str:
    """FFmpeg's words, without the numbers and file names around them."""
    words = str(getattr(error, "strerror", None) or error)
    return words[:1].lower() + words[1:]


def probe_video(data: FileBytes) -> Found:
    """Decode every frame of a video once, as sharding does before it keeps a file.

    Args:
        data: The whole file.

    Returns:
        Why it is no sample, or what is unusual about it; never raises for foreign bytes.
    """
    try:
        lost = missing_bytes(data)
        if lost:
            return Found(f"is cut off: its last {lost} bytes are missing", None)
        with open_video(data) as video:
            turned = _decode_whole(video)
            return Found(None, "; ".join(_remarks(video.info, turned)) or None)
    except DatasetError as error:
        return Found(str(error), None)
    except MemoryError:
        return Found("does not decode as a video: it takes more memory than there is", None)


def _decode_whole(video: Video) -> int:
    """Decode everything; the angle by which the first frame is turned, degrees.

    Raises:
        DatasetError: Frames are damaged or missing.
    """
    turned, given = 0, set[int | None]()
    for frame in video.decode_all():
        turned = turned if given else frame.rotation
        given.add(frame.pts)
    missing = video.lacking(given)
    if missing:
        total = video.info.frames
        raise DatasetError(f"does not decode as a video: {missing} of {total} frames are missing")
    return turned


def _remarks(info: VideoInfo, turned: int) -> list[str]:
    checks = {
        f"is rotated by {-turned % 360}": turned % 360 != 0,
        f"has {info.bits} bits a channel, which are reduced to 8": info.bits > 8,
        "has a variable frame rate": info.variable_rate,
        "has pixels that are not square": info.aspect[0] != info.aspect[1],
        "has a single frame": info.frames == 1,
    }
    return [text for text, applies in checks.items() if applies]
