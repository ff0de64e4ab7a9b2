"""New data -> next dataset version -> train on from the champion -> compare -> promote or not.

Champion and challenger are evaluated on the same validation set at three budgets; the alias
moves only if the challenger is not worse at any of them beyond chance differences. One
retraining at a time per dataset: a second one refuses at once.
"""

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path

from cluster.backends import get_backend
from cluster.session import ray_session
from pipelines.config import RunConfig, to_yaml
from pipelines.data.manifest import read_manifest
from pipelines.data.sharding.plan import ALL
from pipelines.data.sharding.shards import add_archive
from pipelines.data.sharding.versions import side_of
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Source
from pipelines.errors import RunError
from pipelines.evaluate import evaluate, validation_stream
from pipelines.locks import alone
from pipelines.report import ReportContent, write_report
from pipelines.results import Results
from pipelines.run_report import REPORT, evaluate_run
from pipelines.storage import Place, place
from pipelines.terminal import Terminal
from pipelines.tracking import ModelVersion, champion, fetch, promote, tag_version
from pipelines.train import Outcome
from pipelines.training import Trained, train_run
from pipelines.weights import load_weights, step_of_weights

BUDGETS = (0.3, 0.5, 1.0)
LOCK = ".retrain.lock"
_ROUNDING = 1e-9  # 0.8 - 0.79 comes out above 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a retraining came to.

    Attributes:
        promoted: Whether the challenger is the champion now.
        reason: One sentence with the numbers.
    """

    promoted: bool
    reason: str
    report: Path


def run_retraining(
    archive: Place,
    base: RunConfig,
    terminal: Terminal,
    *,
    tolerance: float = 0.0,
    verbose: bool = False,
) -> Verdict:
    """Retrain on a dataset that an archive is added to, and promote the better model.

    Args:
        archive: New samples in any layout of `mone shard`, of classes that the dataset has. Where
            the dataset was split by hash, so are they, and those held out are left alone.
        base: How to train; `base.out` is the folder that retrainings are kept in.
        terminal: Where progress is shown.
        tolerance: Accuracy that the challenger may lose at a budget; below 0 it must gain.
        verbose: Let Ray write to the terminal.

    Raises:
        RunError: Another retraining of this dataset is under way.
        RegistryError: There is no champion to go on from.
        PipelineError: The archive or the dataset is not fit.
    """
    source = find_source(archive)
    root = place(base.data.root).absolute()
    part, val_fraction = new_part(source, side_of(read_manifest(root / "train")))
    lock = (root.local or base.out.absolute()) / LOCK  # an object store has no locks
    with alone(lock, f"retraining of {root}"):
        best = champion(base.tracking)
        with ray_session(verbose=verbose):
            version = _add(source, root, part, val_fraction, terminal)
            folder = base.out.absolute() / f"v{version}_from_{best.version}"
            start = fetch(base.tracking, best, folder / "champion")
            config = _challenger_config(base, folder, start)
            trained = train_run(config, terminal, verbose=verbose)
        return _judge(trained, best, start, folder, tolerance, terminal)


def decide(best: Results, challenger: Results, tolerance: float) -> tuple[bool, str]:
    """Whether the challenger may take over, and why.

    It must not be worse than the champion by more than `tolerance` at any budget.
    """
    losses = {
        b.effective_capacity: b.accuracy - c.accuracy
        for b, c in zip(best.settings, challenger.settings, strict=True)
    }
    numbers = ", ".join(
        f"{100 * c.accuracy:.1f} % against {100 * b.accuracy:.1f} % at e_c {b.effective_capacity}"
        for b, c in zip(best.settings, challenger.settings, strict=True)
    )
    worst, loss = max(losses.items(), key=lambda item: item[1])
    if loss > tolerance + _ROUNDING:
        return False, f"kept the champion: the challenger loses at e_c {worst} ({numbers})"
    if loss > _ROUNDING:
        return True, f"promoted the challenger: within {tolerance} at every budget ({numbers})"
    return True, f"promoted the challenger: not worse at any budget ({numbers})"


def _add(source: Source, root: Place, part: str, val_fraction: float, terminal: Terminal) -> int:
    with terminal.meter("adding the archive", "parts") as meter:
        report = add_archive(
            source,
            root / "train",
            part=part,
            val_fraction=val_fraction,
            progress=lambda what, done, total: meter.update(done, total, what),
        )
    manifest = report.manifest
    terminal.say(
        f"dataset version {manifest.version}: {report.samples} new samples, "
        f"{manifest.samples} in all"
    )
    return manifest.version


def new_part(source: Source, side: tuple[str, float] | None) -> tuple[str, float]:
    """What of an archive is new training data, and the share that its split by hash holds out.

    Args:
        source: The archive.
        side: What the training data are of a split by hash, see `versions.side_of`: the same side
            of the archive is new. Else it is its own training split if it has splits.

    Raises:
        RunError: It has splits, and none to train on, or the dataset was split in another way.
    """
    if side and source.splits:
        raise RunError(
            f"archive {source.archive} has the splits {', '.join(source.splits)}, and the dataset "
            f"was split by hash at {side[1]}; give its folder of training data, which will be "
            "split alike"
        )
    if side:
        return side
    if not source.splits:
        return ALL, 0.0
    if "train" not in source.splits:
        raise RunError(
            f"archive {source.archive} has the splits {', '.join(source.splits)} and no train; "
            f"give the folder that holds new training data"
        )
    return "train", 0.0


def _challenger_config(base: RunConfig, folder: Path, start: Path) -> RunConfig:
    return dataclasses.replace(
        base,
        out=folder / "run",
        train=dataclasses.replace(base.train, start_from=start),
    )


def _judge(
    trained: Trained,
    best: ModelVersion,
    start: Path,
    folder: Path,
    tolerance: float,
    terminal: Terminal,
) -> Verdict:
    config, challenger = trained.config, trained.version
    if trained.outcome is not Outcome.FINISHED or challenger is None:
        raise RunError(
            f"the challenger in {config.out} is not finished or not registered: "
            f"{trained.summary}; run the same command again"
        )
    ours = _evaluate_champion(best, config, start)
    theirs = evaluate_run(config.out, BUDGETS, out=folder, name=f"challenger v{challenger.version}")
    promoted, reason = decide(ours, theirs, tolerance)
    if promoted:
        promote(config.tracking, challenger)
    tag_version(config.tracking, challenger, {"mone.verdict": reason})
    write_report(
        folder / REPORT,
        ReportContent(
            title=f"Retraining {folder.name}",
            summary=(("Date", datetime.date.today().isoformat()),),
            rows=(),
            results=(ours, theirs),
            routing=None,
            verdict=reason,
            config_yaml=to_yaml(config),
        ),
    )
    terminal.say(reason)
    return Verdict(promoted=promoted, reason=reason, report=folder / REPORT)


def _evaluate_champion(best: ModelVersion, config: RunConfig, weights: Path) -> Results:
    """The champion on the challenger's own validation set."""
    return evaluate(
        f"champion v{best.version}",
        step_of_weights(weights),
        load_weights(weights),
        validation_stream(config),
        BUDGETS,
        get_backend("cpu", threads=config.parallel.threads),
    )
