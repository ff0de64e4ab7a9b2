"""The whole way in one go: archive -> shards -> train -> evaluate -> report, in one folder."""

import resource
import shutil
import time
from pathlib import Path

from cluster.session import ray_session
from pipelines.commands.evaluate import show_results
from pipelines.config import RunConfig
from pipelines.data.archive import find_tars
from pipelines.data.embedded import draw_digits, shard_both, shard_split
from pipelines.data.shards import ShardingReport
from pipelines.errors import UsageError
from pipelines.publish import publish_report
from pipelines.results import RESULTS, Results
from pipelines.run_report import REPORT, evaluate_run
from pipelines.terminal import Terminal
from pipelines.train import Outcome
from pipelines.training import EXIT_CODES, train_run

STAGES = 5
VAL_FRACTION = 0.1
_OURS = {"archive", "shards", "run", "mlruns", RESULTS, REPORT}


def run_demo(
    config: RunConfig, out: Path, archive: Path | None, terminal: Terminal, *, verbose: bool
) -> int:
    """Everything once, going on where an earlier call stopped.

    Args:
        config: The run; its paths lie below `out`.
        out: Folder for all of it.
        archive: Folder of synset tars; None draws the embedded digits.
        terminal: Where stages, progress and the final table are shown.
        verbose: Let Ray and the workers write too.

    Returns:
        The exit code.
    """
    started = time.monotonic()
    _check_folder(out)
    if archive:
        find_tars(archive)  # a wrong path is told at once, not after Ray has started
    with ray_session(verbose=verbose):
        _make_data(config, out, archive, terminal)
        terminal.stage(
            3, STAGES, "train", f"{config.train.steps} steps, {config.parallel.num_workers} workers"
        )
        trained = train_run(config, terminal, verbose=verbose)
        terminal.say(f"    {trained.summary}")
    if trained.outcome is Outcome.STOPPED:
        return EXIT_CODES[trained.outcome]
    terminal.stage(4, STAGES, "evaluate", "the same weights at each compute budget")
    results = evaluate_run(trained.config.out)
    shutil.copyfile(trained.config.out / RESULTS, out / RESULTS)
    terminal.stage(5, STAGES, "report", "curves, budgets and routed images in one HTML file")
    publish_report(trained.config.out)
    shutil.copyfile(trained.config.out / REPORT, out / REPORT)
    _close(terminal, config, out, results, time.monotonic() - started)
    return 0


def _check_folder(out: Path) -> None:
    others = sorted({path.name for path in out.iterdir()} - _OURS) if out.is_dir() else []
    others = [name for name in others if not name.startswith(".")]
    if others or out.is_file():
        what = others[0] if others else "a file of that name"
        raise UsageError(f"--out {out} holds something else ({what}); name a new folder")


def _make_data(config: RunConfig, out: Path, archive: Path | None, terminal: Terminal) -> None:
    root = config.data.root
    if archive is None:
        terminal.stage(1, STAGES, "archive", "drawing handwritten digits on cluttered canvases")
        draw_digits(out / "archive")
        train, val = out / "archive" / "train", out / "archive" / "val"
        terminal.say(f"    {len(find_tars(train))} synset tars -> {train} and {val}")
        terminal.stage(2, STAGES, "shards", "Ray Data: synset tars -> WebDataset shards")
        reports = shard_both(train, val, root, terminal)
    else:
        terminal.stage(1, STAGES, "archive", f"reading {archive}")
        terminal.say(f"    {len(find_tars(archive))} synset tars")
        terminal.stage(2, STAGES, "shards", f"Ray Data, {VAL_FRACTION:.0%} held out by key")
        reports = shard_split(archive, root, VAL_FRACTION, terminal)
    for report in reports:
        terminal.say(f"    {_shards_line(report)}")


def _shards_line(report: ShardingReport) -> str:
    manifest = report.manifest
    return (
        f"{manifest.samples} samples in {len(manifest.shards)} shards, {len(manifest.skipped)} "
        f"skipped -> {report.folder}{' (there already)' if report.did_nothing else ''}"
    )


def _close(
    terminal: Terminal, config: RunConfig, out: Path, results: Results, seconds: float
) -> None:
    show_results(terminal, results)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    terminal.say(f"report   {out / REPORT}   (open it in a browser)")
    terminal.say(f"results  {out / RESULTS}")
    terminal.say(f"MLflow   mlflow ui --backend-store-uri {config.tracking.uri}")
    terminal.say(f"took {seconds / 60:.1f} minutes; this process used at most {peak_mb:.0f} MB")
