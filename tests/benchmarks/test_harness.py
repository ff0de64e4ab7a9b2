"""The benchmark harness: fair turns, right arithmetic, rows that come back whole. No timings."""

import dataclasses
import itertools

import pytest
import torch

from tests.benchmarks.bench_forms import FORMS, Operands
from tests.benchmarks.bench_nested import BATCH, TOKENS, NestedStack, plain_stack
from tests.benchmarks.harness import (
    BenchRow,
    Case,
    Setting,
    append_rows,
    commit,
    compare,
    interleave,
    parse,
    read_rows,
    spread,
    table,
)

ROW = BenchRow(
    case="nested/blocks/train",
    shape="S/16 B=8 N=196 e_c=0.3",
    machine="cpu x86_64, 2 cores, 1 used, torch 2",
    dtype="float32",
    median_ms=30.0,
    spread_ms=1.5,
    repeats=15,
    baseline="nested/blocks/train S/16 B=8 N=196 dense",
    baseline_ms=120.0,
    commit="0123456789ab",
    command="python -m tests.benchmarks.bench_nested --threads 1",
)
QUICK = Setting(device="cpu", threads=1, quick=True, command="python -m it --quick")


def test_a_row_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "rows" / "nested.jsonl"
    other = dataclasses.replace(ROW, shape="another")

    append_rows(path, [ROW])
    append_rows(path, [other])

    assert read_rows(path) == [ROW, other]


def test_the_ratio_is_the_time_over_the_baselines():
    assert ROW.ratio == 0.25
    assert dataclasses.replace(ROW, median_ms=240.0).ratio == 2.0


def test_the_spread_is_from_the_10th_to_the_90th_percentile():
    assert spread([float(i) for i in range(11)]) == pytest.approx(8)
    assert spread([3.0, 3.0, 3.0]) == 0


def test_runs_take_turns_and_each_begins_a_round_in_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}

    times = interleave(runs, 3, lambda: None, itertools.count().__next__)

    assert [len(each) for each in times.values()] == [3, 3, 3]
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[-3:] == ["abc", "bca", "cab"]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)


def test_the_clock_runs_until_the_device_is_done():
    """A clock that only a synchronisation moves: one call before, one inside the measured time."""
    now = [0.0]

    def synchronise():
        now[0] += 1.0

    times = interleave({"a": lambda: None}, 2, synchronise, lambda: now[0])

    assert times == {"a": [1000.0, 1000.0]}


def test_every_case_is_compared_with_its_baseline():
    """On a clock that each run moves by its own cost, in seconds."""
    now = [0.0]

    def case(shape, cost):
        def run():
            now[0] += cost

        return Case(case="test", shape=shape, run=run)

    rows = compare(
        case("dense", 0.2), [case("half", 0.1), case("double", 0.4)], QUICK, lambda: now[0]
    )

    assert [row.shape for row in rows] == ["dense", "half", "double"]
    assert [row.median_ms for row in rows] == pytest.approx([200, 100, 400])
    assert [row.ratio for row in rows] == pytest.approx([1, 0.5, 2])
    assert {row.baseline for row in rows} == {"test dense"}
    assert {row.command for row in rows} == {"python -m it --quick"}


def test_a_row_says_where_and_of_which_code_it_is():
    assert QUICK.machine.startswith("cpu ")
    assert "1 used, torch " in QUICK.machine
    assert commit() == "unknown" or len(commit().removesuffix("-dirty")) == 12


def test_the_command_line_is_kept_in_the_row():
    threads = torch.get_num_threads()
    try:
        setting = parse("nested", ["--threads", "2", "--quick"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)

    assert setting.command == "python -m tests.benchmarks.bench_nested --threads 2 --quick"
    assert (setting.device, setting.threads, setting.quick) == ("cpu", 2, True)


def test_the_table_lines_up_and_shows_the_ratio():
    lines = table([ROW, dataclasses.replace(ROW, shape="short", median_ms=1234.5)]).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-3:] == ["ms", "ratio", "n"]
    assert lines[1].split()[-2:] == ["0.250", "15"]
    assert "1234.50" in lines[2]


def test_the_dense_baseline_computes_what_the_nested_blocks_do():
    """A fair baseline: the same sums with the same weights at full width."""
    dense, nested = plain_stack("S"), NestedStack("S", 1.0)
    for plain, block in zip(dense, nested.blocks, strict=True):
        names = {"qkv": "attention.qkv", "out": "attention.out", "up": "mlp.up", "down": "mlp.down"}
        state = block.state_dict()
        plain.load_state_dict(
            {
                name: state[name.replace(part, names.get(part, part), 1)]
                for name in plain.state_dict()
                for part in [name.split(".")[0]]
            }
        )
    x_NBD = torch.randn(TOKENS, BATCH, 384)

    with torch.inference_mode():
        expected = dense(x_NBD.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(nested(x_NBD), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", FORMS)
def test_all_forms_of_a_layer_compute_the_same(layer):
    operands = Operands(QUICK, "Ti", 0.3)
    results = [getattr(operands, f"{layer}_{form}")() for form in FORMS[layer]]

    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-4, atol=1e-6)
