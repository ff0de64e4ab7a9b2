"""The routing grid: which tokens of an image the router sends to the full model, as one PNG.

One row per image, one column per budget. The pixels are computed by `routing_examples`, style and
colours are those of `figures`.
"""

import io
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipelines.figures import INK, MUTED, STYLE, cut, shade
from pipelines.routing_examples import RoutingExamples, highlighted, outline

RIGHT, WRONG, EDGE = "#1a7f4b", "#b42318", "#d55e00"
GRID_INCHES = 10.0
SMALL = 96  # pictures up to this many pixels wide stay crisp squares and compress well
SHARP, PLAIN = 200, 120  # dots per inch for small pictures and for photographs


def routing_grid(examples: RoutingExamples) -> bytes:
    """Draw images with the tokens that the router sends to the full model at each budget.

    One row per image: the image, the image at each budget with all other tokens faded, and a
    map of the widths at the budget that mixes them most. Below stand the label and, per
    budget, the prediction.

    Returns:
        A PNG.
    """
    height, width = examples.images_uint8.shape[1:3]
    columns = len(examples.budgets) + 2
    cell = min(2.0, GRID_INCHES / columns)
    sheet = _Sheet(columns, len(examples.labels), cell, (cell - 0.12) * height / width)
    mixed = _most_mixed(examples)
    with matplotlib.rc_context(STYLE):
        _draw_headers(sheet, examples, mixed)
        for row in range(len(examples.labels)):
            _draw_row(sheet, examples, row, mixed)
        return sheet.png(SHARP if width <= SMALL else PLAIN)


class _Sheet:
    """A sheet of equal cells, measured in inches from its upper left corner."""

    HEADER, FOOT, GUTTER = 0.62, 0.4, 0.12

    def __init__(self, columns: int, rows: int, cell: float, picture: float) -> None:
        self.cell, self.picture = cell, picture
        self.wide = cell - self.GUTTER
        size = (columns * cell - self.GUTTER, self.HEADER + rows * (picture + self.FOOT))
        self.figure = Figure(figsize=size)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
        self.axes.set_axis_off()

    def corner(self, column: int, row: int) -> tuple[float, float]:
        return column * self.cell, self.HEADER + row * (self.picture + self.FOOT)

    def paste(self, picture: npt.NDArray[np.uint8], column: int, row: int) -> None:
        x, y = self.corner(column, row)
        self.axes.imshow(picture, extent=(x, x + self.wide, y + self.picture, y), aspect="auto")

    def write(self, text: str, x: float, y: float, **style: Any) -> None:
        self.axes.text(x, y, text, **{"va": "top", "fontsize": 10.5, **style})

    def png(self, dpi: int) -> bytes:
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
        return out.getvalue()


def _draw_headers(sheet: _Sheet, examples: RoutingExamples, mixed: int) -> None:
    sheet.write("sample", 0, 0.05, weight="bold")
    sheet.write("and its label", 0, 0.3, color=MUTED)
    tokens = examples.expert[0, 0].size
    for budget, capacity in enumerate(examples.budgets):
        x = sheet.corner(budget + 1, 0)[0]
        whole = np.mean([examples.full(budget, i).sum() for i in range(len(examples.labels))])
        sheet.write(f"$e_c$ {capacity:g}", x, 0.05, weight="bold")
        sheet.write(f"{whole:.0f} of {tokens} full", x, 0.3, color=MUTED)
    x = sheet.corner(len(examples.budgets) + 1, 0)[0]
    sheet.write(f"widths at $e_c$ {examples.budgets[mixed]:g}", x, 0.05, weight="bold")
    _draw_key(sheet, examples.widths, x)


def _draw_key(sheet: _Sheet, widths: tuple[float, ...], x: float) -> None:
    """One block per width in its colour, its name inside."""
    wide = sheet.wide / len(widths)
    for expert, width in enumerate(widths):
        left = x + expert * wide
        colour = shade(expert, len(widths))
        sheet.axes.add_patch(Rectangle((left, 0.3), wide, 0.22, color=colour, linewidth=0))
        sheet.write(
            width_name(width), left + wide / 2, 0.41, va="center_baseline", ha="center",
            fontsize=9, color="white" if expert >= len(widths) / 2 else INK,
        )  # fmt: skip


def width_name(width: float) -> str:
    """A width as people say it: "full", "1/8", else the number."""
    if width == 1.0:
        return "full"
    parts = 1 / width
    return f"1/{parts:.0f}" if abs(parts - round(parts)) < 1e-6 else f"{width:g}"


def _draw_row(sheet: _Sheet, examples: RoutingExamples, row: int, mixed: int) -> None:
    picture = examples.images_uint8[row]
    sheet.paste(picture, 0, row)
    _draw_foot(sheet, examples.labels[row], 0, row, INK)
    for budget, predicted in enumerate(examples.predictions[row]):
        tokens = examples.full(budget, row)
        sheet.paste(highlighted(picture, tokens), budget + 1, row)
        _draw_outline(sheet, tokens, budget + 1, row)
        right = predicted == examples.labels[row]
        text = ("\N{CHECK MARK} " if right else "\N{BALLOT X} ") + predicted
        _draw_foot(sheet, text, budget + 1, row, RIGHT if right else WRONG)
    shades = [shade(expert, len(examples.widths)) for expert in range(len(examples.widths))]
    palette = np.array([[int(s[i : i + 2], 16) for i in (1, 3, 5)] for s in shades], np.uint8)
    sheet.paste(palette[examples.expert[mixed, row]], len(examples.budgets) + 1, row)


def _draw_foot(sheet: _Sheet, text: str, column: int, row: int, colour: str) -> None:
    x, y = sheet.corner(column, row)
    shown = cut(text, 0.95 * sheet.wide * 72, 10.5)  # hinting can make a line a little wider
    sheet.write(shown, x, y + sheet.picture + 0.05, color=colour)


def _draw_outline(sheet: _Sheet, tokens: npt.NDArray[np.bool_], column: int, row: int) -> None:
    x, y = sheet.corner(column, row)
    token = np.array([sheet.wide / tokens.shape[1], sheet.picture / tokens.shape[0]])
    segments = list(outline(tokens) * token + (x, y))
    for colour, line in (("white", 2.6), (EDGE, 1.3)):  # light around dark: seen on any picture
        lines = LineCollection(segments, colors=colour, linewidths=line, capstyle="projecting")
        sheet.axes.add_collection(lines, autolim=False)


def _most_mixed(examples: RoutingExamples) -> int:
    """The budget whose tokens are spread most evenly over the widths."""
    entropies = []
    for expert in examples.expert:
        counts = np.bincount(expert.ravel(), minlength=len(examples.widths))
        shares = counts[counts > 0] / counts.sum()
        entropies.append(-float(np.sum(shares * np.log(shares))))
    return int(np.argmax(entropies))
