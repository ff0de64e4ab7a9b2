"""ImageNet as it is released: 21K (winter21, fall11), its processed subset 21K-P, and ILSVRC-1k.

What lies where:

* 21K: a folder of class tars (`n01440764.tar` holding `n01440764_10026.JPEG`), or such folders
  named after splits; one outer tar of class tars; or one `.tar.gz` of them. `words.txt` may lie in
  the folder or beside it.
* 21K-P: `imagenet21k_train`, `imagenet21k_val` and `imagenet21k_small_classes` (or without the
  prefix), folders of class folders, at the top or one level down, or a tar or `.tar.gz` of these.
  The small classes are no part of 21K-P: their folder is left alone unless it is the archive.
* 1k: `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, or folders `train` and `val`, as
  Kaggle's `ILSVRC/Data/CLS-LOC` too. Validation images that lie in no class folders get their
  classes from `LOC_val_solution.csv` or `imagenet_2012_validation_synset_labels.txt`. Test images,
  whose classes are withheld, are left alone.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import PurePosixPath

from pipelines.data.archives.names import (
    SMALL_CLASSES,
    is_tar,
    media_of,
    printable,
    split_of,
)
from pipelines.data.sources.base import Listed, Source, Stream, Unit
from pipelines.data.sources.peek import (
    WNID,
    class_words,
    first_look,
    folders_in,
    in_order,
    inner_tars,
    is_compressed,
    look_into,
    splits_of,
    text_of,
    visible,
)
from pipelines.errors import ArchiveError
from pipelines.storage import Entry, Place

MANY_CLASSES = 5000  # no other class tree with wnids is as large
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
VAL_SOLUTION, VAL_LABELS = "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt"
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
LOOKS_AT_ONCE = 16  # into tars: an object store takes its time for each
_MEND = "mend or remove it and run the command again"


def recognise_21k(archive: Place) -> Source | None:
    """Describe a folder of class tars, an outer tar or a compressed one; None: it is neither."""
    if archive.is_folder():
        return _folder_of_tars(archive)
    if is_tar(archive.name) and look_into(archive).kind == "nested":
        return _source_21k(archive, inner_tars(archive, ""), beside=archive.parent)
    if is_compressed(archive.name) and look_into(archive).kind == "nested":
        return _stream_21k(archive, "", archive.size(), beside=archive.parent)
    return None


def _folder_of_tars(archive: Place) -> Source | None:
    entries = visible(archive)
    tars = [entry for entry in entries if not entry.is_folder and is_tar(entry.name)]
    if tars:
        return _class_tars(archive, tars)
    splits = {entry.name: split_of(entry.name) for entry in entries if entry.is_folder}
    units: dict[str, list[Unit]] = {}
    for name, split in splits.items():
        if split is not None:
            units.setdefault(split, []).extend(_tars_of_split(archive, name, split))
    if any(units.values()):
        order = in_order({split for split, found in units.items() if found})
        return _source_21k(
            archive, tuple(unit for split in order for unit in units[split]), splits=order
        )
    packed = [entry for entry in entries if not entry.is_folder and is_compressed(entry.name)]
    if len(packed) == 1 and look_into(archive / packed[0].name).kind == "nested":
        return _stream_21k(archive, packed[0].name, packed[0].size, beside=archive)
    return None


def _class_tars(archive: Place, tars: list[Entry]) -> Source | None:
    """Tars of a class each, outer tars, or both; None: the first is one of class folders."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        looks = list(pool.map(lambda entry: first_look(archive / entry.name), tars))
    folder = PurePosixPath(looks[0].name).parent.name
    if looks[0].kind == "tree" and folder != _stem(printable(tars[0].name)):
        return None  # not `n01440764/n01440764_1.JPEG` in `n01440764.tar`
    units = [
        inner_tars(archive / entry.name, entry.name)
        if look.kind == "nested"
        else (_class_tar(entry),)
        for entry, look in zip(tars, looks, strict=True)
    ]
    return _source_21k(archive, tuple(chain.from_iterable(units)))


def _class_tar(entry: Entry, folder: str = "", split: str | None = None) -> Unit:
    path = folder + entry.name
    return Unit(
        kind="tar",
        path=path,
        name=printable(path),
        size=entry.size,
        class_name=_stem(printable(entry.name)),
        split=split,
    )


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _tars_of_split(archive: Place, name: str, split: str) -> list[Unit]:
    return [
        _class_tar(entry, f"{name}/", split)
        for entry in visible(archive / name)
        if not entry.is_folder and is_tar(entry.name)
    ]


def _source_21k(
    archive: Place,
    units: tuple[Unit, ...],
    *,
    splits: tuple[str, ...] = (),
    beside: Place | None = None,
) -> Source:
    return Source(
        layout="imagenet21k",
        archive=archive.absolute(),
        media="image",
        units=units,
        splits=splits,
        names=_names(_classes(units), archive, beside),
    )


def _stream_21k(archive: Place, path: str, size: int, *, beside: Place) -> Source:
    return Source(
        layout="imagenet21k",
        archive=archive.absolute(),
        media="image",
        units=(),
        names=class_words(beside),
        stream=Stream(paths=(path,), size=size, nested=True),
    )


def _classes(units: Iterable[Unit]) -> set[str]:
    return {unit.class_name for unit in units if unit.class_name is not None}


def _names(classes: set[str], archive: Place, beside: Place | None = None) -> Mapping[str, str]:
    """People's names of the classes, from a list in the archive or beside it."""
    folders = (beside,) if beside is not None else (archive, archive.absolute().parent)
    words = class_words(*folders)
    return {name: words[name] for name in sorted(classes) if name in words}


def recognise_21k_p(archive: Place) -> Source | None:
    """Describe the processed subset; None: it has no such folders."""
    if not archive.is_folder():
        return _packed_21k_p(archive)
    for path, entries in _one_level(archive):
        found = {
            split: f"{path}{entry.name}"
            for entry in entries
            if entry.is_folder and (split := split_of(entry.name)) is not None
        }
        if "train" not in found:
            continue
        named = SMALL_CLASSES in found or any("imagenet21k" in name for name in found.values())
        train = _class_folders(archive, found["train"], "train")
        if (named and train) or (len(train) > MANY_CLASSES and WNID.fullmatch(_any_class(train))):
            val = _class_folders(archive, found["val"], "val") if "val" in found else []
            splits = ("train", "val") if val else ("train",)
            return _source_21k_p(archive, (*train, *val), splits)
    return None


def _one_level(archive: Place) -> list[tuple[str, list[Entry]]]:
    """The folder itself, and one that is alone in it, with their entries."""
    entries = visible(archive)
    below = [entry for entry in entries if entry.is_folder]
    levels = [("", entries)]
    if len(below) == 1:
        levels += [(f"{entry.name}/", visible(archive / entry.name)) for entry in below]
    return levels


def _class_folders(archive: Place, path: str, split: str | None) -> list[Unit]:
    return [
        Unit(
            kind="folder",
            path=f"{path}/{entry.name}",
            name=printable(f"{path}/{entry.name}"),
            class_name=printable(entry.name),
            split=split,
        )
        for entry in visible(archive / path)
        if entry.is_folder
    ]


def _any_class(units: list[Unit]) -> str:
    return next((unit.class_name for unit in units if unit.class_name is not None), "")


def _source_21k_p(archive: Place, units: tuple[Unit, ...], splits: tuple[str, ...]) -> Source:
    return Source(
        layout="imagenet21k-p",
        archive=archive.absolute(),
        media="image",
        units=units,
        splits=splits,
        names=_names(_classes(units), archive),
    )


def _packed_21k_p(archive: Place) -> Source | None:
    """The subset in one tar, compressed or not: its folders are told by the first names."""
    packed = is_compressed(archive.name)
    if not packed and not is_tar(archive.name):
        return None
    look = look_into(archive)
    folders = {part for name in look.names for part in PurePosixPath(name).parts[:-2]}
    if look.kind != "tree" or not any(
        split_of(folder) and ("imagenet21k" in folder or folder == SMALL_CLASSES)
        for folder in folders
    ):
        return None
    size = archive.size()
    unit = Unit(kind="tar", path="", name=printable(archive.name), size=size)
    return Source(
        layout="imagenet21k-p",
        archive=archive.absolute(),
        media="image",
        units=() if packed else (unit,),
        splits=("train", "val") if packed else _splits_21k_p(archive),
        names=class_words(archive.absolute().parent),
        stream=Stream(paths=("",), size=size, nested=False) if packed else None,
    )


def _splits_21k_p(archive: Place) -> tuple[str, ...]:
    """Those of `train` and `val` that are there; the tar of small classes alone is its own."""
    there = splits_of(folders_in(archive, to_the_end=True))
    return tuple(split for split in there if split in ("train", "val")) or there


def recognise_1k(archive: Place) -> Source | None:
    """Describe ILSVRC 2012; None: it has neither its tars nor its validation images.

    Raises:
        ArchiveError: The classes of the validation images are not there, or their list is broken.
    """
    if not archive.is_folder():
        if archive.name != TRAIN_TAR or look_into(archive).kind != "nested":
            return None
        return _source_1k(archive, inner_tars(archive, "", "train"), None)
    for base in ("", *(path for path in KAGGLE if (archive / path).is_folder())):
        folder = archive / base
        prefix = f"{base}/" if base else ""
        entries = {entry.name: entry for entry in visible(folder)}
        val = _flat_val(folder, prefix, entries)
        if TRAIN_TAR in entries or val is not None:
            train = _train_1k(archive, prefix, entries)
            if val is None and _is_folder(entries, "val"):
                train = (*train, *_class_folders(archive, f"{prefix}val", "val"))
            return _source_1k(archive, train, val, folder=folder)
    return None


def _is_folder(entries: Mapping[str, Entry], name: str) -> bool:
    return name in entries and entries[name].is_folder


def _train_1k(archive: Place, prefix: str, entries: Mapping[str, Entry]) -> tuple[Unit, ...]:
    if TRAIN_TAR in entries:
        return inner_tars(archive / f"{prefix}{TRAIN_TAR}", f"{prefix}{TRAIN_TAR}", "train")
    if not _is_folder(entries, "train"):
        return ()
    tars = _tars_of_split(archive, f"{prefix}train", "train")
    return tuple(tars or _class_folders(archive, f"{prefix}train", "train"))


def _flat_val(folder: Place, prefix: str, entries: Mapping[str, Entry]) -> Unit | None:
    """The validation images without class folders, as a tar or a folder; None: there are none."""
    if VAL_TAR in entries:
        size = entries[VAL_TAR].size
        return Unit(
            kind="tar", path=f"{prefix}{VAL_TAR}", name=f"{prefix}{VAL_TAR}", size=size, split="val"
        )
    if not _is_folder(entries, "val"):
        return None
    first = islice((entry.name for entry in visible(folder / "val") if not entry.is_folder), 8)
    if not any(VAL_IMAGE.fullmatch(name) for name in first):
        return None
    return Unit(kind="folder", path=f"{prefix}val", name=f"{prefix}val", split="val")


def _source_1k(
    archive: Place, train: tuple[Unit, ...], val: Unit | None, *, folder: Place | None = None
) -> Source:
    listed = None if val is None else _val_classes(archive, folder or archive, val)
    classes = _classes(train) | {row.class_name or "" for row in (listed or {}).values()}
    units = (*train, val) if val is not None else train
    splits = in_order({unit.split for unit in units if unit.split is not None})
    above = (archive, archive.absolute().parent)
    return Source(
        layout="imagenet1k",
        archive=archive.absolute(),
        media="image",
        units=units,
        splits=splits,
        classes=tuple(sorted(classes)),
        names={name: word for name, word in class_words(*above).items() if name in classes},
        listed=listed,
    )


def _val_classes(archive: Place, folder: Place, val: Unit) -> dict[str, Listed]:
    """File stem -> class, from one of the known lists in the archive or up to three folders up."""
    looked: list[Place] = []
    for place in (archive, folder, *_parents(folder.absolute(), 3)):
        if place in looked:
            continue
        looked.append(place)
        if (place / VAL_SOLUTION).is_file():
            return _read_solution(place / VAL_SOLUTION)
        if (place / VAL_LABELS).is_file():
            return _read_labels(place / VAL_LABELS)
    raise ArchiveError(
        f"{archive / val.path} holds validation images without their classes; put {VAL_SOLUTION} "
        f"or {VAL_LABELS} into {archive}, or take the images out"
    )


def _parents(place: Place, levels: int) -> list[Place]:
    found = []
    for _ in range(levels):
        place = place.parent
        found.append(place)
    return found


def _read_solution(place: Place) -> dict[str, Listed]:
    """Kaggle's list: `ImageId,PredictionString`, the class first in the second column."""
    listed: dict[str, Listed] = {}
    try:
        for number, row in enumerate(csv.reader(text_of(place).splitlines(), strict=True), start=1):
            if number == 1 or not row:
                continue
            wnid = row[1].split()[0] if len(row) > 1 and row[1].split() else ""
            if not WNID.fullmatch(wnid) or not row[0]:
                raise ArchiveError(f"{place} line {number} has no image and class; {_MEND}")
            listed[row[0]] = Listed(class_name=wnid, split="val")
    except csv.Error as error:
        raise ArchiveError(f"{place} is no csv: {error}; {_MEND}") from error
    return listed


def _read_labels(place: Place) -> dict[str, Listed]:
    """A wnid a line; line k is the class of `ILSVRC2012_val_<k>`."""
    listed: dict[str, Listed] = {}
    for number, line in enumerate(text_of(place).splitlines(), start=1):
        if not WNID.fullmatch(line.strip()):
            raise ArchiveError(f"{place} line {number} is no wnid such as n01440764; {_MEND}")
        listed[f"ILSVRC2012_val_{number:08d}"] = Listed(class_name=line.strip(), split="val")
    return listed


def recognise_named(archive: Place) -> Source | None:
    """Describe a flat folder of `<wnid>_<anything>.JPEG`; None: its first image is named otherwise.

    The class is what stands before the first `_`.
    """
    if not archive.is_folder():
        return None
    entries = visible(archive)
    if any(entry.is_folder for entry in entries):
        return None
    images = [entry.name for entry in entries if media_of(entry.name) == "image"]
    if not images or not WNID.fullmatch(images[0].partition("_")[0]):
        return None
    classes = {name.partition("_")[0] for name in images}
    return Source(
        layout="named",
        archive=archive.absolute(),
        media="image",
        units=(Unit(kind="folder", path="", name=printable(archive.absolute().name)),),
        names=_names(classes, archive),
    )
