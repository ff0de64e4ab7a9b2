"""A first look into tars and folders, for the recognisers: names alone, and only a few of them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

from pipelines.data.archives.inflate import Inflated
from pipelines.data.archives.names import (
    is_hidden,
    is_tar,
    media_of,
    printable,
    split_of,
)
from pipelines.data.archives.tars import BLOCK, Damage, TarEntry, Window, walk
from pipelines.data.sources.base import Media, Unit
from pipelines.errors import ArchiveError
from pipelines.storage import Entry, Place, plain_errors

COMPRESSED = (".tar.gz", ".tgz")
FEW = 256
WNID = re.compile(r"n\d{8}")
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
        return _look(tuple(reader(place)))


def first_look(place: Place) -> Look:
    """Look into a plain tar no further than to the first file that tells, most often the first."""
    names: list[str] = []
    with plain_errors(place), place.open() as file:
        for name in _names(walk(Window(file, 0, file.size(), ahead=BLOCK), 0)):
            names.append(name)
            if _look((name,)).kind != "other":
                break
    return _look(tuple(names))


def _look(names: tuple[str, ...]) -> Look:
    for name in names:
        if is_tar(name):
            return Look(kind="nested", name=name, names=names)
        if (media := media_of(name)) and not is_hidden(_parts(name)[:-1]):
            kind: Literal["tree", "flat"] = "tree" if len(_parts(name)) > 1 else "flat"
            return Look(kind=kind, media=media, name=name, names=names)
    return Look(kind="other", name=names[0] if names else "", names=names)


def _first_inflated(place: Place) -> list[str]:
    with Inflated([place]) as stream:
        return list(_names(walk(stream, 0)))


def _first_of_tar(place: Place) -> list[str]:
    with place.open() as file:
        return list(_names(walk(Window(file, 0, file.size(), ahead=BLOCK), 0)))


def _names(steps: Iterator[TarEntry | Damage]) -> Iterator[str]:
    """The names of the first files."""
    for step in islice(steps, FEW):
        if isinstance(step, TarEntry) and step.problem is None:
            yield printable(step.name)


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts


def split_above(name: str) -> str | None:
    """The split that a file's path in a tar tells, above the folder of its class."""
    return next((split for part in _parts(name)[:-2] if (split := split_of(part))), None)


def folders_in(place: Place, *, to_the_end: bool) -> set[tuple[str, ...]]:
    """The folders in which samples of a plain tar lie, by its headers.

    Args:
        place: The tar.
        to_the_end: Read all headers; else only until two folders at the top were seen, above which
            there is none.
    """
    found: set[tuple[str, ...]] = set()
    first = ""
    with plain_errors(place), place.open() as file:
        for step in walk(Window(file, 0, file.size(), ahead=BLOCK), 0):
            folders = sample_folders(step.name) if isinstance(step, TarEntry) else ()
            found |= {folders} if folders else set()
            first = first or "".join(folders[:1])
            if folders and folders[0] != first and not to_the_end:
                break
    return found


def sample_folders(name: str) -> tuple[str, ...]:
    """The folders above a sample in a tar; none for what is no sample by its name, or is hidden."""
    folders = _parts(name)[:-1]
    return folders if media_of(name) and not is_hidden(folders) else ()


def splits_of(found: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The splits that folders of samples tell, above those of the classes."""
    told = (next(filter(None, map(split_of, folders[:-1])), None) for folders in found)
    return in_order({split for split in told if split is not None})


def folders_above(found: Sequence[set[tuple[str, ...]]], names: Sequence[str]) -> tuple[int, ...]:
    """How many folders of each tar of an archive are above those of the classes.

    The folders of the classes are the first that differ: any below them belong to their class. A
    folder that is named as its own tar, or after the same split, is above them, if the tar holds
    nothing beside it and the name is no wnid. Where no two differ there is one class: the first
    folder that holds samples.

    Args:
        found: The folders in which the samples of each tar lie.
        names: Names of the tars without suffix.
    """
    wrapped = [_is_wrapped(folders, name) for folders, name in zip(found, names, strict=True)]
    bare = {each[is_in:] for of, is_in in zip(found, wrapped, strict=True) for each in of}
    together = set().union(*found)
    if (level := _first_that_differ(bare)) is not None:
        return tuple(level + is_in for is_in in wrapped)
    if (level := _first_that_differ(together)) is not None:
        return (level,) * len(found)
    return (min(map(len, together), default=1) - 1,) * len(found)


def _is_wrapped(found: set[tuple[str, ...]], name: str) -> bool:
    """Whether all samples of a tar lie in class folders in one that is named as it is."""
    tops = {folders[0] for folders in found}
    if len(tops) != 1 or any(len(folders) < 2 for folders in found):
        return False
    (top,) = tops
    if WNID.fullmatch(top):
        return False
    return top == name or (split_of(top) is not None and split_of(top) == split_of(name))


def _first_that_differ(found: set[tuple[str, ...]]) -> int | None:
    """The first level at which there are several folders; None: at no level."""
    for level in range(max(map(len, found), default=0)):
        if len({folders[level] for folders in found if len(folders) > level}) > 1:
            return level
    return None


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
