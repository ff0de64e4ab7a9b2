"""Clips of videos: which frames, which windows, and the same pixels for the same random numbers."""

import threading

import numpy as np
import pytest
from PIL import Image

from pipelines.data.pixels.augment import vary
from pipelines.data.pixels.clips import (
    clip_frames,
    crop_corners,
    eval_clips,
    start_limit,
    train_clip,
    view_starts,
)
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.pixels.video import read_frames
from pipelines.data.settings import AugmentConfig, ClipConfig
from pipelines.errors import DatasetError
from tests.pipelines.data.pixels.hostile_videos import encode, hostile_video, number_of

STILL = AugmentConfig(flip=0.0)
WHOLE = ClipConfig(scale_jitter=(1.0, 1.0))


def square(count: int, size: int = 64) -> bytes:
    """A video of numbered square frames, which a clip of the same size shows whole."""
    return encode(count=count, size=(size, size))


def numbers(clip: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in clip]


def train(data: bytes, seed: int = 0, **changed: object) -> np.ndarray:
    settings = {"frames": 8, "size": 64, "resize": 64, "clip": WHOLE, "augment": STILL, **changed}
    return train_clip(data, rng=SampleRandom(seed), **settings)


def test_a_clip_is_so_many_frames_so_far_apart():
    got = numbers(train(square(100), frames=6, clip=ClipConfig(stride=3, scale_jitter=(1, 1))))

    assert got == list(range(got[0], got[0] + 18, 3))


def test_starts_are_spread_evenly_over_all_that_end_within_the_video():
    starts = [numbers(train(square(12), seed, frames=8))[0] for seed in range(200)]

    assert set(starts) == set(range(5))
    assert min(starts.count(start) for start in range(5)) > 20


def test_a_video_that_is_too_short_begins_again():
    """ViViT repeats the sequence until there are enough frames."""
    assert numbers(train(square(3), frames=8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert clip_frames(5, 0, 4, 2) == [0, 2, 4, 1]


def test_a_video_of_one_frame_is_a_clip_of_copies():
    assert numbers(train(square(1), frames=4)) == [0, 0, 0, 0]


def test_the_last_start_is_that_of_vivit():
    """A start is drawn from [0, max(total - (frames - 1) * stride, 1))."""
    assert start_limit(300, 32, 2) == 300 - 62
    assert start_limit(62, 32, 2) == 1
    assert start_limit(10, 32, 2) == 1


def test_the_same_random_numbers_give_the_same_pixels_on_every_thread():
    data = encode(count=80)
    augment = AugmentConfig(randaugment_layers=2, color_jitter=0.8, grey=0.1)
    clip = ClipConfig(stride=2, scale_jitter=(0.9, 1.33))

    def make(seed: int) -> np.ndarray:
        return train(data, seed, frames=16, size=48, resize=56, clip=clip, augment=augment)

    expected = [make(seed) for seed in range(4)]
    got: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        got[seed] = make(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for seed in range(4):
        np.testing.assert_array_equal(got[seed], expected[seed])
    assert any((expected[0] != other).any() for other in expected[1:])


def test_a_flip_mirrors_every_frame_and_nothing_else():
    data = encode(count=20)
    never, always = (
        train(data, 3, size=48, augment=AugmentConfig(flip=chance)) for chance in (0.0, 1.0)
    )

    np.testing.assert_array_equal(always, never[:, :, ::-1])


def test_without_flips_a_clip_is_never_mirrored():
    data = square(20)

    assert all(-1 not in numbers(train(data, seed)) for seed in range(20))


def test_a_crop_is_one_window_of_the_scaled_frames_and_the_same_in_all():
    data = encode(count=20)
    clip = train(data, 5, frames=4, size=40, resize=64)
    start = number_start(data, 5, 4)
    _, frames = read_frames(data, range(start, start + 4), short_side=64)

    def apart(left: int, top: int) -> list[float]:
        window = frames[:, top : top + 40, left : left + 40].astype(np.int16)
        return [float(each) for each in np.abs(window - clip).mean(axis=(1, 2, 3))]

    places = [(left, top) for left in range(128 - 40 + 1) for top in range(64 - 40 + 1)]
    best = min(places, key=lambda place: sum(apart(*place)))
    assert max(apart(*best)) < 4


def number_start(data: bytes, seed: int, frames: int) -> int:
    """Where the clip of a seed starts: its first random number."""
    return SampleRandom(seed).below(start_limit(20, frames, 1))


def test_scale_jitter_changes_the_size_of_what_is_seen():
    data = encode(count=4, size=(256, 256))
    sharp = [
        np.abs(
            np.diff(train(data, seed, frames=1, clip=ClipConfig(scale_jitter=(1, 4)))[0], axis=1)
        )
        for seed in range(12)
    ]

    assert len({int((each > 60).sum()) for each in sharp}) > 3


def test_a_scaled_clip_never_falls_below_its_size():
    clip = ClipConfig(scale_jitter=(0.5, 0.6))

    assert train(square(10), size=64, resize=64, clip=clip).shape == (8, 64, 64, 3)


def test_colours_change_alike_in_all_frames():
    """The same frame over and over: what is drawn is drawn once per clip."""
    data = square(1)
    augment = AugmentConfig(flip=0.0, randaugment_layers=2, randaugment_magnitude=20)
    for seed in range(10):
        clip = train(data, seed, frames=5, augment=augment)
        for frame in clip[1:]:
            np.testing.assert_array_equal(frame, clip[0])


def test_variation_is_that_of_stacked_frames():
    data = square(30)
    augment = AugmentConfig(flip=0.0, color_jitter=1.0)
    plain = train(data, 2)
    rng = SampleRandom(2)
    for _ in range(5):  # start, scale, flip, left, top
        rng.word()
    stacked = vary(Image.fromarray(plain.reshape(-1, 64, 3)), augment, rng, frames=8)

    np.testing.assert_array_equal(
        train(data, 2, augment=augment), np.asarray(stacked).reshape(plain.shape)
    )


def test_a_test_of_one_view_takes_the_middle():
    clip = ClipConfig(stride=2)
    pixels = eval_clips(square(50), frames=8, size=64, resize=64, clip=clip)

    assert pixels.shape == (1, 8, 64, 64, 3)
    assert numbers(pixels[0]) == list(range(17, 33, 2))


def test_views_start_evenly_from_the_first_frame_to_the_last_start():
    clip = ClipConfig(stride=2, views=4)
    pixels = eval_clips(square(100), frames=8, size=64, resize=64, clip=clip)

    assert [numbers(view)[0] for view in pixels] == [0, 28, 56, 84]
    assert [numbers(view)[-1] for view in pixels] == [14, 42, 70, 98]
    assert view_starts(10, 8, 2, 4) == [0, 0, 0, 0]
    assert view_starts(17, 8, 2, 3) == [0, 0, 1]


@pytest.mark.parametrize(
    ("width", "height", "corners"),
    [
        (340, 256, [(0, 16), (58, 16), (116, 16)]),
        (256, 340, [(16, 0), (16, 58), (16, 116)]),
        (224, 224, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_three_crops_lie_along_the_longer_side(width, height, corners):
    assert crop_corners(width, height, 224, 3) == corners
    assert crop_corners(width, height, 224, 1) == [corners[1]]


def test_crops_of_a_view_stand_next_to_each_other():
    data = encode(count=40)
    clip = ClipConfig(views=2, crops=3)
    pixels = eval_clips(data, frames=4, size=48, resize=64, clip=clip)
    _, frames = read_frames(data, [0, 1, 2, 3, 36, 37, 38, 39], short_side=64)

    assert pixels.shape == (6, 4, 48, 48, 3)
    for number, (start, left) in enumerate((s, x) for s in (0, 4) for x in (0, 40, 80)):
        window = frames[start : start + 4, 8:56, left : left + 48]
        np.testing.assert_array_equal(pixels[number], window)


def test_a_rotated_video_is_cropped_along_the_side_that_viewers_see_as_longer():
    data = hostile_video("rotated.mov")
    clip = ClipConfig(crops=3)
    pixels = eval_clips(data, frames=2, size=64, resize=64, clip=clip)
    _, frames = read_frames(data, [23, 24], short_side=64)

    assert frames.shape == (2, 128, 64, 3)
    np.testing.assert_array_equal(pixels[0], frames[:, :64])
    np.testing.assert_array_equal(pixels[2], frames[:, 64:])


def test_what_does_not_decode_is_refused():
    with pytest.raises(DatasetError, match="only audio"):
        train(hostile_video("sound alone.mp4"))
    with pytest.raises(DatasetError, match="it is empty"):
        eval_clips(b"", frames=2, size=8, resize=8, clip=WHOLE)
