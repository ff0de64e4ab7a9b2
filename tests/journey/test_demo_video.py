"""`mone demo --video`: the whole way on clips, and on videos of one's own."""

import json
import shutil

import pytest
import webdataset

from pipelines.data.motion import CLIPS_TRAIN, CLIPS_VAL, TEMPLATES, VIDEOS
from pipelines.data.verify import verify
from pipelines.storage import place
from tests.journey.commands import SHORT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(mone, tmp_path_factory):
    out = tmp_path_factory.mktemp("video") / "demo"
    done = mone("demo", "--video", "--out", out, *SHORT)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_terminal_says_what_happens(demo):
    done = demo[1]

    for stage in (
        "1/5 archive  drawing handwritten digits that move over clutter",
        "2/5 shards  Ray Data: webm + json -> WebDataset shards",
        "3/5 train  40 steps, 2 workers",
        "4/5 evaluate",
        "5/5 report",
    ):
        assert stage in done.stdout
    assert f"{CLIPS_TRAIN} samples in 1 shards, 0 skipped" in done.stdout
    assert "training 40/40 steps" in done.stderr
    assert "drawing" in done.stderr


@pytest.mark.parametrize(("part", "samples"), [("train", CLIPS_TRAIN), ("val", CLIPS_VAL)])
def test_the_shards_hold_the_clips_byte_for_byte(demo, part, samples):
    out, _ = demo
    folder = out / "shards" / part
    manifest = json.loads((folder / "manifest.json").read_text())

    assert verify(place(folder)) == []
    assert (manifest["media"], manifest["samples"]) == ("video", samples)
    assert manifest["classes"] == sorted(t.replace("[", "").replace("]", "") for t in TEMPLATES)
    names = [str(folder / shard["name"]) for shard in manifest["shards"]]
    found = list(webdataset.WebDataset(names, shardshuffle=False))
    assert len(found) == samples
    for sample in found[:20]:
        original = out / "archive" / VIDEOS / f"{sample['__key__']}.webm"
        assert sample["webm"] == original.read_bytes()


def test_the_results_hold_every_budget(demo):
    results = json.loads((demo[0] / "results.json").read_text())

    settings = results["settings"]
    assert [s["effective_capacity"] for s in settings] == [0.2, 0.3, 0.4, 0.5, 0.7, 1.0]
    assert all(s["samples"] == CLIPS_VAL for s in settings)
    assert [s["macs"] for s in settings] == sorted({s["macs"] for s in settings})


def test_the_report_shows_routed_frames(demo):
    report = (demo[0] / "report.html").read_text()

    assert "data:image/png" in report
    assert "MoNE ViViT" in report


def test_a_second_run_makes_nothing_again(demo, mone):
    out, _ = demo
    kept = [*(out / "archive").rglob("*"), *(out / "shards").rglob("*.tar")]
    before = {path: path.stat().st_mtime_ns for path in kept}

    again = mone("demo", "--video", "--out", out, *SHORT)

    assert again.returncode == 0, again.stderr
    assert "there already" in again.stdout
    assert "is trained to its 40 steps already; nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_videos_of_ones_own_go_the_same_way(demo, mone, tmp_path):
    """Folders of videos, a class each, as which the drawn clips are laid out again."""
    rows = json.loads((demo[0] / "archive" / "labels" / "train.json").read_text())
    for row in rows[:320]:
        folder = tmp_path / "mine" / row["template"].split("] ")[1].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(demo[0] / "archive" / VIDEOS / f"{row['id']}.webm", folder)

    done = mone(
        "demo", "--video", "--archive", tmp_path / "mine", "--out", tmp_path / "out", *SHORT
    )

    assert done.returncode == 0, done.stderr
    assert "videos, recognised as folders" in done.stdout
    assert "10% held out by key" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_classes"] == len(TEMPLATES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), r"holds videos, and recipe photos takes images; add --video"),
        (("--video", "--recipe", "digits"), "--video needs a recipe of clips, and digits takes"),
    ],
)
def test_a_demo_of_the_wrong_media_is_refused_at_once(demo, mone, tmp_path, flags, message):
    done = mone("demo", "--archive", demo[0] / "archive", "--out", tmp_path / "no", *flags)

    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "no").exists()


def test_an_archive_that_is_not_there_is_told_at_once(mone, tmp_path):
    done = mone("demo", "--video", "--archive", tmp_path / "nowhere", "--out", tmp_path / "no")

    assert done.returncode == 2
    assert "nowhere does not exist" in done.stderr
    assert not (tmp_path / "no").exists()
