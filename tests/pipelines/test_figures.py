"""Charts: what is drawn, that every name is readable, and that the bytes are whole pictures."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from pipelines.figures import (
    accuracy_curve,
    budget_curve,
    budget_series,
    cut,
    full_setting,
    latency_curve,
    loss_curve,
    macs_unit,
    smoothed,
    spread,
    training_series,
)
from pipelines.metrics import MetricRow
from pipelines.results import Results, Setting

BUDGETS = (0.2, 0.5, 1.0)


def training_rows(last=200):
    rows = []
    for step in range(10, last + 1, 10):
        values = {"loss": 2.3 * 0.99**step + 0.1 * (step % 3), "alpha": 0.1}
        if step % 50 == 0:
            for budget in BUDGETS:
                values[f"val_accuracy/ec_{budget:.2f}"] = budget * step / last
                values[f"val_loss/ec_{budget:.2f}"] = 1.5 - budget
        rows.append(MetricRow(step=step, values=values))
    return rows


def results(name="run", budgets=BUDGETS):
    settings = tuple(
        Setting(
            effective_capacity=budget,
            realised_effective_capacity=budget,
            accuracy=0.6 + 0.3 * budget,
            loss=1 - budget / 2,
            samples=100,
            macs=int(3e7 * budget),
            latency_ms=5 + 20 * budget,
            latency_batch=8,
            images_per_second=8000 / (5 + 20 * budget),
        )
        for budget in budgets
    )
    return Results(
        name=name,
        step=100,
        num_classes=10,
        settings=settings,
        machine="x86_64, 2 cores, cpu",
        torch="2.13.0",
        commit="abc",
    )


def text_in(svg):
    """The words of a chart: matplotlib keeps each text in a comment beside its paths."""
    ElementTree.fromstring(svg)  # well formed
    comments = svg.decode().split("<!-- ")[1:]
    return [comment.split(" -->")[0] for comment in comments]


def test_the_loss_curve_names_training_and_every_budget():
    words = text_in(loss_curve(training_rows()))

    assert {"training", "$e_c$ 0.2", "$e_c$ 0.5", "$e_c$ 1"} <= set(words)
    assert "Loss by training step (cross entropy, nats)" in words


def test_a_loss_that_is_not_finite_is_left_out_and_the_rest_is_drawn():
    rows = [*training_rows(), MetricRow(step=210, values={"loss": float("nan")})]

    steps, values = training_series(rows, "loss")

    assert steps[-1] == 200
    assert np.isfinite(values).all()
    assert loss_curve(rows) == loss_curve(rows[:-1])


def test_the_accuracy_curve_draws_chance_only_when_the_classes_are_known():
    rows = training_rows()

    assert "chance" in text_in(accuracy_curve(rows, num_classes=10))
    assert "chance" not in text_in(accuracy_curve(rows))


def test_budget_series_are_sorted_by_budget_and_hold_only_their_metric():
    curves = budget_series(list(reversed(training_rows())), "val_accuracy")

    assert list(curves) == [0.2, 0.5, 1.0]
    assert sorted(curves[0.5][0]) == [50, 100, 150, 200]


def test_the_budget_curve_marks_points_with_their_effective_capacity():
    words = text_in(budget_curve([results()]))

    assert {"0.2", "0.5", "1", "MMACs per image"} <= set(words)
    assert "run" not in words  # a single line needs no name


def test_several_evaluations_are_named_and_of_equal_points_the_better_is_marked_once():
    words = text_in(budget_curve([results("champion"), results("challenger")]))

    assert {"champion", "challenger"} <= set(words)
    assert words.count("0.5") == 1


def test_the_latency_curve_leaves_out_what_lacks_a_full_model():
    words = text_in(
        latency_curve([results("one"), results("two"), results("small", budgets=(0.2, 0.5))])
    )

    assert {"one", "two"} <= set(words)
    assert "small" not in words
    assert full_setting(results(budgets=(0.2, 0.5))) is None


def test_the_same_values_give_the_same_bytes():
    assert budget_curve([results()]) == budget_curve([results()])
    assert loss_curve(training_rows()) == loss_curve(training_rows())


@pytest.mark.parametrize(
    "name", ["$x^{2$", "a $ b", "<b>&amp;", "--> <!--", "\x00\x1b[31m", "日本"]
)
def test_a_name_is_drawn_literally_whatever_is_in_it(name):
    svg = budget_curve([results(name), results("other")])

    assert ElementTree.fromstring(svg).tag.endswith("svg")  # and so it is well-formed


def test_characters_that_the_font_lacks_become_a_visible_box():
    assert cut("cat 猫", 200) == "cat □"


def test_long_names_are_cut_to_the_width_they_have():
    assert cut("short", 120) == "short"
    assert cut("a trial name of quite some length", 60).endswith("…")
    assert len(cut("a trial name of quite some length", 60)) < 15


@pytest.mark.parametrize(
    ("macs", "unit"), [(9, "MACs"), (9e3, "KMACs"), (9e6, "MMACs"), (9e9, "GMACs"), (9e12, "TMACs")]
)
def test_macs_are_told_in_the_unit_that_reads_best(macs, unit):
    divisor, name = macs_unit(macs)

    assert (macs / divisor, name) == (9, unit)


def test_smoothing_keeps_constants_and_the_number_of_values():
    assert smoothed(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    assert smoothed(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_spread_leaves_distant_positions_alone():
    assert spread([0.9, 0.1], gap=0.1) == [0.9, 0.1]


def test_spread_moves_neighbours_apart_around_where_they_wanted_to_be():
    assert spread([0.5, 0.5, 0.9], gap=0.1) == pytest.approx([0.45, 0.55, 0.9])


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_distance_and_bounds(seed):
    wanted = np.random.default_rng(seed).uniform(0, 1, 9)

    placed = np.array(spread(wanted.tolist(), gap=0.1))

    assert np.argsort(placed).tolist() == np.argsort(wanted).tolist()
    assert np.diff(np.sort(placed)).min() >= 0.1 - 1e-9
    assert placed.min() >= -1e-9
    assert placed.max() <= 1 + 1e-9


def test_more_positions_than_fit_share_the_room_evenly():
    assert spread([0.5] * 5, gap=0.4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
