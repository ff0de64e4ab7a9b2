"""Every real release at hand, from archive to shards, and from shards to batches.

Shards are read back by plain WebDataset and by our own streams.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import webdataset

from pipelines.data.manifest import read_index, read_manifest
from pipelines.data.settings import AugmentConfig
from pipelines.data.sharding.shards import ShardingReport, write_parts
from pipelines.data.sources import find_source
from pipelines.data.verify import verify
from tests.pipelines.data.sharding.sharded import folder, place
from tests.pipelines.data.streams import joined, open_eval, open_train, same, take, take_ranks

pytestmark = pytest.mark.usefixtures("ray_session")

REAL = Path(__file__).parents[3] / "../shared/data"


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}")
    return path.resolve()


def sharded(
    archive: Path, out: Path, *, layout: str = "auto", val_fraction: float = 0.0, bad: float = 0.01
) -> Mapping[str, ShardingReport]:
    """Shard an archive, look at every byte of what came out, and give the reports by part."""
    source = find_source(place(archive), layout)
    reports = write_parts(
        source,
        place(out),
        val_fraction=val_fraction,
        max_bad_fraction=bad,
        samples_per_shard=2000,
    )
    for report in reports:
        assert verify(report.folder) == []
        assert report.manifest == read_manifest(report.folder)
        assert read_back(report) == report.samples
        stream_back(report)
    return {folder(report).name: report for report in reports}


def read_back(report: ShardingReport) -> int:
    """Samples that WebDataset finds, each compared with the index."""
    rows = {row["key"]: row for row in read_index(report.folder).to_pylist()}
    urls = [str(folder(report) / shard.name) for shard in report.manifest.shards]
    seen = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        row = rows[sample["__key__"]]
        assert len(sample[row["media"]]) == row["media_size"]
        assert sample.get("cls", b"-1") == str(row["label"]).encode()
        seen += 1
    return seen


def stream_back(report: ShardingReport) -> None:
    """Train an epoch's batches on two ranks and on one, and evaluate: all that the index has."""
    labels = read_index(report.folder)["label"].to_pylist()
    directed = {source.layout for source in report.manifest.sources} == {"ssv2"}
    how = {
        "frames": 2 if report.manifest.media == "video" else 1,
        "resize": 16,
        "batch_size": min(64, 2 * (len(labels) // 2)),
        "augment": AugmentConfig(flip=0.0 if directed else 0.5),
    }
    opened = open_train(report.folder, **how)
    assert (opened.num_samples, opened.num_classes) == (len(labels), len(report.manifest.classes))
    steps = opened.steps_per_epoch
    assert steps == len(labels) // how["batch_size"]
    opened.close()

    alone = [batch for batch, _ in take(report.folder, steps, **how)]
    ranks = [[batch for batch, _ in part] for part in take_ranks(report.folder, 2, steps, **how)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert same(whole, joined(list(parts)))
    trained = Counter(torch.cat([batch.labels_R for batch in alone]).tolist())
    assert trained.total() == steps * how["batch_size"]
    assert trained <= Counter(labels)

    del how["augment"]
    evaluated = list(open_eval(report.folder, **how))
    valid = torch.cat([batch.valid_B for batch in evaluated])
    assert torch.cat([batch.labels_R for batch in evaluated])[valid].tolist() == labels
    assert all(batch.pixels_RTHWC.float().std() > 1 for batch in evaluated)


def media(report: ShardingReport) -> Iterator[str]:
    """Hashes of the original files."""
    urls = [str(folder(report) / shard.name) for shard in report.manifest.shards]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        (field,) = set(sample) - {"__key__", "__url__", "__local_path__", "cls", "json"}
        yield hashlib.sha256(sample[field]).hexdigest()


@pytest.mark.slow
def test_synset_tars_of_photographs(tmp_path: Path) -> None:
    archive = real("tiny-imagenet-synset-tars")
    reports = sharded(archive / "train", tmp_path / "out", val_fraction=0.1)
    train, val = reports["train"], reports["val"]
    assert train.samples + val.samples == 7500
    assert 600 < val.samples < 900
    assert len(train.manifest.classes) == 50
    assert train.skipped == val.skipped == ()
    assert [shard.samples for shard in train.manifest.shards] == [1682, 1682, 1682, 1683]


def test_a_class_folder_tar_of_photographs(tmp_path: Path) -> None:
    archive = real("cifar10-jpeg")
    report = sharded(archive / "train.tar", tmp_path / "out")["out"]
    assert (report.samples, len(report.manifest.classes)) == (5000, 10)
    test = sharded(archive / "test.tar", tmp_path / "test")["test"]
    assert test.manifest.classes_sha256 == report.manifest.classes_sha256


def test_loose_photographs_at_full_size(tmp_path: Path) -> None:
    archive = real("imagenet-sample")
    report = sharded(archive, tmp_path / "out", layout="named", bad=0.02)["out"]
    files = [path for path in archive.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg")]
    assert report.samples + len(report.skipped) >= len(files)
    assert report.samples >= 340
    originals = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert set(media(report)) <= originals
    assert any("grey" in remark for remark in report.manifest.remarks)


def test_something_something_v2(tmp_path: Path) -> None:
    reports = sharded(real("derived-motion-ssv2"), tmp_path / "out")
    train = reports["train"]
    assert train.manifest.media == "video"
    assert train.manifest.labelled
    assert not any("[" in name for name in train.manifest.classes)  # templates, not labels
    assert train.manifest.classes == reports["val"].manifest.classes
    assert set(read_index(train.folder)["media"].to_pylist()) == {"webm"}


def test_kinetics_400(tmp_path: Path) -> None:
    reports = sharded(real("derived-clips-k400"), tmp_path / "out")
    assert set(reports) == {"train", "val"}
    for report in reports.values():
        assert report.samples > 0
        assert set(read_index(report.folder)["media"].to_pylist()) == {"mp4"}
    assert reports["train"].manifest.classes == reports["val"].manifest.classes


def test_gestures_in_class_folders(tmp_path: Path) -> None:
    archive = real("asl-gestures")
    clips = sorted(archive.glob("*.mkv"))
    for clip in clips:
        (tmp_path / "raw" / clip.stem).mkdir(parents=True)
        shutil.copyfile(clip, tmp_path / "raw" / clip.stem / clip.name)
    report = sharded(tmp_path / "raw", tmp_path / "out")["out"]
    assert report.samples == len(clips) == 10
    assert report.manifest.classes == tuple(clip.stem for clip in clips)
    originals = {hashlib.sha256(clip.read_bytes()).hexdigest() for clip in clips}
    assert set(media(report)) == originals


def test_videos_of_many_containers_are_kept_or_skipped_with_a_reason(tmp_path: Path) -> None:
    archive = real("video-raw")
    files = sorted(path for path in archive.rglob("*") if path.is_file())
    (tmp_path / "raw/clips").mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, tmp_path / "raw/clips" / file.name)
    report = sharded(tmp_path / "raw", tmp_path / "out", layout="folders", bad=0.7)["out"]
    assert report.samples + len(report.skipped) == len(files)
    assert report.samples >= 10
    assert all(skipped.reason for skipped in report.skipped)
