"""Class-folder trees as folders and tars, and what is refused because no layout fits."""

from collections import Counter
from pathlib import Path

import pytest

from pipelines.data.archives.scan import scan
from pipelines.data.archives.spool import spool
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Source
from pipelines.errors import ArchiveError
from pipelines.storage import Place
from tests.raw_archives import jpeg, jpegs, write_files, write_tar

SHARED = Path(__file__).parents[4] / "../shared/data"


def found(archive: Path, layout: str = "auto") -> Source:
    return find_source(Place(str(archive)), layout)


def told(source: Source) -> Counter[tuple[str | None, str | None, str | None]]:
    """How many members have which class, split and problem."""
    members = (member for unit in source.units for member in scan(source, unit))
    return Counter((each.class_name, each.split, each.problem) for each in members)


def tree(prefix: str = "", classes: tuple[str, ...] = ("cat", "a dog", "b.c")) -> dict[str, bytes]:
    return {f"{prefix}{name}/{k}.jpg": jpeg(k) for name in classes for k in range(2)}


def test_a_tree_is_a_unit_per_class_folder(tmp_path: Path) -> None:
    write_files(tmp_path, tree() | {"README.md": b"x", ".git/HEAD": b"x"})
    (tmp_path / "empty").mkdir()
    source = found(tmp_path)
    assert (source.layout, source.media, source.splits) == ("folders", "image", ())
    assert [unit.class_name for unit in source.units] == ["a dog", "b.c", "cat", "empty"]
    assert told(source) == {
        ("cat", None, None): 2,
        ("a dog", None, None): 2,
        ("b.c", None, None): 2,
    }


def test_folders_below_a_class_belong_to_it(tmp_path: Path) -> None:
    write_files(tmp_path, {f"n01440764/images/n01440764_{k}.JPEG": jpeg(k) for k in range(3)})
    assert told(found(tmp_path)) == {("n01440764", None, None): 3}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "val"), ("train", "val")),
        (("test", "train", "validation"), ("train", "val", "test")),
        (("Train", "Test"), ("train", "test")),
    ],
)
def test_folders_named_after_splits_on_top_are_splits(
    tmp_path: Path, names: tuple[str, ...], splits: tuple[str, ...]
) -> None:
    for name in names:
        write_files(tmp_path, tree(f"{name}/"))
    source = found(tmp_path)
    assert source.splits == splits
    assert told(source) == {
        (name, split, None): 2 for name in ("cat", "a dog", "b.c") for split in splits
    }
    assert [unit.split for unit in source.units] == sorted(
        (str(unit.split) for unit in source.units), key=splits.index
    )


def test_a_class_called_test_is_a_class_among_others(tmp_path: Path) -> None:
    write_files(tmp_path, tree("", ("cat", "test")))
    assert told(found(tmp_path)) == {("cat", None, None): 2, ("test", None, None): 2}


def test_a_class_that_train_lacks_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, tree("train/") | {"val/images/val_0.JPEG": jpeg()})
    with pytest.raises(
        ArchiveError,
        match=r"val has 1 classes that train lacks, such as 'images'; sort its files into the "
        r"folders of their classes, or take val out, or shard .*train alone",
    ):
        found(tmp_path)


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_split_without_class_folders_is_refused_and_no_class(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, tree("train/") | {f"{name}/1.jpg": jpeg()})
    with pytest.raises(
        ArchiveError,
        match=rf"{name} holds no class folders with images or videos, as others beside it do; sort "
        rf"its files into the folders of their classes, or take {name} out",
    ):
        found(tmp_path)
    write_files(tmp_path, {f"{name}/cat/1.jpg": jpeg()})
    (tmp_path / name / "1.jpg").unlink()
    (tmp_path / "valid").mkdir()
    assert "cat" in {unit.class_name for unit in found(tmp_path).units}


def test_splits_without_classes_are_no_classes(tmp_path: Path) -> None:
    write_files(tmp_path, {"train/1.jpg": jpeg(), "val/2.jpg": jpeg()})
    with pytest.raises(
        ArchiveError, match=r"2 folders \(train, val\); expected is a folder per cl"
    ):
        found(tmp_path)


def test_the_layouts_that_are_named_come_near_to_what_lies_there(tmp_path: Path) -> None:
    write_files(tmp_path, {"lists/a.csv": b"", "else/b.txt": b""})
    for name in ("train", "part-2"):
        write_tar(tmp_path / "tars" / f"{name}.tar", tree())
    for name, layouts in (
        ("lists", r"\(kinetics\), or .* \(ssv2\)"),
        ("tars", r"\(folders\), or .* \(imagenet21k\)"),
        ("else", r"\(folders\)"),
    ):
        with pytest.raises(ArchiveError, match=rf"expected is [^(]*{layouts}$") as refused:
            found(tmp_path / name)
        assert len(str(refused.value).replace(str(tmp_path), "")) < 350


def test_a_tree_of_videos_is_one_of_videos(tmp_path: Path) -> None:
    write_files(tmp_path, {"wave/1.mp4": b"x", "clap/1.webm": b"x"})
    assert found(tmp_path).media == "video"


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    write_files(tmp_path / "all", tree())
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(tmp_path / "all" / "cat")
    assert told(found(tmp_path / "some")) == {("cat", None, None): 2}


def test_a_tar_of_class_folders_is_one_unit(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train.tar", {"cat/": b""} | tree())
    source = found(path)
    assert (source.layout, source.splits, len(source.units)) == ("folders", (), 1)
    assert told(source)[("a dog", None, None)] == 2


def test_a_tar_with_splits_in_it_has_those_that_are_there(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "all.tar", tree("data/train/") | tree("data/test/"))
    source = found(path)
    assert source.splits == ("train", "test")
    assert told(source)[("cat", "test", None)] == 2


def test_tars_named_after_splits_are_splits(tmp_path: Path) -> None:
    for name in ("test", "train"):
        write_tar(tmp_path / f"{name}.tar", tree())
    source = found(tmp_path)
    assert (source.layout, source.splits) == ("folders", ("train", "test"))
    assert [unit.name for unit in source.units] == ["train.tar", "test.tar"]
    assert told(source)[("cat", "test", None)] == 2


@pytest.mark.parametrize("names", [("cifar",), ("part-1", "part-2")])
def test_a_folder_of_tars_of_class_folders_is_no_folder_of_class_tars(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        write_tar(tmp_path / f"{name}.tar", tree())
    source = found(tmp_path)
    assert (source.layout, source.splits) == ("folders", ())
    assert told(source)[("cat", None, None)] == 2 * len(names)


def test_tars_of_which_only_some_are_named_after_splits_are_refused(tmp_path: Path) -> None:
    for name in ("train", "part-2"):
        write_tar(tmp_path / f"{name}.tar", tree())
    with pytest.raises(ArchiveError, match=r"2 files \(part-2\.tar, train\.tar\); expected is"):
        found(tmp_path)


@pytest.mark.parametrize("prefix", ["", "data/train/"])
def test_a_compressed_tree_is_a_stream(tmp_path: Path, prefix: str) -> None:
    path = write_tar(tmp_path / "all.tar.gz", tree(prefix))
    source = found(path)
    assert source.stream is not None
    assert not source.stream.nested
    assert source.splits == (("train", "val", "test") if prefix else ())  # it may have any
    spooled = spool(source, Place(str(tmp_path / "spool")))
    assert spooled.splits == (("train",) if prefix else ())
    assert told(spooled)[("cat", "train" if prefix else None, None)] == 2


def test_the_real_tars_of_class_folders_are_recognised_and_whole() -> None:
    folder = SHARED / "cifar10-jpeg"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/cifar10-jpeg")
    source = found(folder)
    assert source.splits == ("train", "test")
    counts = told(source)
    assert len(counts) == 20
    assert counts[("airplane", "train", None)] == 500
    assert counts[("airplane", "test", None)] == 100
    assert found(folder / "test.tar").splits == ()


@pytest.mark.parametrize(
    ("files", "given", "says"),
    [
        ({}, "absent", r"absent does not exist; expected is a folder, a tar or a \.tar\.gz"),
        ({"x/": b""}, "x", r"x is an empty folder; expected is"),
        (
            {"a.txt": b"", "b.txt": b"", "sub/c.pdf": b""},
            "",
            r"is a folder with 1 folder \(sub\) and 2 files \(a\.txt, b\.txt\); expected is",
        ),
        ({"a.pdf": b"x"}, "a.pdf", r"a\.pdf is a file that is no tar by its name; expected is"),
        ({"a.tar": b"x" * 2000}, "a.tar", r"a\.tar is a file without a member of a tar; expected"),
        ({"IMG_1.jpg": b"x"}, "", r"is a folder with 1 file \(IMG_1\.jpg\); expected is"),
    ],
)
def test_what_is_no_archive_is_refused_by_what_lies_there(
    tmp_path: Path, files: dict[str, bytes], given: str, says: str
) -> None:
    for name, data in files.items():
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            write_files(tmp_path, {name: data})
    with pytest.raises(ArchiveError, match=says):
        found(tmp_path / given if given else tmp_path)


def test_the_tar_of_one_class_is_refused_with_the_next_step(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "n01440764.tar", jpegs("n01440764", 2))
    with pytest.raises(
        ArchiveError,
        match=r"is the tar of one class: n01440764_0\.JPEG lies in no folder; give the folder",
    ):
        found(path)


def test_a_tar_of_other_things_is_refused_by_its_first_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a/b.txt": b"x"})
    with pytest.raises(ArchiveError, match=r"x\.tar is a tar that begins with a/b\.txt; expected"):
        found(path)


def test_an_unknown_layout_is_refused_with_near_misses(tmp_path: Path) -> None:
    with pytest.raises(
        ArchiveError, match=r"no layout called 'imagenet'; did you mean .* Take auto or one of kin"
    ):
        found(tmp_path, "imagenet")
