"""Kinetics as people have it: every form of list, of file name and of folder."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pipelines.data.sources.base import Listed
from pipelines.data.sources.kinetics import recognise
from pipelines.errors import ArchiveError
from pipelines.storage import Place

DATA = Path(__file__).parents[5] / "shared" / "data"
LONG = "label,youtube_id,time_start,time_end,split,is_cc"
SHORT = "label,youtube_id,time_start,time_end,split"


def lay(folder: Path, lists: Mapping[str, Sequence[str] | str], clips: Sequence[str] = ()) -> Place:
    """Write lists, given as lines, and empty clips."""
    for name, lines in lists.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = lines if isinstance(lines, str) else "".join(f"{line}\n" for line in lines)
        path.write_text(text)
    for clip in clips:
        path = folder / clip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Place(str(folder))


@pytest.mark.parametrize(
    "lines",
    [
        [LONG, "air drumming,-_abcdefghi,3,13,train,0", "yoga,0123456789A,0,10,train,1"],
        [SHORT, "air drumming,-_abcdefghi,3,13,train", "yoga,0123456789A,0,10,train"],
        [SHORT, '"air drumming","-_abcdefghi",3,13,"train"', '"yoga","0123456789A",0,10,"train"'],
        [
            "label,youtube_id,time_start,time_end",
            "air drumming,-_abcdefghi,3,13",
            "yoga,0123456789A,0,10",
        ],
        [
            "label , youtube_id ,time_start , time_end,split ",
            "air drumming , -_abcdefghi , 3 , 13 , train ",
            "yoga,0123456789A,0,10,train",
        ],
    ],
    ids=["with is_cc", "short", "quoted", "without split", "with blanks"],
)
def test_every_form_of_header_reads_the_same(tmp_path: Path, lines: list[str]):
    source = recognise(lay(tmp_path, {"train.csv": lines}))

    assert source is not None
    assert source.layout == "kinetics"
    assert source.media == "video"
    assert source.splits == ("train",)
    assert source.classes == ("air drumming", "yoga")
    assert source.listed == {
        "-_abcdefghi_000003_000013": Listed(class_name="air drumming", split="train"),
        "0123456789A_000000_000010": Listed(class_name="yoga", split="train"),
    }


def test_carriage_returns_and_a_byte_order_mark_are_no_part_of_names(tmp_path: Path):
    (tmp_path / "val.csv").write_bytes(
        b"\xef\xbb\xbf" + SHORT.encode() + b"\r\nyoga,0123456789A,0,10,val\r\n"
    )
    source = recognise(Place(str(tmp_path)))

    assert source is not None
    assert source.classes == ("yoga",)


def test_a_test_list_without_labels_gives_unlabelled_clips(tmp_path: Path):
    lists = {
        "train.csv": [SHORT, "yoga,0123456789A,0,10,train"],
        "validate.csv": [SHORT, "yoga,0123456789B,0,10,validate"],
        "test.csv": ["youtube_id,time_start,time_end,split", "0123456789C,0,10,test"],
    }
    source = recognise(lay(tmp_path, lists))

    assert source is not None
    assert source.splits == ("train", "val", "test")
    assert source.listed is not None
    assert [row.split for row in source.listed.values()] == ["train", "val", "test"]
    assert source.listed["0123456789C_000000_000010"].class_name is None
    assert source.classes == ("yoga",)


def test_json_twins_give_what_the_csv_gives(tmp_path: Path):
    lay(tmp_path / "csv", {"train.csv": [SHORT, "yoga,0123456789A,3,13,train"]})
    clip = {"annotations": {"label": "yoga", "segment": [3.0, 13.0]}, "subset": "train"}
    lay(tmp_path / "json", {"train.json": json.dumps({"0123456789A": clip})})
    of_csv, of_json = (recognise(Place(str(tmp_path / kind))) for kind in ("csv", "json"))

    assert of_csv is not None
    assert of_json is not None
    assert of_csv.listed == of_json.listed
    assert of_csv.classes == of_json.classes


def test_lists_may_have_a_prefix_and_lie_in_a_folder_of_annotations(tmp_path: Path):
    lists = {"annotations/kinetics-400_val.csv": [SHORT, "yoga,0123456789A,3,13,val"]}
    source = recognise(lay(tmp_path, lists, ["videos/0123456789A.mp4"]))

    assert source is not None
    assert source.splits == ("val",)
    assert [unit.path for unit in source.units] == ["videos"]


def test_files_without_times_in_their_names_are_found_by_id(tmp_path: Path):
    lines = [SHORT, "yoga,-a_b-c_d-e_,3,13,train", "yoga,0123456789A,0,10,train"]
    source = recognise(lay(tmp_path, {"train.csv": lines}, ["train/-a_b-c_d-e_.mp4"]))

    assert source is not None
    assert source.listed is not None
    assert set(source.listed) == {"-a_b-c_d-e_", "0123456789A_000000_000010"}


def test_an_id_that_stands_in_several_rows_keeps_them_apart_by_their_times(tmp_path: Path):
    lines = [SHORT, "yoga,0123456789A,0,10,train", "archery,0123456789A,40,50,train"]
    clips = ["train/yoga/0123456789A_000000_000010.mp4"]
    source = recognise(lay(tmp_path, {"train.csv": lines}, clips))

    assert source is not None
    assert source.listed is not None
    assert {stem: row.class_name for stem, row in source.listed.items()} == {
        "0123456789A_000000_000010": "yoga",
        "0123456789A_000040_000050": "archery",
    }


def test_a_file_that_belongs_to_rows_of_two_classes_gets_neither(tmp_path: Path):
    lines = [
        SHORT,
        "yoga,0123456789A,0,10,train",
        "archery,0123456789A,40,50,train",
        "yoga,0123456789B,0,10,train",
        "yoga,0123456789B,40,50,train",
    ]
    clips = ["train/0123456789A.mp4", "train/0123456789B.mp4"]
    source = recognise(lay(tmp_path, {"train.csv": lines}, clips))

    assert source is not None
    assert source.listed == {"0123456789B": Listed(class_name="yoga", split="train")}


@pytest.mark.parametrize(
    ("clips", "units"),
    [
        (["train/air drumming/a.mp4", "train/yoga/b.mp4", "val/yoga/c.mp4"],
         ["train/air drumming", "train/yoga", "val/yoga"]),
        (["train/air_drumming/a.mp4", "train/yoga/b.webm"], ["train/air_drumming", "train/yoga"]),
        (["train/a.mp4", "val/b.mp4"], ["train", "val"]),
        (["a.mp4", "b.mp4"], [""]),
        (["train/a.mp4", "train/replaced/b.mp4"], ["train"]),
        ([], []),
    ],
)  # fmt: skip
def test_every_folder_of_clips_is_a_unit_and_no_file_is_in_two(tmp_path: Path, clips, units):
    lists = {"train.csv": [SHORT, "yoga,0123456789A,0,10,train"]}
    source = recognise(lay(tmp_path, lists, clips))

    assert source is not None
    assert [unit.path for unit in source.units] == units


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([SHORT, "yoga,0123456789A,0,10"], r"train\.csv line 2 has other columns than the first"),
        ([SHORT, "a,b,0123456789A,0,10,train"], "line 2 has other columns"),
        ([SHORT, "yoga,0123456789A,zero,10,train"], "line 2 has the times zero and 10"),
        ([SHORT, "yoga,0123456789A,20,10,train"], "line 2 has the times 20 and 10"),
        ([SHORT, "yoga,,0,10,train"], "line 2 has the youtube_id ''"),
        ([SHORT, "yoga,../../x,0,10,train"], "has the youtube_id '../../x'"),
        ([SHORT, ",0123456789A,0,10,train"], "has no label, and train is no test split"),
        ([SHORT, '"yoga"x,0123456789A,0,10,train'], "line 2 is no csv"),
    ],
)
def test_a_broken_line_is_refused_by_its_number(tmp_path: Path, lines, problem):
    with pytest.raises(ArchiveError, match=problem):
        recognise(lay(tmp_path, {"train.csv": lines}))


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_list_without_commas_is_refused_with_its_columns(tmp_path: Path, separator: str):
    lines = [separator.join(line.split(",")) for line in (SHORT, "yoga,0123456789A,0,10,train")]
    columns = re.escape(repr(lines[0]))
    with pytest.raises(
        ArchiveError,
        match=rf"train\.csv line 1 has no column youtube_id between commas, but {columns}; write "
        r"the list with commas between its columns and run the command again$",
    ):
        recognise(lay(tmp_path, {"train.csv": lines}))


def test_a_list_of_other_columns_is_none_of_kinetics(tmp_path: Path):
    lists = {"train.csv": ["youtube_id_and_more,label", "a,b"]}
    assert recognise(lay(tmp_path, lists, ["train/a.mp4"])) is None


def test_a_list_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "train.csv").write_bytes(SHORT.encode() + b"\ncaf\xe9,0123456789A,0,10,train\n")

    with pytest.raises(ArchiveError, match=r"train\.csv is not UTF-8 at byte \d+"):
        recognise(Place(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": {"annotations": ', "cannot be read"),
        ('{"a": {"annotations": []}}', "entry 'a' has no annotations with a segment"),
        ('{"a": {"annotations": {"label": "x", "segment": [1]}}}', "segment of 1 times"),
    ],
)
def test_a_broken_json_is_refused_by_its_entry(tmp_path: Path, content: str, problem: str):
    with pytest.raises(ArchiveError, match=problem):
        recognise(lay(tmp_path, {"train.json": content}))


def test_what_has_no_list_of_kinetics_is_something_else(tmp_path: Path):
    lay(tmp_path, {"train.csv": ["path,label", "a.mp4,3"], "train.json": "[]"}, ["train/a.mp4"])

    assert recognise(Place(str(tmp_path))) is None
    assert recognise(Place(str(tmp_path / "train.csv"))) is None


def test_real_derived_clips_have_a_file_for_every_row():
    folder = DATA / "derived-clips-k400"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    source = recognise(Place(str(folder)))

    assert source is not None
    assert source.splits == ("train", "val")
    assert source.classes == tuple(sorted(source.classes or ()))
    assert set(source.listed or ()) == {path.stem for path in folder.rglob("*.mp4")}
