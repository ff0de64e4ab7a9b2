"""Capacity: the shares of a budget, their closed form against the tables, and whole tokens."""

import math
import random

import numpy as np
import pytest

from mone_core.capacity import (
    NESTED_WIDTHS,
    capacity_distribution,
    effective_capacity_of,
    token_counts,
)
from mone_core.errors import CapacityError

# Computed by SLSQP from eq. 3 at E = 4, beta = 10, delta = 2: budget, "fraction", "product".
SHARES = [
    (0.15, (0.817203, 0.174238, 0.008538, 0.000021), (0.816336, 0.175531, 0.008116, 0.000017)),
    (0.20, (0.605389, 0.304838, 0.083312, 0.006461), (0.600938, 0.310375, 0.082795, 0.005892)),
    (0.25, (0.494789, 0.323435, 0.148968, 0.032809), (0.488467, 0.329849, 0.150409, 0.031275)),
    (0.30, (0.420435, 0.315346, 0.191221, 0.072999), (0.413539, 0.321422, 0.194175, 0.070865)),
    (0.40, (0.313594, 0.277683, 0.234685, 0.174037), (0.306958, 0.282450, 0.239149, 0.171443)),
    (0.45, (0.270866, 0.254973, 0.243525, 0.230636), (0.264641, 0.259069, 0.248274, 0.228015)),
    (0.46875, (0.256047, 0.246147, 0.245198, 0.252608), (0.25, 0.25, 0.25, 0.25)),
    (0.50, (0.232566, 0.231183, 0.246235, 0.290016), (0.226838, 0.234643, 0.251069, 0.287450)),
    (0.55, (0.197739, 0.206791, 0.243771, 0.351699), (0.192562, 0.209656, 0.248533, 0.349249)),
    (0.60, (0.165798, 0.182086, 0.236724, 0.415392), (0.161207, 0.184402, 0.241285, 0.413106)),
    (0.70, (0.109250, 0.132498, 0.210065, 0.548187), (0.105885, 0.133856, 0.213918, 0.546342)),
    (0.75, (0.084307, 0.107916, 0.190590, 0.617188), (0.081565, 0.108869, 0.193957, 0.615609)),
    (0.80, (0.061536, 0.083680, 0.166793, 0.687991), (0.059416, 0.084283, 0.169597, 0.686704)),
    (0.90, (0.023142, 0.037209, 0.103689, 0.835961), (0.022222, 0.037307, 0.105151, 0.835320)),
    (0.95, (0.008545, 0.016045, 0.060979, 0.914431), (0.008165, 0.016021, 0.061679, 0.914135)),
]

# Tokens after rounding down and the budget they come to: budget, N = 196, N = 256.
COUNTS = [
    (0.20, (120, 59, 16, 1), 0.1977, (156, 78, 21, 1), 0.1973),
    (0.30, (84, 61, 37, 14), 0.2972, (110, 80, 48, 18), 0.2959),
    (0.40, (63, 54, 45, 34), 0.3973, (81, 71, 60, 44), 0.3979),
    (0.50, (47, 45, 48, 56), 0.4955, (60, 59, 63, 74), 0.4990),
    (0.60, (34, 35, 46, 81), 0.5969, (44, 46, 60, 106), 0.5977),
    (0.70, (23, 25, 41, 107), 0.6971, (30, 33, 53, 140), 0.6973),
    (0.80, (14, 16, 32, 134), 0.7946, (17, 21, 42, 176), 0.7983),
]

BUDGETS = [percent / 100 for percent in range(13, 100)]
PREFERENCE = {"fraction": lambda i: 2.0**-i, "product": lambda i: 2.0**i}


def mean_width(shares, widths=NESTED_WIDTHS):
    return math.fsum(share * width for share, width in zip(shares, widths, strict=True))


def objective(shares, form, beta):
    """Eq. 3: preference plus entropy."""
    preference = sum(share * PREFERENCE[form](i) for i, share in enumerate(shares))
    return preference - beta * sum(share * math.log(share) for share in shares)


@pytest.mark.parametrize(("budget", "fraction", "product"), SHARES)
def test_shares_are_those_of_a_general_solver(budget, fraction, product):
    assert capacity_distribution(budget) == pytest.approx(fraction, abs=6e-7)
    assert capacity_distribution(budget, form="product") == pytest.approx(product, abs=6e-7)


@pytest.mark.parametrize("form", ["fraction", "product"])
@pytest.mark.parametrize("beta", [0.5, 10, 1000])
def test_shares_add_up_and_spend_exactly_the_budget(form, beta):
    for budget in BUDGETS:
        shares = capacity_distribution(budget, form=form, beta=beta)

        assert min(shares) >= 0
        assert math.fsum(shares) == pytest.approx(1, abs=1e-14)
        assert mean_width(shares) == pytest.approx(budget, abs=1e-14)


@pytest.mark.parametrize("num_experts", range(2, 9))
@pytest.mark.parametrize("form", ["fraction", "product"])
def test_any_number_of_experts_gets_the_shares_of_a_general_solver(num_experts, form):
    optimize = pytest.importorskip("scipy.optimize", reason="the general solver is SciPy's")
    widths = tuple(2.0 ** (i + 1 - num_experts) for i in range(num_experts))
    preference = np.array([2.0 ** (-i if form == "fraction" else i) for i in range(num_experts)])
    for budget in np.linspace(widths[0], 1, 8)[1:-1]:
        solved = optimize.minimize(
            lambda c: -(c @ preference) + 10 * (c @ np.log(np.maximum(c, 1e-300))),
            jac=lambda c: -preference + 10 * (np.log(np.maximum(c, 1e-300)) + 1),
            x0=np.full(num_experts, 1 / num_experts),
            bounds=[(0, 1)] * num_experts,
            constraints=[
                {"type": "eq", "fun": lambda c: c.sum() - 1},
                {"type": "eq", "fun": lambda c, budget=budget: c @ widths - budget},
            ],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )

        shares = capacity_distribution(float(budget), widths, form=form)
        assert shares == pytest.approx(solved.x.tolist(), abs=1e-6)


@pytest.mark.parametrize("form", ["fraction", "product"])
def test_no_other_mix_of_the_same_budget_is_better(form):
    """Steps along both directions that keep the two constraints only lower eq. 3."""
    draw = random.Random(0)
    for budget in (0.2, 0.3, 0.5, 0.7, 0.9):
        best = capacity_distribution(budget, form=form, beta=10)
        for _ in range(50):
            s, t = (draw.uniform(-1, 1) * 0.15 * min(best) for _ in range(2))
            step = (-2 * s, 3 * s - 2 * t, 3 * t - s, -t)  # keeps the sum and the mean width
            other = [share + d for share, d in zip(best, step, strict=True)]
            assert mean_width(other) == pytest.approx(budget, abs=1e-12)
            assert objective(other, form, 10) <= objective(best, form, 10)


@pytest.mark.parametrize("beta", [0.1, 1, 10, 1e4])
def test_the_product_form_is_maximum_entropy_whatever_beta(beta):
    """Its preference is proportional to the width, so it is the budget itself: a constant."""
    for budget in (0.15, 0.3, 0.46875, 0.6, 0.95):
        shares = capacity_distribution(budget, form="product", beta=beta)

        assert shares == pytest.approx(capacity_distribution(budget, form="product"), abs=1e-12)
        slopes = [
            (math.log(shares[i + 1]) - math.log(shares[i])) / (NESTED_WIDTHS[i + 1] - width)
            for i, width in enumerate(NESTED_WIDTHS[:-1])
        ]
        assert slopes == pytest.approx([slopes[0]] * 3, abs=1e-9)


def test_both_forms_come_to_nearly_the_same_shares():
    for budget in BUDGETS:
        pair = zip(
            capacity_distribution(budget),
            capacity_distribution(budget, form="product"),
            strict=True,
        )
        assert max(abs(a - b) for a, b in pair) < 0.008


@pytest.mark.parametrize("form", ["fraction", "product"])
@pytest.mark.parametrize("budget", [0.5001, 0.6, 0.75, 0.999])
def test_two_experts_have_one_answer_whatever_is_preferred(budget, form):
    shares = capacity_distribution(budget, (0.5, 1.0), form=form, delta=3, beta=0.7)

    assert shares == pytest.approx((2 - 2 * budget, 2 * budget - 1), abs=1e-14)


@pytest.mark.parametrize("form", ["fraction", "product"])
def test_the_ends_are_one_hot(form):
    assert capacity_distribution(0.125, form=form) == (1, 0, 0, 0)
    assert capacity_distribution(1.0, form=form) == (0, 0, 0, 1)
    assert capacity_distribution(1, (1.0,), form=form) == (1,)


def test_a_hair_from_the_ends_is_nearly_one_hot():
    assert capacity_distribution(0.125 + 1e-12) == pytest.approx((1, 0, 0, 0), abs=1e-10)
    assert capacity_distribution(1 - 1e-12) == pytest.approx((0, 0, 0, 1), abs=1e-10)


@pytest.mark.parametrize("form", ["fraction", "product"])
def test_a_larger_budget_never_shrinks_the_share_of_the_widest_expert(form):
    shares = [capacity_distribution(budget, form=form) for budget in BUDGETS]
    widest = [share[-1] for share in shares]
    narrowest = [share[0] for share in shares]

    assert widest == sorted(widest)
    assert narrowest == sorted(narrowest, reverse=True)


def test_a_large_beta_evens_out_and_a_small_one_prefers():
    """At the budget of even shares: near even for large beta, away from it for small."""
    even = capacity_distribution(0.46875, beta=1e6)
    keen = capacity_distribution(0.46875, beta=0.05)

    assert even == pytest.approx((0.25,) * 4, abs=1e-6)
    assert keen[0] > 0.5  # "fraction" prefers the narrow


@pytest.mark.parametrize("budget", [0.124, 0.0, -0.3, 1.001, 50, float("nan"), float("inf")])
def test_an_unreachable_budget_says_what_is_reachable(budget):
    with pytest.raises(
        CapacityError,
        match=rf"effective capacity {budget} is out of reach: with widths "
        r"\(0\.125, 0\.25, 0\.5, 1\.0\) it must lie between 0\.125 "
        r"\(all tokens at the narrowest\) and 1\.0 \(all at the full width\)",
    ):
        capacity_distribution(budget)


def test_reach_follows_the_widths():
    assert sum(capacity_distribution(0.1, (0.0625, 0.5, 1.0))) == pytest.approx(1)
    with pytest.raises(CapacityError, match=r"0\.4 is out of reach.* between 0\.5 .* and 1\.0"):
        capacity_distribution(0.4, (0.5, 1.0))


@pytest.mark.parametrize(
    "widths", [(), (0.5,), (0.5, 0.25, 1.0), (0.5, 0.5, 1.0), (0.0, 1.0), (-0.5, 1.0), (0.5, 2.0)]
)
def test_widths_that_do_not_rise_to_the_full_model_are_refused(widths):
    with pytest.raises(
        CapacityError, match=r"widths must rise strictly from above 0 to 1\.0 .*, got \(.*\)"
    ):
        capacity_distribution(0.5, widths)


@pytest.mark.parametrize("wrong", [{"delta": 1}, {"delta": 0.5}, {"beta": 0}, {"beta": -1}])
def test_delta_and_beta_outside_their_range_are_refused(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(
        CapacityError, match=rf"delta must be above 1 and beta above 0, got .*{name}={value}"
    ):
        capacity_distribution(0.5, **wrong)


def test_an_unknown_form_is_refused_with_the_known_ones():
    with pytest.raises(CapacityError, match=r"'sum'.*fraction.*product"):
        capacity_distribution(0.5, form="sum")


@pytest.mark.parametrize(("budget", "at_196", "spent_196", "at_256", "spent_256"), COUNTS)
def test_whole_tokens_are_those_of_the_table(budget, at_196, spent_196, at_256, spent_256):
    shares = capacity_distribution(budget)

    assert token_counts(shares, 196) == at_196
    assert token_counts(shares, 256) == at_256
    assert effective_capacity_of(at_196) == pytest.approx(spent_196, abs=6e-5)
    assert effective_capacity_of(at_256) == pytest.approx(spent_256, abs=6e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 49, 196, 197, 256, 1568])
def test_whole_tokens_add_up_and_never_overspend(num_tokens):
    for budget in BUDGETS:
        counts = token_counts(capacity_distribution(budget), num_tokens)

        assert sum(counts) == num_tokens
        assert min(counts) >= 0
        assert effective_capacity_of(counts) <= budget + 1e-5 or counts[0] == num_tokens


def test_what_is_left_over_goes_to_the_narrowest():
    assert token_counts((0.25, 0.25, 0.25, 0.25), 10) == (4, 2, 2, 2)
    assert token_counts((0, 0, 0.5, 0.5), 3) == (1, 0, 1, 1)
    assert token_counts((0.1, 0.9), 5) == (1, 4)


def test_a_share_a_hair_below_a_whole_token_is_that_token():
    assert token_counts((0.71, 0.29), 100) == (71, 29)  # .29 * 100 is 28.999999999999996
    assert token_counts((0.7500000001, 0.2499999999), 196) == (147, 49)


@pytest.mark.parametrize(
    "shares", [(0.5, 0.6), (0.5, 0.4), (1.5, -0.5), (float("nan"), 1.0), (0, 0, 0, 0)]
)
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(
        CapacityError, match=r"shares must be 0 or more and add up to 1, got \(.*\)"
    ):
        token_counts(shares, 10)


@pytest.mark.parametrize(
    ("counts", "spent"), [((8, 4, 2, 1), 4 / 15), ((5, 5, 5, 5), 0.46875), ((0, 0, 0, 7), 1.0)]
)
def test_the_published_mixes_cost_what_the_paper_says(counts, spent):
    """Shares inverse to cost come to .27, even ones to .47 (arXiv 2407.19985, table 2)."""
    assert effective_capacity_of(counts) == pytest.approx(spent, abs=1e-15)


def test_a_single_width_has_one_budget_and_says_so():
    assert capacity_distribution(1.0, (1.0,)) == (1.0,)
    with pytest.raises(
        CapacityError, match=r"0\.5 is out of reach: a model of the one width 1\.0 has that budget"
    ):
        capacity_distribution(0.5, (1.0,))
