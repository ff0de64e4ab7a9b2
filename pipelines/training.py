"""One training as a user asks for it: data there, folder open, run, record closed, model kept."""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from cluster.launch import check_resources
from cluster.session import ray_session
from mone_core.models import build_model
from mone_core.warmstart import in_few_words
from pipelines.checkpoint import checkpoint_of, load_weights, step_of
from pipelines.config import RunConfig
from pipelines.data.embedded import ensure_data
from pipelines.load import alerts, read_loads
from pipelines.locks import alone
from pipelines.metrics import read_rows
from pipelines.runner import check_run, check_start, open_run, resolve, run_training, workers_of
from pipelines.skipped import SKIPPED, read_skipped
from pipelines.terminal import Terminal
from pipelines.tracking import MlflowTracker, ModelVersion, register, version_of
from pipelines.train import Outcome
from pipelines.weights import save_weights

LOCK = ".driver.lock"
EXIT_CODES = {Outcome.FINISHED: 0, Outcome.STOPPED: 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a training left behind.

    Attributes:
        config: The resolved configuration.
        version: The registered model; None when the training was stopped or the tracking
            server was away.
        summary: One line for people.
    """

    config: RunConfig
    outcome: Outcome
    version: ModelVersion | None
    summary: str


def train_run(config: RunConfig, terminal: Terminal, *, verbose: bool = False) -> Trained:
    """Train a run to its end, from wherever it stands, and register its model.

    A run that is at its end is not trained again; MLflow gets what it missed of it.

    Raises:
        PipelineError: Whatever a user can mend, before any worker starts.
        RunFailedError: A worker failed; the run goes on from its last checkpoint next time.
    """
    ensure_data(config.data, terminal, verbose=verbose)
    config = resolve(config)
    finished = check_run(config) == config.train.steps
    with nullcontext() if finished else ray_session(verbose=verbose):
        if not finished:
            check_resources(workers_of(config))
        done = open_run(config)
        if not done:
            _tell_start(config, terminal)
        with alone(config.out / LOCK, f"training of {config.out}"):
            outcome, run_id = _trained(config, terminal, finished=finished, verbose=verbose)
            _tell_load(config, terminal)
            _tell_skipped(config, terminal)
    version = None
    if outcome is Outcome.FINISHED and run_id:
        version = version_of(config.tracking, run_id) or keep_model(config, run_id)
    return Trained(
        config=config, outcome=outcome, version=version, summary=_line(config, outcome, done)
    )


def _tell_load(config: RunConfig, terminal: Terminal) -> None:
    """Say of experts that were full or idle at the end: the loss alone does not show it."""
    for line in [alert for last in read_loads(config.out)[-1:] for alert in alerts(last)]:
        terminal.say(f"warning: {line}")


def _tell_skipped(config: RunConfig, terminal: Terminal) -> None:
    """Say of samples that the run went without, with the first as an example."""
    skipped = read_skipped(config.out)
    for name, why in list(skipped.items())[:1]:
        terminal.say(
            f"warning: samples that could not be decoded and were skipped: {len(skipped)}, named "
            f"in {config.out / SKIPPED}; the first is {name}: {why}"
        )


def _tell_start(config: RunConfig, terminal: Terminal) -> None:
    """Say what became of the weights that a run starts from: nothing is dropped silently."""
    report = check_start(config)
    if report is None:
        return
    terminal.say(f"starting from {config.train.start_from}: {len(report.filled)} parameters")
    for what, names in (("fresh", report.fresh), ("left out", report.dropped)):
        if names:
            terminal.say(f"  {what}: {', '.join(in_few_words(names))}")
    for note in report.notes:
        terminal.say(f"  {note}")


def _trained(
    config: RunConfig, terminal: Terminal, *, finished: bool, verbose: bool
) -> tuple[Outcome, str | None]:
    """Train, with MLflow told; its run when it has taken everything, else None."""
    tracker = MlflowTracker(config)
    status = "FAILED"
    try:
        if finished:
            tracker.resume_after(read_rows(config.out))
            outcome = Outcome.FINISHED
        else:
            outcome = run_training(config, terminal, tracker=tracker, verbose=verbose)
        status = {Outcome.FINISHED: "FINISHED", Outcome.STOPPED: "KILLED"}[outcome]
    finally:
        tracker.finish(status)
        if tracker.problem:
            terminal.say(
                f"warning: MLflow at {config.tracking.uri} did not take everything "
                f"({tracker.problem}); the run's own record in {config.out} is whole"
            )
    return outcome, None if tracker.problem else tracker.run_id


def keep_model(config: RunConfig, run_id: str) -> ModelVersion:
    """Export a finished run's weights into the model registry."""
    with tempfile.TemporaryDirectory() as scratch:
        export_weights(config.out, config, Path(scratch))
        return register(config.tracking, run_id, Path(scratch))


def export_weights(run: Path, config: RunConfig, folder: Path) -> None:
    """Write the weights of a run's newest checkpoint as safetensors and configuration."""
    checkpoint = checkpoint_of(run)
    model = build_model(config.model)
    load_weights(checkpoint, model)
    save_weights(folder, model, step=step_of(checkpoint))


def _line(config: RunConfig, outcome: Outcome, before: int) -> str:
    if before == config.train.steps:
        return f"{config.out} is trained to its {before} steps already; nothing to do"
    checkpoint = checkpoint_of(config.out)
    went_on = f", on from step {before}" if before else ""
    if outcome is Outcome.FINISHED:
        return f"trained {config.train.steps} steps{went_on} -> {checkpoint}"
    return f"stopped after {checkpoint}{went_on}; the same command goes on from there"
