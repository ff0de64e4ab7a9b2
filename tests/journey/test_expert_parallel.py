"""Experts spread over two Ray Train workers, from the command line: one process's training."""

import json
import shutil

import pytest

from pipelines.load import read_loads
from tests.journey.commands import SHORT
from tests.journey.test_resume import losses

pytestmark = pytest.mark.slow

PLAN = (*SHORT, "--train.eval-budgets", "1.0", "--model.experts.group-images", "4")


def arguments(demo, out, recipe, *more):
    root, _ = demo
    return [
        *("train", "--recipe", recipe, "--out", out, *PLAN),
        *("--data.root", root / "shards", "--data.embedded", "None"),
        *("--tracking.uri", f"sqlite:///{out.parent / 'mlflow.db'}", *more),
    ]


def run(mone, demo, out, recipe, *more):
    done = mone(*arguments(demo, out, recipe, *more))
    assert done.returncode == 0, done.stderr
    return losses(out)


@pytest.fixture(scope="module", params=["digits_vmoe", "digits_nested_vmoe"])
def trained(request, mone, demo, tmp_path_factory):
    """One recipe on two workers that share out the experts: where, and its losses and norms."""
    out = tmp_path_factory.mktemp(request.param) / "spread"
    spread = run(
        mone, demo, out, request.param, "--parallel.num-workers", 2, "--parallel.expert", 2
    )
    return request.param, out, spread


def test_losses_and_norms_are_those_of_one_worker(trained, mone, demo, tmp_path):
    recipe, _, spread = trained

    one = run(mone, demo, tmp_path / "one", recipe, "--parallel.num-workers", 1)

    assert [step for step, *_ in spread] == [step for step, *_ in one]
    for ours, theirs in zip(spread, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_goes_on_with_its_experts_shared_out_in_another_way(trained, mone, demo, tmp_path):
    recipe, spread, unbroken = trained
    out = shutil.copytree(spread, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step_40")

    again = run(mone, demo, out, recipe, "--parallel.num-workers", 2, "--parallel.expert", 1)

    assert again[:-2] == unbroken[:-2]  # these were there
    for ours, theirs in zip(again[-2:], unbroken[-2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_how_full_the_experts_were_is_kept_and_drawn(trained, mone):
    _, out, _ = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]

    tables = read_loads(out)
    assert [table.step for table in tables] == [row["step"] for row in training]
    assert all(0 < row["moe/drop_rate"] < 1 for row in training)
    assert all(row["moe/all_to_all_bytes"] > 0 for row in training)
    assert mone("evaluate", out).returncode == 0
    assert mone("report", out).returncode == 0
    assert "How full the experts are" in (out / "report.html").read_text()
