"""Whether a challenger takes over, and that one retraining at a time asks."""

from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.config import TrackingConfig
from pipelines.data.sources.base import Source
from pipelines.errors import ArchiveError, DatasetError, RunError
from pipelines.results import Results, Setting
from pipelines.retrain import LOCK, decide, new_part, run_retraining
from pipelines.storage import place
from pipelines.terminal import Terminal
from tests.pipelines import tiny

BUDGETS = (0.3, 0.5, 1.0)


def results(*accuracies, samples=100):
    settings = tuple(
        Setting(
            effective_capacity=budget,
            realised_effective_capacity=budget,
            accuracy=accuracy,
            loss=1.0,
            samples=samples,
            macs=1,
            latency_ms=1.0,
            latency_batch=8,
            images_per_second=1.0,
        )
        for budget, accuracy in zip(BUDGETS, accuracies, strict=True)
    )
    return Results(
        name="x", step=1, num_classes=10, settings=settings, machine="m", torch="2", commit="c"
    )


BEST = (0.70, 0.80, 0.90)


@pytest.mark.parametrize(
    ("challenger", "tolerance", "promoted"),
    [
        ((0.70, 0.80, 0.90), 0.0, True),
        ((0.75, 0.85, 0.95), 0.0, True),
        ((0.70, 0.80, 0.91), 0.0, True),
        ((0.69, 0.99, 0.99), 0.0, False),
        ((0.99, 0.79, 0.99), 0.0, False),
        ((0.99, 0.99, 0.89), 0.0, False),
        ((0.69, 0.79, 0.89), 0.01, True),
        ((0.69, 0.78, 0.89), 0.01, False),
        ((0.65, 0.75, 0.85), 0.05, True),
        ((0.65, 0.75, 0.84), 0.05, False),
        ((0.0, 0.0, 0.0), 1.0, True),
        ((0.71, 0.81, 0.905), -0.01, False),
        ((0.71, 0.81, 0.91), -0.01, True),
    ],
)
def test_a_challenger_takes_over_unless_it_loses_more_than_the_tolerance_at_some_budget(
    challenger, tolerance, promoted
):
    assert decide(results(*BEST), results(*challenger), tolerance)[0] is promoted


@pytest.mark.parametrize("right", range(1, 101))
def test_a_loss_of_exactly_the_tolerance_is_within_it_whatever_the_rounding(right):
    best, challenger = right / 100, (right - 1) / 100

    assert decide(results(*[best] * 3), results(*[challenger] * 3), 0.01)[0]
    assert not decide(results(*[best] * 3), results(*[challenger] * 3), 0.0099)[0]


def test_the_reason_names_the_worst_budget_and_all_numbers():
    promoted, reason = decide(results(*BEST), results(0.69, 0.75, 0.95), 0.0)

    assert not promoted
    assert reason == (
        "kept the champion: the challenger loses at e_c 0.5 (69.0 % against 70.0 % at e_c 0.3, "
        "75.0 % against 80.0 % at e_c 0.5, 95.0 % against 90.0 % at e_c 1.0)"
    )


def test_the_reason_tells_a_loss_within_the_tolerance_from_none():
    _, better = decide(results(*BEST), results(*BEST), 0.02)
    _, within = decide(results(*BEST), results(0.69, 0.8, 0.9), 0.02)

    assert better.startswith("promoted the challenger: not worse at any budget (")
    assert within.startswith("promoted the challenger: within 0.02 at every budget (")


def test_evaluations_at_other_budgets_are_not_compared():
    other = results(*BEST)

    with pytest.raises(ValueError, match="zip"):
        decide(results(*BEST), replace(other, settings=other.settings[:2]), 0.0)


# Before anything is touched.


@pytest.fixture
def base(tmp_path):
    config = tiny.tiny_config(tiny.write_data(tmp_path / "data"), tmp_path / "retrainings")
    return replace(config, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/ml/mlflow.db"))


@pytest.fixture
def archive(make_archive, tmp_path):
    return make_archive(tmp_path / "archive")


def test_a_second_retraining_of_a_dataset_refuses_at_once(base, archive):
    with (
        FileLock(Path(base.data.root) / LOCK),
        pytest.raises(
            RunError,
            match=rf"another retraining of {base.data.root} is under way .*{LOCK}\); wait for it",
        ),
    ):
        run_retraining(place(archive), base, Terminal())

    assert not base.out.exists()


def test_a_missing_archive_or_dataset_is_told_before_anything_else(base, archive, tmp_path):
    with pytest.raises(ArchiveError, match=r"archive .*/none does not exist"):
        run_retraining(place(tmp_path / "none"), base, Terminal())
    with pytest.raises(DatasetError, match=r"none/train is not a finished dataset"):
        run_retraining(
            place(archive),
            replace(base, data=replace(base.data, root=str(tmp_path / "none"))),
            Terminal(),
        )

    assert not base.out.exists()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("splits", "part"), [((), "all"), (("train", "val"), "train"), (("train", "test"), "train")]
)
def test_of_an_archive_with_splits_the_training_one_is_added(splits, part):
    assert new_part(source_of(splits), None) == (part, 0.0)


def test_an_archive_without_training_data_is_refused():
    with pytest.raises(RunError, match=r"archive new/ has the splits val, test and no train; give"):
        new_part(source_of(("val", "test")), None)


def test_an_archive_is_split_as_the_dataset_was():
    assert new_part(source_of(()), ("train", 0.2)) == ("train", 0.2)
    message = r"new/ has the splits train, val, and .* by hash at 0\.2; give its folder of training"
    with pytest.raises(RunError, match=message):
        new_part(source_of(("train", "val")), ("train", 0.2))


def source_of(splits):
    return Source(layout="folders", archive=place("new/"), media="image", units=(), splits=splits)
