"""The same training as a job on a cluster with token auth: followed, and ended with its code."""

import pytest

from tests.journey.commands import SHORT
from tests.ray_head import running_head

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job_server(tmp_path_factory):
    """Address and token of a local cluster that takes jobs."""
    with running_head(tmp_path_factory.mktemp("head"), cpus=2) as head:
        yield head.url, head.token.read_text().strip()


def test_a_training_runs_as_a_job_and_its_log_is_followed(job_server, demo, mone, tmp_path):
    address, token = job_server
    done = mone(
        *("submit", "--address", address, "--"),
        *("train", "--recipe", "digits", "--out", tmp_path / "run", *SHORT),
        *("--train.steps", "10", "--data.root", demo[0] / "shards"),
        *("--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
    )

    assert done.returncode == 0, done.stderr + done.stdout
    assert "training 10/10 steps" in done.stdout
    assert "trained 10 steps" in done.stdout
    assert "succeeded" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "step_10" / "COMMITTED").is_file()


def test_the_jobs_own_exit_code_comes_back(job_server, mone):
    address, token = job_server
    done = mone(
        *("submit", "--address", address, "--", "train", "--recipe", "digitz"),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
    )

    assert done.returncode == 2
    assert "no recipe called 'digitz'; did you mean 'digits'?" in done.stdout


@pytest.mark.parametrize("token", ["wrong", ""])
def test_without_the_right_token_nothing_is_submitted(job_server, mone, token, tmp_path):
    done = mone(
        *("submit", "--address", job_server[0], "--", "recipes"),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
        HOME=str(tmp_path),
    )

    assert done.returncode == 2
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr
