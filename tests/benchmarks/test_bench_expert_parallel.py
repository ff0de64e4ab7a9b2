"""The benchmark of spread layers: what it compares, divides and counts. No timings."""

import time
from dataclasses import replace

import pytest
import torch

from cluster.backends import get_backend
from mone_core.bank import ExpertBank
from mone_core.capacity import capacity_distribution, effective_capacity_of, token_counts
from mone_core.experts import ExpertsConfig
from mone_core.models import ModelConfig
from tests.benchmarks.bench_expert_parallel import (
    Layers,
    TrainStep,
    capture_step,
    measure_world,
    ranks_in_words,
    shares,
    show,
)
from tests.benchmarks.bench_moe_layer import NESTED, TOKENS
from tests.benchmarks.harness import BenchRow, Setting, append_rows, read_rows
from tests.benchmarks.stopwatch import Stopwatch, Timed, TimedRanks, watch

QUICK = Setting(device="cpu", threads=1, quick=True, command="python -m it --quick")
TINY = ModelConfig(
    image_size=32,
    patch_size=8,
    num_classes=3,
    dim=32,
    depth=2,
    heads=2,
    experts=ExpertsConfig(placement="every", num_experts=4, k=1, group_images=4),
)
ROW = BenchRow(
    case="expert_parallel/train",
    shape="B/16 R=2",
    machine="cpu x86_64, 2 cores, 1 used, torch 2",
    dtype="float32",
    median_ms=30.0,
    spread_ms=1.5,
    repeats=11,
    baseline="the layer in one process",
    baseline_ms=20.0,
    mode="eager",
    floor_ms=None,
    commit="0123456789ab",
    command="python -m it",
    measures={
        "exchange": 0.25,
        "products": 0.7,
        "overhead": 0.05,
        "bank_alone": 0.6,
        "sent_mb": 10.125,
        "sent_over_flat": 1.0,
    },
)


@pytest.mark.parametrize("world", [1, 2])
def test_rows_of_ranks_divide_the_time_and_count_the_bytes(world):
    """Real processes, and one that sends to itself."""
    rows = measure_world(QUICK, world, "Ti")

    assert [row.case.partition("/")[2] for row in rows] == 2 * ["forward", "train"]
    assert len({(row.case, row.shape) for row in rows}) == 4
    for row in rows:
        parts = [row.measures[name] for name in ("exchange", "products", "overhead")]
        assert sum(parts) == pytest.approx(1)
        assert min(parts) > 0
        assert row.measures["bank_alone"] > 0
    flat, nested = (row.measures["sent_mb"] for row in rows[::2])
    slots = 8 * 206  # of 196 tokens of 8 images with C = 1.05
    assert flat == 2 * slots * 192 * 4 / 1e6  # there and back, float32
    assert [row.measures["sent_mb"] for row in rows[1::2]] == [2 * flat, 2 * nested]
    counts = token_counts(capacity_distribution(NESTED), TOKENS)
    realised = effective_capacity_of(counts, (0.125, 0.25, 0.5, 1.0))
    over = [row.measures["sent_over_flat"] for row in rows]
    assert over == pytest.approx([1, 1, realised, realised], rel=0.01)


def test_the_spread_layer_computes_what_the_whole_one_does():
    layers = Layers(QUICK, "Ti", 2, get_backend("cpu"))

    assert torch.equal(layers.part(layers.x_NBD), layers.whole(layers.x_NBD))


def test_the_bank_alone_has_as_many_slots_as_in_the_layer():
    layers = Layers(QUICK, "Ti", 1, get_backend("cpu"))
    seen = []
    layers.part.sparse.bank.register_forward_pre_hook(
        lambda _, inputs: seen.append([tuple(x_EQd.shape) for x_EQd in inputs[0]])
    )
    trial = layers.trial(NESTED, training=False)

    trial.timed()
    trial.bank()

    assert seen[0] == seen[1]
    assert len(seen[0]) == 4  # widths


def test_what_runs_outside_of_a_timed_run_is_not_counted():
    stopwatch = Stopwatch("cpu")

    def run():
        for part in ("bank", "exchange", "exchange", "bank"):
            stopwatch.tick(part)
            time.sleep(0.001)

    timed = Timed(run, stopwatch)
    timed()
    run()
    layer, bank, exchange = timed.milliseconds()

    assert layer > bank > exchange >= 1
    assert layer >= 4
    assert timed.milliseconds() == [layer, bank, exchange]


def test_a_bank_is_marked_around_the_exchange_in_both_passes():
    class Noted:
        def __init__(self):
            self.ticks = []

        def tick(self, part):
            self.ticks.append(part)

    noted = Noted()
    bank = ExpertBank(2, 8, 16, "tanh")
    watch(bank, noted)
    bank([torch.ones(2, 3, 8)], TimedRanks(get_backend("cpu"), noted))[0].sum().backward()

    # Each way is started, and waited for.
    assert noted.ticks == 2 * ["bank", *2 * 2 * ["exchange", "exchange"], "bank"]


def test_shares_are_of_all_runs_together():
    class Measured:
        def __init__(self):
            self.runs = iter([[10.0, 8.0, 2.0], [30.0, 28.0, 6.0]])

        def milliseconds(self):
            return next(self.runs)

    found = shares(lambda: None, Measured(), 2, get_backend("cpu"))

    assert found == pytest.approx({"exchange": 0.2, "products": 0.7, "overhead": 0.1})


def test_a_row_says_when_ranks_outnumber_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)

    assert ranks_in_words(QUICK, 2) == "2"
    assert ranks_in_words(QUICK, 4) == "4 (on 2 cores)"
    assert ranks_in_words(replace(QUICK, threads=2), 2) == "2 (on 2 cores)"
    assert ranks_in_words(replace(QUICK, device="cuda"), 4) == "4"


def test_the_table_shows_how_the_time_is_divided():
    step = replace(ROW, case="expert_parallel/step", mode="graph", measures={})

    lines = show([ROW, step]).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-8:] == [
        "1.500",
        "25.0%",
        "70.0%",
        "5.0%",
        "60.0%",
        "10.125",
        "1.000",
        "11",
    ]
    assert lines[2].split()[-8:] == ["1.500", *6 * ["-"], "11"]


def test_what_was_measured_beside_the_time_is_kept(tmp_path):
    append_rows(tmp_path / "rows.jsonl", [ROW])

    assert read_rows(tmp_path / "rows.jsonl") == [ROW]


def test_a_training_step_learns_its_batch():
    step = TrainStep(TINY, 4, get_backend("cpu"))
    step()
    first = step.loss.item()

    for _ in range(20):
        step()

    assert step.loss.item() < 0.8 * first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")
def test_a_captured_step_goes_on_learning():
    step = TrainStep(TINY, 4, get_backend("cuda"))
    replay = capture_step(step)
    replay()
    first = step.loss.item()

    for _ in range(20):
        replay()

    assert step.loss.item() < 0.8 * first
