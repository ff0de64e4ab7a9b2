"""The pictures of a report: plain values in, bytes of one SVG or PNG out.

Every function is pure: no file is read or written (`report` does), no pyplot state is touched,
and the same values give the same bytes. Charts are SVG, about 500 px wide, so that two stand
beside each other on a desk and one fills a phone; pictures are in `routing_grid`. Text is drawn
as paths in the font that matplotlib carries: it looks the same wherever it is opened.

Colours: more compute is darker (budgets, widths); runs take the Okabe-Ito colours, which
people with any kind of colour vision can tell apart; right and wrong also carry a mark.
"""

import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.metrics import MetricRow
from pipelines.results import Results, Setting

INK, MUTED, RULE = "#1f2933", "#667085", "#e4e7ec"
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1f2933")
RUN_MARKERS = "osD^vP"  # one fewer than colours: 42 runs before a pair comes again
FONT = "DejaVu Sans"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
STYLE: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "path",
    "svg.hashsalt": "mone",
}
CHART_INCHES = (5.2, 3.6)
LABEL_GAP = 0.07  # of the height of a chart: one line of text
MOST_MARKERS = 25  # a line through more points than this is drawn without markers

Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def loss_curve(rows: Sequence[MetricRow]) -> bytes:
    """Draw the training loss by step, raw and smoothed, and the validation loss per budget.

    Returns:
        An SVG. Values that are not finite leave a gap.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = chart("Loss by training step (cross entropy, nats)")
        ends = []
        steps, values = training_series(rows, "loss")
        if len(steps):
            smooth = smoothed(values)
            axes.plot(steps, values, color=MUTED, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smooth, color=MUTED)
            ends.append((steps[-1], smooth[-1], "training", MUTED))
        ends += _budget_lines(axes, rows, "val_loss")
        axes.set_ylim(bottom=0)
        step_axis(axes, max(x for x, *_ in ends))
        label_ends(axes, ends)
        return svg(figure)


def accuracy_curve(rows: Sequence[MetricRow], num_classes: int | None = None) -> bytes:
    """Draw the validation accuracy by step, one line per budget.

    Args:
        rows: Metric rows; those with `val_accuracy/ec_*` count.
        num_classes: Draws the line of chance, one over this, where given.

    Returns:
        An SVG.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = chart("Validation accuracy by training step")
        ends = _budget_lines(axes, rows, "val_accuracy")
        if num_classes:
            axes.axhline(1 / num_classes, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            ends.append((max(x for x, *_ in ends), 1 / num_classes, "chance", MUTED))
        axes.set_ylim(0, min(1.0, axes.get_ylim()[1] * 1.05))
        axes.yaxis.set_major_formatter(PERCENT)
        step_axis(axes, max(x for x, *_ in ends))
        label_ends(axes, ends)
        return svg(figure)


def budget_curve(results: Sequence[Results]) -> bytes:
    """Draw accuracy against multiply-accumulates, one line per evaluation, points marked e_c.

    Returns:
        An SVG.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = chart("Accuracy against compute, by effective capacity")
        divisor, unit = macs_unit(max(s.macs for r in results for s in r.settings))
        ends = []
        for run, result in enumerate(results):
            settings = _by_macs(result)
            x = [s.macs / divisor for s in settings]
            y = [s.accuracy for s in settings]
            axes.plot(x, y, **_run_style(run), zorder=3)
            ends.append((x[-1], y[-1], cut(result.name, 120), _run_style(run)["color"]))
        axes.margins(x=0.08, y=0.18)
        axes.set_xlim(left=0)
        _name_capacities(axes, results, divisor)
        axes.set_xlabel(f"{unit} per image")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(PERCENT)
        if len(results) > 1:
            label_ends(axes, ends)
        return svg(figure)


def latency_curve(results: Sequence[Results]) -> bytes:
    """Draw measured time against multiply-accumulates, both as shares of the full model's.

    Args:
        results: Evaluations that `has_full_model`; the others have nothing to be compared to.

    Returns:
        An SVG. On the diagonal, time falls exactly as the arithmetic does.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = chart("Measured time against compute, full model = 100 %")
        top = 1.05
        ends = []
        for run, result in enumerate(results):
            full = full_setting(result)
            if full is None:
                continue
            settings = _by_macs(result)
            x = [s.macs / full.macs for s in settings]
            y = [seconds_per_image(s) / seconds_per_image(full) for s in settings]
            axes.plot(x, y, **_run_style(run), zorder=3)
            ends.append((x[-1], y[-1], cut(result.name, 120), _run_style(run)["color"]))
            top = max(top, *y)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set(xlim=(0, 1.05), ylim=(0, top * 1.04), xlabel="MACs, share of the full model's")
        axes.annotate(
            "time falls\nas MACs do", (0.62, 0.62), (8, -6), textcoords="offset points",
            color=MUTED, va="top", fontsize=9, linespacing=1.3,
        )  # fmt: skip
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        if len(ends) > 1:
            label_ends(axes, ends)
        return svg(figure)


def training_series(rows: Sequence[MetricRow], name: str) -> Series:
    """Steps and finite values of one metric, in order of appearance."""
    pairs = [(row.step, row.values[name]) for row in rows if name in row.values]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    return table[:, 0], table[:, 1]


def budget_series(rows: Sequence[MetricRow], metric: str) -> dict[float, Series]:
    """The curves called `<metric>/ec_<budget>`, by budget, smallest first; empty ones left out."""
    pattern = re.compile(re.escape(metric) + r"/ec_(\d+\.\d+)")
    names = {name for row in rows for name in row.values if pattern.fullmatch(name)}
    budgets = {name: float(name.rpartition("_")[2]) for name in names}
    ordered = sorted(names, key=lambda name: budgets[name])
    curves = {budgets[name]: training_series(rows, name) for name in ordered}
    return {budget: curve for budget, curve in curves.items() if len(curve[0])}


def smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centred running mean over a twentieth of the values; shorter windows at both ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    total = np.convolve(values, window, "same")
    share: npt.NDArray[np.float64] = total / np.convolve(np.ones_like(values), window, "same")
    return share


def macs_unit(macs: float) -> tuple[float, str]:
    """The divisor and name of the unit in which so many MACs read best: (1e9, "GMACs")."""
    for divisor, unit in ((1e12, "TMACs"), (1e9, "GMACs"), (1e6, "MMACs"), (1e3, "KMACs")):
        if macs >= divisor:
            return divisor, unit
    return 1.0, "MACs"


def seconds_per_image(setting: Setting) -> float:
    """Measured time of one image within its batch."""
    return setting.latency_ms / 1000 / setting.latency_batch


def full_setting(result: Results) -> Setting | None:
    """The setting with every token at full width, None where it was not evaluated."""
    return next((s for s in result.settings if s.effective_capacity == 1.0), None)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours keep a distance, and all of them into 0 to 1.

    Groups of neighbours that touch stay centred where their members wanted to be; more of them
    than fit move closer together.
    """
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    groups: list[list[float]] = []
    for rank in order:
        group = [float(wanted[rank])]
        while groups and _placed(groups[-1], gap)[-1] + gap > _placed(group, gap)[0]:
            group = groups.pop() + group
        groups.append(group)
    placed = [position for group in groups for position in _placed(group, gap)]
    return [placed[place] for place in np.argsort(order, kind="stable")]


def _placed(group: Sequence[float], gap: float) -> list[float]:
    """Positions of one group at equal distances around its mean, within 0 to 1."""
    half = gap * (len(group) - 1) / 2
    centre = min(max(sum(group) / len(group), half), 1 - half)
    return [centre - half + gap * place for place in range(len(group))]


def shade(rank: int, of: int) -> str:
    """Colour of the rank-th of so many ordered things, light (little compute) to dark."""
    return str(to_hex(matplotlib.colormaps["viridis"](0.8 - 0.75 * rank / max(1, of - 1))))


def cut(text: str, points: float, size: float = 9) -> str:
    """Other people's text as matplotlib draws it literally, cut with an ellipsis to a width."""
    shown = _drawable(text)
    if _width(shown, size) > points:
        lengths = range(1, len(shown))
        kept = bisect_right(lengths, points, key=lambda n: _width(shown[:n] + ELLIPSIS, size))
        shown = shown[:kept].rstrip() + ELLIPSIS
    return shown.replace("$", r"\$")  # a dollar sign is no formula here


def _width(text: str, size: float) -> float:
    font = FontProperties(family=FONT, size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width)


def _drawable(text: str) -> str:
    """The text on one line, characters that the font lacks replaced by a visible box."""
    font = get_font(findfont(FONT))
    line = " ".join(text.split())
    return "".join(c if font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in line)


PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")
THOUSANDS = FuncFormatter(lambda number, _: f"{number:,.0f}")


def chart(title: str) -> tuple[Figure, Any]:
    """An empty chart of the usual size, and its axes."""
    figure = Figure(figsize=CHART_INCHES, layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.01, ha="left")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def step_axis(axes: Any, last: float) -> None:
    """Let x be training steps from 0 to the last."""
    axes.set_xlim(0, last)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)


def _budget_lines(
    axes: Any, rows: Sequence[MetricRow], metric: str
) -> list[tuple[float, float, str, str]]:
    """Draw one line per budget; returns what `label_ends` takes."""
    curves = budget_series(rows, metric)
    ends = []
    for rank, (budget, (steps, values)) in enumerate(curves.items()):
        colour = shade(rank, len(curves))
        marker = "o" if len(steps) <= MOST_MARKERS else ""
        axes.plot(steps, values, color=colour, marker=marker, markersize=3.5, clip_on=False)
        ends.append((steps[-1], values[-1], f"$e_c$ {budget:g}", colour))
    return ends


def _run_style(run: int) -> dict[str, Any]:
    marker = RUN_MARKERS[run % len(RUN_MARKERS)]
    return {"color": RUN_COLOURS[run % len(RUN_COLOURS)], "marker": marker, "markersize": 5}


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name beside its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    heights = spread([(y - low) / (high - low) for _, y, _, _ in ends], LABEL_GAP)
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            text, (x, y), (1.07, height), textcoords="axes fraction", va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5),
                "shrinkA": 1, "shrinkB": 3,
            },
        )  # fmt: skip


def _name_capacities(axes: Any, results: Sequence[Results], divisor: float) -> None:
    """Write e_c above and left of points: where accuracy rises with compute, no line runs there.

    Of several evaluations only points that no cheaper one beats are named, and of points too
    close for two names the more accurate.
    """
    settings = [s for result in results for s in result.settings]
    if len(results) > 1:
        settings = [s for s in settings if not any(_beats(other, s) for other in settings)]
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    named: list[npt.NDArray[np.float64]] = []
    for setting in sorted(settings, key=lambda s: -s.accuracy):
        point = (setting.macs / divisor, setting.accuracy)
        place = to_axes(point)
        if any(np.all(np.abs(place - other) < LABEL_GAP * 1.2) for other in named):
            continue
        named.append(place)
        axes.annotate(
            f"{setting.effective_capacity:g}", point, (-4, 5), textcoords="offset points",
            ha="right", color=INK, fontsize=9,
        )  # fmt: skip


def _beats(one: Setting, other: Setting) -> bool:
    cheaper = one.macs < other.macs and one.accuracy >= other.accuracy
    return cheaper or (one.macs == other.macs and one.accuracy > other.accuracy)


def _by_macs(result: Results) -> list[Setting]:
    return sorted(result.settings, key=lambda setting: setting.macs)


def svg(figure: Figure) -> bytes:
    """The picture as SVG, the same bytes every time."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
