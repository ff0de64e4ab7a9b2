"""The whole way in one go: archive -> shards -> train -> evaluate -> report, in one folder."""

import resource
import shutil
import time
from pathlib import Path

from cluster.session import ray_session
from pipelines.commands.evaluate import show_results
from pipelines.config import RunConfig
from pipelines.data.embedded import Embedded, draw, held_out, shard_archive, shard_embedded
from pipelines.data.sharding.shards import ShardingReport
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Source
from pipelines.errors import UsageError
from pipelines.publish import publish_report
from pipelines.results import RESULTS, Results
from pipelines.run_report import REPORT, evaluate_run
from pipelines.storage import Place, place
from pipelines.terminal import Terminal
from pipelines.train import Outcome
from pipelines.training import EXIT_CODES, train_run

STAGES = 5
_DRAWN: dict[Embedded, tuple[str, str]] = {
    "digits": ("handwritten digits on cluttered canvases", "synset tars"),
    "motion": ("handwritten digits that move over clutter", "webm + json"),
}
_OURS = {"archive", "shards", "run", "mlruns", RESULTS, REPORT}


def run_demo(
    config: RunConfig, out: Path, archive: Place | None, terminal: Terminal, *, verbose: bool
) -> int:
    """Everything once, going on where an earlier call stopped.

    Args:
        config: The run; its paths lie below `out`.
        out: Folder for all of it.
        archive: Any archive that `mone shard` reads; None draws embedded data: clips if the model
            takes clips, else images.
        terminal: Where stages, progress and the final table are shown.
        verbose: Let Ray and the workers write too.

    Returns:
        The exit code.

    Raises:
        UsageError: `out` holds something else, or the archive is not what the model takes.
        ArchiveError: `archive` is none that is recognised.
    """
    started = time.monotonic()
    _check_folder(out)
    source = None
    if archive is not None:  # a wrong path is told at once, not after Ray has started
        source = find_source(archive)
        _check_media(source, config)
    with ray_session(verbose=verbose):
        _make_data(config, out, source, terminal)
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


def _check_media(source: Source, config: RunConfig) -> None:
    takes = "video" if config.model.video.frames > 1 else "image"
    if source.media != takes:
        flag = "add --video" if source.media == "video" else "leave out --video"
        raise UsageError(
            f"--archive {source.archive} holds {source.media}s, and recipe {config.recipe} takes "
            f"{takes}s; {flag}, or name a recipe for {source.media}s"
        )


def _make_data(config: RunConfig, out: Path, source: Source | None, terminal: Terminal) -> None:
    root = place(config.data.root)
    if source is None:
        name: Embedded = "motion" if config.model.video.frames > 1 else "digits"
        what, kind = _DRAWN[name]
        terminal.stage(1, STAGES, "archive", f"drawing {what}")
        draw(name, out / "archive", terminal)
        terminal.say(f"    {kind} -> {out / 'archive'}")
        terminal.stage(2, STAGES, "shards", f"Ray Data: {kind} -> WebDataset shards")
        reports = shard_embedded(name, out / "archive", root, terminal)
    else:
        terminal.stage(1, STAGES, "archive", f"reading {source.archive}")
        terminal.say(f"    {source.media}s, recognised as {source.layout}")
        share = held_out(source)
        split = f"{share:.0%} held out by key" if share else "split as the release has it"
        terminal.stage(2, STAGES, "shards", f"Ray Data: {source.layout} -> WebDataset, {split}")
        reports = shard_archive(source, root, terminal)
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
