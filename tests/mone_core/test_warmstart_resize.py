"""Positions and kernels for another size of input, against torch's own interpolation."""

import pytest
import torch
import torch.nn.functional as F

from mone_core.warmstart.resize import central_frame, resize_positions


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 2), (1, 4), (4, 1)])
def test_positions_are_resized_between_the_old_ones_with_aligned_corners(old, new):
    table = torch.randn(old * old, 16, dtype=torch.float64)

    out = resize_positions(table, (1, old, old), (1, new, new))

    image = table.t().reshape(1, 16, old, old)
    theirs = F.interpolate(image, size=(new, new), mode="bilinear", align_corners=True)
    torch.testing.assert_close(out, theirs.reshape(16, -1).t(), rtol=0, atol=1e-14)


def test_positions_of_the_same_grid_are_the_same_to_the_last_bit():
    table = torch.randn(2 * 9, 16, dtype=torch.float32)

    assert resize_positions(table, (2, 3, 3), (2, 3, 3)) is table


def test_corners_keep_their_positions():
    table = torch.randn(9, 16)

    out = resize_positions(table, (1, 3, 3), (1, 5, 5))

    assert torch.equal(out[[0, 4, 20, 24]], table[[0, 2, 6, 8]])


def test_positions_in_half_precision_are_resized_in_single():
    table = torch.randn(9, 16).to(torch.bfloat16)

    out = resize_positions(table, (1, 3, 3), (1, 5, 5))

    assert torch.equal(out, resize_positions(table.float(), (1, 3, 3), (1, 5, 5)).bfloat16())


def test_one_step_is_repeated_for_every_step():
    table = torch.randn(9, 16)

    assert torch.equal(resize_positions(table, (1, 3, 3), (4, 3, 3)), table.repeat(4, 1))


@pytest.mark.parametrize(("tubelet", "central"), [(2, 1), (3, 1), (4, 2)])
def test_kernels_of_tubelets_see_the_central_frame_only(tubelet, central):
    weight = torch.randn(16, 3 * 4 * 4)

    kernel = central_frame(weight, tubelet).reshape(16, 3, tubelet, 4, 4)

    assert torch.equal(kernel[:, :, central], weight.reshape(16, 3, 4, 4))
    assert kernel.count_nonzero() == weight.count_nonzero()
