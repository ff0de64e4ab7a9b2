"""What several tests of the pipelines share: Ray on this machine, and small archives of images."""

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.session import ray_session as started_ray


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """Ray with two CPUs for the tests of one file."""
    with started_ray(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def jpeg() -> Callable[[int], bytes]:
    """Makes a small JPEG, another one for every seed."""

    def make(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """Writes files into a tar, in the order given."""

    def write(path: Path, files: Mapping[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def make_archive(
    jpeg: Callable[[int], bytes], write_tar: Callable[..., Path]
) -> Callable[..., Path]:
    """Writes an archive of `classes` synset tars with `images` JPEGs each.

    Images count on from `first`, so that two archives can share some samples or none.
    """

    def make(folder: Path, *, classes: int = 3, images: int = 20, first: int = 0) -> Path:
        for c in range(classes):
            wnid = f"n{c:08d}"
            numbers = range(first, first + images)
            files = {f"{wnid}_{n}.JPEG": jpeg(1000 * c + n) for n in numbers}
            write_tar(folder / f"{wnid}.tar", files)
        return folder

    return make
