"""A training as a user asks for it, once its steps are done: its record and its model in MLflow.

What happens before, on Ray's workers, is walked through in the journeys.
"""

from dataclasses import replace

import pytest

from pipelines.config import TrackingConfig
from pipelines.metrics import append_row
from pipelines.runner import resolve
from pipelines.skipped import SKIPPED, SkipList
from pipelines.terminal import Terminal
from pipelines.tracking import client, fetch, find_champion
from pipelines.train import Outcome
from pipelines.training import train_run
from pipelines.weights import load_weights, step_of_weights
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was trained to its end, then killed before MLflow heard of it."""
    folder = tmp_path_factory.mktemp("training")
    config = tiny.tiny_config(tiny.write_data(folder / "data"), folder / "run", steps=4)
    config = resolve(
        replace(config, tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlruns/mlflow.db"))
    )
    _, rows = tiny.train_here(config)
    for row in rows:
        append_row(config.out, row)
    return config


def test_a_run_at_its_end_is_not_trained_again_but_mlflow_gets_all_that_it_missed(
    finished, tmp_path
):
    trained = train_run(finished, Terminal())

    assert trained.outcome is Outcome.FINISHED
    assert trained.summary == f"{finished.out} is trained to its 4 steps already; nothing to do"
    assert trained.version == find_champion(finished.tracking)
    store = client(finished.tracking)
    history = store.get_metric_history(trained.version.run_id, "loss")
    assert [point.step for point in history] == [2, 4]
    assert store.get_run(trained.version.run_id).info.status == "FINISHED"
    weights = fetch(finished.tracking, trained.version, tmp_path / "weights")
    assert step_of_weights(weights) == 4
    assert load_weights(weights).config == finished.model

    again = train_run(finished, Terminal())  # now there is nothing left to send or register
    assert again.version == trained.version
    assert len(store.search_model_versions(f"name = '{finished.tracking.model}'")) == 1
    assert [p.step for p in store.get_metric_history(again.version.run_id, "loss")] == [2, 4]


def test_samples_that_the_run_went_without_are_told_at_its_end(finished, capsys):
    SkipList(finished.out).add({"sample 'a' in there": "cut off", "sample 'b' in there": "black"})

    train_run(finished, Terminal())

    out = capsys.readouterr().out.replace("\n", " ")
    assert "warning: samples that could not be decoded and were skipped: 2, named in" in out
    assert "skipped.jsonl; the first is sample 'a' in there: cut off" in out
    (finished.out / SKIPPED).unlink()


def test_a_tracking_server_that_is_away_costs_a_warning_and_the_registration(
    finished, capsys, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = replace(finished, tracking=replace(finished.tracking, uri="http://127.0.0.1:1"))

    trained = train_run(away, Terminal())

    assert (trained.outcome, trained.version) == (Outcome.FINISHED, None)
    out = capsys.readouterr().out
    assert "warning: MLflow at http://127.0.0.1:1 did not take everything (" in out
    assert f"the run's own record in {finished.out} is whole" in out
