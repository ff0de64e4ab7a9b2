"""Parameters that depend on the size of the input, for another size.

Axes: N positions, T temporal steps, D model width.

Source: arXiv 2010.11929, section 3.2 (positions); arXiv 2103.15691, section 3.4 (clips).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]


def resize_positions(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    """Positions of another grid, linearly between the old ones, the corners aligned.

    A table of one step is repeated for every step.

    Args:
        table_ND: Patches only, of a grid `old`, columns fastest.
        old, new: Temporal steps, rows, columns.
    """
    if old == new:
        return table_ND
    grid = table_ND.t().reshape(1, -1, *old)
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = F.interpolate(grid, size=new, mode="trilinear", align_corners=True)
    out_ND: Tensor = grid.flatten(2).squeeze(0).t().to(table_ND.dtype)
    return out_ND


def central_frame(weight: Tensor, tubelet: int) -> Tensor:
    """Kernels of image patches as kernels of tubelets that look at the central frame only.

    Args:
        weight: `[D, 3 * pixels]`.
        tubelet: Frames; the one at `tubelet // 2` is the central one.

    Returns:
        `[D, 3 * tubelet * pixels]`.
    """
    image = weight.reshape(weight.shape[0], 3, -1)
    clip = image.new_zeros(weight.shape[0], 3, tubelet, image.shape[2])
    clip[:, :, tubelet // 2] = image
    return clip.flatten(1)
