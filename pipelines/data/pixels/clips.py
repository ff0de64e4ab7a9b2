"""From the bytes of a video file to clips of a fixed shape, for training and for testing.

Pure functions: what is random comes from a `SampleRandom` that the caller seeds, is drawn once per
clip, and always in the same order. How frames are found and decoded is the subject of `video`.

The rules are ViViT's (Arnab et al. 2021, arXiv 2103.15691, and the loader that it was trained
with): a clip starts at random wherever it ends within the video; a video that is too short is
played again from its beginning; tests take clips whose starts are spaced evenly, and a single one
from the middle. Scale jitter here is one factor for both sides; that loader draws one each.

Axes: V views, T frames, H height, W width, 3 red-green-blue.
"""

import numpy as np
from PIL import Image

from pipelines.data.pixels.augment import varies, vary
from pipelines.data.pixels.decode import Box, FileBytes, Pixels
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.pixels.video import open_video
from pipelines.data.settings import AugmentConfig, ClipConfig


def train_clip(
    data: FileBytes,
    *,
    frames: int,
    size: int,
    resize: int,
    clip: ClipConfig,
    augment: AugmentConfig,
    rng: SampleRandom,
) -> Pixels:
    """A random clip of a video: scaled, cropped, perhaps mirrored and varied, as one.

    Args:
        data: A video file.
        frames: Frames of the clip.
        size: Height and width of the result, pixels.
        resize: Short side after scaling, before jitter; the result's never falls below `size`.
        clip: Stride and scale jitter.
        augment: Flip, RandAugment and colours; its crop settings are for images.
        rng: Random numbers of the sample.

    Returns:
        Pixels, uint8, shape [T, size, size, 3].

    Raises:
        DatasetError: The video does not decode.
    """
    with open_video(data) as video:
        start = rng.below(start_limit(video.info.frames, frames, clip.stride))
        short_side = max(size, round(resize * rng.uniform(*clip.scale_jitter)))

        def cut(width: int, height: int) -> Box:
            left, top = rng.below(width - size + 1), rng.below(height - size + 1)
            return left, top, left + size, top + size

        flip = rng.uniform() < augment.flip
        chosen = clip_frames(video.info.frames, start, frames, clip.stride)
        pixels_THWC = video.read(chosen, short_side=short_side, cut=cut, mirror=flip)
    if not varies(augment):
        return pixels_THWC
    stacked = Image.fromarray(pixels_THWC.reshape(frames * size, size, 3))
    return np.asarray(vary(stacked, augment, rng, frames=frames)).reshape(pixels_THWC.shape)


def eval_clips(data: FileBytes, *, frames: int, size: int, resize: int, clip: ClipConfig) -> Pixels:
    """The clips that a test averages over: `clip.views` in time, `clip.crops` of each in space.

    Args:
        data: A video file.
        frames: Frames of a clip.
        size: Height and width of the result, pixels.
        resize: Short side after scaling, pixels; at least `size`.
        clip: Stride, views and crops.

    Returns:
        Pixels, uint8, shape [V, T, size, size, 3]; V is views * crops, the crops of a view next
        to each other, from left to right or from top to bottom.

    Raises:
        DatasetError: The video does not decode.
    """
    with open_video(data) as video:
        starts = view_starts(video.info.frames, frames, clip.stride, clip.views)
        chosen = [
            index
            for start in starts
            for index in clip_frames(video.info.frames, start, frames, clip.stride)
        ]
        pixels = video.read(chosen, short_side=resize)
    height, width = pixels.shape[1:3]
    shape = (clip.views, clip.crops, frames, size, size, 3)
    out = np.empty(shape, np.uint8)
    for number, (left, top) in enumerate(crop_corners(width, height, size, clip.crops)):
        window = pixels[:, top : top + size, left : left + size]
        out[:, number] = window.reshape(clip.views, frames, size, size, 3)
    return out.reshape(clip.views * clip.crops, *shape[2:])


def start_limit(total: int, frames: int, stride: int) -> int:
    """How many starts a clip of a video has: those with which it ends within the video; at least 1.

    ViViT draws from `[0, max(total - (frames - 1) * stride, 1))`.
    """
    return max(total - (frames - 1) * stride, 1)


def clip_frames(total: int, start: int, frames: int, stride: int) -> list[int]:
    """Frames of the clip that begins at `start`; after its end the video begins again."""
    return [(start + step * stride) % total for step in range(frames)]


def view_starts(total: int, frames: int, stride: int, views: int) -> list[int]:
    """Where the clips of a test start: evenly from the first to the last start, one in the middle.

    ViViT's last start leaves room for a whole last stride, which this keeps.
    """
    last = max(total - frames * stride, 0)
    if views == 1:
        return [last // 2]
    return [last * view // (views - 1) for view in range(views)]


def crop_corners(width: int, height: int, size: int, crops: int) -> list[tuple[int, int]]:
    """Left and top of squares side by side along the longer side; of one, the centre."""
    free_x, free_y = width - size, height - size
    if crops == 1:
        return [(free_x // 2, free_y // 2)]
    if width >= height:
        return [(free_x * crop // (crops - 1), free_y // 2) for crop in range(crops)]
    return [(free_x // 2, free_y * crop // (crops - 1)) for crop in range(crops)]
