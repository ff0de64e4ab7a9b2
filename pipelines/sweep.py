"""One run per compute budget, as Ray Tune trials, reported together.

A trial is a whole training on one process (no Ray Train inside: nothing to free when a
trial ends), evaluated at its own budget. The driver alone talks to MLflow: a parent run for
the sweep, a child per trial, fed from the trials' own records.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune import RunConfig as TuneRunConfig
from ray.tune import TuneConfig, Tuner

from cluster.backends import get_backend
from cluster.session import cluster_cpus, ray_session
from pipelines.build import build_run
from pipelines.config import RunConfig, to_yaml
from pipelines.data.embedded import ensure_data
from pipelines.errors import RunError, RunFailedError, UsageError
from pipelines.metrics import read_rows, rewind
from pipelines.report import ReportContent, write_report
from pipelines.results import RESULTS, Results, read_results
from pipelines.run_data import read_data
from pipelines.run_report import REPORT, evaluate_run
from pipelines.runner import open_run, resolve, steps_done
from pipelines.terminal import Terminal
from pipelines.tracking import MlflowTracker, keep_parent
from pipelines.train import train
from pipelines.worker import FileReporter


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What a sweep found: one evaluation per trial, in the order of the budgets."""

    results: tuple[Results, ...]
    report: Path


def run_sweep(
    base: RunConfig, budgets: Sequence[float], terminal: Terminal, *, verbose: bool = False
) -> SweepResult:
    """Train `base` once at each fixed effective capacity and compare.

    Args:
        base: The run that the trials vary; `base.out` becomes the sweep's folder.
        budgets: Effective capacities, one trial each.
        terminal: Where progress is shown.
        verbose: Let Ray write to the terminal.

    Raises:
        RunFailedError: A trial failed; the finished ones are kept and not run again.
    """
    if base.parallel.device != "cpu":
        raise UsageError(
            f"a sweep's trials train on one CPU process each, got parallel.device "
            f"{base.parallel.device!r}; set it to cpu"
        )
    ensure_data(base.data, terminal, verbose=verbose)
    trials = [_trial_config(base, budget) for budget in dict.fromkeys(budgets)]
    for config in trials:
        open_run(config)
    with ray_session(verbose=verbose):
        _run_trials([config for config in trials if not _is_done(config)], base, terminal)
    results = tuple(read_results(config.out) for config in trials)
    report = _report(base, results)
    try:
        _tell_mlflow(base, trials, results, report)
    except RunError as error:
        terminal.say(f"warning: {error}; the sweep's own files are whole")
    return SweepResult(results=results, report=report)


def _trial_config(base: RunConfig, budget: float) -> RunConfig:
    return resolve(
        dataclasses.replace(
            base,
            out=base.out / f"ec_{budget:.3f}",
            model=dataclasses.replace(
                base.model,
                nesting=dataclasses.replace(base.model.nesting, effective_capacity=budget),
            ),
            train=dataclasses.replace(base.train, budgets=(budget,), eval_budgets=(budget,)),
            parallel=dataclasses.replace(base.parallel, num_workers=1),
        )
    )


def _is_done(config: RunConfig) -> bool:
    return (config.out / RESULTS).is_file()


def _run_trials(trials: list[RunConfig], base: RunConfig, terminal: Terminal) -> None:
    if not trials:
        return
    cpus = base.parallel.threads
    with terminal.meter("sweep", "trials") as meter:
        meter.update(0, len(trials), f"{len(trials)} budgets")
        tuner = Tuner(
            ray.tune.with_resources(_trial, {"CPU": cpus}),
            param_space={"config": ray.tune.grid_search(trials)},
            tune_config=TuneConfig(max_concurrent_trials=max(1, cluster_cpus() // cpus)),
            run_config=TuneRunConfig(
                name=".tune", storage_path=str(base.out.absolute()), verbose=0
            ),
        )
        grid = tuner.fit()
        meter.update(len(trials), len(trials))
    if grid.errors:
        raise RunFailedError(
            f"{len(grid.errors)} of {len(trials)} trials failed, the first with: "
            f"{str(grid.errors[0]).splitlines()[-1]}; the same command runs only those again"
        )


def _trial(params: dict[str, Any]) -> None:
    """Train and evaluate one budget in this process; runs inside a Ray Tune worker."""
    config: RunConfig = params["config"]
    backend = get_backend("cpu", threads=config.parallel.threads)
    rewind(config.out, steps_done(config.out))
    run = build_run(config, backend, FileReporter(config.out), read_data(config.out))
    train(run)
    results = evaluate_run(config.out, config.train.budgets)
    ray.tune.report({"accuracy": results.settings[0].accuracy})


def _report(base: RunConfig, results: tuple[Results, ...]) -> Path:
    report = base.out / REPORT
    content = ReportContent(
        title=f"{base.out.name}: one run per budget",
        summary=(("Recipe", base.recipe), ("Trials", str(len(results)))),
        rows=(),
        results=results,
        routing=None,
        verdict=None,
        config_yaml=to_yaml(base),
    )
    write_report(report, content)
    return report


def _tell_mlflow(
    base: RunConfig, trials: list[RunConfig], results: tuple[Results, ...], report: Path
) -> None:
    """A run for the sweep with the report, and one below it for each trial.

    Raises:
        RunError: MLflow is away.
    """
    parent = keep_parent(base.tracking, base.out.name, {"mone.kind": "sweep"}, [report])
    for config, result in zip(trials, results, strict=True):
        tracker = MlflowTracker(config, parent=parent)
        tracker.resume_after(read_rows(config.out))
        tracker.log_summary({"accuracy": result.settings[0].accuracy})
        tracker.finish()
