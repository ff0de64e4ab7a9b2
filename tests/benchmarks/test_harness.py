"""The benchmark harness: fair turns, right arithmetic, rows that come back whole. No timings."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch

from mone_core.gemm import chosen_gemm, has_onednn
from mone_core.models import VIT_SIZES
from tests.benchmarks.bench_forms import FORMS, Operands
from tests.benchmarks.bench_moe_layer import GROUP, Layer, OwnMlp, PlainMlp, compare_layers
from tests.benchmarks.bench_nested import TOKENS, NestedStack, plain_stack
from tests.benchmarks.harness import (
    ROWS,
    BenchRow,
    Case,
    Setting,
    append_rows,
    commit,
    compare,
    forward_backward,
    graph_or_run,
    interleave,
    parse,
    prepare,
    read_rows,
    spread,
    table,
    through_onednn,
)
from tests.benchmarks.roofline import ACCELERATORS, experts_ms

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
    mode="eager",
    floor_ms=None,
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


@pytest.mark.parametrize("path", sorted(ROWS.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_row_that_is_kept_can_be_read(path):
    assert all(row.median_ms > 0 and row.command for row in read_rows(path))


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


def test_a_burst_counts_as_the_mean_of_its_runs():
    now = [0.0]

    def run():
        now[0] += 0.5

    assert interleave({"a": run}, 2, lambda: None, lambda: now[0], burst=4) == {"a": [500.0, 500.0]}


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
    assert {row.mode for row in rows} == {"eager"}


def test_what_can_be_captured_is_timed_as_a_graph():
    calls = []
    case = Case(case="test", shape="a", run=lambda: calls.append("run"))

    run, mode = graph_or_run(case, lambda _: partial(calls.append, "replay"))
    run()

    assert (mode, calls) == ("graph", ["replay"])


def test_what_cannot_be_captured_is_timed_as_it_is_and_says_so(capsys):
    case = Case(case="test", shape="a", run=lambda: None)

    def capture(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    assert graph_or_run(case, capture) == (case.run, "eager")
    assert capsys.readouterr().err == (
        "test a runs eagerly: operation not permitted when stream is capturing\n"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_case_becomes_a_graph_and_one_that_waits_for_the_device_is_refused():
    layer, x = torch.nn.Linear(8, 8).cuda(), torch.randn(4, 8).cuda()

    run, mode = prepare(Case(case="test", shape="a", run=forward_backward(layer, x)), "cuda")
    layer.weight.grad.zero_()
    run()
    torch.cuda.synchronize()

    assert mode == "graph"
    assert layer.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="synchronizing"):
        prepare(Case(case="test", shape="b", run=lambda: x.sum().item()), "cuda")
    assert torch.cuda.get_sync_debug_mode() == 0


def test_gradients_are_made_anew_in_every_run():
    layer, x = torch.nn.Linear(3, 3), torch.randn(4, 3)
    run = forward_backward(layer, x)

    run()
    first = [layer.weight.grad.clone(), x.grad.clone()]
    run()

    torch.testing.assert_close([layer.weight.grad, x.grad], first)


@pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")
def test_a_case_runs_through_onednn_and_leaves_the_choice_as_it_was():
    seen = []
    case = Case(case="test", shape="a", run=lambda: seen.append(chosen_gemm()))

    through_onednn(case).run()
    case.run()

    assert seen == ["onednn", "torch"]
    assert through_onednn(case).shape == "a oneDNN"


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        parse("nested", ["--device", "cuda"])

    assert "torch sees no CUDA device here; use --device cpu" in capsys.readouterr().err


def test_a_processor_has_no_floor_and_a_small_batch():
    cuda = dataclasses.replace(QUICK, device="cuda")

    assert QUICK.accelerator is None
    assert (QUICK.images, QUICK.burst, cuda.images, cuda.burst) == (8, 1, 128, 20)


def test_the_table_lines_up_and_shows_the_ratio():
    lines = table([ROW, dataclasses.replace(ROW, shape="short", median_ms=1234.5)]).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-6:] == ["ratio", "roofline", "%", "of", "floor", "n"]
    assert lines[1].split()[-4:] == ["0.250", "-", "-", "15"]
    assert "1234.50" in lines[2]


def test_the_table_shows_how_near_the_floor_a_row_is_and_what_ratio_the_floors_have():
    dense = dataclasses.replace(
        ROW, shape="S/16 B=8 N=196 dense", median_ms=120.0, mode="graph", floor_ms=90.0
    )
    nested = dataclasses.replace(ROW, mode="graph", floor_ms=27.0)

    _, *lines = table([dense, nested]).splitlines()

    assert lines[0].split()[-4:] == ["1.000", "1.000", "75%", "15"]
    assert lines[1].split()[-4:] == ["0.250", "0.300", "90%", "15"]
    assert all(" graph " in line for line in lines)


def test_the_dense_baseline_computes_what_the_nested_blocks_do():
    """A fair baseline: the same sums with the same weights at full width."""
    dense, nested = plain_stack("S"), NestedStack("S", 1.0, QUICK.images)
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
    x_NBD = torch.randn(TOKENS, QUICK.images, 384)

    with torch.inference_mode():
        expected = dense(x_NBD.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(nested(x_NBD), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", FORMS)
def test_all_forms_of_a_layer_compute_the_same(layer):
    operands = Operands(QUICK, "Ti", 0.3)
    results = [getattr(operands, f"{layer}_{form}")() for form in FORMS[layer]]

    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-4, atol=1e-6)


def test_the_dense_mlp_of_mone_core_computes_what_torchs_does():
    """But for the residual sum, which only a nested layer brings along."""
    config = VIT_SIZES["Ti"]
    plain, own = PlainMlp(config), OwnMlp(config)
    own.mlp.load_state_dict(plain.state_dict())
    x_NBD = torch.randn(5, 2, config.dim)

    torch.testing.assert_close(own(x_NBD), x_NBD + plain(x_NBD), rtol=1e-4, atol=1e-5)


def test_the_floor_of_a_sparse_layer_counts_the_slots_that_it_has():
    device = ACCELERATORS["NVIDIA H200"]
    layer = Layer(VIT_SIZES["Ti"], 2, 0.5)
    x_NBD = torch.randn(196, GROUP, 192)
    _, told = layer.sparse(x_NBD, x_NBD, layer.layout, None)

    slots = [
        (2 * each.assignment.filled_GEC.numel(), dim)
        for each, dim in zip(told.classes, (192, 96, 48, 24), strict=True)
    ]

    floor_ms = layer.floor_ms(device, 2 * GROUP * 196, training=True)
    assert floor_ms == experts_ms(
        device, slots, 768, experts=8, out_features=2 * GROUP * 196 * 192, training=True
    )


def test_sparse_layers_are_compared_by_both_ways_to_multiply():
    rows = compare_layers(QUICK, "Ti", 1, training=False)

    assert [row.shape.rpartition("K=1 ")[2].split()[0] for row in rows[:3]] == [
        "dense",
        *2 * ["E=8"],
    ]
    both = [row.shape.rpartition(" ")[2] == "oneDNN" for row in rows]
    assert both == [False] * 3 + [True] * (3 if has_onednn() else 0)
    assert len({row.shape for row in rows}) == len(rows)
    assert {(row.mode, row.floor_ms) for row in rows} == {("eager", None)}


def test_settings_of_the_allocator_are_part_of_the_command(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")

    told = parse("nested", ["--quick"]).command

    assert told == "THP_MEM_ALLOC_ENABLE=1 python -m tests.benchmarks.bench_nested --quick"
