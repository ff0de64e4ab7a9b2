"""The embedded video data: real handwritten digits that move over clutter, as an SSv2 archive.

The scans are those of `pipelines.data.digits`, and so is their division into training and
validation. The class is the direction in which the digit moves, one of eight, and only motion
tells it: where the digit leaves the frame it comes back on the opposite side, so its place is
equally likely to be anywhere in every frame of every class; each digit moves in each direction
equally often; sizes, speeds and colours are drawn without regard to the class; and the clutter
drifts in a direction of its own.

What comes out lies like Something-Something-v2: `20bn-something-something-v2/<id>.webm` (VP9,
12 frames a second) and `labels/{labels,train,validation}.json`. The templates are ours in its
manner. How such an archive is read, see `pipelines.data.sources.ssv2`.

Axes: N clips, T frames, H and W pixels of the canvas, C red-green-blue, S 8.
"""

import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from pipelines.data.digits import (
    NUMBERS_PER_SEED,
    SCAN_SIZE,
    WORDS,
    Bytes,
    Floats,
    draw_paper,
    enlarger,
    ink_on,
    load_scans,
    split_scans,
    write_whole,
)
from pipelines.files import write_json

Numbers = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

DRAWING = 1  # one more whenever the same parameters begin to give other pixels
CLIPS_TRAIN, CLIPS_VAL = 2400, 480
VIDEOS = "20bn-something-something-v2"
# Clockwise from the right; the number of one is its place here times an eighth of a turn.
TEMPLATES = (
    "Moving [something] right",
    "Moving [something] down right",
    "Moving [something] down",
    "Moving [something] down left",
    "Moving [something] left",
    "Moving [something] up left",
    "Moving [something] up",
    "Moving [something] up right",
)
FRAMES = 16
FRAMES_PER_SECOND = 12
CANVAS = 48
DIGIT_SIZES = (12, 16)
SPEEDS = (0.75, 1.5)  # pixels a frame
DRIFTS = (0.0, 1.0)  # of the clutter, pixels a frame
CLUTTER = 1.0
MARGIN = math.ceil(DRIFTS[1] * FRAMES) + 1  # clutter drawn beyond the canvas, to drift in from
# Constant quality, the fast encoder, and frames in the order that they are shown.
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "16", "b": "0", "lag-in-frames": "0"}


def write_motion_archive(
    out: Path,
    *,
    clips_train: int = CLIPS_TRAIN,
    clips_val: int = CLIPS_VAL,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write an archive of clips and labels, whole or not at all.

    Files are named by numbers from `seed * 1,000,000` on, so that archives of other seeds
    bring other ones. A second call with the same parameters does nothing.

    Args:
        out: Folder to make.
        clips_train: Training clips, of training scans.
        clips_val: Validation clips, of validation scans.
        seed: Seed of everything that is drawn.
        progress: Called with the clips written and all clips.

    Raises:
        ArchiveError: `out` holds something else.
    """
    record = {
        "drawing": DRAWING,
        "clips": {"train": clips_train, "validation": clips_val},
        "seed": seed,
    }
    write_whole(
        out, record, what="moving digits", draw=partial(_draw_all, record=record, progress=progress)
    )


def _draw_all(folder: Path, *, record: dict[str, Any], progress: Progress | None) -> None:
    (folder / VIDEOS).mkdir()
    (folder / "labels").mkdir()
    scans_NSS, digit_N = load_scans()
    total = sum(record["clips"].values())
    first = record["seed"] * NUMBERS_PER_SEED
    # Numbers of both parts are mixed, so that a number says nothing about its clip.
    numbers = first + np.random.default_rng([record["seed"], 2]).permutation(total)
    done = 0
    for split, (name, count) in enumerate(record["clips"].items()):
        rng = np.random.default_rng([record["seed"], split])
        scan_N, class_N = cast(count, rng, digit_N, split)
        rows = []
        clips = draw_clips(scans_NSS[scan_N], class_N, rng)
        for number, digit, direction, clip_THWC in zip(
            numbers[done:].tolist(), digit_N[scan_N], class_N, clips, strict=False
        ):
            (folder / VIDEOS / f"{number}.webm").write_bytes(encode_webm(clip_THWC))
            rows.append(_row(number, WORDS[digit], TEMPLATES[direction]))
            if progress:
                progress(done + len(rows), total)
        done += count
        write_json(folder / "labels" / f"{name}.json", sorted(rows, key=lambda row: row["id"]))
    names = sorted(template.replace("[", "").replace("]", "") for template in TEMPLATES)
    write_json(folder / "labels" / "labels.json", {name: str(i) for i, name in enumerate(names)})


def _row(number: int, word: str, template: str) -> dict[str, Any]:
    """What the release's lists say of one clip."""
    something = f"a handwritten {word}"
    return {
        "id": str(number),
        "label": template.replace("[something]", something).lower(),
        "template": template,
        "placeholders": [something],
    }


def cast(
    count: int, rng: np.random.Generator, digit_N: Numbers, split: int
) -> tuple[Numbers, Numbers]:
    """Choose who moves where: a scan and a direction for each clip, in random order.

    Digits are equally many, and every digit moves equally often in every direction; both up to
    rounding. Scans of a digit take turns.

    Args:
        count: Clips.
        rng: Where all randomness comes from.
        digit_N: The digit of every scan.
        split: 0 for training scans, 1 for those of validation.
    """
    digits = len(WORDS)
    turns = -(-count // digits)
    scan_N = np.empty((turns, digits), np.int64)
    class_N = np.empty((turns, digits), np.int64)
    for digit in range(digits):
        scans = split_scans(np.flatnonzero(digit_N == digit), digit)[split]
        scan_N[:, digit] = np.resize(rng.permutation(scans), turns)
        class_N[:, digit] = rng.permutation((np.arange(turns) + digit) % len(TEMPLATES))
    order = rng.permutation(count)
    return scan_N.ravel()[order], class_N.ravel()[order]


def draw_clips(scans_NSS: Floats, class_N: Numbers, rng: np.random.Generator) -> Iterator[Bytes]:
    """Draw one clip [T, H, W, C] after the other.

    Args:
        scans_NSS: Ink of the scans, 0 to 1.
        class_N: The direction of each, a position in `TEMPLATES`.
        rng: Where all randomness comes from.
    """
    for scan_SS, direction in zip(scans_NSS, class_N.tolist(), strict=True):
        sheet_1HWC, ink_1C = draw_paper(1, rng, canvas=CANVAS + 2 * MARGIN, clutter=CLUTTER)
        drift_T2 = _path(rng.uniform(0, 2 * math.pi), rng.uniform(*DRIFTS))
        sheet_THWC = np.stack([_moved(sheet_1HWC[0], y, x) for y, x in drift_T2])
        inside = slice(MARGIN, MARGIN + CANVAS)
        path_T2 = _path(direction * math.pi / 4, rng.uniform(*SPEEDS))
        path_T2 += rng.uniform(0, CANVAS, 2)
        ink_HW = _inked(scan_SS, int(rng.integers(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1)))
        ink_THW = np.stack([_moved(ink_HW, y, x) for y, x in path_T2])
        yield ink_on(sheet_THWC[:, inside, inside], ink_THW, ink_1C)


def _path(angle: float, speed: float) -> Floats:
    """Rows and columns moved since the first frame, [T, 2], pixels; angles turn clockwise."""
    step_2 = speed * np.array([math.sin(angle), math.cos(angle)])
    return np.arange(FRAMES)[:, None] * step_2


def _inked(scan_SS: Floats, size: int) -> Floats:
    """The scan enlarged, in the corner of a canvas [H, W]."""
    enlarge_SW = enlarger(SCAN_SIZE, size)
    ink_HW = np.zeros((CANVAS, CANVAS), np.float32)
    ink_HW[:size, :size] = (enlarge_SW.T @ scan_SS @ enlarge_SW).clip(0, 1)
    return ink_HW


def _moved(image: Floats, rows: float, columns: float) -> Floats:
    """An image [H, W, ...] moved by parts of pixels; what leaves comes back on the other side."""
    for axis, distance in enumerate((rows, columns)):
        whole = math.floor(distance)
        part = np.float32(distance - whole)
        near = np.roll(image, whole, axis)
        image = near + part * (np.roll(near, 1, axis) - near)
    return image


def encode_webm(clip_THWC: Bytes) -> bytes:
    """A clip as VP9 in WebM, with nothing of the machine or the day in it."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FRAMES_PER_SECOND, options=VP9)
        stream.height, stream.width = clip_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # more would change the bytes with the machine
        for pixels_HWC in clip_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
