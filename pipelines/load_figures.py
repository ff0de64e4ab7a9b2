"""The pictures of sparse experts' load: tables of a run in, bytes of one SVG out.

Maps of layers x experts say where tokens went towards the end of training, curves how much was
lost on the way. Pure functions, like those of `figures`, whose style and colours they take.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mone_core.load import DEAD, LoadRow, drop_rates, load_rows, unreached_shares
from pipelines.figures import (
    PERCENT,
    RULE,
    STYLE,
    chart,
    label_ends,
    shade,
    smoothed,
    step_axis,
    svg,
)
from pipelines.load import LoadTable, window

MAP_INCHES = 10.0
LINE_INCHES = 0.26  # height of one layer
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue
BRIGHT = 0.45  # luminance above which ink reads better than white
MOST_NUMBERS = 16  # experts beside each other in whose cells a number fits
MOST_NAMES = 12  # curves that have a name each
MOST_APART = 4.0  # times the even share, and its inverse, where the colours end

CROSS = "\N{MULTIPLICATION SIGN}"

Map = npt.NDArray[np.float64]


def expert_load(tables: Sequence[LoadTable]) -> bytes:
    """Draw layers x experts, for every width: the share of slots filled, and of tokens taken.

    Args:
        tables: Of one run, in order, at least one; the last tenth of them is drawn.

    Returns:
        An SVG about 1000 px wide. A cross marks an expert that hardly any token of that width
        reaches, grey a layer without such tokens.
    """
    late = tables[-max(1, len(tables) // 10) :]
    first = tables[-len(late) - 1].step + 1 if len(late) < len(tables) else 1
    last = window(late)
    rows = load_rows(last.sums_LWEF, last.layers, last.dims)
    dims = sorted({row.width for row in rows})
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        height = len(dims) * (0.55 + LINE_INCHES * len(last.layers)) + 1.5
        figure = Figure(figsize=(MAP_INCHES, height), layout="constrained")
        figure.set_layout_engine("constrained", wspace=0.06)
        figure.suptitle(
            f"Sparse experts, steps {first:,} to {last.step:,} of training", x=0.01, ha="left"
        )
        grid = figure.subplots(len(dims), 2, squeeze=False, sharey=True)
        for column, kind in enumerate(_kinds(last)):
            for axes, dim in zip(grid[:, column], dims, strict=True):
                image = _draw_map(axes, _map(rows, last, dim, kind.value), kind)
                axes.set_yticks(range(len(last.layers)), [str(layer) for layer in last.layers])
                if len(last.dims) > 1:
                    axes.set_title(f"tokens of {dim} features", loc="left", fontsize=9)
            grid[-1, column].set_xlabel("expert")
            _draw_scale(
                figure.colorbar(
                    image, ax=list(grid[:, column]), location="top", aspect=40, pad=0.02
                ),
                kind,
            )
        for axes in grid[:, 0]:
            axes.set_ylabel("block")
        return svg(figure)


def drop_curve(tables: Sequence[LoadTable]) -> bytes:
    """Draw the share of dropped choices by step, one line per layer, running means.

    Returns:
        An SVG.
    """
    return _curves(tables, "Choices that got no slot, by training step", drop_rates)


def unreached_curve(tables: Sequence[LoadTable]) -> bytes:
    """Draw the share of tokens that no expert takes by step, one line per layer, running means.

    Returns:
        An SVG.
    """
    return _curves(tables, "Tokens that no expert takes, by training step", unreached_shares)


def any_dropped(tables: Sequence[LoadTable]) -> bool:
    """Whether any choice was dropped, so that `drop_curve` has something to show."""
    return any(bool(drop_rates(table.sums_LWEF).any()) for table in tables)


def any_unreached(tables: Sequence[LoadTable]) -> bool:
    """Whether any token was left out by all experts."""
    return any(bool(unreached_shares(table.sums_LWEF).any()) for table in tables)


def _curves(tables: Sequence[LoadTable], title: str, rates: Callable[[Tensor], Tensor]) -> bytes:
    steps = np.array([table.step for table in tables])
    layers = tables[-1].layers
    values_TL = np.array([rates(table.sums_LWEF).tolist() for table in tables])
    every = -(-len(layers) // MOST_NAMES)
    with matplotlib.rc_context(STYLE):
        figure, axes = chart(title)
        ends = []
        for rank, layer in enumerate(layers):
            colour, values = shade(rank, len(layers)), smoothed(values_TL[:, rank])
            axes.plot(steps, values, color=colour)
            if (len(layers) - 1 - rank) % every == 0:
                ends.append((steps[-1], values[-1], f"block {layer}", colour))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PERCENT)
        step_axis(axes, steps[-1])
        label_ends(axes, ends)
        return svg(figure)


class _Kind(NamedTuple):
    """A map: what it shows of a row, in which colours, and how a value is written."""

    name: str
    value: Callable[[LoadRow], float]
    colours: Colormap
    norm: Normalize
    ticks: tuple[float, ...]
    tick: Callable[[float], str]
    cell: Callable[[float], str]


def _kinds(table: LoadTable) -> tuple[_Kind, _Kind]:
    num_experts = table.sums_LWEF.shape[2]
    uneven = matplotlib.colormaps["PuOr_r"].with_extremes(bad=RULE)
    filled = ListedColormap([shade(rank, 256) for rank in range(256)]).with_extremes(bad=RULE)
    return (
        _Kind(
            "slots filled, %",
            lambda row: 100 * row.fill,
            filled,
            Normalize(0, 100),
            (0, 25, 50, 75, 100),
            lambda share: f"{share:g}",
            lambda share: f"{share:.0f}",
        ),
        _Kind(
            "tokens taken, times the even share",
            lambda row: num_experts * row.token_share,
            uneven,
            LogNorm(1 / MOST_APART, MOST_APART, clip=True),
            (0.25, 0.5, 1, 2, 4),
            lambda times: f"{times:g}",
            lambda times: CROSS if times < DEAD else f"{times:.1f}",
        ),
    )


def _map(
    rows: Sequence[LoadRow], table: LoadTable, dim: int, value: Callable[[LoadRow], float]
) -> Map:
    """One value per layer and expert for a width; NaN where a layer has no tokens of it."""
    values_LE = np.full((len(table.layers), table.sums_LWEF.shape[2]), np.nan)
    for row in rows:
        if row.width == dim:
            values_LE[table.layers.index(row.layer), row.expert] = value(row)
    return values_LE


def _draw_map(axes: Any, values_LE: Map, kind: _Kind) -> Any:
    """Coloured cells, with numbers where they fit, else the crosses of dead experts alone."""
    image = axes.imshow(
        values_LE, cmap=kind.colours, norm=kind.norm, aspect="auto", interpolation="none"
    )
    fits = values_LE.shape[1] <= MOST_NUMBERS
    for (line, column), value in np.ndenumerate(values_LE):
        text = "" if np.isnan(value) else kind.cell(value)
        if text == CROSS or (text and fits):
            *rgb, _ = kind.colours(kind.norm(value))
            bright = np.dot(LUMINANCE, rgb) > BRIGHT
            axes.text(
                column, line, text, ha="center", va="center", fontsize=8,
                color="black" if bright else "white",
            )  # fmt: skip
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    return image


def _draw_scale(bar: Any, kind: _Kind) -> None:
    bar.set_label(kind.name)
    bar.set_ticks(kind.ticks, labels=[kind.tick(value) for value in kind.ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
