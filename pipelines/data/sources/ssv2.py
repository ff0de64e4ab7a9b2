"""Something-Something-v2: short webm clips named by number, and json lists of what happens in them.

Two packages of the release are known: `something-something-v2-{train,validation,test,labels}.json`
beside the videos, and `labels/{train,validation,test,labels}.json`. Videos are `<id>.webm` in the
folder `20bn-something-something-v2`, or still in the parts of one tar.gz
(`20bn-something-something-v2-00`, ...), which are read as the stream that they are.

A clip's class is its `template` without brackets; its `label` has the objects filled in and would
make a class of nearly every clip. Classes are numbered by `labels.json` where there is one, else
sorted. The test list has ids alone: its clips are unlabelled.
"""

import re
from collections.abc import Iterator
from typing import Any

from pipelines.data.sources.base import Listed, Source, Stream, Unit
from pipelines.errors import ArchiveError
from pipelines.files import parse_json
from pipelines.storage import Entry, Place

VIDEOS = "20bn-something-something-v2"
PREFIX = "something-something-v2-"
LISTS = {"train": "train", "val": "validation", "test": "test"}  # split -> name of its list
_PART = re.compile(re.escape(VIDEOS) + r"-(\d\d)")
_NEXT = "mend or remove it and run the command again"


def recognise(archive: Place) -> Source | None:
    """Describe a folder with lists and videos of Something-Something-v2; None: it has none.

    Raises:
        ArchiveError: A list is broken, or parts of the archive are missing; names which.
    """
    if not archive.is_folder():
        return None
    entries = list(archive.entries())
    lists = {split: _find(archive, name) for split, name in LISTS.items()}
    units, stream = _videos(archive, entries)
    if lists["train"] is None or not (units or stream):
        return None
    labels = _find(archive, "labels")
    classes = None if labels is None else _classes(labels)
    listed: dict[str, Listed] = {}
    for split, place in lists.items():
        for stem, class_name in _read(place, split, classes) if place else ():
            if listed.setdefault(stem, Listed(class_name=class_name, split=split)).split != split:
                raise ArchiveError(f"{place} lists {stem}, as {listed[stem].split} does; {_NEXT}")
    found = sorted({row.class_name for row in listed.values() if row.class_name is not None})
    return Source(
        layout="ssv2",
        archive=archive.absolute(),
        media="video",
        units=units,
        splits=tuple(split for split, place in lists.items() if place),
        classes=classes or tuple(found),
        listed=listed,
        stream=stream,
    )


def _find(archive: Place, name: str) -> Place | None:
    """A list, as either package names it."""
    for folder in (archive, archive / "labels"):
        for place in (folder / f"{PREFIX}{name}.json", folder / f"{name}.json"):
            if place.is_file() and (folder is not archive or place.name.startswith(PREFIX)):
                return place
    return None


def _videos(archive: Place, entries: list[Entry]) -> tuple[tuple[Unit, ...], Stream | None]:
    """The folder of videos, or the tar or the compressed parts that hold it."""
    for entry in entries:
        if entry.is_folder and entry.name == VIDEOS:
            return (Unit(kind="folder", path=VIDEOS, name=VIDEOS),), None
        if not entry.is_folder and entry.name == f"{VIDEOS}.tar":
            return (Unit(kind="tar", path=entry.name, name=entry.name, size=entry.size),), None
    parts = [entry for entry in entries if not entry.is_folder and _PART.fullmatch(entry.name)]
    if not parts:
        parts = [each for each in entries if each.name in (f"{VIDEOS}.tar.gz", f"{VIDEOS}.tgz")]
        return (), _stream(parts[:1]) if parts else None
    numbers = {int(entry.name[-2:]) for entry in parts}
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        names = ", ".join(f"{VIDEOS}-{number:02d}" for number in missing)
        raise ArchiveError(f"{archive} lacks {names}, and the parts are one file; fetch them first")
    return (), _stream(parts)


def _stream(parts: list[Entry]) -> Stream:
    return Stream(
        paths=tuple(entry.name for entry in parts),
        size=sum(entry.size for entry in parts),
        nested=False,
    )


def _classes(place: Place) -> tuple[str, ...]:
    """Class names in the order of `labels.json`, whose numbers are strings."""
    numbers = _parse(place, dict[str, str | int])
    try:
        order = {int(number): name for name, number in numbers.items()}
    except ValueError as error:
        raise ArchiveError(f"{place} has a class without a number: {error}; {_NEXT}") from error
    if sorted(order) != list(range(len(numbers))):
        raise ArchiveError(
            f"{place} does not number its {len(numbers)} classes from 0 to {len(numbers) - 1}, "
            f"each once; {_NEXT}"
        )
    return tuple(order[number] for number in range(len(order)))


def _read(
    place: Place, split: str, classes: tuple[str, ...] | None
) -> Iterator[tuple[str, str | None]]:
    """Id and class of every clip of a list."""
    known = None if classes is None else set(classes)
    for position, clip in enumerate(_parse(place, list[dict[str, Any]])):
        stem = str(clip.get("id", "")).strip()
        if not stem or "/" in stem:
            raise ArchiveError(f"{place} entry {position} has the id {stem!r}; {_NEXT}")
        template = clip.get("template")
        if template is None and split == "test":
            yield stem, None
            continue
        if not isinstance(template, str):
            raise ArchiveError(f"{place} entry {position} (id {stem}) has no template; {_NEXT}")
        class_name = template.replace("[", "").replace("]", "")
        if known is not None and class_name not in known:
            raise ArchiveError(
                f"{place} entry {position} (id {stem}) has the class {class_name!r}, which the "
                f"list of classes lacks; {_NEXT}"
            )
        yield stem, class_name


def _parse(place: Place, kind: Any) -> Any:
    return parse_json(
        place.read_bytes(),
        kind,
        name=str(place),
        otherwise=lambda why: ArchiveError(f"{why}; {_NEXT}"),
    )
