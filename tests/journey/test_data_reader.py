"""Batches that Ray Data makes anywhere in the cluster: the same training as with own threads."""

import shutil

import pytest

from tests.journey.commands import SHORT
from tests.journey.test_resume import losses

pytestmark = pytest.mark.slow


def run(mone, demo, out, reader):
    root, _ = demo
    done = mone(
        *("train", "--recipe", "digits", "--out", out, *SHORT, "--data.reader", reader),
        *("--data.root", root / "shards", "--data.embedded", "None"),
        *("--data.augment.randaugment-layers", 2, "--data.augment.mixup", 0.2),
        *("--parallel.num-workers", 1, "--data.read.threads", 1),
        *("--tracking.uri", f"sqlite:///{out.parent / 'mlflow.db'}"),
    )
    assert done.returncode == 0, done.stderr
    return losses(out)


@pytest.fixture(scope="module")
def remote(mone, demo, tmp_path_factory):
    """A run whose batches came from Ray Data: where, and its losses and norms."""
    out = tmp_path_factory.mktemp("remote") / "run"
    return out, run(mone, demo, out, "ray")


def test_losses_are_those_of_batches_made_by_threads(remote, mone, demo, tmp_path):
    assert run(mone, demo, tmp_path / "run", "threads") == remote[1]


def test_a_run_may_change_who_makes_its_batches(remote, mone, demo, tmp_path):
    out = shutil.copytree(remote[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step_40")

    assert run(mone, demo, out, "threads") == remote[1]
