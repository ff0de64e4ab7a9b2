"""Runs and models in MLflow: the one module that imports it.

A run's own folder is the record (`metrics`); MLflow gets a copy, from a thread of its own, in
batches. A tracking server that is away costs a warning, never a training: what it missed is
sent when the run is started again.

The registry holds exported weights by version; the alias `champion` names the one in use.
"""

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipelines.config import RunConfig, TrackingConfig, flatten
from pipelines.errors import RegistryError, RunError
from pipelines.files import read_json, write_json
from pipelines.metrics import MetricRow

CHAMPION = "champion"
_LINK = "mlflow.json"
_SQLITE = "sqlite:///"
_AWAY = (MlflowException, SQLAlchemyError, OSError)
_NO_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_PARAMS_A_BATCH = 100

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Tracker(Protocol):
    """Where a run's metrics go besides its own file."""

    def resume_after(self, rows: Sequence[MetricRow]) -> None:
        """Learn which rows the run already has, and send those that are missing there."""
        ...

    def log(self, row: MetricRow) -> None:
        """Take a row; returns at once."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLink:
    """Which MLflow run belongs to a run folder."""

    uri: str
    run_id: str


class MlflowTracker:
    """One run in MLflow, made when its folder is first trained and found again later.

    Args:
        config: The run; its values become the MLflow run's parameters.
        parent: MLflow run that this one belongs to (the trials of a sweep).
    """

    def __init__(self, config: RunConfig, *, parent: str | None = None) -> None:
        self.problem: str | None = None
        self._known: Mapping[str, set[int]] | None = {}
        self._queue: queue.Queue[MetricRow | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._client = self._guard(lambda: client(config.tracking))
        self._run_id: str | None = None
        if self._client is not None:
            self._run_id = self._guard(lambda: self._open(config, parent))
        if self._run_id:
            self._thread = threading.Thread(target=self._write, name="mlflow", daemon=True)
            self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run; None while the server is away."""
        return self._run_id

    def resume_after(self, rows: Sequence[MetricRow]) -> None:
        """Send what MLflow does not have yet of these rows."""
        if self._run_id:
            self._known = self._guard(self._steps_by_metric)
            for row in rows:
                self.log(row)

    def log(self, row: MetricRow) -> None:
        """Queue a row. What MLflow has already is left out: it would stand there twice.

        When MLflow went away before it could tell what it has, nothing is sent.
        """
        known = self._known
        if self._thread and known is not None:
            new = {k: v for k, v in row.values.items() if row.step not in known.get(k, ())}
            self._queue.put(MetricRow(step=row.step, values=new))

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Keep files with the run, by name; a name may hold one folder."""
        if not self._run_id:
            return
        run_id = self._run_id
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in files.items():
                path = Path(scratch) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._guard(lambda: self._client.log_artifacts(run_id, scratch))

    def log_summary(self, values: Mapping[str, float]) -> None:
        """Numbers that belong to the whole run, such as those of an evaluation."""
        if self._run_id:
            run_id, now = self._run_id, _now_ms()
            metrics = [Metric(name, value, now, 0) for name, value in values.items()]
            self._guard(lambda: self._client.log_batch(run_id, metrics=metrics))

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is queued and close the run.

        Args:
            status: FINISHED, KILLED (stopped by its user) or FAILED.
        """
        if self._thread:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._run_id:
            run_id = self._run_id
            self._guard(lambda: self._client.set_terminated(run_id, status))

    def _open(self, config: RunConfig, parent: str | None) -> str:
        link = config.out / _LINK
        if link.is_file():
            known = read_json(link, RunLink, otherwise=RunError)
            if known.uri == config.tracking.uri:
                self._client.update_run(known.run_id, status="RUNNING")
                return known.run_id
        tags = {"mlflow.parentRunId": parent} if parent else {}
        experiment = experiment_id(self._client, config.tracking)
        run = self._client.create_run(experiment, run_name=config.out.name, tags=tags)
        run_id: str = run.info.run_id
        params = [Param(name, str(value)) for name, value in flatten(config).items()]
        for start in range(0, len(params), _PARAMS_A_BATCH):
            self._client.log_batch(run_id, params=params[start : start + _PARAMS_A_BATCH])
        write_json(link, RunLink(uri=config.tracking.uri, run_id=run_id))
        return run_id

    def _steps_by_metric(self) -> dict[str, set[int]]:
        """The steps that MLflow has of each of the run's metrics."""
        names = self._client.get_run(self._run_id).data.metrics
        return {
            name: {point.step for point in self._client.get_metric_history(self._run_id, name)}
            for name in names
        }

    def _write(self) -> None:
        """Runs in the thread: rows in batches until None comes."""
        assert self._run_id is not None
        run_id, ended = self._run_id, False
        while not ended:
            rows = [self._queue.get()]
            while not self._queue.empty():
                rows.append(self._queue.get())
            ended = None in rows
            now = _now_ms()
            metrics = [
                Metric(name, value, now, row.step)
                for row in rows
                if row is not None
                for name, value in row.values.items()
            ]
            for start in range(0, len(metrics), 1000):
                batch = metrics[start : start + 1000]
                self._guard(lambda batch=batch: self._client.log_batch(run_id, metrics=batch))

    def _guard(self, call: Any) -> Any:
        """Do something with the server; note that it is away instead of failing."""
        try:
            return call()
        except _AWAY as error:
            self.problem = _in_a_line(error)
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """A version of a registered model: its number, run and where its files lie."""

    name: str
    version: int
    run_id: str
    source: str


def client(config: TrackingConfig) -> MlflowClient:
    """A client of the tracking store, after making the folder of a local one.

    Raises:
        RunError: The address is of no kind that MLflow takes.
    """
    try:
        _make_local_folder(config.uri)
        return MlflowClient(tracking_uri=config.uri, registry_uri=config.uri)
    except (MlflowException, OSError, ImportError) as error:
        raise RunError(
            f"tracking.uri {config.uri!r} cannot be used: {_in_a_line(error)}; give "
            f"sqlite:///FILE or http(s)://HOST of a tracking server"
        ) from error


def experiment_id(store: MlflowClient, config: TrackingConfig) -> str:
    """The experiment's id, made on first use; a local store keeps artifacts beside itself."""
    found = store.get_experiment_by_name(config.experiment)
    if found is not None:
        return str(found.experiment_id)
    folder = local_folder(config.uri)
    artifacts = (folder / "artifacts").as_uri() if folder else None
    return str(store.create_experiment(config.experiment, artifact_location=artifacts))


def register(config: TrackingConfig, run_id: str, weights: Path) -> ModelVersion:
    """Keep exported weights with their run and make them the next version of the model.

    The first version there is becomes the champion, for want of another.

    Raises:
        RegistryError: The registry is away or refuses the name.
    """
    try:
        store = client(config)
        store.log_artifacts(run_id, str(weights), "model")
        if not store.search_registered_models(f"name = '{config.model}'"):
            store.create_registered_model(config.model)
        source = f"{store.get_run(run_id).info.artifact_uri}/model"
        made = store.create_model_version(config.model, source, run_id)
    except _AWAY as error:
        raise RegistryError(
            f"the registry at {config.uri} did not take model {config.model!r}: "
            f"{_in_a_line(error)}; the run is whole, start the same command again to register it"
        ) from error
    version = ModelVersion(
        name=config.model, version=int(made.version), run_id=run_id, source=source
    )
    if find_champion(config) is None:
        promote(config, version)
    return version


def version_of(config: TrackingConfig, run_id: str) -> ModelVersion | None:
    """The version that a run's weights were registered as; None when they were not."""
    found = client(config).search_model_versions(f"name = '{config.model}' and run_id = '{run_id}'")
    return _version(config, found[0]) if found else None


def find_champion(config: TrackingConfig) -> ModelVersion | None:
    """The version that the alias `champion` names; None when there is none.

    Raises:
        RegistryError: The registry is away.
    """
    try:
        found = client(config).get_model_version_by_alias(config.model, CHAMPION)
    except _AWAY as error:
        if getattr(error, "error_code", "") in _NO_SUCH:
            return None
        raise RegistryError(
            f"the registry at {config.uri} does not answer: {_in_a_line(error)}; check "
            f"tracking.uri and that its server runs"
        ) from error
    return _version(config, found)


def champion(config: TrackingConfig) -> ModelVersion:
    """The champion of the configured model.

    Raises:
        RegistryError: There is none yet, or the registry is away.
    """
    found = find_champion(config)
    if found is None:
        raise RegistryError(
            f"the registry at {config.uri} has no {CHAMPION} of model {config.model!r}; train a "
            f"first one with `mone train` and the same tracking.uri and tracking.model"
        )
    return found


def promote(config: TrackingConfig, version: ModelVersion) -> None:
    """Make a version the champion."""
    client(config).set_registered_model_alias(config.model, CHAMPION, str(version.version))


def tag_version(config: TrackingConfig, version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Write facts beside a version, such as why it was promoted or not."""
    for name, value in tags.items():
        client(config).set_model_version_tag(config.model, str(version.version), name, value)


def fetch(config: TrackingConfig, version: ModelVersion, folder: Path) -> Path:
    """Bring a version's files into a folder; gives the path of the exported weights."""
    folder.mkdir(parents=True, exist_ok=True)
    found = download_artifacts(
        artifact_uri=version.source, dst_path=str(folder), tracking_uri=config.uri
    )
    return Path(found)


def keep_parent(
    config: TrackingConfig, name: str, tags: Mapping[str, str], files: Sequence[Path]
) -> str:
    """Make a finished run that others belong to (a sweep), with files of its own; gives its id.

    Raises:
        RunError: MLflow is away.
    """
    try:
        store = client(config)
        run = store.create_run(experiment_id(store, config), run_name=name, tags=dict(tags))
        for path in files:
            store.log_artifact(run.info.run_id, str(path))
        store.set_terminated(run.info.run_id, "FINISHED")
    except _AWAY as error:
        raise RunError(f"MLflow at {config.uri} does not answer: {_in_a_line(error)}") from error
    return str(run.info.run_id)


def local_folder(uri: str) -> Path | None:
    """The folder of an SQLite store; None for a server."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE)).absolute().parent


def _make_local_folder(uri: str) -> None:
    if folder := local_folder(uri):
        folder.mkdir(parents=True, exist_ok=True)


def _version(config: TrackingConfig, found: Any) -> ModelVersion:
    return ModelVersion(
        name=config.model,
        version=int(found.version),
        run_id=str(found.run_id),
        source=str(found.source),
    )


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _now_ms() -> int:
    return int(time.time() * 1000)
