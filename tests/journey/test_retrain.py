"""New data becomes the next dataset version, and the alias moves only to a model not worse."""

import json
import shutil

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from pipelines.data.digits import write_digit_archives
from pipelines.data.embedded import COPIES_TRAIN
from tests.journey.commands import SHORT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def house(demo, tmp_path_factory):
    """A copy of the demo's dataset and registry, and an archive of new digits."""
    folder = tmp_path_factory.mktemp("retrain")
    shutil.copytree(demo[0] / "shards", folder / "shards")
    shutil.copytree(demo[0] / "mlruns", folder / "mlruns")
    write_digit_archives(folder / "new", copies_train=1, copies_val=1, seed=1)
    return folder


@pytest.fixture(scope="module")
def retrain(house, mone):
    """Runs `mone retrain` on that copy."""

    def call(*more):
        return mone(
            *("retrain", "--archive", house / "new" / "train", "--recipe", "digits"),
            *("--out", house / "retrained", *SHORT, "--train.steps", "10"),
            *("--data.root", house / "shards"),
            *("--tracking.uri", f"sqlite:///{house / 'mlruns' / 'mlflow.db'}"),
            *more,
        )

    return call


def champion(house):
    client = MlflowClient(f"sqlite:///{house / 'mlruns' / 'mlflow.db'}")
    return int(client.get_model_version_by_alias("mone", "champion").version)


def test_a_second_retraining_refuses_while_one_is_under_way(house, retrain):
    with FileLock(house / "shards" / ".retrain.lock"):
        done = retrain()

    assert done.returncode == 2
    assert "another retraining of" in done.stderr
    assert "wait for it to end" in done.stderr
    assert json.loads((house / "shards/train/manifest.json").read_text())["version"] == 1


def test_new_data_a_challenger_and_a_verdict(house, retrain):
    old = {path: path.read_bytes() for path in (house / "shards" / "train").glob("*.tar")}

    done = retrain("--tolerance", "1.0")

    assert done.returncode == 0, done.stderr
    manifest = json.loads((house / "shards/train/manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["samples"] == (COPIES_TRAIN + 1) * 1438
    assert all(path.read_bytes() == content for path, content in old.items())
    assert "promoted the challenger" in done.stdout
    assert champion(house) == 2
    report = (house / "retrained" / "v2_from_1" / "report.html").read_text()
    assert "champion v1" in report
    assert "challenger v2" in report


def test_a_worse_challenger_leaves_the_champion_where_it_is(house, retrain, demo):
    client = MlflowClient(f"sqlite:///{house / 'mlruns' / 'mlflow.db'}")
    before = champion(house)

    done = retrain("--tolerance", "-1.0")  # nothing is better by 100 points

    assert done.returncode == 0, done.stderr
    assert "kept the champion" in done.stdout
    assert champion(house) == before
    versions = client.search_model_versions("name = 'mone'")
    assert any("kept the champion" in v.tags.get("mone.verdict", "") for v in versions)


def test_without_a_champion_it_says_how_to_get_one(house, retrain, tmp_path):
    done = retrain("--tracking.uri", f"sqlite:///{tmp_path / 'empty.db'}")

    assert done.returncode == 2
    assert "has no champion of model 'mone'; train a first one" in done.stderr
