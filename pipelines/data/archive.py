"""Raw archives: a folder with one tar of images per synset, as ImageNet-21K's winter21 unpacks.

`n01440764.tar` holds `n01440764_10026.JPEG` and so on. A tar is read from front to back and
never unpacked: what comes out is where each member's bytes lie and whether they decode. Python's
`tarfile` ends quietly at a damaged header and takes the rest for absent, so every walk is checked
to end at the end-of-archive blocks. Which members go where is decided elsewhere (`shards`).
"""

import hashlib
import io
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image

from pipelines.errors import ArchiveError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_MEMBER_BYTES = 256 * 2**20
DIRECTORY = "is a directory"
BLOCK = 512
WORDS_FILE = "words.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One entry of a tar.

    Attributes:
        key: Name of the sample: the file's stem with dots replaced by `_`, the synset put in
            front where it is missing, so that `0001.jpg` of two synsets stay apart.
        name: The entry's name in the tar; bytes that are not UTF-8 are written `\\xNN`.
        offset: Byte in the tar where the data begin.
        size: Bytes of data.
        problem: Why this is no sample, or None if it is an image that decodes.
    """

    key: str
    name: str
    offset: int
    size: int
    problem: str | None


def find_tars(archive: Path) -> tuple[Path, ...]:
    """The synset tars of an archive, sorted by name, as absolute paths.

    Raises:
        ArchiveError: There is no such folder, or it holds no tars.
    """
    layout = "expected is a folder with one tar of images per class, such as n01440764.tar"
    if not archive.exists():
        raise ArchiveError(f"archive {archive} does not exist; {layout}")
    if not archive.is_dir():
        raise ArchiveError(f"archive {archive} is a file; {layout}")
    tars = sorted(
        path
        for path in archive.resolve().iterdir()
        if path.suffix == ".tar" and path.is_file() and not path.name.startswith(".")
    )
    if not tars:
        raise ArchiveError(f"archive {archive} holds no tars; {layout}")
    return tuple(tars)


def class_names(archive: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """What people call the classes: the first word of each in `words.txt`, else the synset.

    Args:
        archive: Folder of tars; `words.txt` (synset, tab, words) lies in it or beside it.
        classes: Synsets.
    """
    files = [folder / WORDS_FILE for folder in (archive, archive.resolve().parent)]
    lines = next((file.read_text().splitlines() for file in files if file.is_file()), [])
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(synset, synset).split(",")[0].strip() for synset in classes)


def fingerprint(tars: tuple[Path, ...]) -> str:
    """A hash that tells archives apart: sha256 over the tars' names and sizes, not their bytes."""
    lines = (f"{tar.name} {tar.stat().st_size}\n" for tar in tars)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def scan_tar(path: Path) -> Iterator[Member]:
    """Walk through a tar and look at every entry: where it lies, and whether it decodes.

    Args:
        path: The tar of one class; its stem is the synset.

    Yields:
        One `Member` per entry, in the tar's order.

    Raises:
        ArchiveError: The tar is cut off or damaged, so members would be lost; names the byte.
    """
    try:
        with path.open("rb") as file:
            yield from _walk(path, file)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror or error}") from error


def _walk(path: Path, file: BinaryIO) -> Iterator[Member]:
    """The entries of an open tar; tarfile and the checks share the file and seek before reading."""
    position = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while info := tar.next():
                if tar.offset <= position:  # a negative size would lead round in circles
                    raise tarfile.ReadError("negative size")
                position = tar.offset
                yield _member(path.stem, info, file)
                tar.members.clear()  # type: ignore[attr-defined]  # else all of them stay in memory
            position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _damage(path, file, position) from error
    _check_end(path, file, position)


def _member(synset: str, info: tarfile.TarInfo, file: BinaryIO) -> Member:
    name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return Member(
        key=sample_key(synset, name),
        name=name,
        offset=info.offset_data,
        size=info.size,
        problem=_entry_problem(info, name) or image_problem(_data(file, info)),
    )


def sample_key(synset: str, name: str) -> str:
    """The key of a member; a dot would end it early for readers of WebDataset shards."""
    stem = PurePosixPath(name).stem
    whole = stem if stem.startswith(f"{synset}_") else f"{synset}_{stem}"
    return whole.replace(".", "_")


def _entry_problem(info: tarfile.TarInfo, name: str) -> str | None:
    """What is wrong with an entry before its data are looked at."""
    if info.isdir():
        return DIRECTORY
    if info.issym() or info.islnk():
        return "is a link"
    if not info.isfile() or info.issparse():
        return "is not a plain file"
    suffix = PurePosixPath(name).suffix
    if suffix.lower() not in IMAGE_SUFFIXES:
        return f"is not an image by its name (suffix {suffix!r})"
    if info.size > MAX_MEMBER_BYTES:
        return f"has {info.size} bytes, more than the limit of {MAX_MEMBER_BYTES}"
    return None


def _data(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) < info.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def image_problem(data: bytes) -> str | None:
    """Decode an image completely; None if that works, else what is wrong, in Pillow's words."""
    if not data:
        return "is empty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                image.load()
    except Exception as error:  # noqa: BLE001 - whatever a decoder throws at foreign bytes
        words = " ".join(str(error).split()) or type(error).__name__
        return f"does not decode: {_without_address(words)}"
    return None


def _without_address(words: str) -> str:
    """Pillow names an unknown image by its memory address, which differs in every run."""
    return "cannot identify image file" if words.startswith("cannot identify") else words


def _damage(path: Path, file: BinaryIO, position: int) -> ArchiveError:
    """Word the error for a walk that stopped at `position`, where a header should stand."""
    size = file.seek(0, io.SEEK_END)
    what = (
        f"is cut off: it ends at byte {size}"
        if position + BLOCK > size
        else f"is damaged: no tar header at byte {position} of {size}"
    )
    return ArchiveError(f"{path} {what}; fetch it again or take it out of the archive")


def _check_end(path: Path, file: BinaryIO, position: int) -> None:
    """Refuse a tar whose walk ended anywhere but at zero blocks up to the end of the file."""
    file.seek(position)
    first = file.read(BLOCK)
    if len(first) < BLOCK or any(first):
        raise _damage(path, file, position)
    while chunk := file.read(2**20):
        if any(chunk):
            raise ArchiveError(
                f"{path} goes on after its end-of-archive blocks at byte {position}, as joined "
                "tars do; its later members would be lost: pack it again as one tar"
            )
