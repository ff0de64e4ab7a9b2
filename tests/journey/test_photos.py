"""The same demo on real photographs, where a folder of them lies beside the repository."""

import json
from pathlib import Path

import pytest

from tests.journey.commands import SHORT

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "tiny-imagenet-synset-tars" / "train"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PHOTOS.is_dir(), reason=f"no photographs at {PHOTOS}; the demo on digits covers the way"
    ),
]


def test_the_demo_runs_on_an_archive_of_photographs(mone, tmp_path):
    done = mone("demo", "--out", tmp_path / "demo", "--archive", PHOTOS, *SHORT)

    assert done.returncode == 0, done.stderr
    train, val = (
        json.loads((tmp_path / "demo" / "shards" / part / "manifest.json").read_text())
        for part in ("train", "val")
    )
    assert train["samples"] + val["samples"] == 7500
    assert 600 < val["samples"] < 900  # a tenth by a hash of the key
    assert train["classes"] == val["classes"]
    assert len(train["names"]) == 50
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["num_classes"] == 50
    assert {s["samples"] for s in results["settings"]} == {val["samples"]}
    assert "data:image/png" in (tmp_path / "demo" / "report.html").read_text()


def test_an_archive_that_is_not_there_is_told_at_once(mone, tmp_path):
    done = mone("demo", "--out", tmp_path / "demo", "--archive", tmp_path / "nowhere")

    assert done.returncode == 2
    assert "nowhere does not exist; expected is" in done.stderr
    assert not (tmp_path / "demo").exists()
