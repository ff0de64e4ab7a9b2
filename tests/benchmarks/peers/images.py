"""The images that every side reads: real photographs where there are some, else drawn ones."""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "imagenet-sample"
DRAWN = 64  # different ones
WIDTH, HEIGHT, QUALITY = 500, 375, 92  # as most of ImageNet


def write_images(to: Path, count: int) -> str:
    """Write so many JPEGs, the same few over and over under numbers; gives what they are."""
    to.mkdir(parents=True)
    images, what = photographs()
    for number in range(count):
        (to / f"{number:07d}.jpg").write_bytes(images[number % len(images)])
    return f"{count} of {what}"


def photographs() -> tuple[list[bytes], str]:
    """JPEGs as ImageNet has them, and what they are in words."""
    real = [path.read_bytes() for path in sorted(REAL.glob("*.JPEG"))]
    if real:
        return real, f"{len(real)} real JPEGs of ImageNet"
    return [drawn(n) for n in range(DRAWN)], f"{DRAWN} drawn JPEGs of {WIDTH}x{HEIGHT}"


def drawn(seed: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have it: noise of ever finer grain."""
    rng = np.random.default_rng(seed)
    pixels_HWC = np.zeros((HEIGHT, WIDTH, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        grain = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        layer = Image.fromarray(grain).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels_HWC += np.asarray(layer, float) / cells
    pixels_HWC *= 255 / pixels_HWC.max()
    file = io.BytesIO()
    Image.fromarray(pixels_HWC.astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


if __name__ == "__main__":
    print(write_images(Path(sys.argv[1]), int(sys.argv[2])))
