"""A killed training goes on from its last checkpoint and ends as if nothing had been."""

import json
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.journey.commands import SHORT, command_line, environment

pytestmark = pytest.mark.slow

STEPS = 40


def train_arguments(demo, out):
    root, _ = demo
    return [
        *("train", "--recipe", "digits", "--out", str(out), *SHORT),
        *("--data.root", str(root / "shards"), "--data.embedded", "None"),
        *("--tracking.uri", f"sqlite:///{out.parent / 'mlflow.db'}"),
    ]


def start(arguments):
    return subprocess.Popen(
        command_line(arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def tensors(run):
    """Weights and moments by name; which rank wrote which of them is torch's choice."""
    files = (run / "checkpoints" / f"step_{STEPS}").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def killed(demo, tmp_path_factory):
    """A run whose driver was killed between two checkpoints, and what its rerun said."""
    run = tmp_path_factory.mktemp("killed") / "run"
    process = start(train_arguments(demo, run))
    wait_for(run / "checkpoints" / "step_10" / "COMMITTED", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = start(train_arguments(demo, run))
    said = again.communicate(timeout=200)
    assert again.returncode == 0, said[1]
    return run, said[0]


def test_a_killed_run_goes_on_where_it_was(killed):
    assert ", on from step " in killed[1]


def test_its_losses_are_those_of_an_unbroken_run_to_the_last_bit(demo, killed):
    unbroken = demo[0] / "run"

    assert losses(killed[0]) == losses(unbroken)
    assert [step for step, *_ in losses(unbroken)] == list(range(5, STEPS + 1, 5))


def test_its_weights_and_moments_are_those_of_an_unbroken_run_to_the_last_bit(demo, killed):
    resumed, unbroken = tensors(killed[0]), tensors(demo[0] / "run")

    assert resumed.keys() == unbroken.keys()
    assert any(name.endswith("exp_avg_sq") for name in unbroken)
    assert [n for n in unbroken if not torch.equal(resumed[n], unbroken[n])] == []


def test_a_run_that_is_asked_to_stop_ends_behind_a_checkpoint_with_code_3(demo, tmp_path):
    run = tmp_path / "run"
    process = start([*train_arguments(demo, run), "--train.steps", "4000"])
    wait_for(run / "checkpoints" / "step_10" / "COMMITTED", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)

    assert process.returncode == 3, err
    assert "stopped after" in out
    assert "the same command goes on from there" in out
    newest = max(int(p.name[5:]) for p in (run / "checkpoints").glob("step_*"))
    assert losses(run)[-1][0] == newest
