"""Small raw archives for tests: images by number, and tars of them written with plain `tarfile`."""

import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int = 0, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """An image of smooth colours, another one for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(number: int = 0) -> bytes:
    """The bytes of `picture` as a JPEG."""
    return encoded(picture(number))


def jpegs(wnid: str, count: int, first: int = 0) -> dict[str, bytes]:
    """Images of a class as ImageNet names them."""
    return {f"{wnid}_{n}.JPEG": jpeg(n) for n in range(first, first + count)}


def tar_bytes(
    members: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
    *,
    form: int = tarfile.GNU_FORMAT,
    pax: Mapping[str, str] | None = None,
) -> bytes:
    """A tar of plain files; a name that ends in `/` is a directory."""
    file = io.BytesIO()
    items = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(
        fileobj=file, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, data in items:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(data)
            info.pax_headers = dict(pax or {})
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], **options: object) -> Path:
    """Write a tar of plain files, folders on the way too; `.gz` names are compressed."""
    content = tar_bytes(members, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = path.name.endswith((".gz", ".tgz"))
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write loose files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
