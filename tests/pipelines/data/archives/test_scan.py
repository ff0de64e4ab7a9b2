"""Scanning units: class, split, key and fate of every file, and nothing raised for bad input."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipelines.data.archives.names import MAX_KEY_BYTES, sample_key
from pipelines.data.archives.probe import MAX_BYTES
from pipelines.data.archives.scan import UNLISTED, scan
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Listed, Member, Source, Unit
from pipelines.storage import Place
from tests.raw_archives import encoded, jpeg, jpegs, picture, tar_bytes, write_files, write_tar

ROOT = Path(__file__).parents[4]


def source(archive: Path, *units: Unit, layout: str = "folders", **more: object) -> Source:
    return Source(layout=layout, archive=Place(str(archive)), media="image", units=units, **more)


def class_tar(path: Path, name: str = "n01") -> list[Member]:
    unit = Unit(
        kind="tar", path=path.name, name=path.name, size=path.stat().st_size, class_name=name
    )
    return list(scan(source(path.parent, unit), unit))


def tree(folder: Path, class_name: str | None = "cat", **more: object) -> list[Member]:
    unit = Unit(kind="folder", path=folder.name, name=folder.name, class_name=class_name)
    return list(scan(source(folder.parent, unit, **more), unit))


def test_every_member_of_a_class_tar_is_told_with_where_it_lies(tmp_path: Path) -> None:
    files = jpegs("n01", 5)
    path = write_tar(tmp_path / "n01.tar", files)
    members = class_tar(path)
    assert [member.key for member in members] == [name[:-5] for name in files]
    for member, data in zip(members, files.values(), strict=True):
        assert (member.problem, member.remark, member.lost) == (None, None, 0)
        assert (member.class_name, member.path) == ("n01", "n01.tar")
        assert member.name == f"n01.tar/{member.key}.JPEG"
        assert path.read_bytes()[member.offset : member.offset + member.size] == data


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01_7.JPEG", "n01_7"),
        ("./n01_7.JPEG", "n01_7"),
        ("n01/n01_7.JPEG", "n01_7"),
        ("0007.jpg", "n01_0007-HASH"),
        ("n01_é.png", "n01_é"),
        ("n01_a b.jpg", "n01_a b"),
        ("n01_7.v2.JPEG", "n01_7_v2-HASH"),
        ("n01_\udcff.jpg", "n01__xff-HASH"),
        ("sub/n01_7.JPEG", "sub_n01_7-HASH"),
    ],
)
def test_keys_have_no_dots_and_the_class_in_front(tmp_path: Path, name: str, key: str) -> None:
    (member,) = class_tar(write_tar(tmp_path / "n01.tar", {name: jpeg()}))
    assert member.problem is None
    assert re.fullmatch(re.escape(key).replace("HASH", "[0-9a-f]{10}"), member.key)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.b.jpg", "a_b.jpg"),
        ("a\n.jpg", "a_x0a.jpg"),
        ("x/1.jpg", "y/1.jpg"),
        ("x/1.jpg", "x_1.jpg"),
        ("\udcff.jpg", "\udcfe.jpg"),
        ("l" * 300 + "1.jpg", "l" * 300 + "2.jpg"),
    ],
)
def test_two_names_never_collapse_into_one_key(one: str, other: str) -> None:
    keys = {sample_key("cat", name) for name in (one, other)}
    assert len(keys) == 2
    for key in keys:
        assert key.startswith("cat_")
        assert not set(key) & set("./\\\n")
        assert len(key.encode()) <= MAX_KEY_BYTES


def test_classes_whose_names_differ_by_a_dot_share_no_key() -> None:
    assert sample_key("a.b", "1.jpg") != sample_key("a_b", "1.jpg")


def test_an_empty_synset_has_no_members(tmp_path: Path) -> None:
    assert class_tar(write_tar(tmp_path / "n01.tar", {})) == []
    (tmp_path / "cat").mkdir()
    assert tree(tmp_path / "cat") == []


def test_what_is_no_image_by_its_name_kind_or_bytes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "n01.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("sub", tarfile.DIRTYPE), ("n01_1.JPEG", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("README.txt", "n01_3.JPEG", "._n01_4.JPEG", "../n01_5.JPEG", "/n01_6.JPEG"):
            tar.addfile(tarfile.TarInfo(name))
    members = class_tar(path)
    assert [member.problem for member in members] == [
        "is a link",
        "is not an image by its name (suffix '.txt')",
        "is empty",
        "is a hidden file",
        "has a name that leads outside, with '..'",
        "has an absolute path as its name",
    ]
    assert all(member.name.startswith("n01.tar/") for member in members)


def test_an_image_of_another_kind_than_its_name_says_is_kept(tmp_path: Path) -> None:
    (member,) = class_tar(
        write_tar(tmp_path / "n01.tar", {"n01_1.JPEG": encoded(picture(), "PNG")})
    )
    assert (member.problem, member.remark) == (None, "is PNG, not JPEG as its name says")


def test_a_member_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "n01.tar"
    info = tarfile.TarInfo("n01_0.JPEG")
    info.size = 2**31
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + 2**31 + 1024)  # a hole: no disk is used
    (member,) = class_tar(path)
    limit = MAX_BYTES["image"]
    assert member.problem == f"has {2**31} bytes, more than the limit of {limit}"


def test_a_truncated_tar_keeps_what_stands_before_and_tells_what_is_lost(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "n01.tar", jpegs("n01", 4))
    third = class_tar(path)[2]
    path.write_bytes(path.read_bytes()[: third.offset + 5])
    *kept, last = class_tar(path)
    assert [member.key for member in kept] == ["n01_0", "n01_1"]
    assert last.name == "n01.tar"
    cut = third.offset + 5
    assert last.problem == f"is cut off: it ends at byte {cut}; what followed is lost"
    assert last.lost == 512 + 5
    assert last.class_name is None


def test_a_missing_or_unreadable_tar_is_told(tmp_path: Path) -> None:
    unit = Unit(kind="tar", path="n09.tar", name="n09.tar", size=700, class_name="n09")
    (member,) = scan(source(tmp_path, unit), unit)
    assert member.problem == "cannot be read: No such file or directory; what follows is lost"
    assert member.lost == 700


def test_files_of_a_class_folder_are_members_in_sorted_order(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "cat",
        {"b.jpg": jpeg(1), "a.jpg": jpeg(2), "sub/1.jpg": jpeg(3), "note.txt": b"x", "c.jpg": b""},
    )
    members = tree(folder)
    assert [member.name for member in members] == [
        "cat/a.jpg",
        "cat/b.jpg",
        "cat/c.jpg",
        "cat/note.txt",
        "cat/sub/1.jpg",
    ]
    assert [member.problem for member in members] == [
        None,
        None,
        "is empty",
        "is not an image by its name (suffix '.txt')",
        None,
    ]
    for member in members:
        assert (tmp_path / member.path).stat().st_size == member.size
    assert members[0].key == "cat_a"


def test_links_in_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "cat", {"a.jpg": jpeg()})
    (folder / "b.jpg").symlink_to(folder / "a.jpg")
    (folder / "gone.jpg").symlink_to(folder / "absent.jpg")
    (folder / "round").symlink_to(folder)
    members = tree(folder)
    assert [m.problem for m in members if m.name in ("cat/a.jpg", "cat/b.jpg")] == [None, None]
    problems = {m.problem for m in members if m.problem}
    assert "is a link that leads nowhere" in problems
    assert any("lies more than 16 folders deep" in problem for problem in problems)


def test_a_file_whose_name_is_not_utf_8_is_told_and_left_alone(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "cat", {"a.jpg": jpeg()})
    (folder / "b\udcff.jpg").write_bytes(jpeg())
    _, odd = tree(folder)
    assert odd.name == "cat/b\\xff.jpg"
    assert odd.path == ""
    assert odd.problem == "has a name that is not printable UTF-8; rename it"


def test_a_listed_file_has_the_class_and_split_of_its_row(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "val", {"v1.jpg": jpeg(1), "v2.jpg": jpeg(2), "v3.jpg": b""})
    listed = {
        "v1": Listed(class_name="n01", split="val"),
        "v3": Listed(class_name=None, split="test"),
    }
    told = [(m.key, m.class_name, m.split, m.problem) for m in tree(folder, None, listed=listed)]
    assert told == [
        ("v1", "n01", "val", None),
        ("v2", None, None, UNLISTED),
        ("v3", None, "test", "is empty"),
    ]


def test_a_file_in_a_tar_has_the_class_of_its_folder_and_the_split_above(tmp_path: Path) -> None:
    names = ["train/cat/1.jpg", "./data/val/dog/1.jpg", "cat/2.jpg", "3.jpg"]
    path = write_tar(tmp_path / "all.tar", {name: jpeg() for name in names})
    unit = Unit(kind="tar", path="", name="all.tar", size=path.stat().st_size)
    whole = source(path, unit, splits=("train", "val"))
    told = [(m.class_name, m.split, m.problem) for m in scan(whole, unit)]
    assert told == [
        ("cat", "train", None),
        ("dog", "val", None),
        (None, None, "lies in no class folder of train or val"),
        (None, None, "lies in no class folder of train or val"),
    ]


def test_a_file_outside_the_splits_of_a_tar_is_no_sample_of_the_first(tmp_path: Path) -> None:
    names = ["train/n01/images/1.jpg", "test/1.jpg", "test/cat/1.jpg", "small_classes/n02/1.jpg"]
    path = write_tar(tmp_path / "all.tar", {name: jpeg() for name in names})
    unit = Unit(kind="tar", path="", name="all.tar", size=path.stat().st_size)
    outside = (None, None, "lies in no class folder of train")
    whole = source(path, unit, splits=("train",))
    told = [(m.class_name, m.split, m.problem) for m in scan(whole, unit)]
    assert told == [("n01", "train", None), outside, outside, outside]
    processed = source(path, unit, splits=("train",), layout="imagenet21k-p")
    *_, small = scan(processed, unit)
    assert (small.class_name, small.split, small.problem) == ("n02", "small_classes", None)


def test_how_much_a_cut_off_tar_of_many_classes_lacks_is_not_known(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "all.tar", {f"cat/{k}.jpg": jpeg(k) for k in range(3)})
    path.write_bytes(path.read_bytes()[:-10_000])
    unit = Unit(kind="tar", path="", name="all.tar", size=path.stat().st_size)
    *_, lost = scan(source(path, unit), unit)
    assert (lost.name, lost.lost) == ("all.tar", None)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_a_tar(tmp_path: Path) -> None:
    code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.raw_archives import *
from pipelines.data.archives.scan import scan
from pipelines.data.sources import find_source
from pipelines.storage import Place
path = Path({str(tmp_path)!r}) / "n00000001.tar"
data = jpeg() + bytes(3 << 20)
with path.open("wb") as file:
    for n in range(100):
        one = tar_bytes({{f"n00000001_{{n}}.JPEG": data}})
        file.write(one[: 512 + len(data) + -len(data) % 512])
    file.write(bytes(1024))
source = find_source(Place({str(tmp_path)!r}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(m.problem is None for unit in source.units for m in scan(source, unit)) == 100
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    assert int(done.stdout) < 40  # MiB, for a tar of 300


def test_a_unit_in_an_outer_tar_is_scanned_where_it_lies(tmp_path: Path) -> None:
    inner = {f"n0{k}.tar": tar_bytes(jpegs(f"n0{k}", 3)) for k in range(3)}
    outer = write_tar(tmp_path / "whole.tar", inner)
    found = find_source(Place(str(outer)))
    members = [member for unit in found.units for member in scan(found, unit)]
    assert [member.problem for member in members] == [None] * 9
    content = outer.read_bytes()
    for member in members:
        data = content[member.offset : member.offset + member.size]
        assert data == jpegs(member.class_name or "", 3)[f"{member.key}.JPEG"]
