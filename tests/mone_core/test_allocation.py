"""The simpler capacity distributions: what the paper's table says of them, and what they refuse."""

import pytest

from mone_core.allocation import constant, greedy, mod_greedy, proportionate, uniform
from mone_core.capacity import NESTED_WIDTHS
from mone_core.errors import CapacityError

ALL = (greedy, mod_greedy, proportionate, uniform, constant)


def test_greedy_gives_the_full_width_to_as_many_as_possible():
    shares = greedy(0.4, NESTED_WIDTHS)

    assert shares == pytest.approx((0.685714, 0, 0, 0.314286), abs=1e-6)
    assert sum(c * w for c, w in zip(shares, NESTED_WIDTHS, strict=True)) == pytest.approx(0.4)


def test_greedy_reaches_both_ends():
    assert greedy(0.125, NESTED_WIDTHS) == (1, 0, 0, 0)
    assert greedy(1.0, NESTED_WIDTHS) == (0, 0, 0, 1)
    assert greedy(1.0, (1.0,)) == (1.0,)


def test_mod_greedy_skips_the_rest():
    assert mod_greedy(0.4, NESTED_WIDTHS) == pytest.approx((0.6, 0, 0, 0.4))


@pytest.mark.parametrize("budget", [0.46875, 0.47])
def test_uniform_meets_the_mean_width_alone(budget):
    assert uniform(budget, NESTED_WIDTHS) == (0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("budget", [4 / 15, 0.27])
def test_proportionate_shares_are_inverse_to_cost(budget):
    assert proportionate(budget, NESTED_WIDTHS) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15))


def test_a_constant_width_is_one_hot():
    assert constant(0.25, NESTED_WIDTHS) == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("allocate", "budget", "says"),
    [
        (greedy, 0.1, r"effective capacity 0\.1 is out of reach: .* between 0\.125 .* and 1\.0"),
        (mod_greedy, 0.0, r"effective capacity 0\.0 .* mod_greedy it must be above 0 .* at most 1"),
        (mod_greedy, 1.5, r"effective capacity 1\.5 .* mod_greedy it must be above 0 .* at most 1"),
        (uniform, 0.5, r"effective capacity 0\.5 .* allocation uniform .* meets 0\.4688 only"),
        (proportionate, 0.3, r"capacity 0\.3 .* allocation proportionate .* meets 0\.2667 only"),
        (constant, 0.3, r"capacity 0\.3 .* at a constant width it must be one of \(0\.125, 0\.25"),
    ],
)
def test_a_budget_out_of_reach_says_what_is_reachable(allocate, budget, says):
    with pytest.raises(CapacityError, match=says):
        allocate(budget, NESTED_WIDTHS)


def test_skipping_needs_a_narrow_expert():
    with pytest.raises(CapacityError, match=r"mod_greedy needs a narrow expert .* use two widths"):
        mod_greedy(0.5, (1.0,))


@pytest.mark.parametrize("allocate", ALL)
def test_widths_that_do_not_rise_are_refused(allocate):
    with pytest.raises(CapacityError, match=r"widths must rise strictly"):
        allocate(0.5, (0.5, 0.5, 1.0))
