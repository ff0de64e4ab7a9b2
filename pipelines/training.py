"""One training as a user asks for it: data there, folder open, run, record closed, model kept."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from mone_core.models import build_model
from pipelines.checkpoint import checkpoint_of, load_weights, step_of
from pipelines.config import RunConfig
from pipelines.data.embedded import ensure_data
from pipelines.metrics import read_rows
from pipelines.runner import open_run, resolve, run_training
from pipelines.terminal import Terminal
from pipelines.tracking import MlflowTracker, ModelVersion, register, version_of
from pipelines.train import Outcome
from pipelines.weights import save_weights

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
    done = open_run(config)
    tracker = MlflowTracker(config)
    status = "FAILED"
    try:
        if done == config.train.steps:
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
    version = None
    if outcome is Outcome.FINISHED and tracker.run_id and not tracker.problem:
        known = version_of(config.tracking, tracker.run_id)
        version = known or keep_model(config, tracker.run_id)
    return Trained(
        config=config, outcome=outcome, version=version, summary=_line(config, outcome, done)
    )


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
