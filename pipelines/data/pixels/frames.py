"""From decoded video frames to upright RGB pixels of one size; `video` decodes them.

Resizing is part of the conversion to RGB: one pass, and within 0.3 of 255 on average of converting
first and resizing with Pillow's antialiased bilinear filter afterwards. Colours are converted as
planes: FFmpeg's way to packed RGB darkens by up to 2.5 of 255, more at some sizes than at others,
or takes twice as long. Where only a window is wanted, only that window of the source is converted,
which takes less than half of the time; it is rounded to even pixels of the source, since colour
has half the resolution there.

Axes: T frames, H height, W width, 3 red-green-blue.
"""

import threading
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipelines.data.pixels.decode import Box, Pixels

SCALING = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
_GREEN_BLUE_RED = (1, 2, 0)  # FFmpeg's order of planes, as places in red, green, blue
_LEAST_WINDOW = 16  # pixels of the source: rounding a smaller one would distort it
_threads = threading.local()


class FrameWriter:
    """Puts frames into one array, which is made when the first one is known."""

    def __init__(
        self,
        count: int,
        size: tuple[int, int],
        cut: Callable[[int, int], Box] | None,
        mirror: bool,
    ) -> None:
        """Prepare for frames.

        Args:
            count: T.
            size: Width and height of a whole frame after scaling, before it is turned upright.
            cut, mirror: As in `Video.read`.
        """
        self._count, self._size, self._cut, self._mirror = count, size, cut, mirror
        self._box: Box | None = None
        self._turns = 0
        self._kind: tuple[int, int, str] | None = None
        self._window: _Window | None = None
        self.pixels: Pixels = np.empty((0, 0, 0, 3), np.uint8)

    def put(self, places: Sequence[int], frame: VideoFrame) -> None:
        """Convert a frame to one or more places of the array."""
        if self._box is None:
            self._turns = round(frame.rotation / 90) % 4  # the first one's, against the clock
            self._begin(self._turns)
        kind = (frame.width, frame.height, frame.format.name)
        if kind != self._kind:  # some videos change their size on the way
            self._kind, self._window = kind, self._window_of(frame, self._turns)
        for colour, plane in zip(_GREEN_BLUE_RED, self._planes(frame), strict=True):
            upright = np.rot90(plane, self._turns)
            if self._window is None:
                left, top, right, bottom = self._box or (0, 0, 0, 0)
                upright = upright[top:bottom, left:right]
            seen = upright[:, ::-1] if self._mirror else upright
            for place in places:
                self.pixels[place, :, :, colour] = seen

    def _begin(self, turns: int) -> None:
        wide, high = self._size[::-1] if turns % 2 else self._size
        left, top, right, bottom = self._box = self._cut(wide, high) if self._cut else (
            0, 0, wide, high
        )  # fmt: skip
        self.pixels = np.empty((self._count, bottom - top, right - left, 3), np.uint8)

    def _window_of(self, frame: VideoFrame, turns: int) -> "_Window | None":
        """The part of a frame to convert alone; None: convert all of it and cut afterwards."""
        assert self._box is not None
        wide, high = self._size
        box = turned_back(self._box, self._size, turns)
        left, top, right, bottom = box
        x, across = _even(left, right, wide, frame.width)
        y, down = _even(top, bottom, high, frame.height)
        small = min(across, down) < _LEAST_WINDOW
        if small or across * down > 0.8 * frame.width * frame.height:
            return None
        return _Window(frame, (x, y, across, down), (right - left, bottom - top))

    def _planes(self, frame: VideoFrame) -> list[NDArray[np.uint8]]:
        return self._window.planes(frame) if self._window else _planes(frame, *self._size)


class _Window:
    """A window of the source, cut out without a copy (FFmpeg's `crop`), then converted."""

    def __init__(
        self, frame: VideoFrame, window: tuple[int, int, int, int], size: tuple[int, int]
    ) -> None:
        left, top, across, down = window
        self._size, self._graph = size, Graph()
        self._graph.threads = 1
        self._graph.link_nodes(
            self._graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=Fraction(1, 1000),  # of no meaning here
            ),
            self._graph.add("crop", f"{across}:{down}:{left}:{top}"),
            self._graph.add("buffersink"),
        ).configure()

    def planes(self, frame: VideoFrame) -> list[NDArray[np.uint8]]:
        self._graph.vpush(frame)
        return _planes(self._graph.vpull(), *self._size)


def turned_back(box: Box, size: tuple[int, int], turns: int) -> Box:
    """Where a window of an upright frame lies in the frame as it is stored.

    Args:
        box: Left, top, right, bottom in the upright frame.
        size: Width and height of the stored frame.
        turns: Quarter turns against the clock that make it upright.
    """
    left, top, right, bottom = box
    for turn in range(turns):
        width = size[(turns - turn - 1) % 2]  # of the frame before this turn
        left, top, right, bottom = width - bottom, left, width - top, right
    return left, top, right, bottom


def _even(low: int, high: int, scaled: int, source: int) -> tuple[int, int]:
    """Start and length, in even pixels of the source, of a stretch of the scaled side."""
    length = min(2 * round((high - low) * source / (2 * scaled)), source)
    start = min(2 * round(low * source / (2 * scaled)), (source - length) // 2 * 2)
    return start, length


def _planes(frame: VideoFrame, width: int, height: int) -> list[NDArray[np.uint8]]:
    """The scaled frame's colours, views of the scaler's own memory, to be copied once."""
    scaled = _scaler().reformat(
        frame, width=width, height=height, format="gbrp", interpolation=SCALING, threads=1
    )
    rows = (
        np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        for plane in scaled.planes
    )
    return [each[:height, :width] for each in rows]


def _scaler() -> VideoReformatter:
    """This thread's scaler: making one for every frame takes half of the time."""
    if not hasattr(_threads, "scaler"):
        _threads.scaler = VideoReformatter()
    scaler: VideoReformatter = _threads.scaler
    return scaler
