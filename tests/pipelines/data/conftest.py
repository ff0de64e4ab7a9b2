"""Datasets of a few small images, written with plain `tarfile`: no Ray, no `mone shard`."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dataset_folder import write_dataset


@pytest.fixture(scope="session")
def noise() -> Callable[..., Image.Image]:
    """Makes an image of smooth colours, another one for every seed."""

    def make(width: int, height: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height)).convert(mode)

    return make


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Makes the bytes of an image file."""

    def make(image: Image.Image, kind: str = "JPEG") -> bytes:
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    return make


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes files as a finished dataset; every sample is a class of its own unless told."""

    def make(
        files: Sequence[bytes],
        *,
        labels: Sequence[int] | None = None,
        per_shard: int = 5,
        media: str = "jpg",
        name: str = "train",
    ) -> Path:
        folder = tmp_path / name
        pairs = zip(files, labels or range(len(files)), strict=True)
        samples = dict(enumerate(pairs))
        write_dataset(folder, samples, num_classes=len(files), per_shard=per_shard, media=media)
        return folder

    return make
