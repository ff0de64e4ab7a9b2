"""The training loop on one and two processes: same bits after a stop, same losses on any world."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch

from cluster.backends import get_backend
from mone_core.models import build_model
from pipelines.checkpoint import Checkpoints, checkpoint_of, committed, load_weights, step_of
from pipelines.data.order import Position
from pipelines.errors import RunFailedError
from pipelines.evaluate import score, validation_stream
from pipelines.metrics import MetricRow, append_row, read_rows, rewind
from pipelines.optim import build_optimizer, learning_rate
from pipelines.train import Outcome, budget_at, train
from pipelines.weights import save_weights
from tests.pipelines import tiny
from tests.pipelines.tiny import MemoryReporter, losses, same_bits, state_of, without_clock

BUDGETS = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run that nobody disturbed: its configuration and rows."""
    config = tiny.tiny_config(data, tmp_path_factory.mktemp("unbroken") / "run")
    outcome, rows = tiny.train_here(config)
    assert outcome is Outcome.FINISHED
    return config, rows


def test_rows_come_every_log_and_evaluation_step_and_say_what_was_measured(unbroken):
    config, rows = unbroken

    assert [row.step for row in rows] == [2, 4, 6, 6, 8, 10, 12, 12]
    training = [row for row in rows if "loss" in row.values]
    assert [row.values["epoch"] for row in training] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert all(0 <= row.values["alpha"] < 1 for row in training)
    assert all(row.values["images_per_second"] > 0 for row in training)
    assert [row.values["learning_rate"] for row in training] == [
        learning_rate(row.step - 1, 12, config.optim) for row in training
    ]
    assert rows[3].values.keys() == {
        "val_accuracy/ec_0.20",
        "val_loss/ec_0.20",
        "val_accuracy/ec_1.00",
        "val_loss/ec_1.00",
    }


def test_the_first_loss_of_fresh_weights_is_that_of_guessing(data, tmp_path):
    config = tiny.tiny_config(data, tmp_path / "run", steps=1, log_every=1, checkpoint_every=1)

    _, rows = tiny.train_here(config)

    assert rows[0].values["loss"] == pytest.approx(math.log(4), rel=1e-6)


def test_a_run_stopped_at_every_row_and_gone_on_is_the_unbroken_run_to_the_bit(
    unbroken, data, tmp_path
):
    config = tiny.tiny_config(data, tmp_path / "run")
    rows, outcomes = [], []

    while not outcomes or outcomes[-1] is Outcome.STOPPED:
        outcome, new = tiny.train_here(config, MemoryReporter(stop_at=0))
        rows += new
        outcomes.append(outcome)

    assert outcomes == [Outcome.STOPPED] * 5 + [Outcome.FINISHED]
    assert without_clock(rows) == without_clock(unbroken[1])
    assert same_bits(state_of(config.out), state_of(unbroken[0].out))


def test_a_killed_run_gone_on_has_the_record_and_weights_of_the_unbroken_one(
    unbroken, data, tmp_path
):
    config = tiny.tiny_config(data, tmp_path / "run")
    killed = tiny.KilledReporter(stop_at=6)
    with pytest.raises(tiny.Killed, match="at step 6"):
        tiny.train_here(config, killed)
    for row in killed.rows:
        append_row(config.out, row)
    done = step_of(checkpoint_of(config.out))
    assert done == 4

    rewind(config.out, done)
    _, rows = tiny.train_here(config)
    for row in rows:
        append_row(config.out, row)

    assert without_clock(read_rows(config.out)) == without_clock(unbroken[1])
    assert same_bits(state_of(config.out), state_of(unbroken[0].out))


def test_another_seed_trains_another_run(unbroken, data, tmp_path):
    _, rows = tiny.train_here(tiny.tiny_config(data, tmp_path / "run", seed=1))

    assert losses(rows) != losses(unbroken[1])


def test_a_finished_run_has_nothing_left_to_train(unbroken):
    outcome, rows = tiny.train_here(unbroken[0])

    assert (outcome, rows) == (Outcome.FINISHED, [])


def test_a_stop_asked_for_at_the_last_step_is_a_finish(data, tmp_path):
    config = tiny.tiny_config(data, tmp_path / "run", steps=4)

    outcome, _ = tiny.train_here(config, MemoryReporter(stop_at=4))

    assert outcome is Outcome.FINISHED


def test_the_loss_falls_and_squares_are_told_apart_on_unseen_data(data, tmp_path):
    config = tiny.tiny_config(data, tmp_path / "run", steps=60, log_every=10, checkpoint_every=60)

    _, rows = tiny.train_here(config)

    assert losses(rows)[-1] < 0.75 * losses(rows)[0]
    assert rows[-1].values["val_accuracy/ec_1.00"] == 1.0
    assert rows[-1].values["val_accuracy/ec_0.20"] > 0.5


def test_training_starts_from_the_weights_that_it_is_given(data, unbroken, tmp_path):
    from_scratch, _ = unbroken
    trained = build_model(from_scratch.model)
    load_weights(checkpoint_of(from_scratch.out), trained)
    weights = tmp_path / "weights"
    save_weights(weights, trained, step=12)

    run = tiny.build_here(
        tiny.tiny_config(data, tmp_path / "run", start_from=weights), MemoryReporter()
    )

    assert same_bits(dict(run.core.state_dict()), dict(trained.state_dict()))


def one_step(data, out, **optim):
    """A run after its first update, and the row of it."""
    config = tiny.tiny_config(data, out, steps=1, log_every=1, checkpoint_every=1)
    config = replace(config, optim=replace(config.optim, **optim))
    reporter = MemoryReporter()
    run = tiny.build_here(config, reporter)
    train(run)
    return run, reporter.rows[0]


@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_a_gradient_is_scaled_down_to_the_norm_that_is_allowed_and_reported_as_it_was(
    data, tmp_path, clip_norm
):
    run, row = one_step(data, tmp_path / "run", clip_norm=clip_norm)

    first_moments = [run.optimizer.state[p]["exp_avg"] for p in run.core.parameters()]
    used = torch.stack([moment.norm() for moment in first_moments]).norm().item() / (1 - 0.9)
    assert row.values["grad_norm"] > 0.1
    assert used == pytest.approx(min(clip_norm, row.values["grad_norm"]), rel=1e-3)


def test_the_scheduled_rate_is_the_one_that_is_used(data, tmp_path):
    run, row = one_step(data, tmp_path / "run", learning_rate=0.3, warmup_steps=3)

    (rate,) = {group["lr"] for group in run.optimizer.param_groups}
    assert rate == row.values["learning_rate"] == pytest.approx(0.1)


def test_smoothed_labels_are_learnt_less_surely(data, tmp_path):
    sure, _ = one_step(data, tmp_path / "sure", label_smoothing=0.0, clip_norm=1e6)
    smooth, _ = one_step(data, tmp_path / "smooth", label_smoothing=0.5, clip_norm=1e6)

    first = [run.optimizer.state[run.core.head.classify.bias]["exp_avg"] for run in (sure, smooth)]
    assert first[0].norm() > 0
    torch.testing.assert_close(first[1], 0.5 * first[0])


# Numbers that are not finite.


def poison(run, at_step, value):
    """Let one weight's gradient be `value` in the backward pass of `at_step`, counted from 0."""
    seen = iter(range(10**6))

    def hook(gradient):
        return torch.full_like(gradient, value) if next(seen) == at_step else gradient

    run.core.head.classify.bias.register_hook(hook)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint_whole(
    data, tmp_path
):
    config = tiny.tiny_config(data, tmp_path / "run")
    reporter = MemoryReporter()
    run = tiny.build_here(config, reporter)
    poison(run, at_step=4, value=math.nan)

    with pytest.raises(
        RunFailedError,
        match=r"the loss is nan within the 2 steps up to step 6; start a new run with a lower "
        r"optim\.learning_rate \(now 0\.003\)",
    ):
        train(run)

    assert [row.step for row in reporter.rows] == [2, 4]
    assert [step_of(folder) for folder in committed(config.out)] == [4]
    assert all(value.isfinite().all() for value in state_of(config.out).values())


def test_a_gradient_that_is_not_finite_right_before_a_checkpoint_never_gets_into_it(data, tmp_path):
    config = tiny.tiny_config(data, tmp_path / "run")
    run = tiny.build_here(config, MemoryReporter())
    poison(run, at_step=7, value=math.nan)

    with pytest.raises(RunFailedError, match=r"gradient norm is nan within the 2 steps"):
        train(run)

    assert [step_of(folder) for folder in committed(config.out)] == [4]


# Budgets.


def test_the_budget_of_a_step_is_a_pure_function_of_seed_and_step():
    draws = [budget_at(step, BUDGETS, 3) for step in range(200)]

    assert draws == [budget_at(step, BUDGETS, 3) for step in range(200)]
    assert draws != [budget_at(step, BUDGETS, 4) for step in range(200)]
    assert draws[50:] == [budget_at(step, BUDGETS, 3) for step in range(50, 200)]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**70])
def test_every_budget_is_drawn_equally_often_and_in_no_pattern(seed):
    draws = [budget_at(step, BUDGETS, seed) for step in range(9000)]
    pairs = Counter(pairwise(draws))

    counts = Counter(draws)
    assert counts.keys() == set(BUDGETS)
    # chi-square with 8 and 80 degrees of freedom; beyond these once in ten thousand draws
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 32
    assert sum((pairs[a, b] - 111.1) ** 2 / 111.1 for a in BUDGETS for b in BUDGETS) < 135


def test_a_single_budget_is_always_drawn():
    assert {budget_at(step, (0.4,), 0) for step in range(20)} == {0.4}


# Two processes.


def train_and_score(backend, config, alone, folder):
    """What each of two ranks does; rank r leaves what it saw in `folder/rank_r.json`.

    `alone` is a run that one process trained.
    """
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim)
    step, _ = Checkpoints(alone.out, alone, backend).restore_newest(model, optimizer)
    saved = state_of(alone.out)
    assert step == 12
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(
                optimizer.state[parameter][moment], saved[f"optimizer.{name}.{moment}"]
            )

    outcome, rows = tiny.train_here(config, backend=backend)
    stopped_config = replace(config, out=config.out.with_name("stopped"))
    stopped, outcomes = [], []
    while not outcomes or outcomes[-1] is Outcome.STOPPED:
        # Only rank 0 is asked; the others must learn of it.
        reporter = MemoryReporter(stop_at=0 if backend.rank == 0 else math.inf)
        ended, new = tiny.train_here(stopped_config, reporter, backend)
        stopped += new
        outcomes.append(ended)
    model = build_model(config.model)
    load_weights(checkpoint_of(config.out), model)
    stream = validation_stream(config, rank=backend.rank, world=backend.world)
    scores = score(model, model, stream, (0.2, 0.5, 1.0), backend)
    told = {
        "outcomes": [outcome, *outcomes],
        "rows": [asdict(row) for row in rows],
        "stopped": [asdict(row) for row in stopped],
        "scores": [asdict(found) for found in scores.values()],
    }
    (folder / f"rank_{backend.rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def two_ranks(data, unbroken, tmp_path_factory):
    """A run of two processes, whole and stopped at every row; what each rank told."""
    folder = tmp_path_factory.mktemp("two")
    config = tiny.tiny_config(data, folder / "run")
    config = replace(config, parallel=replace(config.parallel, num_workers=2))
    tiny.on_ranks(train_and_score, folder, config, unbroken[0], folder)
    return config, [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(2)]


def rows_of(told):
    return [MetricRow(**row) for row in told]


def test_two_processes_train_as_one_does_on_the_same_global_batch(unbroken, two_ranks):
    _, (told, other) = two_ranks
    two, one = without_clock(rows_of(told["rows"])), without_clock(unbroken[1])

    assert [row.step for row in two] == [row.step for row in one]
    for left, right in zip(two, one, strict=True):
        assert left.values.keys() == right.values.keys()
        for name, value in left.values.items():
            if name != "alpha":
                assert value == pytest.approx(right.values[name], abs=1e-5), name
    assert other["rows"] == []  # rank 0 alone reports


def test_two_processes_stopped_at_every_row_and_gone_on_are_their_own_unbroken_run_to_the_bit(
    two_ranks,
):
    config, (told, other) = two_ranks

    assert without_clock(rows_of(told["stopped"])) == without_clock(rows_of(told["rows"]))
    assert told["outcomes"] == ["finished", *["stopped"] * 5, "finished"]
    assert other["outcomes"] == told["outcomes"]
    assert same_bits(state_of(config.out), state_of(config.out.with_name("stopped")))


def test_one_process_reads_what_two_wrote_and_two_read_what_one_wrote(two_ranks):
    config, _ = two_ranks  # the other way round is asserted on the ranks
    checkpoint = checkpoint_of(config.out)
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim)

    found = Checkpoints(config.out, config, get_backend("cpu")).restore_newest(model, optimizer)

    assert found == (12, Position(seed=0, epoch=3, step=0))
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    saved = state_of(config.out)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert same_bits(weights, {k: v for k, v in saved.items() if k.startswith("model.")})
    assert len(saved) == 3 * len(weights)


def test_two_processes_score_a_model_as_one_does(two_ranks):
    config, told = two_ranks
    model = build_model(config.model)
    load_weights(checkpoint_of(config.out), model)

    alone = score(model, model, validation_stream(config), (0.2, 0.5, 1.0), get_backend("cpu"))

    assert told[0]["scores"] == told[1]["scores"]
    for two, one in zip(told[0]["scores"], alone.values(), strict=True):
        assert (two["accuracy"], two["samples"]) == (one.accuracy, one.samples)
        assert two["loss"] == pytest.approx(one.loss, rel=1e-6)
