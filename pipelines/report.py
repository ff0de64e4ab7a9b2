"""One HTML file that says what a run, a sweep or a comparison found.

The file stands alone: pictures are inline, nothing is fetched, no script runs (a content
policy in its head forbids both). Every sentence and number is computed from the content
given; parts that the content lacks are left out. The pictures come from `figures`,
`load_figures` and `routing_grid`, the layout from `report.html.j2`; who gathers the content is
the command line.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.figures import (
    accuracy_curve,
    budget_curve,
    budget_series,
    full_setting,
    latency_curve,
    loss_curve,
    macs_unit,
    seconds_per_image,
    training_series,
)
from pipelines.files import write_atomically
from pipelines.load import LoadTable
from pipelines.load_figures import (
    any_dropped,
    any_unreached,
    drop_curve,
    expert_load,
    unreached_curve,
)
from pipelines.metrics import MetricRow
from pipelines.results import Results, Setting
from pipelines.routing_examples import RoutingExamples
from pipelines.routing_grid import routing_grid

TEMPLATE = "report.html.j2"
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
TALKED_ABOUT = 0.5  # the effective capacity that the headline looks for first
WIDE = ("routing.png", "experts.svg")
MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportContent:
    """All that a report shows.

    Attributes:
        title: What the report is about ("demo/run").
        summary: Facts as (name, value): run, model, parameters, steps, data, machine, commit.
        rows: The run's metrics; empty where several runs are compared.
        results: Evaluations; the first is what the others are compared to.
        routing: Images and their routing, None where none was computed.
        verdict: What was decided ("challenger v4 is promoted: ..."), None where nothing was.
        config_yaml: The resolved configuration.
        loads: How full sparse experts were in training; empty without sparse experts.
    """

    title: str
    summary: tuple[tuple[str, str], ...]
    rows: tuple[MetricRow, ...]
    results: tuple[Results, ...]
    routing: RoutingExamples | None
    verdict: str | None
    config_yaml: str
    loads: tuple[LoadTable, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    """One figure of the page: `uri` holds its bytes, `wide` gives it the whole column."""

    uri: str
    alt: str
    caption: str
    wide: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """Accuracy of every evaluation (rows) at every budget (columns), the best of each marked."""

    baseline: str
    capacities: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str, bool], ...]], ...]


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report as one self-contained HTML file, whole or not at all.

    Args:
        path: The file; its folder exists, an older report is replaced.
        content: What it shows.
    """
    write_atomically(path, _html(content).encode())


def figure_files(content: ReportContent) -> dict[str, bytes]:
    """Draw the figures for which the content has data.

    Returns:
        File name to bytes: of `accuracy-by-compute.svg`, `latency-by-compute.svg`,
        `loss.svg`, `accuracy.svg`, `routing.png`, `experts.svg` and `dropped-choices.svg` or
        `unreached-tokens.svg`.
    """
    results = _evaluated(content)
    files = {}
    if any(len(result.settings) > 1 for result in results) or len(results) > 1:
        files["accuracy-by-compute.svg"] = budget_curve(results)
    if any(_has_relative_latency(result) for result in results):
        files["latency-by-compute.svg"] = latency_curve(
            [result for result in results if _has_relative_latency(result)]
        )
    if len(training_series(content.rows, "loss")[0]) > 1:
        files["loss.svg"] = loss_curve(content.rows)
    curves = budget_series(content.rows, "val_accuracy").values()
    if any(len(steps) > 1 for steps, _ in curves):
        num_classes = results[0].num_classes if results else None
        files["accuracy.svg"] = accuracy_curve(content.rows, num_classes)
    if content.routing is not None:
        files["routing.png"] = routing_grid(content.routing)
    return files | _load_files(content.loads)


def _load_files(loads: Sequence[LoadTable]) -> dict[str, bytes]:
    """The figures of sparse experts; what was lost on the way only where something was."""
    if not loads:
        return {}
    files = {"experts.svg": expert_load(loads)}
    if len(loads) > 1 and any_dropped(loads):
        files["dropped-choices.svg"] = drop_curve(loads)
    elif len(loads) > 1 and any_unreached(loads):
        files["unreached-tokens.svg"] = unreached_curve(loads)
    return files


def headline(results: Sequence[Results]) -> str | None:
    """The most important finding in one sentence.

    Args:
        results: Evaluations, each with at least one setting.

    Returns:
        For one evaluation: what a smaller budget saves and costs against the full model. For
        several: who is best, at a budget that all have in common where there is one. None
        without results.
    """
    if not results:
        return None
    return _one_result(results[0]) if len(results) == 1 else _several_results(results)


def _html(content: ReportContent) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = _evaluated(content)
    pictures = {name: _picture(name, data, content) for name, data in figure_files(content).items()}
    return environment.get_template(TEMPLATE).render(
        content=content,
        headline=headline(results),
        tables=_tables(results),
        table_note=_table_note(results),
        unit=macs_unit(max((s.macs for r in results for s in r.settings), default=1))[1],
        comparison=_comparison(results),
        compute=_only(pictures, "accuracy-by-compute.svg", "latency-by-compute.svg"),
        training=_only(pictures, "loss.svg", "accuracy.svg"),
        routing=_only(pictures, "routing.png"),
        experts=_only(pictures, "experts.svg", "dropped-choices.svg", "unreached-tokens.svg"),
        not_finite=_not_finite(content.rows),
    )


def _only(pictures: dict[str, _Picture], *names: str) -> list[_Picture]:
    return [pictures[name] for name in names if name in pictures]


def _evaluated(content: ReportContent) -> list[Results]:
    return [result for result in content.results if result.settings]


def _has_relative_latency(result: Results) -> bool:
    return len(result.settings) > 1 and full_setting(result) is not None


def _picture(name: str, data: bytes, content: ReportContent) -> _Picture:
    alt, caption = _words(name, content)
    encoded = base64.b64encode(data).decode()
    return _Picture(
        uri=f"data:{MEDIA_TYPES[Path(name).suffix]};base64,{encoded}",
        alt=alt,
        caption=caption,
        wide=name in WIDE,
    )


def _words(name: str, content: ReportContent) -> tuple[str, str]:
    """What a figure shows (for those who cannot see it), and how to read it."""
    if name == "accuracy-by-compute.svg":
        of = "one line per evaluation; " if len(_evaluated(content)) > 1 else ""
        return (
            "Line chart: accuracy against multiply-accumulates per image",
            f"The same weights at several budgets; {of}the number at a point is its effective "
            "capacity. Up and left is better.",
        )
    if name == "latency-by-compute.svg":
        return (
            "Line chart: measured time against multiply-accumulates, relative to the full model",
            "A point on the dotted line saves as much time as arithmetic; above it, some of the "
            "saving is lost to overhead.",
        )
    if name == "loss.svg":
        return (
            "Line chart: training and validation loss by step",
            "Pale: as logged. Grey: its running mean. Coloured: validation, one line per budget. "
            "Training loss may stem from other budgets and altered images: compare shapes, not "
            "levels.",
        )
    if name == "accuracy.svg":
        return (
            "Line chart: validation accuracy by step, one line per budget",
            "One set of weights evaluated at each budget. Lines close together mean that little "
            "is lost by computing less.",
        )
    if name == "experts.svg":
        return (
            "Heat maps: layers by experts, slots filled and tokens taken",
            "One cell per expert of a block, late in training. Left: how many of its slots hold a "
            "token; empty ones are computed for nothing, full ones turn tokens away. Right: its "
            "tokens over what each would have in perfect balance; a cross: hardly any.",
        )
    if name == "dropped-choices.svg":
        return (
            "Line chart: share of choices that were dropped, by step, one line per block",
            "A choice is dropped when its expert is full already; the token goes on without that "
            "expert. A larger capacity ratio or stronger balance losses bring the lines down.",
        )
    if name == "unreached-tokens.svg":
        return (
            "Line chart: share of tokens that no expert takes, by step, one line per block",
            "Experts choose their tokens: none is turned away, but some are chosen by nobody, and "
            "of such a block they get the attention alone.",
        )
    return (
        "Grid of validation samples with the tokens highlighted that go to the full model",
        "Outlined and in colour: tokens that the full model handles; pale: those that narrower "
        "experts handle. The tick or cross and the name are the prediction at that budget. Last "
        "column: the width each token gets, the darker the wider.",
    )


def _one_result(result: Results) -> str:
    ranked = sorted(result.settings, key=lambda setting: setting.effective_capacity)
    top = ranked[-1]
    if len(ranked) == 1:
        divisor, unit = macs_unit(top.macs)
        return (
            f"At effective capacity {top.effective_capacity:g}, the model is right on "
            f"{percent(top.accuracy)} of {top.samples:,} validation samples, for "
            f"{significant(top.macs / divisor)} {unit} per image."
        )
    talked = _nearest(ranked[:-1])
    full = top.effective_capacity == 1.0
    whole = "the full model" if full else f"effective capacity {top.effective_capacity:g}"
    return (
        f"At effective capacity {talked.effective_capacity:g}, the model is right on "
        f"{percent(talked.accuracy)} of validation samples, "
        f"{_against(talked.accuracy, top.accuracy)} of {whole}, with "
        f"{percent(talked.macs / top.macs, 0)} of the arithmetic and "
        f"{percent(seconds_per_image(talked) / seconds_per_image(top), 0)} of the time."
    )


def _several_results(results: Sequence[Results]) -> str:
    common = set.intersection(*({s.effective_capacity for s in r.settings} for r in results))
    if not common:
        return _best_anywhere(results)
    at = min(common, key=lambda capacity: (abs(capacity - TALKED_ABOUT), capacity))
    ranked = sorted(
        ((setting.accuracy, result.name) for result in results if (setting := _at(result, at))),
        key=lambda pair: -pair[0],
    )
    (best, name), (worst, last) = ranked[0], ranked[-1]
    if best == worst:
        return (
            f"At effective capacity {at:g}, all {len(results)} are right on {percent(best)} of "
            f"validation samples."
        )
    first = "" if len(results) == 2 else f", best of {len(results)},"
    return (
        f"At effective capacity {at:g}, {name}{first} is right on {percent(best)} of validation "
        f"samples, {_against(best, worst)} of {last}."
    )


def _best_anywhere(results: Sequence[Results]) -> str:
    pairs = [(setting, result.name) for result in results for setting in result.settings]
    best, name = max(pairs, key=lambda pair: pair[0].accuracy)
    cheapest, other = min(pairs, key=lambda pair: pair[0].macs)
    sentence = (
        f"{name} is best: right on {percent(best.accuracy)} of validation samples at effective "
        f"capacity {best.effective_capacity:g}"
    )
    if cheapest.macs == best.macs:
        return f"{sentence}."
    return (
        f"{sentence}; the cheapest, {other} at {cheapest.effective_capacity:g}, is right on "
        f"{percent(cheapest.accuracy)} with {percent(cheapest.macs / best.macs, 0)} of the "
        f"arithmetic."
    )


def _against(accuracy: float, top: float) -> str:
    """Compare as a reader would, after rounding to tenths of a point."""
    difference = round(100 * (accuracy - top), 1)
    if difference == 0:
        return f"level with the {percent(top)}"
    word = "below" if difference < 0 else "above"
    return f"{abs(difference):.1f} points {word} the {percent(top)}"


def _nearest(settings: Sequence[Setting]) -> Setting:
    return min(settings, key=lambda s: abs(s.effective_capacity - TALKED_ABOUT))


def _at(result: Results, capacity: float) -> Setting | None:
    return next((s for s in result.settings if s.effective_capacity == capacity), None)


def _tables(results: Sequence[Results]) -> list[tuple[str, list[list[str]]]]:
    """Per evaluation its name and one row of cells per budget, in the columns of the template."""
    divisor, _ = macs_unit(max((s.macs for r in results for s in r.settings), default=1))
    tables = []
    for result in results:
        ranked = sorted(result.settings, key=lambda setting: setting.effective_capacity)
        dearest = max(setting.macs for setting in ranked)
        tables.append((result.name, [_cells(s, divisor, dearest) for s in ranked]))
    return tables


def _cells(setting: Setting, divisor: float, dearest: int) -> list[str]:
    error = math.sqrt(setting.accuracy * (1 - setting.accuracy) / max(1, setting.samples))
    return [
        f"{setting.effective_capacity:.2f}",
        f"{setting.realised_effective_capacity:.3f}",
        significant(setting.macs / divisor),
        percent(setting.macs / dearest, 0),
        percent(setting.accuracy),
        f"± {100 * error:.1f}",
        f"{setting.loss:.3f}",
        significant(setting.latency_ms),
        significant(setting.images_per_second),
    ]


def _table_note(results: Sequence[Results]) -> str:
    settings = [setting for result in results for setting in result.settings]
    samples = " or ".join(f"{n:,}" for n in sorted({s.samples for s in settings}))
    batches = " or ".join(f"{n:,}" for n in sorted({s.latency_batch for s in settings}))
    machines = "; ".join(
        sorted({f"{r.machine}, torch {r.torch}, commit {r.commit}" for r in results})
    )
    return (
        f"Realised: mean width per token after whole tokens were shared out. ± is one standard "
        f"error over {samples} samples. Latency: median of one forward pass of a batch of "
        f"{batches}. Measured on {machines}."
    )


def _comparison(results: Sequence[Results]) -> _Comparison | None:
    """Compare evaluations that share a budget at least; None where there is nothing to compare."""
    asked = [s.effective_capacity for result in results for s in result.settings]
    if len(asked) == len(set(asked)):
        return None
    capacities = sorted(set(asked))
    return _Comparison(
        baseline=results[0].name,
        capacities=tuple(f"{capacity:g}" for capacity in capacities),
        rows=tuple(
            (result.name, tuple(_compared(results, result, c) for c in capacities))
            for result in results
        ),
    )


def _compared(
    results: Sequence[Results], result: Results, capacity: float
) -> tuple[str, str, bool]:
    """Accuracy of one evaluation at one budget, its difference to the first, whether it is best."""
    here = _at(result, capacity)
    if here is None:
        return NONE, "", False
    others = [setting for other in results if (setting := _at(other, capacity))]
    best = len(others) > 1 and here.accuracy == max(setting.accuracy for setting in others)
    base = _at(results[0], capacity)
    apart = "" if base is None or result is results[0] else points(here.accuracy - base.accuracy)
    return percent(here.accuracy), apart, best


def _not_finite(rows: Sequence[MetricRow]) -> int:
    return sum(not math.isfinite(value) for row in rows for value in row.values.values())


def percent(share: float, decimals: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """A difference of shares in percentage points, always with its sign."""
    tenths = round(100 * difference, 1)
    sign = "+" if tenths > 0 else MINUS if tenths < 0 else "±"
    return f"{sign}{abs(tenths):.1f}"


def significant(value: float) -> str:
    """A positive number to three digits, in full: 0.0421, 4.21, 421, 42,100."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"
