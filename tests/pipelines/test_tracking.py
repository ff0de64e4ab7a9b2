"""Runs and models in MLflow: a real store on SQLite, one that is away, one on PostgreSQL."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.config import TrackingConfig, flatten
from pipelines.errors import RegistryError, RunError
from pipelines.metrics import MetricRow
from pipelines.tracking import (
    MlflowTracker,
    champion,
    client,
    fetch,
    find_champion,
    keep_parent,
    local_folder,
    promote,
    register,
    tag_version,
)
from tests.pipelines import tiny

ROWS = [
    MetricRow(step=2, values={"loss": 2.0, "grad_norm": 1.0}),
    MetricRow(step=4, values={"loss": 1.5, "grad_norm": 0.5}),
    MetricRow(step=4, values={"val_accuracy/ec_0.50": 0.25}),
    MetricRow(step=6, values={"loss": 1.0, "grad_norm": 0.25}),
]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A store of SQLite, made once for this file: that takes MLflow seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlruns')}/new/mlflow.db"
    assert find_champion(TrackingConfig(uri=uri)) is None
    return uri


@pytest.fixture
def config(uri, tmp_path):
    """A run that has its own experiment and registered model."""
    return run_in(uri, tmp_path)


def run_in(uri, tmp_path):
    config = tiny.tiny_config(tmp_path / "data", tmp_path / "run")
    config.out.mkdir()
    tracking = TrackingConfig(uri=uri, experiment=tmp_path.name, model=tmp_path.name)
    return replace(config, tracking=tracking)


def steps(config, run_id, name):
    """Steps that the store has of a metric, in the order in which they came."""
    return [point.step for point in client(config.tracking).get_metric_history(run_id, name)]


def tracked(config, rows=ROWS, resumed=(), **more):
    """One start of a run that logs some rows; gives its MLflow run's id."""
    tracker = MlflowTracker(config, **more)
    tracker.resume_after(resumed)
    for row in rows:
        tracker.log(row)
    tracker.finish()
    assert tracker.problem is None
    return tracker.run_id


# Runs.


def test_a_run_is_stored_with_its_configuration_and_every_row_by_step(config):
    run_id = tracked(config)

    run = client(config.tracking).get_run(run_id)
    assert run.data.params == {name: str(value) for name, value in flatten(config).items()}
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert steps(config, run_id, "loss") == [2, 4, 6]
    assert steps(config, run_id, "val_accuracy/ec_0.50") == [4]
    assert run.data.metrics["loss"] == 1.0
    assert run.data.metrics["grad_norm"] == 0.25


def test_a_run_started_again_goes_on_in_the_same_mlflow_run_and_stores_no_step_twice(config):
    first = tracked(config)

    # Gone on from step 4: what came above is computed and logged once more.
    again = tracked(
        config, rows=[ROWS[3], MetricRow(step=8, values={"loss": 0.5})], resumed=ROWS[:3]
    )

    assert again == first
    assert steps(config, first, "loss") == [2, 4, 6, 8]
    assert steps(config, first, "grad_norm") == [2, 4, 6]
    assert steps(config, first, "val_accuracy/ec_0.50") == [4]
    runs = client(config.tracking).search_runs(
        [client(config.tracking).get_run(first).info.experiment_id]
    )
    assert len(runs) == 1


@pytest.mark.parametrize("missed", range(len(ROWS)))
def test_whatever_row_was_missed_is_sent_at_the_next_start(config, missed):
    run_id = tracked(config, rows=[row for i, row in enumerate(ROWS) if i != missed])

    tracked(config, rows=[], resumed=ROWS)

    assert sorted(steps(config, run_id, "loss")) == [2, 4, 6]
    assert sorted(steps(config, run_id, "grad_norm")) == [2, 4, 6]
    assert steps(config, run_id, "val_accuracy/ec_0.50") == [4]


def test_a_run_that_ended_otherwise_says_so(config):
    tracker = MlflowTracker(config)
    assert client(config.tracking).get_run(tracker.run_id).info.status == "RUNNING"

    tracker.finish("KILLED")

    assert client(config.tracking).get_run(tracker.run_id).info.status == "KILLED"


def test_more_rows_than_one_request_takes_all_arrive(config):
    rows = [MetricRow(step=s, values={"loss": float(s), "lr": 1.0}) for s in range(1, 1201)]

    run_id = tracked(config, rows=rows)

    assert steps(config, run_id, "loss") == list(range(1, 1201))
    assert steps(config, run_id, "lr") == list(range(1, 1201))


def test_files_and_the_numbers_of_a_whole_run_are_kept_with_it(config):
    tracker = MlflowTracker(config)
    tracker.log_files({"report.html": b"<html>", "figures/a.svg": b"<svg>"})
    tracker.log_summary({"accuracy": 0.75})
    tracker.finish()

    store = client(config.tracking)
    assert tracker.problem is None
    assert {file.path for file in store.list_artifacts(tracker.run_id)} == {
        "figures",
        "report.html",
    }
    assert [f.path for f in store.list_artifacts(tracker.run_id, "figures")] == ["figures/a.svg"]
    assert store.get_run(tracker.run_id).data.metrics["accuracy"] == 0.75
    artifacts = local_folder(config.tracking.uri) / "artifacts"
    assert list(artifacts.rglob("report.html"))


def test_the_trials_of_a_sweep_belong_to_its_run(config):
    report = config.out / "report.html"
    report.write_text("all")

    parent = keep_parent(config.tracking, "sweep", {"mone.kind": "sweep"}, [report])
    child = tracked(config, parent=parent)

    store = client(config.tracking)
    assert store.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert store.get_run(parent).info.status == "FINISHED"
    assert [file.path for file in store.list_artifacts(parent)] == ["report.html"]


# A store that is away.


def test_a_sweep_and_a_model_say_that_the_store_is_away(config, closed_port, tmp_path):
    away = replace(config.tracking, uri=f"http://127.0.0.1:{closed_port}")

    with pytest.raises(RunError, match=r"MLflow at http://127.*does not answer"):
        keep_parent(away, "sweep", {}, [])
    with pytest.raises(RegistryError, match=r"did not take model .*start the same command again"):
        register(away, "run", tmp_path)


@pytest.fixture
def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_server_that_is_away_costs_a_remark_and_little_time_and_gets_all_rows_later(
    config, closed_port
):
    away = replace(config, tracking=replace(config.tracking, uri=f"http://127.0.0.1:{closed_port}"))
    started = time.monotonic()

    tracker = MlflowTracker(away)
    tracker.resume_after([])
    for row in ROWS:
        tracker.log(row)
    tracker.log_files({"a": b"b"})
    tracker.log_summary({"accuracy": 1.0})
    tracker.finish()

    assert time.monotonic() - started < 20
    assert tracker.run_id is None
    assert f"127.0.0.1', port={closed_port}" in tracker.problem
    assert "\n" not in tracker.problem
    run_id = tracked(config, rows=[], resumed=ROWS)  # the store is back
    assert steps(config, run_id, "loss") == [2, 4, 6]


@pytest.fixture
def breakable(config, tmp_path):
    """A run in a store of its own, and the file that the store is."""
    folder = tmp_path / "copy"
    shutil.copytree(local_folder(config.tracking.uri), folder)
    tracking = replace(config.tracking, uri=f"sqlite:///{folder}/mlflow.db")
    return replace(config, tracking=tracking), folder / "mlflow.db"


def test_a_store_lost_on_the_way_costs_a_remark(breakable):
    config, store = breakable
    tracker = MlflowTracker(config)
    store.write_bytes(b"no database" * 1000)

    for row in ROWS:
        tracker.log(row)
    tracker.finish()

    assert "database" in tracker.problem


def test_nothing_is_sent_twice_by_a_start_that_could_not_learn_what_is_there(breakable):
    config, store = breakable
    run_id = tracked(config)
    tracker = MlflowTracker(config)
    content = store.read_bytes()
    store.write_bytes(b"no database" * 1000)
    tracker.resume_after(ROWS[:3])
    store.write_bytes(content)

    tracker.log(ROWS[3])
    tracker.finish()

    assert "database" in tracker.problem
    assert steps(config, run_id, "loss") == [2, 4, 6]


def test_an_address_that_mlflow_does_not_take_is_refused(config):
    with pytest.raises(
        RunError, match=r"tracking\.uri 'ftp://x' cannot be used: .*; give sqlite:///FILE or http"
    ):
        client(replace(config.tracking, uri="ftp://x"))


def test_a_folder_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(RunError, match=r"tracking\.uri 'sqlite:.*' cannot be used: .*file"):
        client(replace(config.tracking, uri=f"sqlite:///{tmp_path}/file/mlflow.db"))


def test_a_database_without_its_driver_is_refused(config):
    with pytest.raises(
        RunError, match=r"tracking\.uri 'mssql\+pymssql:.*' cannot be used: .*pymssql"
    ):
        client(replace(config.tracking, uri="mssql+pymssql://127.0.0.1/db"))


# Models.


@pytest.fixture
def version(config, tmp_path):
    """Registers a model with a file that tells it from others."""

    def make(content):
        weights = tmp_path / content
        weights.mkdir()
        (weights / "weights").write_text(content)
        run = replace(config, out=tmp_path / f"run_{content}")
        run.out.mkdir()
        return register(config.tracking, tracked(run, rows=[]), weights)

    return make


def test_the_first_version_is_the_champion_and_later_ones_are_not(config, version):
    assert find_champion(config.tracking) is None

    first, second = version("one"), version("two")

    assert (first.version, second.version) == (1, 2)
    assert find_champion(config.tracking) == first


def test_promotion_moves_the_title_and_the_weights_come_with_it(config, version, tmp_path):
    version("one")
    second = version("two")

    promote(config.tracking, second)

    assert champion(config.tracking) == second
    folder = fetch(config.tracking, champion(config.tracking), tmp_path / "fetched" / "here")
    assert (folder / "weights").read_text() == "two"


def test_facts_are_kept_beside_a_version(config, version):
    made = version("one")

    tag_version(config.tracking, made, {"mone.verdict": "kept"})

    found = client(config.tracking).get_model_version(config.tracking.model, "1")
    assert found.tags == {"mone.verdict": "kept"}


def test_a_model_without_a_champion_has_none(config, version):
    version("one")
    client(config.tracking).delete_registered_model_alias(config.tracking.model, "champion")

    assert find_champion(config.tracking) is None


def test_a_missing_champion_says_how_to_make_one(config):
    with pytest.raises(
        RegistryError,
        match=rf"the registry at sqlite:.* has no champion of model '{config.tracking.model}'; "
        r"train a first one with `mone train` and the same tracking\.uri and tracking\.model",
    ):
        champion(config.tracking)


def test_a_registry_that_is_away_is_told_from_one_without_a_champion(
    config, closed_port, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = replace(config.tracking, uri=f"http://127.0.0.1:{closed_port}")

    with pytest.raises(
        RegistryError,
        match=rf"the registry at http://127\.0\.0\.1:{closed_port} does not answer: .*; check",
    ):
        champion(tracking)


# PostgreSQL.


def postgres_tools():
    """The folder of PostgreSQL's programs; the newest of what Debian installs side by side."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "pg_ctl").is_file() and (f / "initdb").is_file()), None)


@contextlib.contextmanager
def postgres(tools, port):
    """A PostgreSQL server on the loopback interface, as its own user where we are root."""
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        if root:
            shutil.chown(folder, "postgres", "postgres")

        def run(*command):
            command = [*as_user, *command] if root else list(command)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

        data = f"{folder}/data"
        run(str(tools / "initdb"), "-D", data, "-A", "trust", "-U", "mone", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run(str(tools / "pg_ctl"), "-D", data, "-l", f"{folder}/log", "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://mone@127.0.0.1:{port}/postgres"
        finally:
            run(str(tools / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")


def test_a_store_on_postgresql_keeps_runs_and_models_too(tmp_path, closed_port):
    pytest.importorskip("psycopg2", reason="psycopg2, PostgreSQL's driver, is not installed")
    tools = postgres_tools()
    if tools is None:
        pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
    if os.geteuid() == 0 and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")

    with postgres(tools, closed_port) as uri:
        config = run_in(uri, tmp_path)
        (tmp_path / "artifacts").mkdir()
        store = MlflowClient(tracking_uri=uri)
        store.create_experiment(
            config.tracking.experiment, artifact_location=(tmp_path / "artifacts").as_uri()
        )
        assert find_champion(config.tracking) is None

        run_id = tracked(config, rows=ROWS[:2])
        assert tracked(config, rows=ROWS[3:], resumed=ROWS[:3]) == run_id
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "w").write_text("w")
        made = register(config.tracking, run_id, tmp_path / "weights")

        assert sorted(steps(config, run_id, "loss")) == [2, 4, 6]
        assert steps(config, run_id, "val_accuracy/ec_0.50") == [4]
        assert champion(config.tracking) == made
        tracker = MlflowTracker(config)

    for row in ROWS:  # the server is gone
        tracker.log(MetricRow(step=row.step + 10, values=row.values))
    tracker.finish()
    assert "127.0.0.1" in tracker.problem
