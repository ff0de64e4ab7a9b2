"""Archives into shards on a real Ray: exact bytes, restarts, additions, and what is refused."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.data.manifest import FIELDS, Manifest, read_index, read_manifest
from pipelines.data.pack import UNFINISHED
from pipelines.data.shards import ShardingReport, add_archive, write_shards
from pipelines.data.verify import verify
from pipelines.errors import ArchiveError, DatasetError

pytestmark = pytest.mark.usefixtures("ray_session")

MakeArchive = Callable[..., Path]
WriteTar = Callable[..., Path]
Jpeg = Callable[[int], bytes]

REAL = Path(__file__).parents[3] / "../shared/data/tiny-imagenet-synset-tars"

# Writes one dataset to its end, and dies while writing another.
CHILD = """
import os, signal, sys
from pathlib import Path
from cluster.session import ray_session
from pipelines.data.shards import write_shards

def die(stage, done, total):
    if stage == "write":
        os.kill(os.getpid(), signal.SIGKILL)

archive, whole, killed = map(Path, sys.argv[1:])
with ray_session(num_cpus=1):
    write_shards(archive, whole, samples_per_shard=4)
    write_shards(archive, killed, samples_per_shard=4, progress=die)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, make_archive: MakeArchive) -> Path:
    return make_archive(tmp_path_factory.mktemp("raw") / "archive")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, archive: Path, ray_session: None
) -> ShardingReport:
    """Sixty images in shards of up to 25."""
    return write_shards(archive, tmp_path_factory.mktemp("made") / "out", samples_per_shard=25)


@pytest.fixture
def dataset(tmp_path: Path, made: ShardingReport) -> Path:
    """A copy of `made` that a test may change."""
    return shutil.copytree(made.folder, tmp_path / "dataset")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(archive: Path) -> dict[str, bytes]:
    """Key to bytes of every image of an archive."""
    found = {}
    for path in archive.glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file
                found[info.name.removesuffix(".JPEG")] = file.read()
    return found


def test_plain_webdataset_reads_every_image_once_and_unchanged(
    made: ShardingReport, archive: Path
) -> None:
    urls = [str(made.folder / shard.name) for shard in made.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == made.samples == 60
    assert {sample["__key__"]: sample["jpg"] for sample in samples} == members(archive)
    for sample in samples:
        synset = sample["__key__"].split("_")[0]
        assert sample["cls"] == str(made.manifest.classes.index(synset)).encode()
        assert json.loads(sample["json"]) == {
            "synset": synset,
            "member": f"{synset}.tar/{sample['__key__']}.JPEG",
        }


def test_the_manifest_adds_up_and_nothing_else_is_left(made: ShardingReport) -> None:
    manifest = made.manifest
    assert manifest == read_manifest(made.folder)
    assert manifest.classes == ("n00000000", "n00000001", "n00000002")
    assert [shard.samples for shard in manifest.shards] == [20, 20, 20]
    assert manifest.bytes == sum((made.folder / s.name).stat().st_size for s in manifest.shards)
    assert (manifest.version, manifest.samples, manifest.skipped) == (1, 60, ())
    assert [source.name for source in manifest.sources] == ["archive"]
    assert set(contents(made.folder)) == {
        "manifest.json",
        "index.parquet",
        *(shard.name for shard in manifest.shards),
    }
    assert verify(made.folder) == []


def test_classes_are_mixed_in_every_shard(made: ShardingReport) -> None:
    index = read_index(made.folder).to_pylist()
    for number in range(3):
        assert {row["label"] for row in index if row["shard"] == number} == {0, 1, 2}


def test_the_index_leads_to_the_bytes_of_every_field(made: ShardingReport) -> None:
    for row in read_index(made.folder).to_pylist():
        path = made.folder / made.manifest.shards[row["shard"]].name
        content = path.read_bytes()
        with tarfile.open(path) as tar:
            for field in FIELDS:
                file = tar.extractfile(f"{row['key']}.{field}")
                assert file
                start = row[f"{field}_offset"]
                assert content[start : start + row[f"{field}_size"]] == file.read()


def test_headers_tell_nothing_of_machine_or_day(made: ShardingReport) -> None:
    with tarfile.open(made.folder / "shard-000000.tar") as tar:
        infos = tar.getmembers()
    assert [info.name.split(".")[1] for info in infos[:4]] == ["jpg", "cls", "json", "jpg"]
    for info in infos:
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
        assert info.mode == 0o644


def test_another_seed_gives_another_order_of_the_same_samples(
    tmp_path: Path, archive: Path, made: ShardingReport
) -> None:
    other = write_shards(archive, tmp_path / "out", seed=1, samples_per_shard=25)
    before = read_index(made.folder)["key"].to_pylist()
    after = read_index(other.folder)["key"].to_pylist()
    assert before != after
    assert sorted(before) == sorted(after)


def test_a_second_run_does_nothing(made: ShardingReport, archive: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    report = write_shards(archive, made.folder, samples_per_shard=25)
    assert report.did_nothing
    assert report.samples == 0
    assert report.manifest == made.manifest
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}


def test_a_killed_run_is_continued_to_the_bytes_of_an_unbroken_one_on_any_number_of_cpus(
    tmp_path: Path, archive: Path
) -> None:
    one_cpu, killed, two_cpus = (tmp_path / name for name in ("one", "killed", "two"))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(archive), str(one_cpu), str(killed)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not (killed / "manifest.json").exists()
    assert (killed / UNFINISHED).is_dir()

    report = write_shards(archive, killed, samples_per_shard=4)
    assert report.kept_shards >= 1
    assert not report.did_nothing
    write_shards(archive, two_cpus, samples_per_shard=4)
    assert len(report.manifest.shards) == 15
    assert contents(killed) == contents(two_cpus) == contents(one_cpu)


def test_leftovers_of_another_plan_are_made_anew(
    tmp_path: Path, archive: Path, made: ShardingReport
) -> None:
    out = tmp_path / "out"
    write_shards(archive, out, seed=3, samples_per_shard=4)
    (out / "manifest.json").unlink()
    (out / UNFINISHED).mkdir()
    (out / UNFINISHED / "shard-000000.tar.77.tmp").write_bytes(b"half")
    report = write_shards(archive, out, samples_per_shard=25)
    assert report.kept_shards == 0
    assert contents(out) == contents(made.folder)


def test_adding_an_archive_leaves_old_shards_untouched(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    before = contents(dataset)
    base = read_manifest(dataset)
    new = make_archive(tmp_path / "new", classes=2, images=15, first=10)  # 10 of each are known
    report = add_archive(new, dataset)

    assert report.samples == 10
    assert len(report.skipped) == 20
    assert report.skipped[0].member == "n00000000.tar/n00000000_10.JPEG"
    assert {skipped.reason for skipped in report.skipped} == {
        "is in the dataset already (same key)"
    }
    manifest = read_manifest(dataset)
    assert manifest == report.manifest
    assert (manifest.version, manifest.samples, manifest.classes) == (2, 70, base.classes)
    assert manifest.shards[:3] == base.shards
    assert [(shard.name, shard.version) for shard in manifest.shards[3:]] == [
        ("shard-000003.tar", 2)
    ]
    assert [source.version for source in manifest.sources] == [1, 2]
    after = contents(dataset)
    assert all(after[shard.name] == before[shard.name] for shard in base.shards)
    assert (
        read_index(dataset).slice(0, 60).equals(pq.read_table(io.BytesIO(before["index.parquet"])))
    )
    assert verify(dataset) == []


def test_adding_the_same_archive_twice_does_nothing(
    tmp_path: Path, dataset: Path, archive: Path, make_archive: MakeArchive
) -> None:
    new = make_archive(tmp_path / "new", images=5, first=50)
    assert not add_archive(new, dataset).did_nothing
    before = contents(dataset)
    assert add_archive(new, dataset).did_nothing
    assert write_shards(archive, dataset, samples_per_shard=25).did_nothing
    assert contents(dataset) == before


def test_an_archive_that_brings_nothing_new_makes_no_version(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    before = contents(dataset)
    report = add_archive(make_archive(tmp_path / "part", images=4), dataset)
    assert report.did_nothing
    assert len(report.skipped) == 12
    assert contents(dataset) == before


def test_an_interrupted_addition_is_continued(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    new = make_archive(tmp_path / "new", images=5, first=50)
    straight = shutil.copytree(dataset, tmp_path / "straight")
    add_archive(new, straight, samples_per_shard=4)
    interrupted: list[tuple[str, int, int]] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        interrupted.append((stage, done, total))
        if stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_archive(new, dataset, samples_per_shard=4, progress=interrupt)
    assert read_manifest(dataset).version == 1
    assert interrupted[-1] == ("write", 1, 4)
    assert add_archive(new, dataset, samples_per_shard=4).kept_shards >= 1
    assert contents(dataset) == contents(straight)


def test_adding_a_synset_that_the_dataset_lacks_is_refused(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    before = contents(dataset)
    new = make_archive(tmp_path / "new", classes=4)
    with pytest.raises(DatasetError, match=r"synsets that the .* 3 classes lack \(first n00000003"):
        add_archive(new, dataset)
    assert contents(dataset) == before


def test_adding_to_a_folder_without_manifest_is_refused(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(DatasetError, match="is not a finished dataset"):
        add_archive(archive, tmp_path / "absent")


def test_adding_to_a_dataset_that_lacks_a_shard_is_refused(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    (dataset / "shard-000001.tar").unlink()
    new = make_archive(tmp_path / "new", first=90)
    with pytest.raises(DatasetError, match=r"shard-000001\.tar is missing or not \d+ bytes long"):
        add_archive(new, dataset)


def test_given_classes_decide_the_labels(
    tmp_path: Path, archive: Path, make_archive: MakeArchive
) -> None:
    classes = ("a", "n00000000", "n00000001", "n00000002")
    report = write_shards(archive, tmp_path / "out", classes=classes)
    assert report.manifest.classes == classes
    rows = read_index(report.folder).to_pylist()
    assert {(row["key"][:9], row["label"]) for row in rows} == {
        ("n00000000", 1),
        ("n00000001", 2),
        ("n00000002", 3),
    }
    with pytest.raises(DatasetError, match=r"has 1 synsets .* 2 classes lack \(first n00000002\)"):
        write_shards(archive, tmp_path / "val", classes=classes[1:3])
    assert not (tmp_path / "val").exists()


def test_a_synset_without_images_keeps_its_label(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    write_tar(tmp_path / "raw/n01.tar", {})
    write_tar(tmp_path / "raw/n02.tar", {"n02_1.JPEG": jpeg(1)})
    report = write_shards(tmp_path / "raw", tmp_path / "out")
    assert report.manifest.classes == ("n01", "n02")
    assert read_index(report.folder)["label"].to_pylist() == [1]


def test_bad_members_are_skipped_counted_and_named(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    files = {f"n01_{n}.JPEG": jpeg(n) for n in range(5)}
    files |= {
        "n01_0.0.JPEG": jpeg(10),
        "n01_0_0.JPEG": jpeg(11),
        "sub/n01_1.JPEG": jpeg(12),
        "n01_9.JPEG": jpeg(9)[:-40],
        "notes.txt": b"hello",
    }
    write_tar(tmp_path / "raw/n01.tar", files)
    report = write_shards(tmp_path / "raw", tmp_path / "out", max_bad_fraction=0.2)
    told = [(skipped.member, skipped.reason.split(":")[0]) for skipped in report.manifest.skipped]
    assert told == [
        ("n01.tar/n01_0_0.JPEG", "has the key of an earlier member"),
        ("n01.tar/sub/n01_1.JPEG", "has the key of an earlier member"),
        ("n01.tar/n01_9.JPEG", "does not decode"),
        ("n01.tar/notes.txt", "is not an image by its name (suffix '.txt')"),
    ]
    assert report.skipped == report.manifest.skipped
    keys = read_index(report.folder)["key"].to_pylist()
    assert sorted(keys) == ["n01_0", "n01_0_0", "n01_1", "n01_2", "n01_3", "n01_4"]
    assert sum("n01_0.0.JPEG" in str(row) for row in samples(report.manifest, tmp_path)) == 1


def samples(manifest: Manifest, tmp_path: Path) -> list[dict[str, object]]:
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_too_many_bad_members_stop_the_run_and_leave_nothing(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    files = {f"n01_{n}.JPEG": jpeg(n) for n in range(6)}
    files |= {f"n01_{n}.JPEG": b"<html>" for n in range(6, 10)}
    write_tar(tmp_path / "raw/n01.tar", files)
    message = (
        r"4 of the 10 files .* cannot be used \(40\.00%, the limit is 1\.00%\): "
        r"n01\.tar/n01_6\.JPEG does not decode.*n01_7.*n01_8.*; mend the archive"
    )
    with pytest.raises(ArchiveError, match=message):
        write_shards(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_of_text_files_holds_no_images(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "raw/n01.tar", {"a.txt": b"a", "b.txt": b"b"})
    with pytest.raises(ArchiveError, match=r"holds no images: none of the 2 files .*n01\.tar/a"):
        write_shards(tmp_path / "raw", tmp_path / "out", max_bad_fraction=1.0)
    assert not (tmp_path / "out").exists()


def test_an_archive_of_empty_tars_holds_no_images(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "raw/n01.tar", {})
    with pytest.raises(ArchiveError, match="holds no images: its 1 tars are empty"):
        write_shards(tmp_path / "raw", tmp_path / "out")


def test_damaged_tars_are_all_named_in_one_line_and_nothing_is_left(
    tmp_path: Path, make_archive: MakeArchive
) -> None:
    raw = make_archive(tmp_path / "raw")
    for name in ("n00000000.tar", "n00000002.tar"):
        (raw / name).write_bytes((raw / name).read_bytes()[:5000])
    message = (
        r"n00000000\.tar is cut off: it ends at byte 5000; fetch it again or take it out of the "
        r"archive \(and 1 more damaged: n00000002\.tar\)$"
    )
    with pytest.raises(ArchiveError, match=message) as caught:
        write_shards(raw, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_archive_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        write_shards(tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["letter.txt", "shard-000000.tar", "index.parquet"])
def test_a_folder_with_something_else_in_it_is_refused(
    tmp_path: Path, archive: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(
        DatasetError, match=rf"holds something else \(first {name}\); choose an emp"
    ):
        write_shards(archive, out)
    assert contents(out) == {name: b"mine"}


def test_something_else_beside_a_dataset_stops_an_addition(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    (dataset / "shard-000003.tar").write_text("mine")
    new = make_archive(tmp_path / "new", first=90)
    with pytest.raises(
        DatasetError, match=r"holds something else \(first shard-000003\.tar\); mov"
    ):
        add_archive(new, dataset)
    assert (dataset / "shard-000003.tar").read_text() == "mine"


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DatasetError, match="is a file; choose an empty folder"):
        write_shards(archive, tmp_path / "out")


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DatasetError, match=r"cannot be made \(Not a directory\); choose another"):
        write_shards(archive, tmp_path / "file" / "out")


def test_a_dataset_of_another_archive_is_not_overwritten(
    tmp_path: Path, made: ShardingReport, make_archive: MakeArchive
) -> None:
    other = make_archive(tmp_path / "other", images=2)
    with pytest.raises(DatasetError, match=r"made from another archive \(archive\);.*--append"):
        write_shards(other, made.folder)


def test_a_dataset_made_with_other_settings_is_not_overwritten(
    made: ShardingReport, archive: Path
) -> None:
    with pytest.raises(DatasetError, match=r"other settings \(seed: 0, now 5\)"):
        write_shards(archive, made.folder, seed=5, samples_per_shard=25)
    with pytest.raises(DatasetError, match=r"other settings \(shards: 3, now 1\)"):
        write_shards(archive, made.folder)
    with pytest.raises(DatasetError, match=r"other settings \(classes: others than now\)"):
        write_shards(archive, made.folder, classes=("a", *made.manifest.classes))


def test_a_tar_that_shrinks_between_the_passes_stops_the_run_and_keeps_the_rest(
    tmp_path: Path, make_archive: MakeArchive
) -> None:
    raw = make_archive(tmp_path / "raw")

    def shrink(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("check", total):
            (raw / "n00000001.tar").write_bytes(b"")

    with pytest.raises(
        DatasetError, match=r"was not written: .*n00000001\.tar became shorter .*run"
    ):
        write_shards(raw, tmp_path / "out", samples_per_shard=1, progress=shrink)
    assert not (tmp_path / "out/manifest.json").exists()
    assert len(list((tmp_path / "out").glob("shard-*.tar"))) == 40
    assert not list((tmp_path / "out" / UNFINISHED).glob("*.tmp"))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/tiny-imagenet-synset-tars")
def test_real_photographs_shard_whole(tmp_path: Path) -> None:
    report = write_shards(REAL / "train", tmp_path / "train", samples_per_shard=2000)
    assert (report.samples, len(report.manifest.classes)) == (7500, 50)
    assert [shard.samples for shard in report.manifest.shards] == [1875] * 4
    assert report.skipped == ()
    assert verify(report.folder) == []
    val = write_shards(REAL / "val", tmp_path / "val", classes=report.manifest.classes)
    assert val.samples == 1000
    assert val.manifest.classes == report.manifest.classes
