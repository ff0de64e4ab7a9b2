"""A first look into tars and folders, for the recognisers: names alone, and only a few of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

from pipelines.data.archives.inflate import Inflated
from pipelines.data.archives.names import is_tar, media_of, printable, split_of
from pipelines.data.archives.tars import BLOCK, Damage, TarEntry, Window, walk
from pipelines.data.sources.base import Media, Unit
from pipelines.errors import ArchiveError
from pipelines.storage import Entry, Place, plain_errors

COMPRESSED = (".tar.gz", ".tgz")
FEW = 256
WORDS_FILES = {"words.txt": "\t", "LOC_synset_mapping.txt": " "}


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What the first files of a tar tell.

    Attributes:
        kind: "nested": tars in a tar; "tree": samples in folders; "flat": samples in none;
            "other": neither among the first files, or no tar at all.
        media: What its samples are, where there are some.
        name: The first file that tells, or the first of all; empty: there is none.
        names: The first files.
    """

    kind: Literal["nested", "tree", "flat", "other"]
    media: Media | None = None
    name: str = ""
    names: tuple[str, ...] = ()


def visible(folder: Place) -> list[Entry]:
    """What lies in a folder, without what is hidden, sorted by name."""
    return [
        entry
        for entry in folder.entries()
        if not entry.name.startswith(".") and entry.name != "__MACOSX"
    ]


def is_compressed(name: str) -> bool:
    """Whether a file is a compressed tar by its name."""
    return name.lower().endswith(COMPRESSED)


def look_into(place: Place) -> Look:
    """Look at the first files of a tar, compressed or not."""
    reader = _first_inflated if is_compressed(place.name) else _first_of_tar
    with plain_errors(place):
        names = tuple(reader(place))
    for name in names:
        if is_tar(name):
            return Look(kind="nested", name=name, names=names)
        if media := media_of(name):
            kind: Literal["tree", "flat"] = "tree" if len(_parts(name)) > 1 else "flat"
            return Look(kind=kind, media=media, name=name, names=names)
    return Look(kind="other", name=names[0] if names else "", names=names)


def _first_inflated(place: Place) -> list[str]:
    with Inflated([place]) as stream:
        return _first(walk(stream, 0))


def _first_of_tar(place: Place) -> list[str]:
    with place.open() as file:
        return _first(walk(Window(file, 0, file.size(), ahead=BLOCK), 0))


def _first(steps: Iterator[TarEntry | Damage]) -> list[str]:
    return [
        printable(step.name)
        for step in islice(steps, FEW)
        if isinstance(step, TarEntry) and step.problem is None
    ]


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts


def split_above(name: str) -> str | None:
    """The split that a file's path in a tar tells, above the folder of its class."""
    return next((split for part in _parts(name)[:-2] if (split := split_of(part))), None)


def splits_in(place: Place) -> tuple[str, ...]:
    """The splits in which the members of a plain tar lie: reads all headers, and keeps none."""
    found = set()
    with plain_errors(place), place.open() as file:
        for step in walk(Window(file, 0, file.size(), ahead=BLOCK), 0):
            if isinstance(step, TarEntry) and (split := split_above(step.name)):
                found.add(split)
    return in_order(found)


def in_order(splits: set[str]) -> tuple[str, ...]:
    """Splits as they are named everywhere: train, val, test, others."""
    known = [split for split in ("train", "val", "test") if split in splits]
    return (*known, *sorted(splits - set(known)))


def inner_tars(place: Place, path: str, split: str | None = None) -> tuple[Unit, ...]:
    """The class tars within a plain tar, by its headers; what lies beside them is no sample.

    Args:
        place: The outer tar.
        path: Its path relative to the archive.
        split: The release's own split that it is.

    Returns:
        A unit per inner tar. If the outer tar is damaged, the last unit begins at the damage, or
        where the file ends in the midst of an inner tar, so that scanning it tells what is lost.
    """
    units = []
    with plain_errors(place), place.open() as file:
        for step in walk(Window(file, 0, file.size(), ahead=BLOCK), 0):
            if isinstance(step, TarEntry) or (step.entry and is_tar(step.entry.name)):
                entry = step if isinstance(step, TarEntry) else step.entry
                assert entry is not None
                units += _inner_unit(entry, path, split)
            if isinstance(step, Damage):
                units.append(_damaged(step, place, path, split))
    return tuple(units)


def _inner_unit(entry: TarEntry, path: str, split: str | None) -> list[Unit]:
    if entry.problem is not None or not is_tar(entry.name):
        return []
    name = PurePosixPath(printable(entry.name))
    return [
        Unit(
            kind="tar",
            path=path,
            name=name.name,
            size=entry.size,
            start=entry.offset,
            class_name=name.stem,
            split=split,
        )
    ]


def _damaged(damage: Damage, place: Place, path: str, split: str | None) -> Unit:
    cut = damage.lost if damage.entry and is_tar(damage.entry.name) else 0  # it has its own unit
    return Unit(
        kind="tar",
        path=path,
        name=printable(place.name),
        size=damage.lost - cut,
        start=damage.position + cut,
        split=split,
    )


def class_words(*folders: Place) -> dict[str, str]:
    """What people call classes, the first word of each, from a list in the first folder with one.

    Raises:
        ArchiveError: The list is not UTF-8; names it and the byte.
    """
    for folder in folders:
        for name, separator in WORDS_FILES.items():
            if (folder / name).is_file():
                return _words(folder / name, separator)
    return {}


def _words(place: Place, separator: str) -> dict[str, str]:
    lines = text_of(place).splitlines()
    told = (line.partition(separator) for line in lines)
    return {wnid: words.split(",")[0].strip() for wnid, _, words in told if words.strip()}


def text_of(place: Place) -> str:
    """The text of a small list.

    Raises:
        ArchiveError: It is not UTF-8.
    """
    with plain_errors(place):
        content = place.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArchiveError(
            f"{place} is not UTF-8 at byte {error.start}; mend or remove it and run it again"
        ) from error


def describe(archive: Place) -> str:
    """What lies at a place, in a few words."""
    if not archive.is_folder():
        return _describe_file(archive)
    entries = visible(archive)
    if not entries:
        return "is an empty folder"
    kinds = {
        "folders": [entry.name for entry in entries if entry.is_folder],
        "files": [entry.name for entry in entries if not entry.is_folder],
    }
    told = [
        f"{len(names)} {kind if len(names) > 1 else kind[:-1]} "
        f"({', '.join(map(printable, names[:3]))}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return f"is a folder with {' and '.join(told)}"


def _describe_file(archive: Place) -> str:
    if not (is_tar(archive.name) or is_compressed(archive.name)):
        return "is a file that is no tar by its name"
    look = look_into(archive)
    if look.kind == "flat":
        return f"is the tar of one class: {look.name} lies in no folder; give the folder of tars"
    if look.name:
        return f"is a tar that begins with {look.name}"
    return "is a file without a member of a tar"
