"""A sweep trains each budget as a Ray Tune trial and reports them together."""

import json

import pytest
from mlflow import MlflowClient

from tests.journey.commands import SHORT

pytestmark = pytest.mark.slow

BUDGETS = ("0.3", "0.5", "0.7")


@pytest.fixture(scope="module")
def sweep(demo, mone, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "sweep"
    arguments = (
        *("sweep", "--recipe", "digits", "--effective-capacity", *BUDGETS, "--out", out),
        *(*SHORT, "--train.steps", "10", "--data.root", demo[0] / "shards"),
        *("--tracking.uri", f"sqlite:///{out.parent / 'mlflow.db'}"),
    )
    return out, arguments, mone(*arguments)


def test_each_budget_is_a_trained_and_evaluated_run(sweep):
    out, _, done = sweep

    assert done.returncode == 0, done.stderr
    for budget in BUDGETS:
        run = out / f"ec_{float(budget):.3f}"
        (setting,) = json.loads((run / "results.json").read_text())["settings"]
        assert setting["effective_capacity"] == float(budget)
        assert (run / "checkpoints" / "step_10" / "COMMITTED").is_file()


def test_the_trials_stand_in_one_table_and_one_report(sweep):
    out, _, done = sweep

    assert "one run per budget" in done.stdout
    assert all(f"{float(budget):.2f}" in done.stdout for budget in BUDGETS)
    report = (out / "report.html").read_text()
    assert all(f"ec_{float(budget):.3f}" in report for budget in BUDGETS)


def test_mlflow_holds_a_parent_with_a_child_per_trial(sweep):
    out, *_ = sweep
    client = MlflowClient(f"sqlite:///{out.parent / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mone").experiment_id])

    (parent,) = [run for run in runs if run.data.tags.get("mone.kind") == "sweep"]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == 3
    assert {len(client.get_metric_history(c.info.run_id, "loss")) for c in children} == {2}


def test_a_second_sweep_trains_nothing_again(sweep, mone):
    out, arguments, _ = sweep
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}

    again = mone(*arguments)

    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
