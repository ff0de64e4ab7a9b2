"""Gathers what `report` draws: a run's metrics, load, results, routing and configuration."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.backends import get_backend
from mone_core.models import ModelConfig, build_model
from pipelines.checkpoint import checkpoint_of, load_weights, step_of
from pipelines.config import RunConfig, read_config, to_yaml
from pipelines.data.manifest import Manifest, classes_sha256, read_manifest
from pipelines.errors import DatasetError
from pipelines.evaluate import evaluate, validation_stream
from pipelines.load import read_loads
from pipelines.metrics import read_rows
from pipelines.report import ReportContent, figure_files, write_report
from pipelines.results import RESULTS, Results, read_results, write_results
from pipelines.routing import routing_examples
from pipelines.routing_examples import RoutingExamples
from pipelines.run_data import DATA, read_data
from pipelines.skipped import SKIPPED, SkipList, read_skipped
from pipelines.storage import place

REPORT = "report.html"
ROUTING_BUDGETS = (0.3, 0.5, 0.7)
EVALUATION_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def evaluate_run(
    target: Path,
    budgets: tuple[float, ...] | None = None,
    *,
    out: Path | None = None,
    name: str | None = None,
    sparse: Mapping[str, Any] | None = None,
    read: Mapping[str, Any] | None = None,
) -> Results:
    """Evaluate a run's newest checkpoint (or one checkpoint) and write `results.json`.

    Args:
        target: A run, or one of its checkpoints.
        budgets: Effective capacities; None: the usual ones that the model can meet.
        out: Folder for the results; by default the target.
        name: What to call it; by default the target's name, with what `sparse` changes.
        sparse: What to change of how sparse experts take tokens: `ViT.set_capacity`'s arguments.
        read: What to change of how samples are read: fields of `ReadConfig`.
    """
    checkpoint = checkpoint_of(target)
    config = read_config(checkpoint)
    data = replace(config.data, read=replace(config.data.read, **(read or {})))
    config = replace(config, data=data)
    model = build_model(config.model)
    if budgets is None:
        budgets = config.model.nesting.reachable(EVALUATION_BUDGETS)
    for budget in budgets:
        model.set_effective_capacity(budget)  # a budget out of reach ends it here, before work
    if sparse:
        model.set_capacity(**sparse)
    load_weights(checkpoint, model)
    backend = get_backend("cpu", threads=config.parallel.threads)
    _check_classes(checkpoint, config)
    stream = validation_stream(config)
    called = ", ".join(
        [target.name, *(f"{what} {value}" for what, value in (sparse or {}).items())]
    )
    results = evaluate(name or called, step_of(checkpoint), model, stream, budgets, backend)
    SkipList(out or target).add(stream.skipped_samples)
    write_results(out or target, results)
    return results


def report_run(run: Path) -> ReportContent:
    """Write a run's `report.html`; gives back what it shows."""
    config = read_config(checkpoint_of(run))  # what may change between starts is as it was last
    content = ReportContent(
        title=str(run.name),
        summary=_summary(run, config),
        rows=tuple(read_rows(run)),
        results=(read_results(run),) if (run / RESULTS).is_file() else (),
        routing=_routing(run, config) if config.model.nesting.routed else None,
        verdict=None,
        config_yaml=to_yaml(config),
        loads=tuple(read_loads(run)),
    )
    write_report(run / REPORT, content)
    return content


def report_files(run: Path, content: ReportContent) -> dict[str, bytes]:
    """The report and its pictures by file name, to keep beside the run in MLflow."""
    pictures = {f"figures/{name}": data for name, data in figure_files(content).items()}
    return {REPORT: (run / REPORT).read_bytes(), **pictures}


def _routing(run: Path, config: RunConfig) -> RoutingExamples:
    checkpoint = checkpoint_of(run)
    model = build_model(config.model)
    load_weights(checkpoint, model)
    budgets = config.model.nesting.reachable(ROUTING_BUDGETS)
    names = _check_classes(checkpoint, config).class_names
    return routing_examples(model, validation_stream(config), budgets, names)


def _check_classes(checkpoint: Path, config: RunConfig) -> Manifest:
    """The validation set's manifest, if its labels mean what they did when the run was trained.

    A checkpoint that lies outside its run is compared by the number of classes alone.

    Raises:
        DatasetError: They do not.
    """
    root, run = place(config.data.root), checkpoint.parent.parent
    manifest = read_manifest(root / "val")
    found, trained, wrong = len(manifest.classes), config.model.num_classes, ""
    if found != trained:
        wrong = f"has {found} classes, and {checkpoint} was trained on {trained}"
    elif (run / DATA).is_file() and classes_sha256(manifest.classes) != read_data(run).classes:
        wrong = f"has other classes than {run} was trained on, or these in another order"
    if wrong:
        raise DatasetError(
            f"{root / 'val'} {wrong}; shard the validation archive again, with `--classes-of` a "
            "dataset that has the classes of training"
        )
    return manifest


def _input(model: ModelConfig) -> str:
    """What the model looks at."""
    frames = model.video.frames
    return f"{f'{frames} frames' if frames > 1 else 'images'} of {model.image_size} px"


def _summary(run: Path, config: RunConfig) -> tuple[tuple[str, str], ...]:
    model = build_model(config.model)
    train = read_manifest(place(config.data.root) / "train")
    parameters = sum(p.numel() for p in model.parameters())
    sizes, skipped = config.model, len(read_skipped(run))
    return (
        ("Recipe", config.recipe),
        (
            "Model",
            f"{sizes.family}, D={sizes.dim}, {sizes.depth} layers, {sizes.num_patches} tokens of "
            f"{_input(sizes)}, widths {', '.join(map(str, sizes.nesting.widths))}",
        ),
        ("Parameters", f"{parameters:,}"),
        ("Training samples", f"{train.samples:,} in {len(train.classes)} classes"),
        ("Steps", f"{config.train.steps:,} of {config.train.batch_size} samples"),
        ("Workers", f"{config.parallel.num_workers} x {config.parallel.device}"),
        ("Checkpoint", checkpoint_of(run).name),
        *((("Skipped samples", f"{skipped:,}, named in {SKIPPED}"),) if skipped else ()),
    )
