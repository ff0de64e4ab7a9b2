"""Class-folder trees of images or videos: `<class>/<file>`, perhaps below `train`, `val`, `test`.

As folders, as tars of them, perhaps one per split, or as one `.tar.gz`. A folder's class is its
name, whatever folders it holds; in tars, the first folders that differ are the classes, which takes
a walk over the headers. What lies beside them is no sample. Listings are as few as there are
splits, and those of a few classes, whatever the archive's size.

The folders at the top are splits if all of them are named as splits are, or if `train` is among
them. A class of `val` or `test` that `train` lacks would be a wrong label (Tiny-ImageNet's `val`
holds all its images in one folder `images`): it is refused, as is a split without class folders.
"""

from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath

from pipelines.data.archives.names import is_tar, media_of, printable, split_of
from pipelines.data.sources.base import Media, Source, Stream, Unit
from pipelines.data.sources.peek import (
    class_words,
    folders_above,
    folders_in,
    in_order,
    is_compressed,
    look_into,
    split_above,
    splits_of,
    visible,
)
from pipelines.errors import ArchiveError
from pipelines.storage import Entry, Place

FEW_CLASSES = 16  # that are looked into for a first sample
FEW_LEVELS = 3  # of folders in a class


def recognise(archive: Place) -> Source | None:
    """Describe a tree of class folders, or a tar of one; None: no samples are found in folders.

    Raises:
        ArchiveError: A split has no classes, or classes that `train` lacks.
    """
    if not archive.is_folder():
        return _packed(archive)
    entries = visible(archive)
    folders = [entry for entry in entries if entry.is_folder]
    if not folders:
        return _tars(archive, [entry for entry in entries if not entry.is_folder])
    splits = [entry.name for entry in folders if split_of(entry.name) is not None]
    if splits and (len(splits) == len(folders) or "train" in map(split_of, splits)):
        source = _splits(archive, splits)
        if source is not None or len(splits) == len(folders) > 1:
            return source  # files right below train and val have no classes
    units = _class_folders(archive, "", folders, None)
    return _source(archive, units, ())


def _splits(archive: Place, names: list[str]) -> Source | None:
    units = {}
    for name in names:
        entries = [entry for entry in visible(archive / name) if entry.is_folder]
        units[name] = _class_folders(archive, f"{name}/", entries, split_of(name))
    if not any(units.values()):
        return None
    names = [name for name in names if visible(archive / name)]
    flat = [name for name in names if not units[name]]
    if flat:
        raise ArchiveError(
            f"archive {archive}: {flat[0]} holds no class folders with images or videos, as others "
            f"beside it do; sort its files into the folders of their classes, or take {flat[0]} out"
        )
    _check_classes(archive, names, units)
    order = in_order({split for name in names if (split := split_of(name)) is not None})
    in_turn = sorted(
        (unit for each in units.values() for unit in each),
        key=lambda unit: (order.index(unit.split or ""), unit.path),
    )
    return _source(archive, tuple(in_turn), order)


def _check_classes(archive: Place, names: list[str], units: dict[str, tuple[Unit, ...]]) -> None:
    train = next((name for name in names if split_of(name) == "train"), None)
    if train is None:
        return
    known = {unit.class_name for unit in units[train]}
    for name in names:
        others = sorted(
            str(unit.class_name) for unit in units[name] if unit.class_name not in known
        )
        if others:
            raise ArchiveError(
                f"archive {archive}: {name} has {len(others)} classes that {train} lacks, such as "
                f"{others[0]!r}; sort its files into the folders of their classes, or take {name} "
                f"out, or shard {archive / train} alone"
            )


def _class_folders(
    archive: Place, prefix: str, folders: list[Entry], split: str | None
) -> tuple[Unit, ...]:
    """A unit per class folder; none if no sample lies in the first of them."""
    if _media(archive, prefix, folders) is None:
        return ()
    return tuple(
        Unit(
            kind="folder",
            path=prefix + entry.name,
            name=printable(prefix + entry.name),
            class_name=printable(entry.name),
            split=split,
        )
        for entry in folders
    )


def _media(archive: Place, prefix: str, folders: list[Entry]) -> Media | None:
    """What the first sample is that lies in one of the first class folders."""
    found = (_first_media(archive / (prefix + entry.name), FEW_LEVELS) for entry in folders)
    return next((media for media in islice(found, FEW_CLASSES) if media is not None), None)


def _first_media(folder: Place, levels: int) -> Media | None:
    entries = visible(folder)
    for entry in entries:
        if not entry.is_folder and (media := media_of(entry.name)):
            return media
    below = [entry for entry in entries if entry.is_folder][:1] if levels > 1 else []
    return next((_first_media(folder / entry.name, levels - 1) for entry in below), None)


def _source(archive: Place, units: tuple[Unit, ...], splits: tuple[str, ...]) -> Source | None:
    if not units:
        return None
    prefixes = {unit.path.rpartition("/")[0] for unit in units}
    folders = {
        prefix: [
            Entry(name=unit.path.rpartition("/")[2], is_folder=True, size=0)
            for unit in units
            if unit.path.rpartition("/")[0] == prefix
        ][:FEW_CLASSES]
        for prefix in sorted(prefixes)
    }
    kinds = (
        _media(archive, f"{prefix}/" if prefix else "", few) for prefix, few in folders.items()
    )
    media: Media = next((kind for kind in kinds if kind is not None), "image")
    classes = {unit.class_name for unit in units}
    words = class_words(archive, archive.absolute().parent)
    return Source(
        layout="folders",
        archive=archive.absolute(),
        media=media,
        units=units,
        splits=splits,
        names={name: word for name, word in words.items() if name in classes},
    )


def _tars(archive: Place, files: list[Entry]) -> Source | None:
    """A folder that holds tars of class folders, perhaps one for each split."""
    tars = [entry for entry in files if is_tar(entry.name)]
    packed = [entry for entry in files if is_compressed(entry.name)]
    if not tars and len(packed) == 1:
        return _stream(archive, packed[0].name, packed[0].size)
    looks = [look_into(archive / entry.name) for entry in tars]
    if not tars or any(look.kind != "tree" for look in looks):
        return None
    splits = [split_of(entry.name[: -len(".tar")]) for entry in tars]
    if any(splits) and len(tars) > 1 and (None in splits or len(set(splits)) < len(splits)):
        return None
    units = [
        Unit(kind="tar", path=entry.name, name=printable(entry.name), size=entry.size, split=split)
        for entry, split in zip(tars, splits, strict=True)
    ]
    order = in_order({split for split in splits if split is not None})
    inside = not order and any(split_above(look.name) for look in looks)
    settled, within = _settled(archive, tuple(units), inside=inside)
    if order:
        settled = tuple(sorted(settled, key=lambda unit: order.index(unit.split or "")))
    return _of_tars(archive, settled, looks[0].media, order or within)


def _settled(
    archive: Place, units: tuple[Unit, ...], *, inside: bool
) -> tuple[tuple[Unit, ...], tuple[str, ...]]:
    """Tars of class folders with where the classes are, and the splits within, if looked for."""
    places = [archive / unit.path for unit in units]
    found = [folders_in(place, to_the_end=inside) for place in places]
    if inside:
        return units, splits_of(set().union(*found))
    above = folders_above(found, [PurePosixPath(place.name).stem for place in places])
    in_turn = zip(units, above, strict=True)
    return tuple(replace(unit, above=levels) for unit, levels in in_turn), ()


def _packed(archive: Place) -> Source | None:
    if is_compressed(archive.name):
        return _stream(archive, "", archive.size())
    if not is_tar(archive.name):
        return None
    look = look_into(archive)
    if look.kind != "tree":
        return None
    unit = Unit(kind="tar", path="", name=printable(archive.name), size=archive.size())
    units, splits = _settled(archive, (unit,), inside=split_above(look.name) is not None)
    return _of_tars(archive, units, look.media, splits)


def _stream(archive: Place, path: str, size: int) -> Source | None:
    """A compressed tree; which splits it has is known once it was read: all are expected."""
    look = look_into(archive / path)
    if look.kind != "tree":
        return None
    splits = ("train", "val", "test") if split_above(look.name) else ()
    stream = Stream(paths=(path,), size=size, nested=False)
    return _of_tars(archive, (), look.media, splits, stream)


def _of_tars(
    archive: Place,
    units: tuple[Unit, ...],
    media: Media | None,
    splits: tuple[str, ...],
    stream: Stream | None = None,
) -> Source:
    return Source(
        layout="folders",
        archive=archive.absolute(),
        media=media or "image",
        units=units,
        splits=splits,
        names=class_words(archive.absolute().parent),
        stream=stream,
    )
