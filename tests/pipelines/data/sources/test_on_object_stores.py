"""The same layouts in an object store: recognised, scanned and spooled as on a disk."""

import gzip
from pathlib import Path

import pytest

from pipelines.data.archives.scan import scan
from pipelines.data.archives.spool import spool
from pipelines.data.sharding.versions import unit_digests
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Member, Source
from pipelines.errors import ArchiveError
from pipelines.storage import Place
from tests.object_store import bucket, s3_server  # noqa: F401 - fixtures
from tests.raw_archives import jpeg, jpegs, tar_bytes

WNIDS = ("n01440764", "n01443537")
CLASSES = {f"{wnid}.tar": tar_bytes(jpegs(wnid, 3)) for wnid in WNIDS}
TREE = {
    f"{split}/{name}/{k}.jpg": jpeg(k)
    for split in ("train", "val")
    for name in ("a cat", "dög")
    for k in range(2)
}
LAYOUTS = {
    "imagenet21k": CLASSES | {"words.txt": b"n01440764\ttench, Tinca tinca\n"},
    "imagenet1k": {
        "ILSVRC2012_img_train.tar": tar_bytes(CLASSES),
        "val/ILSVRC2012_val_00000001.JPEG": jpeg(),
        "LOC_val_solution.csv": b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1\n",
    },
    "imagenet21k-p": {f"resized/imagenet21k_{name}": data for name, data in TREE.items()},
    "folders": TREE,
    "named": jpegs("n01440764", 3),
}


def both(files: dict[str, bytes], local: Path, remote: Place) -> tuple[Place, Place]:
    """The same files on this machine and in the store."""
    for place in (Place(str(local)), remote):
        for name, data in files.items():
            (place / name).write_bytes(data)
    return Place(str(local)), remote


def members(source: Source) -> list[Member]:
    return [member for unit in source.units for member in scan(source, unit)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_archive_in_a_store_is_what_it_is_on_a_disk(
    layout: str,
    tmp_path: Path,
    bucket: Place,  # noqa: F811
) -> None:
    local, remote = both(LAYOUTS[layout], tmp_path / "raw", bucket / "raw")
    here, there = find_source(local), find_source(remote)
    assert (there.layout, there.units, there.splits) == (layout, here.units, here.splits)
    assert there.names == here.names
    found = members(there)
    assert found == members(here)
    assert found
    assert not any(member.problem for member in found)


def test_a_stream_in_a_store_is_spooled_into_the_store(
    tmp_path: Path,
    bucket: Place,  # noqa: F811
) -> None:
    packed = {"winter21.tar.gz": gzip.compress(tar_bytes(CLASSES))}
    local, remote = both(packed, tmp_path / "raw", bucket / "raw")
    here = spool(find_source(local), Place(str(tmp_path / "s")), segment_bytes=5000)
    there = spool(find_source(remote), bucket / "s", segment_bytes=5000)
    assert [each.key for each in members(there)] == [each.key for each in members(here)]
    for unit in here.units:
        assert (there.archive / unit.path).read_bytes() == (here.archive / unit.path).read_bytes()
    assert spool(find_source(remote), bucket / "s", segment_bytes=5000) == there


def test_a_truncated_tar_in_a_store_is_told(bucket: Place) -> None:  # noqa: F811
    (bucket / "n01440764.tar").write_bytes(CLASSES["n01440764.tar"][:2000])
    *_, lost = members(find_source(bucket))
    assert lost.problem == "is cut off: it ends at byte 2000; what followed is lost"


def test_a_truncated_outer_tar_in_a_store_is_told_and_told_apart(
    bucket: Place,  # noqa: F811
) -> None:
    in_second = 512 + len(CLASSES["n01440764.tar"]) + 512 + 100
    (bucket / "whole.tar").write_bytes(tar_bytes(CLASSES)[:in_second])
    cut = find_source(bucket / "whole.tar")
    assert [member.lost is None for member in members(cut)][-1]
    assert len(set(unit_digests(cut))) == len(cut.units) == 3


def test_an_archive_that_is_not_there_is_refused(bucket: Place) -> None:  # noqa: F811
    with pytest.raises(ArchiveError, match=r"archive s3://.*/absent does not exist; expected is"):
        find_source(bucket / "absent")
