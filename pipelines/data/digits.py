"""The embedded data: real handwritten digits on cluttered canvases, as an archive of synset tars.

The 1,797 scans (8 x 8 pixels, ten writers' worth of variety) are those that scikit-learn bundles.
Each is enlarged, put somewhere on a larger canvas of coloured paper, and surrounded by a gradient,
smooth noise, faint strokes and blobs, so that few tokens carry the label and many are redundant.
What comes out lies like a release of ImageNet-21K: `train/<wnid>.tar`, `val/<wnid>.tar` holding
`<wnid>_<n>.JPEG`, and `words.txt`. The wnids are ours; WordNet has none for digits.

Axes: N canvases, K shapes per canvas, H and W pixels of the canvas, C red-green-blue, S 8.
"""

import io
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.errors import ArchiveError
from pipelines.files import read_json, write_json

Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WNIDS = tuple(f"n{90000000 + digit}" for digit in range(10))
RECORD = "archive.json"
DRAWING = 1  # one more whenever the same parameters begin to give other pixels
SCAN_SIZE = 8
SCAN_INK = 16.0
VAL_SHARE = 0.2
SPLIT_SEED = 0
NUMBERS_PER_SEED = 1_000_000
JPEG_QUALITY = 92
LUMA_C = np.array([0.299, 0.587, 0.114], np.float32)
NOISE_GRID = 5
STROKES = 3
BLOBS = 2


def write_digit_archives(
    out: Path,
    *,
    copies_train: int,
    copies_val: int,
    canvas: int = 28,
    digit_sizes: tuple[int, int] = (18, 21),
    clutter: float = 0.4,
    seed: int = 0,
) -> None:
    """Write `out/train`, `out/val` and `out/words.txt`, whole or not at all.

    Which scans are for validation (a fifth of each digit) is fixed: no seed ever draws a
    training canvas from a validation scan. Canvas `copy` of scan `scan` is number
    `seed * 1,000,000 + scan * copies + copy`, so archives of other seeds bring other keys.
    A second call with the same parameters does nothing.

    Args:
        out: Folder to make.
        copies_train: Canvases per training scan (1,438 scans).
        copies_val: Canvases per validation scan (359 scans).
        canvas: Side of the square canvas, pixels.
        digit_sizes: Smallest and largest side of the enlarged scan, pixels.
        clutter: Strength of all that is not digit; 0 is plain paper.
        seed: Seed of sizes, positions, colours and clutter.

    Raises:
        ArchiveError: `out` holds something else, or the sizes do not fit the canvas.
    """
    if not 0 < digit_sizes[0] <= digit_sizes[1] <= canvas:
        raise ArchiveError(
            f"digit sizes {digit_sizes} do not fit a canvas of {canvas} pixels; "
            f"give a smallest and a largest size between 1 and {canvas}"
        )
    record: dict[str, Any] = {
        "drawing": DRAWING,
        "copies": {"train": copies_train, "val": copies_val},
        "canvas": canvas,
        "digit_sizes": list(digit_sizes),
        "clutter": clutter,
        "seed": seed,
    }
    write_whole(out, record, what="digits", draw=partial(_draw_all, record=record))


def write_whole(
    out: Path, record: dict[str, Any], *, what: str, draw: Callable[[Path], None]
) -> None:
    """Draw an archive into a folder, whole or not at all; nothing if this very one is there.

    Args:
        out: Folder to make.
        record: Everything that the drawing depends on, JSON values; kept beside it.
        what: What is drawn, for messages.
        draw: Fills the folder that it is given.

    Raises:
        ArchiveError: `out` holds something else, or was drawn with other parameters.
    """
    if _is_there(out, record, what):
        return
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        draw(unfinished)
        write_json(unfinished / RECORD, record)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_there(out: Path, record: dict[str, Any], what: str) -> bool:
    """Whether this very archive exists; refuses any other content."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if RECORD not in names:
        if names or out.is_file():
            first = names[0] if names else "a file of that name"
            raise ArchiveError(
                f"{out} holds something else (first {first}); choose an empty folder"
            )
        return False
    was = read_json(out / RECORD, dict[str, Any], otherwise=ArchiveError)
    changed = [name for name in record if was.get(name) != record[name]]
    if changed:
        name = changed[0]
        raise ArchiveError(
            f"{out} holds {what} drawn with {name} {was.get(name)}, now {record[name]}; "
            "choose an empty folder or remove this one"
        )
    return True


def load_scans() -> tuple[Floats, npt.NDArray[np.int64]]:
    """All scans' ink [N, S, S], 0 to 1, and the digit that each shows [N]."""
    scans_NSS, digit_N = load_digits(return_X_y=True)
    return (scans_NSS / SCAN_INK).astype(np.float32).reshape(-1, SCAN_SIZE, SCAN_SIZE), digit_N


def _draw_all(folder: Path, record: dict[str, Any]) -> None:
    scans_NSS, digit_N = load_scans()
    for split, (name, copies) in enumerate(record["copies"].items()):
        (folder / name).mkdir(parents=True)
        for digit, wnid in enumerate(WNIDS):
            scans = split_scans(np.flatnonzero(digit_N == digit), digit)[split].repeat(copies)
            rng = np.random.default_rng([record["seed"], split, digit])
            pixels_NHWC, _ = draw_canvases(
                scans_NSS[scans],
                rng,
                canvas=record["canvas"],
                digit_sizes=tuple(record["digit_sizes"]),
                clutter=record["clutter"],
            )
            # Copies of one scan stand together, so the running number is scan * copies + copy.
            numbers = scans * copies + np.arange(len(scans)) % copies
            numbers += record["seed"] * NUMBERS_PER_SEED
            _write_tar(folder / name / f"{wnid}.tar", numbers, pixels_NHWC)
    words = [f"{wnid}\t{word}\n" for wnid, word in zip(WNIDS, WORDS, strict=True)]
    (folder / "words.txt").write_text("".join(words))


def split_scans(
    scans: npt.NDArray[np.int64], digit: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Divide the scans of one digit into those of training and those of validation."""
    shuffled = np.random.default_rng([SPLIT_SEED, digit]).permutation(scans)
    val = round(VAL_SHARE * len(scans))
    return np.sort(shuffled[val:]), np.sort(shuffled[:val])


def draw_canvases(
    scans_NSS: Floats,
    rng: np.random.Generator,
    *,
    canvas: int,
    digit_sizes: tuple[int, int],
    clutter: float,
) -> tuple[Bytes, Floats]:
    """Put every scan at a random size and place on a canvas of its own.

    Args:
        scans_NSS: Ink of the scans, 0 to 1.
        rng: Where all randomness comes from.
        canvas: Side of the canvas, pixels.
        digit_sizes: Smallest and largest side of the enlarged scan, pixels.
        clutter: Strength of what is not digit.

    Returns:
        Pixels [N, H, W, C], and the digit's ink [N, H, W], 0 to 1.
    """
    back_NHWC, ink_NC = draw_paper(len(scans_NSS), rng, canvas=canvas, clutter=clutter)
    ink_NHW = _place(scans_NSS, rng, canvas, digit_sizes)
    return ink_on(back_NHWC, ink_NHW, ink_NC), ink_NHW


def draw_paper(
    count: int, rng: np.random.Generator, *, canvas: int, clutter: float
) -> tuple[Floats, Floats]:
    """Cluttered sheets without a digit [N, H, W, C], 0 to 1, and the ink for each [N, C]."""
    paper_NC, ink_NC = _colours(count, rng)
    back_NHWC = paper_NC[:, None, None] + clutter * _texture(count, rng, canvas)
    shapes_NHW1 = clutter * _shapes(count, rng, canvas)[..., None]
    return back_NHWC + shapes_NHW1 * (ink_NC - paper_NC)[:, None, None], ink_NC


def ink_on(back_NHWC: Floats, ink_NHW: Floats, ink_NC: Floats) -> Bytes:
    """Pixels of sheets with so much ink of a colour on them, [N, H, W, C]."""
    mix_NHWC = back_NHWC + ink_NHW[..., None] * (ink_NC[:, None, None] - back_NHWC)
    pixels_NHWC: Bytes = np.rint(255 * mix_NHWC.clip(0, 1)).astype(np.uint8)
    return pixels_NHWC


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    return rng.uniform(low, high, shape).astype(np.float32)


def _colours(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Light paper and dark ink, each [N, C]: any hue, at least 0.45 apart in brightness."""
    paper_N1 = 0.5 + _uniform(rng, 0.15, 0.35, count, 1)
    ink_N1 = paper_N1 - _uniform(rng, 0.45, 0.6, count, 1)
    return paper_N1 + _hue(count, rng), ink_N1 + _hue(count, rng)


def _hue(count: int, rng: np.random.Generator) -> Floats:
    """Offsets of red, green and blue that leave the brightness as it is."""
    offset_NC = _uniform(rng, -0.15, 0.15, count, 3)
    return offset_NC - (offset_NC @ LUMA_C)[:, None]


def _texture(count: int, rng: np.random.Generator, canvas: int) -> Floats:
    """Gradient and smooth coloured noise, [N, H, W, C], around 0."""
    axis_W = np.linspace(-1, 1, canvas, dtype=np.float32)
    slope_NK = _uniform(rng, -0.1, 0.1, count, 2)[..., None, None]
    gradient_NHW = slope_NK[:, 0] * axis_W[:, None] + slope_NK[:, 1] * axis_W
    grid_NCGG = _uniform(rng, -0.12, 0.12, count, 3, NOISE_GRID, NOISE_GRID)
    enlarge_GW = enlarger(NOISE_GRID, canvas)
    noise_NCHW = enlarge_GW.T @ grid_NCGG @ enlarge_GW
    return gradient_NHW[..., None] + noise_NCHW.transpose(0, 2, 3, 1)


def _shapes(count: int, rng: np.random.Generator, canvas: int) -> Floats:
    """Faint strokes and blobs: how much of the ink's colour they add, [N, H, W]."""
    shapes = STROKES + BLOBS
    start_NK2 = _uniform(rng, 0, canvas, count, shapes, 2)
    end_NK2 = start_NK2 + _uniform(rng, -canvas / 2, canvas / 2, count, shapes, 2)
    end_NK2[:, STROKES:] = start_NK2[:, STROKES:]  # a blob is a stroke of no length
    width_NK = _uniform(rng, 0.02, 0.04, count, shapes) * canvas
    width_NK[:, STROKES:] *= 4
    strength_NK = _uniform(rng, 0.1, 0.3, count, shapes)
    total_NHW = np.zeros((count, canvas, canvas), np.float32)
    for k in range(shapes):
        squares_NHW = _squared_distance(start_NK2[:, k], end_NK2[:, k], canvas)
        width_N11 = width_NK[:, k, None, None]
        total_NHW += strength_NK[:, k, None, None] * np.exp(-squares_NHW / (2 * width_N11**2))
    return total_NHW.clip(max=0.35)


def _squared_distance(start_N2: Floats, end_N2: Floats, canvas: int) -> Floats:
    """Square of every pixel's distance to a line segment, [N, H, W], pixels."""
    pixel_W = np.arange(canvas, dtype=np.float32) + 0.5
    y_NH1 = pixel_W[None, :, None] - start_N2[:, 0, None, None]
    x_N1W = pixel_W[None, None, :] - start_N2[:, 1, None, None]
    dy_N11, dx_N11 = (end_N2 - start_N2).T[..., None, None]
    along_NHW = (y_NH1 * dy_N11 + x_N1W * dx_N11) / np.maximum(dy_N11**2 + dx_N11**2, 1e-6)
    along_NHW = along_NHW.clip(0, 1)
    squares_NHW: Floats = (y_NH1 - along_NHW * dy_N11) ** 2 + (x_N1W - along_NHW * dx_N11) ** 2
    return squares_NHW


def _place(
    scans_NSS: Floats, rng: np.random.Generator, canvas: int, digit_sizes: tuple[int, int]
) -> Floats:
    """Enlarge every scan and put it somewhere: ink [N, H, W]. Rows and columns each by a matrix."""
    size_N = rng.integers(digit_sizes[0], digit_sizes[1] + 1, len(scans_NSS))
    top_N, left_N = (rng.random((2, len(scans_NSS))) * (canvas - size_N + 1)).astype(np.int64)
    table_TPSW = np.zeros((digit_sizes[1] + 1, canvas, SCAN_SIZE, canvas), np.float32)
    for size in range(digit_sizes[0], digit_sizes[1] + 1):
        for start in range(canvas - size + 1):
            table_TPSW[size, start, :, start : start + size] = enlarger(SCAN_SIZE, size)
    rows_NHS = table_TPSW[size_N, top_N].transpose(0, 2, 1)
    ink_NHW: Floats = rows_NHS @ scans_NSS @ table_TPSW[size_N, left_N]
    return ink_NHW.clip(0, 1)


def enlarger(small: int, large: int) -> Floats:
    """The matrix [small, large] that enlarges a row of samples: Pillow's bicubic filter."""
    unit = Image.fromarray(np.eye(small, dtype=np.float32))
    return np.asarray(unit.resize((large, small), Image.Resampling.BICUBIC))


def _write_tar(path: Path, numbers: npt.NDArray[np.int64], pixels_NHWC: Bytes) -> None:
    """One synset's tar, with nothing of the machine or the day in it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, pixels_HWC in zip(numbers.tolist(), pixels_NHWC, strict=True):
            jpeg = io.BytesIO()
            image = Image.fromarray(pixels_HWC)
            image.save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            info = tarfile.TarInfo(f"{path.stem}_{number}.JPEG")
            info.size = jpeg.tell()
            jpeg.seek(0)
            tar.addfile(info, jpeg)
