"""Keys and classes are a function of class and path, whatever an archive is packed in."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipelines.data.archives.names import MAX_KEY_BYTES, sample_key
from pipelines.data.archives.scan import scan
from pipelines.data.archives.spool import spool
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Member, Source
from pipelines.storage import Place
from tests.raw_archives import jpeg, write_files, write_tar

TREES = {
    "flat": ("cat/1.jpg", "dog/1.jpg", "dog/dog_1.jpg"),
    "wrapped classes": ("n01/images/n01_1.JPEG", "n01/n01_2.JPEG", "n02/images/n02_1.JPEG"),
    "frames": tuple(f"{c}/vid{v}/frame{f}.jpg" for c in ("cat", "dog") for v in "12" for f in "01"),
    "underscores": ("dog/small_1.jpg", "dog_small/1.jpg", "dog/1.jpg", "dog/dog_1.jpg"),
    "dots": ("a.b/1.jpg", "a_b/1.jpg", "a b/x.y.jpg", "a b/x_y.jpg"),
    "the class twice": ("cat/cat/1.jpg", "cat/1.jpg", "dog/1.jpg"),
    "splits": (
        "train/cat/vid1/0.jpg",
        "train/cat/vid2/0.jpg",
        "train/dog/0.jpg",
        "test/cat/vid1/0.jpg",
        "test/dog/0.jpg",
    ),
}  # fmt: skip


def files_of(tree: str, prefix: str = "") -> dict[str, bytes]:
    return {prefix + name: jpeg() for name in TREES[tree]}


def members(source: Source) -> list[Member]:
    return [member for unit in source.units for member in scan(source, unit)]


def told(source: Source) -> list[tuple[str, str | None, str | None, str | None]]:
    found = [(each.key, each.class_name, each.split, each.problem) for each in members(source)]
    return sorted(found, key=str)


def packed(path: Path, files: Mapping[str, bytes]) -> Source:
    """The source of a tar, spooled if it is compressed."""
    source = find_source(Place(str(write_tar(path, files))))
    return spool(source, Place(str(path.parent / "spool"))) if source.stream else source


@pytest.mark.parametrize("prefix", ["", "./", "data/", "some/where/"])
@pytest.mark.parametrize("tree", TREES)
def test_a_tree_has_the_same_keys_and_classes_as_folder_tar_and_compressed_tar(
    tmp_path: Path, tree: str, prefix: str
) -> None:
    folder = told(find_source(Place(str(write_files(tmp_path / "tree", files_of(tree))))))
    assert [problem for *_, problem in folder] == [None] * len(TREES[tree])
    assert len({key for key, _, split, _ in folder if split in (None, "train")}) == sum(
        split in (None, "train") for _, _, split, _ in folder
    )
    files = files_of(tree, prefix) | {f"{prefix}README.md": b"x", f"{prefix}.git/x/1.jpg": b"x"}
    backward = dict(reversed(files.items()))
    for path, content in (
        (tmp_path / "a/tree.tar", files),
        (tmp_path / "b/tree.tar", backward),
        (tmp_path / "c/tree.tar.gz", files),
        (tmp_path / "d/tree.tar.gz", backward),
    ):
        source = packed(path, content)
        assert [each for each in told(source) if each[3] is None] == folder, path
        assert source.splits == (("train", "test") if tree == "splits" else ())


def test_tars_of_a_tree_in_parts_have_the_classes_of_the_whole(tmp_path: Path) -> None:
    for form, prefixes in (("one", ("", "")), ("two", ("part-1/", "part-2/"))):
        for number, prefix in enumerate(prefixes, 1):
            files = {f"{prefix}{name}/{number}.jpg": jpeg() for name in ("cat", "dog")}
            write_tar(tmp_path / form / f"part-{number}.tar", files)
        found = told(find_source(Place(str(tmp_path / form))))
        assert [(key, name) for key, name, *_ in found] == [
            ("cat_1", "cat"),
            ("cat_2", "cat"),
            ("dog_1", "dog"),
            ("dog_2", "dog"),
        ]


def test_parts_that_hold_a_class_each_have_its_name(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        files = {f"all/{name}/vid{video}/0.jpg": jpeg() for video in (1, 2)}
        write_tar(tmp_path / f"part-{number}.tar", files)
    assert {name for _, name, *_ in told(find_source(Place(str(tmp_path))))} == {"cat", "dog"}


@pytest.mark.parametrize("more", [(), ("images2/n02440764_2.JPEG",)])
def test_class_tars_with_folders_in_them_have_the_class_of_the_tar(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    for wnid in ("n01440764", "n02440764"):
        names = (f"images/{wnid}_1.JPEG", *more)
        write_tar(tmp_path / f"{wnid}.tar", {f"{wnid}/{name}": jpeg() for name in names})
    found = told(find_source(Place(str(tmp_path))))
    assert {name for _, name, *_ in found} == {"n01440764", "n02440764"}
    assert len({key for key, *_ in found}) == len(found) == 2 + 2 * len(more)


@pytest.mark.parametrize("split", ["train", "training"])
def test_tars_named_after_splits_may_hold_a_folder_of_that_name(tmp_path: Path, split: str) -> None:
    write_tar(tmp_path / "train.tar", {f"{split}/{name}/1.jpg": jpeg() for name in ("cat", "dog")})
    write_tar(tmp_path / "val.tar", {"val/cat/1.jpg": jpeg()})
    assert [each[:3] for each in told(find_source(Place(str(tmp_path))))] == [
        ("cat_1", "cat", "train"),
        ("cat_1", "cat", "val"),
        ("dog_1", "dog", "train"),
    ]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("cat/1.jpg", "cat/front/2.jpg"), {"cat"}),
        (("data/cat/1.jpg",), {"cat"}),
        (("data/cover.jpg", "data/cat/1.jpg", "data/dog/1.jpg"), {None, "cat", "dog"}),
        (("cat/1.jpg", "1.jpg"), {None, "cat"}),
    ],
)
def test_the_first_folders_that_differ_are_classes_and_what_lies_above_has_none(
    tmp_path: Path, names: tuple[str, ...], classes: set[str | None]
) -> None:
    source = packed(tmp_path / "all.tar", {name: jpeg() for name in names})
    found = members(source)
    assert {member.class_name for member in found} == classes
    for member in found:
        assert (member.problem == "lies in no class folder") == (member.class_name is None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("dog", "small_1.jpg"), ("dog_small", "1.jpg")),
        (("dog", "1.jpg"), ("dog", "dog_1.jpg")),
        (("n01", "1.jpg"), ("n01", "n01_1.jpg")),
        (("n01", "x/n01_1.jpg"), ("n02", "x/n01_1.jpg")),
        (("n01", "x/n01_1.jpg"), ("n01", "y/n01_1.jpg")),
        (("a_b", "c.jpg"), ("a", "b_c.jpg")),
        (("a_b", "a_b_c.jpg"), ("a", "b_a_b_c.jpg")),
        (("a.b", "1.jpg"), ("a_b", "1.jpg")),
        (("cat", "cat/1.jpg"), ("cat", "1.jpg")),
    ],
)
def test_another_class_or_path_is_another_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    keys = {sample_key(*each) for each in (one, other)}
    assert len(keys) == 2
    assert not any(set(key) & set("./\\\n") or len(key.encode()) > MAX_KEY_BYTES for key in keys)


def test_plain_names_give_plain_keys() -> None:
    assert sample_key("n01440764", "n01440764_18.JPEG") == "n01440764_18"
    assert sample_key("airplane", "0001.jpg") == "airplane_0001"
    assert sample_key("dog", "dog_1.jpg") == "dog_dog_1"
    assert sample_key(None, "v_1.mp4") == "v_1"
