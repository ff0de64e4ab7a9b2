"""From JPEG bytes to a crop: with Pillow, as people write it, and with simplejpeg and torch.

All sides but ours use these two functions, `bare` too. They are straightforward code without waste:
Pillow crops and resizes in one step, and both stay in bytes. Ours has its own code for the same
work, with randomness that a restart repeats.

Axes: H height, W width, 3 red-green-blue.
"""

import io
import math
import random
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import default_collate

from tests.benchmarks.peers.setup import Batch, Decoder

Pixels = NDArray[np.uint8]


def train_crop(data: bytes, *, size: int, decoder: Decoder) -> Pixels:
    """A random crop of the image at `size` x `size`, perhaps mirrored."""
    crop = with_pillow if decoder == "pillow" else with_simplejpeg
    return crop(data, size=size)


def collate(samples: Sequence[tuple[Pixels, int]]) -> Batch:
    """Crops and labels as one batch; in a worker torch's own way stacks into shared memory."""
    crops, labels = zip(*samples, strict=True)
    pixels_BHWC = default_collate([torch.from_numpy(np.array(crop)) for crop in crops])
    return pixels_BHWC, torch.tensor(labels)


def with_pillow(data: bytes, *, size: int) -> Pixels:
    """Decode, crop and resize with Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = inception_box(*image.size)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def with_simplejpeg(data: bytes, *, size: int) -> Pixels:
    """Decode with libjpeg-turbo, resize in bytes with torch, whose loops are vectorised."""
    image = torch.from_numpy(simplejpeg.decode_jpeg(data))
    left, top, right, bottom = inception_box(image.shape[1], image.shape[0])
    window_1CHW = image[top:bottom, left:right].permute(2, 0, 1).unsqueeze(0)
    x_1CHW = F.interpolate(window_1CHW, (size, size), mode="bilinear", antialias=True)
    x_HWC = x_1CHW.squeeze(0).permute(1, 2, 0).numpy()
    return x_HWC[:, ::-1] if random.random() < 0.5 else x_HWC


def inception_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop of 5 to 100 % of the area, 3:4 to 4:3 wide."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        target = width * height * random.uniform(0.05, 1.0)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height
