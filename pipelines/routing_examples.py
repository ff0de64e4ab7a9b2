"""What the router did with a few validation images, for pictures.

Made by whoever runs the model (`routing`), drawn by `routing_grid`; neither torch nor matplotlib is
needed here. Axes: M images, H W pixels, gh gw the patch grid.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GREY = np.array([0.299, 0.587, 0.114])  # luma of red, green and blue
FADED = 0.3  # how much of a dimmed pixel's contrast is left
PAPER = 246.0  # the light grey that dimmed pixels fade towards


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingExamples:
    """A few images, and which nested expert each of their tokens went to at each budget.

    Attributes:
        images_uint8: Pictures as a person should see them, shape [M, H, W, 3].
        labels: Name of the true class, one per image.
        predictions: Names of the predicted classes: per image, one per budget.
        budgets: Effective capacities, in the order of `predictions` and `expert`.
        expert: Expert index per token, shape [budgets, M, gh, gw]; 0 is the narrowest.
        widths: Width of each expert as a fraction of the full model, rising to 1.

    Raises:
        ValueError: The shapes do not fit each other.
    """

    images_uint8: npt.NDArray[np.uint8]
    labels: tuple[str, ...]
    predictions: tuple[tuple[str, ...], ...]
    budgets: tuple[float, ...]
    expert: npt.NDArray[np.integer]
    widths: tuple[float, ...]

    def __post_init__(self) -> None:
        images, budgets = len(self.labels), len(self.budgets)
        fits = (
            images > 0
            and budgets > 0
            and self.images_uint8.dtype == np.uint8
            and self.images_uint8.shape == (images, *self.images_uint8.shape[1:3], 3)
            and self.expert.shape == (budgets, images, *self.expert.shape[2:4])
            and self.expert.ndim == 4
            and [len(row) for row in self.predictions] == [budgets] * images
            and 0 <= int(self.expert.min()) <= int(self.expert.max()) < len(self.widths)
        )
        if not fits:
            raise ValueError(
                f"routing examples do not fit each other: {images} labels, {budgets} budgets, "
                f"{len(self.widths)} widths, images {self.images_uint8.dtype} "
                f"{self.images_uint8.shape}, predictions "
                f"{[len(row) for row in self.predictions]}, expert {self.expert.shape} with values "
                f"{np.unique(self.expert)[:8].tolist()}; expected uint8 [M, H, W, 3], M rows of "
                f"one name per budget, [budgets, M, gh, gw] below the number of widths"
            )

    def full(self, budget: int, image: int) -> npt.NDArray[np.bool_]:
        """Which tokens of one image the full model handles at one budget, shape [gh, gw]."""
        whole: npt.NDArray[np.bool_] = self.expert[budget, image] == len(self.widths) - 1
        return whole


def highlighted(
    picture: npt.NDArray[np.uint8], tokens: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Fade the pixels of all tokens but the chosen ones to pale grey.

    Args:
        picture: Shape [H, W, 3].
        tokens: Chosen tokens, shape [gh, gw]; the grid is stretched over the picture.

    Returns:
        Shape [H, W, 3]; pixels of chosen tokens as they were.
    """
    height, width, _ = picture.shape
    rows = np.arange(height) * tokens.shape[0] // height
    columns = np.arange(width) * tokens.shape[1] // width
    chosen = tokens[rows[:, None], columns[None, :], None]
    faded = PAPER + FADED * (picture @ GREY - PAPER)
    return np.where(chosen, picture, faded[..., None].astype(np.uint8))


def outline(tokens: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Edges between chosen and other tokens, in tokens from the upper left corner.

    Returns:
        Line segments, shape [segments, 2 ends, (x, y)]; the border of the picture counts as an
        edge of the chosen tokens that touch it.
    """
    framed = np.pad(tokens, 1)
    y, x = np.nonzero(framed[1:] != framed[:-1])  # edges below row y - 1
    level = np.stack([np.stack([x - 1, y], 1), np.stack([x, y], 1)], 1)
    y, x = np.nonzero(framed[:, 1:] != framed[:, :-1])
    upright = np.stack([np.stack([x, y - 1], 1), np.stack([x, y], 1)], 1)
    return np.concatenate([level, upright]).astype(np.float64)
