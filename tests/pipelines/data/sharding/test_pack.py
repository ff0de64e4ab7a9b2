"""Writing one shard: exact bytes, and nothing half-made where it fails."""

import hashlib
import io
import json
import resource
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from pipelines.data.manifest import Resized
from pipelines.data.sharding.pack import (
    UNFINISHED,
    Packed,
    PackJob,
    TarWriter,
    header,
    read_side_file,
    write_shard,
)
from pipelines.data.sharding.plan import BINS, Part, ShardJob, ShardRange
from pipelines.data.sharding.scanned import Scanned, scan_file, scan_unit
from pipelines.data.sources.base import Listed, Source, Unit
from pipelines.errors import ArchiveError, DatasetError
from pipelines.storage import Place, StorageError

KEYS = ["n01_0", "n01_" + "long" * 30, "n01_é"]
WHOLE = ShardRange(number=0, part=0, first=0, last=BINS)


def packing(folder: Path, tar: Path) -> PackJob:
    """A job of one scanned tar of class n01 among two classes."""
    source = Source(
        layout="imagenet21k",
        archive=Place(str(tar.parent)),
        media="image",
        units=(
            Unit(
                kind="tar",
                path=tar.name,
                name=tar.name,
                size=tar.stat().st_size,
                class_name=tar.stem,
            ),
        ),
    )
    job = ShardJob(
        source=source,
        units=("u",),
        parts=(Part(name="all", out=Place(str(folder))),),
        scratch=Place(str(folder / UNFINISHED / "scan")),
        classes=("n00", "n01"),
        seed=0,
    )
    scan_unit(job, 0)
    file = Scanned(name=scan_file(job, 0).name, unit=0)
    return PackJob(job=job, files=(file,), known=((),), versions=(1,))


@pytest.fixture
def pack(tmp_path: Path, write_tar: Callable[..., Path], jpeg: Callable[[int], bytes]) -> PackJob:
    files = {f"{key}.JPEG": jpeg(n) for n, key in enumerate(KEYS)}
    return packing(tmp_path / "out", write_tar(tmp_path / "n01.tar", files))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("n01_1.jpg", 0),
        ("n01_1.jpg", 511),
        ("k" * 96 + ".jpg", 512),
        ("k" * 97 + ".jpg", 512),
        ("k" * 300 + ".json", 10**6),
        ("é.cls", 1),
        ("x.mp4", 8**11 - 1),
        ("x.mp4", 8**11),
    ],
)
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def test_a_tar_is_counted_and_hashed_while_it_is_written() -> None:
    file = io.BytesIO()
    tar = TarWriter(file)
    files = [bytes([n % 256]) * n * 9 for n in range(600)]
    begins = [tar.add(f"k{n}.jpg", data) for n, data in enumerate(files)]
    tar.finish()
    content = file.getvalue()
    assert tar.size == len(content) > 10**6
    assert tar.sha256.digest() == hashlib.sha256(content).digest()
    for begin, data in zip(begins, files, strict=True):
        assert content[begin : begin + len(data)] == data
    with tarfile.open(fileobj=io.BytesIO(content)) as read:
        assert [info.offset_data for info in read] == begins


def test_webdataset_reads_long_and_foreign_names_from_where_the_index_says(
    pack: PackJob, tmp_path: Path, jpeg: Callable[[int], bytes]
) -> None:
    assert write_shard(pack, WHOLE) == Packed(kept=False, samples=3)
    path = tmp_path / "out/shard-000000.tar"
    samples = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    images = {key: jpeg(n) for n, key in enumerate(KEYS)}
    assert {sample["__key__"]: sample["jpg"] for sample in samples} == images
    for sample in samples:
        assert set(sample) - {"__key__", "__url__", "__local_path__"} == {"jpg", "cls", "json"}
        assert sample["cls"] == b"1"
        assert json.loads(sample["json"]) == {
            "class": "n01",
            "member": f"n01.tar/{sample['__key__']}.JPEG",
        }
    side, index = read_side_file(Place(str(tmp_path / "out")), "shard-000000.tar")
    content = path.read_bytes()
    assert side.record
    assert (side.record.bytes, side.record.samples) == (len(content), 3)
    assert side.record.sha256 == hashlib.sha256(content).hexdigest()
    for row in index.to_pylist():
        media, cls, told = (
            content[row[f"{field}_offset"] :][: row[f"{field}_size"]]
            for field in ("media", "cls", "json")
        )
        assert media == images[row["key"]]
        assert (row["media"], row["crc32"]) == ("jpg", zlib.crc32(media))
        assert (cls, row["label"]) == (b"1", 1)
        assert json.loads(told)["member"].startswith("n01.tar/")


def test_a_whole_shard_is_kept_and_one_made_again_has_the_same_bytes(
    pack: PackJob, tmp_path: Path
) -> None:
    path = tmp_path / "out/shard-000000.tar"
    write_shard(pack, WHOLE)
    first, inode = path.read_bytes(), path.stat().st_ino
    assert write_shard(pack, WHOLE) == Packed(kept=True, samples=3)
    assert path.stat().st_ino == inode
    path.write_bytes(first[:-1])
    assert not write_shard(pack, WHOLE).kept
    assert path.read_bytes() == first
    labels = replace(pack, job=replace(pack.job, classes=("n01",)))
    assert not write_shard(labels, WHOLE).kept
    assert path.read_bytes() != first


def test_a_shard_of_known_keys_alone_has_no_file(pack: PackJob, tmp_path: Path) -> None:
    known = replace(pack, known=(pack.files,))
    assert write_shard(known, WHOLE) == Packed(kept=False, samples=0)
    side, index = read_side_file(Place(str(tmp_path / "out")), "shard-000000.tar")
    assert (side.record, index.num_rows) == (None, 0)
    assert (side.known, side.repeats) == (len(KEYS), ())
    assert write_shard(known, WHOLE).kept
    assert not (tmp_path / "out/shard-000000.tar").exists()


def test_a_shard_without_samples_leaves_no_file_of_an_interrupted_run(
    pack: PackJob, tmp_path: Path
) -> None:
    write_shard(pack, WHOLE)
    nothing = replace(pack, files=())
    assert write_shard(nothing, WHOLE) == Packed(kept=False, samples=0)
    assert not (tmp_path / "out" / WHOLE.name).exists()


def test_a_sample_without_a_class_has_no_cls(pack: PackJob, tmp_path: Path) -> None:
    listed = {key: Listed(class_name=None, split="test") for key in KEYS}
    unit = replace(pack.job.source.units[0], class_name=None)
    source = replace(pack.job.source, units=(unit,), listed=listed)
    job = replace(pack.job, source=source, units=("v",))
    assert scan_unit(job, 0).counts[0].unlabelled == 3
    file = Scanned(name=scan_file(job, 0).name, unit=0)
    write_shard(replace(pack, job=job, files=(file,)), WHOLE)
    url = str(tmp_path / "out/shard-000000.tar")
    for sample in webdataset.WebDataset([url], shardshuffle=False):
        assert {"jpg", "json"} < set(sample)
        assert "cls" not in sample
        assert "class" not in json.loads(sample["json"])
    _, index = read_side_file(Place(str(tmp_path / "out")), "shard-000000.tar")
    rows = index.select(["label", "cls_offset", "cls_size"]).to_pylist()
    assert rows == [{"label": -1, "cls_offset": 0, "cls_size": 0}] * 3


def test_resized_images_are_told_in_their_json(
    tmp_path: Path,
    write_tar: Callable[..., Path],
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
) -> None:
    files = {"n01_1.JPEG": encode(noise(96, 64)), "n01_2.JPEG": encode(noise(20, 30))}
    pack = packing(tmp_path / "out", write_tar(tmp_path / "n01.tar", files))
    pack = replace(pack, job=replace(pack.job, resized=Resized(short_side=32, quality=80)))
    write_shard(pack, WHOLE)
    url = str(tmp_path / "out/shard-000000.tar")
    samples = {s["__key__"]: s for s in webdataset.WebDataset([url], shardshuffle=False)}
    told = {key: json.loads(sample["json"])["resized"] for key, sample in samples.items()}
    assert told == {
        "n01_1": {"from": [96, 64], "to": [48, 32], "quality": 80},
        "n01_2": {"from": [20, 30], "to": [20, 30], "quality": 80},
    }
    assert Image.open(io.BytesIO(samples["n01_1"]["jpg"])).size == (48, 32)
    _, index = read_side_file(Place(str(tmp_path / "out")), "shard-000000.tar")
    crcs = dict(zip(index["key"].to_pylist(), index["crc32"].to_pylist(), strict=True))
    assert crcs == {key: zlib.crc32(sample["jpg"]) for key, sample in samples.items()}


def test_a_shard_that_fails_leaves_nothing(pack: PackJob, tmp_path: Path) -> None:
    tar = tmp_path / "n01.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(ArchiveError, match=r"n01\.tar/.*JPEG was changed after it was scanned"):
        write_shard(pack, WHOLE)
    tar.unlink()
    with pytest.raises(StorageError, match=r"n01\.tar does not exist"):
        write_shard(pack, WHOLE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [UNFINISHED]
    assert [path.name for path in (tmp_path / "out" / UNFINISHED).iterdir()] == ["scan"]


def test_bytes_that_changed_after_the_scan_do_not_get_into_a_shard(
    pack: PackJob, tmp_path: Path, jpeg: Callable[[int], bytes]
) -> None:
    tar = tmp_path / "n01.tar"
    content, image = tar.read_bytes(), jpeg(1)
    assert content.count(image) == 1
    tar.write_bytes(content.replace(image, image[:-3] + bytes(3)))
    with pytest.raises(ArchiveError, match=r"n01\.tar/n01_long.* was changed after it was scanned"):
        write_shard(pack, WHOLE)


def test_a_disk_that_is_full_is_named_by_the_shard_that_it_has_no_room_for(
    pack: PackJob, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"out/shard-000000\.tar cannot be .*written: File"):
            write_shard(pack, WHOLE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [UNFINISHED]


def test_an_image_that_cannot_be_resized_is_named(
    tmp_path: Path, write_tar: Callable[..., Path], encode: Callable[..., bytes]
) -> None:
    files = {"n01_1.PNG": encode(Image.new("RGB", (70_000, 4)), "PNG")}
    pack = packing(tmp_path / "out", write_tar(tmp_path / "n01.tar", files))
    pack = replace(pack, job=replace(pack.job, resized=Resized(short_side=8, quality=80)))
    message = r"n01\.tar/n01_1\.PNG cannot be resized: it would have a side above the 65500 pixels"
    with pytest.raises(DatasetError, match=message):
        write_shard(pack, WHOLE)
