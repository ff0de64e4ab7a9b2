"""Something-Something-v2 in both packages, and its traps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.sources.base import Listed
from pipelines.data.sources.ssv2 import recognise
from pipelines.errors import ArchiveError
from pipelines.storage import Place

DATA = Path(__file__).parents[5] / "shared" / "data"
VIDEOS = "20bn-something-something-v2"
DRAWER = {
    "id": "41775",
    "label": "moving drawer of night stand",
    "template": "Moving [part] of [something]",
    "placeholders": ["drawer", "night stand"],
}
BOOK = {"id": "7", "label": "closing book", "template": "Closing [something]", "placeholders": []}
LABELS = {"Moving part of something": "1", "Closing something": "0"}
PACKAGES = {"new": "labels/{}.json", "old": "something-something-v2-{}.json"}


def lay(folder: Path, lists: Mapping[str, Any], package: str = "new") -> Place:
    """Write lists as a package names them, and an empty video."""
    for name, content in lists.items():
        path = folder / PACKAGES[package].format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / VIDEOS).mkdir(exist_ok=True)
    return Place(str(folder))


@pytest.mark.parametrize("package", PACKAGES)
def test_both_packages_read_the_same(tmp_path: Path, package: str):
    lists = {"train": [DRAWER], "validation": [BOOK], "test": [{"id": "9"}], "labels": LABELS}
    source = recognise(lay(tmp_path, lists, package))

    assert source is not None
    assert source.layout == "ssv2"
    assert source.media == "video"
    assert source.splits == ("train", "val", "test")
    assert source.classes == ("Closing something", "Moving part of something")
    assert source.listed == {
        "41775": Listed(class_name="Moving part of something", split="train"),
        "7": Listed(class_name="Closing something", split="val"),
        "9": Listed(class_name=None, split="test"),
    }
    assert [(unit.kind, unit.path) for unit in source.units] == [("folder", VIDEOS)]
    assert source.stream is None


def test_classes_are_templates_and_never_labels(tmp_path: Path):
    again = {**DRAWER, "id": "8", "label": "moving lid of box"}
    source = recognise(lay(tmp_path, {"train": [DRAWER, again]}))

    assert source is not None
    assert source.classes == ("Moving part of something",)


def test_classes_are_numbered_as_the_release_numbers_them(tmp_path: Path):
    """`"10"` comes after `"9"`, whatever strings say."""
    labels = {f"Class {chr(ord('z') - n)}": str(n) for n in range(12)}
    clip = {"id": "1", "template": "Class z"}
    source = recognise(lay(tmp_path, {"train": [clip], "labels": labels}))

    assert source is not None
    assert source.classes == tuple(f"Class {chr(ord('z') - n)}" for n in range(12))


def test_without_a_list_of_classes_they_are_sorted(tmp_path: Path):
    source = recognise(lay(tmp_path, {"train": [DRAWER, BOOK]}))

    assert source is not None
    assert source.classes == ("Closing something", "Moving part of something")


def test_parts_of_the_archive_are_one_stream_in_order(tmp_path: Path):
    lay(tmp_path, {"train": [DRAWER]})
    (tmp_path / VIDEOS).rmdir()
    for number in (1, 0, 2):
        (tmp_path / f"{VIDEOS}-{number:02d}").write_bytes(b"x" * (number + 1))
    source = recognise(Place(str(tmp_path)))

    assert source is not None
    assert source.units == ()
    assert source.stream is not None
    assert source.stream.paths == tuple(f"{VIDEOS}-{number:02d}" for number in range(3))
    assert source.stream.size == 6
    assert not source.stream.nested


def test_a_part_that_is_missing_is_named(tmp_path: Path):
    lay(tmp_path, {"train": [DRAWER]})
    (tmp_path / VIDEOS).rmdir()
    for number in (0, 3):
        (tmp_path / f"{VIDEOS}-{number:02d}").touch()

    with pytest.raises(ArchiveError, match=rf"lacks {VIDEOS}-01, {VIDEOS}-02"):
        recognise(Place(str(tmp_path)))


@pytest.mark.parametrize("name", [f"{VIDEOS}.tar.gz", f"{VIDEOS}.tgz"])
def test_one_compressed_tar_is_a_stream(tmp_path: Path, name: str):
    lay(tmp_path, {"train": [DRAWER]})
    (tmp_path / VIDEOS).rmdir()
    (tmp_path / name).write_bytes(b"abc")
    source = recognise(Place(str(tmp_path)))

    assert source is not None
    assert source.stream is not None
    assert (source.stream.paths, source.stream.size) == ((name,), 3)


def test_a_plain_tar_is_a_unit(tmp_path: Path):
    lay(tmp_path, {"train": [DRAWER]})
    (tmp_path / VIDEOS).rmdir()
    (tmp_path / f"{VIDEOS}.tar").write_bytes(b"abc")
    source = recognise(Place(str(tmp_path)))

    assert source is not None
    assert [(unit.kind, unit.path, unit.size) for unit in source.units] == [
        ("tar", f"{VIDEOS}.tar", 3)
    ]


@pytest.mark.parametrize(
    ("lists", "problem"),
    [
        ({"train": "[{"}, r"train\.json cannot be read"),
        ({"train": {"41775": DRAWER}}, r"train\.json cannot be read"),
        ({"train": [{"id": "5"}]}, r"train\.json entry 0 \(id 5\) has no template"),
        ({"train": [DRAWER, {"template": "x"}]}, r"train\.json entry 1 has the id ''"),
        ({"train": [{**DRAWER, "id": "../1"}]}, r"entry 0 has the id '\.\./1'"),
        (
            {"train": [{**DRAWER, "template": "Eating [something]"}], "labels": LABELS},
            r"entry 0 \(id 41775\) has the class 'Eating something', which the list of cl",
        ),
        ({"train": [DRAWER], "labels": {"a": "0", "b": "0"}}, "does not number its 2 classes"),
        ({"train": [DRAWER], "labels": {"a": "first"}}, r"labels\.json has a class without a num"),
        ({"train": [DRAWER], "validation": [DRAWER]}, r"validation\.json lists 41775, as train"),
    ],
)
def test_a_broken_list_is_refused_by_its_entry(tmp_path: Path, lists, problem: str):
    with pytest.raises(ArchiveError, match=problem):
        recognise(lay(tmp_path, lists))


def test_what_lacks_lists_or_videos_is_something_else(tmp_path: Path):
    (tmp_path / "train.json").write_text("[]")
    assert recognise(Place(str(tmp_path))) is None

    lay(tmp_path, {"train": [DRAWER]})
    (tmp_path / VIDEOS).rmdir()
    assert recognise(Place(str(tmp_path))) is None
    assert recognise(Place(str(tmp_path / "train.json"))) is None


def test_real_derived_clips_have_a_file_for_every_entry():
    folder = DATA / "derived-motion-ssv2"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    source = recognise(Place(str(folder)))

    assert source is not None
    assert len(source.classes or ()) == 174
    assert source.splits == ("train", "val")
    assert set(source.listed or ()) == {path.stem for path in folder.rglob("*.webm")}
