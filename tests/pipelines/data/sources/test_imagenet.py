"""Every layout that ImageNet is released in, recognised by names and lists."""

import gzip
from collections import Counter
from pathlib import Path

import pytest

from pipelines.data.archives.scan import scan
from pipelines.data.archives.spool import spool
from pipelines.data.sources import LAYOUTS, find_source
from pipelines.data.sources.base import Member, Source
from pipelines.errors import ArchiveError
from pipelines.storage import Place
from tests.raw_archives import jpeg, jpegs, tar_bytes, write_files, write_tar

WNIDS = ("n01440764", "n01443537", "n02119789")
SHARED = Path(__file__).parents[4] / "../shared/data"


def found(archive: Path, layout: str = "auto") -> Source:
    return find_source(Place(str(archive)), layout)


def members(source: Source) -> list[Member]:
    return [member for unit in source.units for member in scan(source, unit)]


def told(source: Source) -> Counter[tuple[str | None, str | None, str | None]]:
    """How many members have which class, split and problem."""
    return Counter((each.class_name, each.split, each.problem) for each in members(source))


def class_tars(folder: Path, count: int = 2) -> Path:
    for wnid in WNIDS:
        write_tar(folder / f"{wnid}.tar", jpegs(wnid, count))
    return folder


def inner_tars(count: int = 2) -> dict[str, bytes]:
    return {f"{wnid}.tar": tar_bytes(jpegs(wnid, count)) for wnid in WNIDS}


def test_a_folder_of_class_tars_is_a_unit_per_tar(tmp_path: Path) -> None:
    class_tars(tmp_path)
    write_tar(tmp_path / ".hidden.tar", {})
    (tmp_path / "words.txt").write_text("n01440764\ttench, Tinca tinca\nn09999999\tother\n")
    source = found(tmp_path)
    assert (source.layout, source.media, source.splits) == ("imagenet21k", "image", ())
    assert [unit.name for unit in source.units] == [f"{wnid}.tar" for wnid in WNIDS]
    assert [unit.class_name for unit in source.units] == list(WNIDS)
    assert source.names == {"n01440764": "tench"}
    assert told(source) == {(wnid, None, None): 2 for wnid in WNIDS}


def test_words_may_lie_beside_the_folder(tmp_path: Path) -> None:
    class_tars(tmp_path / "train")
    (tmp_path / "words.txt").write_text("n01440764\ttench, Tinca tinca\n")
    assert found(tmp_path / "train").names == {"n01440764": "tench"}


def test_words_that_are_not_utf_8_are_refused_with_the_byte(tmp_path: Path) -> None:
    class_tars(tmp_path)
    (tmp_path / "words.txt").write_bytes(b"n01440764\t\xff\n")
    with pytest.raises(ArchiveError, match=r"words\.txt is not UTF-8 at byte 10; mend or remove"):
        found(tmp_path)


def test_a_class_tar_may_hold_a_folder_of_its_own_name(tmp_path: Path) -> None:
    files = {f"n01440764/{name}": data for name, data in jpegs("n01440764", 2).items()}
    write_tar(tmp_path / "n01440764.tar", files)
    source = found(tmp_path)
    assert source.layout == "imagenet21k"
    assert [member.key for member in members(source)] == ["n01440764_0", "n01440764_1"]


def test_an_empty_synset_is_a_unit_without_members(tmp_path: Path) -> None:
    write_tar(class_tars(tmp_path) / "n03000000.tar", {})
    source = found(tmp_path)
    assert len(source.units) == 4
    assert "n03000000" not in {member.class_name for member in members(source)}


def test_folders_of_tars_named_after_splits_are_splits(tmp_path: Path) -> None:
    class_tars(tmp_path / "val", 1)
    class_tars(tmp_path / "train", 3)
    source = found(tmp_path)
    assert (source.layout, source.splits) == ("imagenet21k", ("train", "val"))
    assert source.units[0].name == "train/n01440764.tar"
    expected = {(wnid, "train", None): 3 for wnid in WNIDS}
    assert told(source) == expected | {(wnid, "val", None): 1 for wnid in WNIDS}


@pytest.mark.parametrize("where", ["fall11_whole.tar", "download/fall11_whole.tar"])
@pytest.mark.parametrize("prefix", ["", "fall11_whole/"])
def test_an_outer_tar_is_a_unit_per_inner_tar(tmp_path: Path, where: str, prefix: str) -> None:
    inner = {prefix + name: data for name, data in inner_tars().items()}
    path = write_tar(tmp_path / where, {"fall11_whole/": b"", "ReadMe.txt": b"x"} | inner)
    source = found(tmp_path / where.split("/")[0])
    assert [unit.name for unit in source.units] == list(inner_tars())
    content = path.read_bytes()
    for member in members(source):
        wnid = member.class_name or ""
        data = content[member.offset : member.offset + member.size]
        assert data == jpegs(wnid, 2)[f"{member.key}.JPEG"]
    assert told(source) == {(wnid, None, None): 2 for wnid in WNIDS}


@pytest.mark.parametrize("outer", ["fall11_whole.tar", "n00000000.tar"])
def test_class_tars_beside_an_outer_tar_are_units_whichever_comes_first(
    tmp_path: Path, outer: str
) -> None:
    write_tar(tmp_path / outer, inner_tars())
    write_tar(tmp_path / "n00000003.tar", jpegs("n00000003", 2))
    write_tar(tmp_path / "n00000004.tar", {})
    source = found(tmp_path)
    assert source.layout == "imagenet21k"
    assert sorted(unit.name for unit in source.units) == [
        "n00000003.tar",
        "n00000004.tar",
        *inner_tars(),
    ]
    assert told(source) == {(wnid, None, None): 2 for wnid in (*WNIDS, "n00000003")}


def test_an_empty_inner_tar_is_no_other_one_s(tmp_path: Path) -> None:
    inner = {"n00000001.tar": b""} | inner_tars()
    source = found(write_tar(tmp_path / "fall11_whole.tar", inner))
    by_unit = [list(scan(source, unit)) for unit in source.units]
    assert [len(each) for each in by_unit] == [1, 2, 2, 2]
    ((lost,),) = by_unit[:1]
    assert (lost.name, lost.lost) == ("n00000001.tar", 0)
    assert (lost.problem or "").startswith("is cut off: it ends at byte ")


def test_a_truncated_outer_tar_keeps_the_members_before_the_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "fall11_whole.tar", inner_tars(3))
    last = members(found(path))[-1]
    path.write_bytes(path.read_bytes()[: last.offset + 7])
    *kept, lost, unknown = members(found(path))
    assert [member.key for member in kept][-2:] == ["n02119789_0", "n02119789_1"]
    assert len(kept) == 8
    assert lost.name == "n02119789.tar"
    assert (lost.problem or "").startswith("is cut off: it ends at byte")
    assert lost.lost is not None
    assert lost.lost > 500
    assert (unknown.name, unknown.problem, unknown.lost) == (path.name, lost.problem, None)


def test_an_outer_tar_cut_off_between_two_inner_ones_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "fall11_whole.tar", inner_tars(3))
    header = found(path).units[1].start - 512
    path.write_bytes(path.read_bytes()[:header])
    *kept, lost = members(found(path))
    assert {member.class_name for member in kept} == {"n01440764"}
    assert (lost.name, lost.lost) == (path.name, None)


def test_a_damaged_outer_header_keeps_the_classes_before_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "fall11_whole.tar", inner_tars())
    content = bytearray(path.read_bytes())
    header = found(path).units[1].start - 512
    content[header : header + 100] = b"\xff" * 100
    path.write_bytes(bytes(content))
    *kept, lost = members(found(path))
    assert {member.class_name for member in kept} == {"n01440764"}
    assert lost.name == "fall11_whole.tar"
    assert (lost.problem or "").startswith(f"is damaged: no tar header at byte {header} of")
    assert lost.lost == len(content) - header


def test_joined_outer_tars_are_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "fall11_whole.tar", inner_tars())
    path.write_bytes(path.read_bytes() * 2)
    *kept, lost = members(found(path))
    assert len(kept) == 6
    assert "goes on after its end-of-archive blocks" in (lost.problem or "")


@pytest.mark.parametrize("where", ["winter21_whole.tar.gz", "winter21.tgz"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_compressed_archive_is_a_stream(tmp_path: Path, where: str, inside: bool) -> None:
    path = write_tar(tmp_path / "download" / where, inner_tars())
    (path.parent / "words.txt").write_text("n01440764\ttench\n")
    source = found(path.parent if inside else path)
    assert (source.layout, source.units) == ("imagenet21k", ())
    assert source.stream is not None
    assert (source.stream.nested, source.stream.size) == (True, path.stat().st_size)
    assert source.names == {"n01440764": "tench"}
    spooled = spool(source, Place(str(tmp_path / "spool")))
    assert told(spooled) == {(wnid, None, None): 2 for wnid in WNIDS}


@pytest.mark.parametrize("nesting", ["", "imagenet21k_resized/"])
@pytest.mark.parametrize("prefix", ["imagenet21k_", ""])
def test_the_processed_subset_has_its_splits_and_leaves_small_classes(
    tmp_path: Path, nesting: str, prefix: str
) -> None:
    files = {}
    for wnid in WNIDS:
        files |= {f"{prefix}train/{wnid}/{name}": data for name, data in jpegs(wnid, 3).items()}
        files |= {f"{prefix}val/{wnid}/{name}": data for name, data in jpegs(wnid, 1, 9).items()}
    files[f"{prefix}small_classes/n09999999/n09999999_1.JPEG"] = jpeg()
    write_files(tmp_path / nesting if nesting else tmp_path, files)
    source = found(tmp_path)
    assert (source.layout, source.splits) == ("imagenet21k-p", ("train", "val"))
    expected = {(wnid, "train", None): 3 for wnid in WNIDS}
    assert told(source) == expected | {(wnid, "val", None): 1 for wnid in WNIDS}
    small = found(tmp_path / nesting / f"{prefix}small_classes")
    assert told(small) == {("n09999999", None, None): 1}


@pytest.mark.parametrize("name", ["imagenet21k_resized.tar", "imagenet21k_resized.tar.gz"])
def test_the_processed_subset_in_a_tar_has_its_splits(tmp_path: Path, name: str) -> None:
    files = {
        f"imagenet21k_resized/imagenet21k_{split}/{wnid}/{wnid}_{k}.JPEG": jpeg(k)
        for k, split in enumerate(("small_classes", "train", "val"))
        for wnid in WNIDS[:2]
    }
    source = found(write_tar(tmp_path / name, files))
    assert (source.layout, source.splits) == ("imagenet21k-p", ("train", "val"))
    if source.stream:
        source = spool(source, Place(str(tmp_path / "spool")))
    assert told(source) == {
        (wnid, split, None): 1 for wnid in WNIDS[:2] for split in ("small_classes", "train", "val")
    }


def ilsvrc_val(count: int = 3) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{k + 1:08d}.JPEG": jpeg(k) for k in range(count)}


def solution(folder: Path) -> None:
    rows = [f"ILSVRC2012_val_{k + 1:08d},{wnid} 1 2 3 4 " for k, wnid in enumerate(WNIDS)]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))


def test_ilsvrc_as_two_tars_with_a_list_of_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner_tars())
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", ilsvrc_val())
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(WNIDS) + "\n")
    source = found(tmp_path)
    assert (source.layout, source.splits) == ("imagenet1k", ("train", "val"))
    assert source.classes == WNIDS
    expected = {(wnid, "train", None): 2 for wnid in WNIDS}
    assert told(source) == expected | {(wnid, "val", None): 1 for wnid in WNIDS}
    assert members(source)[-1].key == "ILSVRC2012_val_00000003"


@pytest.mark.parametrize("given", ["", "ILSVRC/Data/CLS-LOC"])
def test_ilsvrc_as_kaggle_has_it(tmp_path: Path, given: str) -> None:
    data = tmp_path / "ILSVRC/Data/CLS-LOC"
    for wnid in WNIDS:
        write_files(data / "train" / wnid, jpegs(wnid, 2))
    write_files(data / "val", ilsvrc_val())
    write_files(data / "test", {"ILSVRC2012_test_00000001.JPEG": jpeg()})
    solution(tmp_path)
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    source = found(tmp_path / given if given else tmp_path)
    assert (source.layout, source.splits) == ("imagenet1k", ("train", "val"))
    expected = {(wnid, "train", None): 2 for wnid in WNIDS}
    assert told(source) == expected | {(wnid, "val", None): 1 for wnid in WNIDS}
    if not given:
        assert source.names == {"n01440764": "tench"}


def test_ilsvrc_with_validation_images_in_class_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner_tars())
    for wnid, (name, data) in zip(WNIDS, ilsvrc_val().items(), strict=True):
        write_files(tmp_path / "val" / wnid, {name: data})
    source = found(tmp_path)
    assert source.layout == "imagenet1k"
    assert told(source)[("n01440764", "val", None)] == 1


def test_the_train_tar_of_ilsvrc_alone_is_enough(tmp_path: Path) -> None:
    source = found(write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner_tars()))
    assert (source.layout, source.splits, source.classes) == ("imagenet1k", ("train",), WNIDS)


def test_validation_images_without_their_classes_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", ilsvrc_val())
    with pytest.raises(
        ArchiveError,
        match=r"ILSVRC2012_img_val\.tar holds validation images without their classes; put "
        r"LOC_val_solution\.csv or imagenet_2012_validation_synset_labels\.txt into",
    ):
        found(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "LOC_val_solution.csv",
            "ImageId,P\na,b 1\n",
            r"\.csv line 2 has no image and class; mend",
        ),
        ("LOC_val_solution.csv", "ImageId,P\na\n", r"\.csv line 2 has no image and class; mend"),
        ("LOC_val_solution.csv", 'I,P\na,"n0', r"\.csv is no csv: unexpected end of data; mend"),
        (
            "imagenet_2012_validation_synset_labels.txt",
            "n01440764\n281\n",
            r"labels\.txt line 2 is no wnid such as n01440764; mend",
        ),
    ],
)
def test_a_broken_list_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", ilsvrc_val())
    (tmp_path / name).write_text(text)
    with pytest.raises(ArchiveError, match=message):
        found(tmp_path)


def test_a_flat_folder_has_the_class_before_the_underscore(tmp_path: Path) -> None:
    write_files(tmp_path / "flat", jpegs("n01440764", 2) | {"n01443537_goldfish.JPEG": jpeg()})
    source = found(tmp_path / "flat")
    assert source.layout == "named"
    assert told(source) == {("n01440764", None, None): 2, ("n01443537", None, None): 1}
    assert members(source)[-1].key == "n01443537_goldfish"


def test_the_first_layout_wins_unless_one_is_asked_for(tmp_path: Path) -> None:
    files = {
        f"{split}/{wnid}/{wnid}_{split}.JPEG": jpeg()
        for wnid in WNIDS
        for split in ("train", "val", "small_classes")
    }
    write_files(tmp_path, files)
    assert found(tmp_path).layout == "imagenet21k-p"
    forced = found(tmp_path, "folders")
    assert forced.splits == ("train", "val", "small_classes")


def test_the_real_synset_tars_are_recognised_and_whole() -> None:
    folder = SHARED / "tiny-imagenet-synset-tars"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/tiny-imagenet-synset-tars")
    source = found(folder)
    assert (source.layout, source.splits, len(source.units)) == (
        "imagenet21k",
        ("train", "val"),
        100,
    )
    assert len(source.names) == 50
    first, last = (list(scan(source, unit)) for unit in (source.units[0], source.units[-1]))
    assert [len(first), len(last)] == [150, 20]
    assert not any(member.problem for member in first + last)


def test_the_real_photographs_are_recognised_and_whole() -> None:
    folder = SHARED / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/imagenet-sample")
    source = found(folder)
    every = members(source)
    assert source.layout == "named"
    assert len(every) == 341
    assert not any(member.problem for member in every)
    assert all((member.class_name or "").startswith("n") for member in every)
    assert Counter(member.remark for member in every)["is greyscale"] == 12


def test_every_layout_says_what_it_misses(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    for layout in LAYOUTS:
        with pytest.raises(
            ArchiveError,
            match=rf"is a folder with 1 file \(x\.txt\); expected is .* \({layout}\); without "
            rf"--layout {layout} every layout is tried",
        ):
            found(tmp_path, layout)


def test_a_stream_that_is_not_compressed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(tar_bytes(inner_tars()))
    with pytest.raises(ArchiveError, match=r"a\.tar\.gz is a file without a member of a tar"):
        found(tmp_path / "a.tar.gz")
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(ArchiveError, match=r"b\.tar\.gz is a file without a member of a tar"):
        found(tmp_path / "b.tar.gz")
