"""Sparse layers without a capacity are static ones with room for all, and wait once for numbers."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mone_core.bank import ExpertBank
from mone_core.dropless import exchange_rows, plan_rows
from mone_core.errors import CapacityError, ConfigError, RoutingError
from mone_core.experts import ExpertsConfig
from mone_core.gemm import gemm
from mone_core.load import FIELDS, load_sums, summary
from mone_core.models import DENSE, ModelConfig
from mone_core.nested import Layout
from mone_core.ranks import ALONE
from mone_core.routing import top_k_assignment
from tests.mone_core.no_sync import NoSync
from tests.mone_core.rank_steps import (
    BATCH,
    DIMS,
    LAYOUTS,
    NESTED,
    SKEWS,
    assert_close,
    favouring,
    images_of_all,
    infer_on,
    step,
    step_of_one,
    whole_gradient,
)
from tests.mone_core.simulated_ranks import SEED, Table
from tests.mone_core.sparse_reference import LOSSES, leaf, operands, random_layer

TABLES = [(1, 1), (1, 2), (1, 4), (2, 2)]  # rows: copies of the experts; columns
every_table = pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t[0]}x{t[1]}")


def without_capacity(layer):
    """The same layer, dropless."""
    other = copy.deepcopy(layer)
    other.config = replace(layer.config, dropless=True)
    return other


def dropless(**changes):
    return random_layer(dropless=True, **changes)


def assert_ranks_equal(layer, table, expected, batch, layout):
    """Output, auxiliary loss and all gradients of ranks against those of one."""
    out, told, grads = expected
    steps = table.run(lambda rank: step_of_one(layer, rank, batch, layout))
    outs, tolds, parts = zip(*steps, strict=True)
    assert_close(torch.cat(outs, dim=1), out, "output")
    losses = torch.stack([each.aux_loss.detach() for each in tolds])
    assert_close(losses.mean(), told.aux_loss.detach(), "auxiliary loss")
    for name, grad in grads.items():
        theirs = whole_gradient(name, [each[name] for each in parts], table.columns)
        assert_close(theirs, grad, name)
    return parts


@pytest.mark.usefixtures("_dirty_memory")
@every_table
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_a_static_layer_with_room_for_all(layout, skew, k, table):
    """Whatever the experts are chosen for: ranks without a row take part, unwritten memory not."""
    layout, layer = LAYOUTS[layout], favouring(skew, k=k, capacity_ratio=4.0)
    batch = images_of_all(layout)
    expected = step(layer, *batch, layout)
    assert all(each.assignment.kept_GSK.all() for each in expected[1].classes)

    parts = assert_ranks_equal(without_capacity(layer), Table(*table), expected, batch, layout)

    if skew in ("one empty", "all to one"):  # nobody chose expert 0
        for part in parts[:: table[1]]:
            for name in ("up_weight_EFD", "up_bias_EF", "down_weight_EDF", "down_bias_ED"):
                assert (part[f"bank.{name}"][0] == 0).all()


@every_table
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_noise_and_losses_of_training_are_those_of_a_static_layer(layout, table):
    layout = LAYOUTS[layout]
    layer = random_layer(noise=1.0, capacity_ratio=4.0, **LOSSES).train()
    batch = images_of_all(layout)
    torch.manual_seed(SEED)
    expected = step(layer, *batch, layout)

    assert_ranks_equal(without_capacity(layer), Table(*table), expected, batch, layout)


def test_a_rest_of_the_images_loses_nothing_either():
    layer, batch = random_layer(capacity_ratio=4.0), (*operands(3, NESTED), torch.randn(7, 3, 8))

    (out, told, grads), (other, _, others) = (
        step(each, *batch, NESTED) for each in (layer, without_capacity(layer))
    )

    assert len(told.classes) == 2 * len(NESTED.segments)
    assert_close(other, out, "output")
    for name, grad in grads.items():
        assert_close(others[name], grad, name)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_gives_the_same(without):
    layer, table, batch = dropless(), Table(1, 2), images_of_all(NESTED)
    expected, _ = layer(*batch[:2], NESTED, batch[2])

    out = infer_on(table, layer, batch, NESTED, without)

    assert_close(out, expected.detach(), "output")
    assert [len(rank.handed) for rank in table.ranks] == [1 + 2 * len(NESTED.segments)] * 2


def test_rows_travel_in_16_bits_under_autocast():
    table, batch = Table(1, 2), [each.float() for each in images_of_all(NESTED)]
    layer = dropless().float()

    def compute(rank):
        with torch.autocast("cpu", torch.bfloat16):
            return step_of_one(layer, rank, batch, NESTED)

    for out, _, grads in table.run(compute):
        assert out.dtype == torch.float32
        assert all(grad.isfinite().all() and grad.dtype == out.dtype for grad in grads.values())
    for rank in table.ranks:
        counts, *rows = (each.dtype for _, each in rank.handed)
        assert counts == torch.int64
        assert set(rows) == {torch.bfloat16}


# What travels.


@pytest.mark.parametrize("table", [(1, 2), (1, 4)])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("skew", ["balanced", "all to one"])
def test_choices_travel_at_their_width_and_nothing_else_does(skew, k, table):
    layer, table = favouring(skew, k=k, dropless=True), Table(*table)
    batch = images_of_all(NESTED)

    steps = table.run(lambda rank: step_of_one(layer, rank, batch, NESTED))

    ranks, features = len(table.ranks), sum(s.dim * (s.stop - s.start) for s in NESTED.segments)
    sent = [[each.numel() for _, each in rank.handed] for rank in table.ranks]
    assert [numbers[0] for numbers in sent] == [4 * len(NESTED.segments)] * ranks
    # Of all ranks together: each choice goes there and back, in both passes.
    assert sum(sum(numbers[1:]) for numbers in sent) == 4 * k * BATCH * features
    for rank, (_, told, _) in zip(table.ranks, steps, strict=True):
        here = [
            (each.assignment.kept_GSK.numel(), each.dim) for each in told.classes
        ]  # those of this rank, whoever computes them
        inputs = [tuple(each.shape) for _, each in rank.handed[1 : 1 + len(here)]]
        assert inputs == here
        assert all(each.is_contiguous() for _, each in rank.handed)


def test_numbers_of_rows_go_first_and_then_classes_widest_first():
    table, batch, layer = Table(1, 2), images_of_all(NESTED), dropless()

    table.run(lambda rank: step_of_one(layer, rank, batch, NESTED))

    def exchanges(there, back):
        there, back = (
            [f"layer 3, width {dim}, {what}" for dim in reversed(DIMS)] for what in (there, back)
        )
        computed = [(("wait", come), ("send", go)) for come, go in zip(there, back, strict=True)]
        yield from (("send", each) for each in there)
        yield from (event for pair in computed for event in pair)
        yield from (("wait", each) for each in back)

    assert table.ranks[0].log == [
        ("send", "layer 3, numbers of rows"),
        ("wait", "layer 3, numbers of rows"),
        *exchanges("inputs", "outputs"),
        *exchanges("gradients of outputs", "gradients of inputs"),
    ]
    assert table.ranks[1].log == table.ranks[0].log


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_come_in_the_order_of_experts_and_go_back_to_where_they_were(ranks):
    """A row's two features: the rank that sends it and its place there, by hand-made numbers."""
    table = Table(1, ranks)
    torch.manual_seed(3)
    count_RWE = torch.randint(0, 4, (ranks, 2, 8))
    count_RWE[-1] = 0  # a rank without any row

    def compute(rank):
        count_WE = count_RWE[rank.rank]
        exchange = exchange_rows(count_WE, rank, "layer 3")
        rows = [
            torch.stack([torch.full((n,), rank.rank), torch.arange(n)], dim=1)[None]
            for n in count_WE.sum(1).tolist()
        ]
        come = [arrive() for arrive in exchange.to_experts(rows, "there")]
        back = [exchange.to_tokens(i, each, "back")() for i, each in enumerate(come)]
        assert all(torch.equal(*pair) for pair in zip(rows, back, strict=True))
        return [exchange.parts(i, each) for i, each in enumerate(come)]

    of_ranks = table.run(compute)

    start_RWE = count_RWE.cumsum(2) - count_RWE
    for index in range(2):
        by_expert = [part for of_rank in of_ranks for part in of_rank[index]]
        for expert, part in enumerate(by_expert):
            assert part.tolist() == [
                [sender, int(start_RWE[sender, index, expert]) + i]
                for sender in range(ranks)
                for i in range(int(count_RWE[sender, index, expert]))
            ]


# The bank.


@pytest.mark.usefixtures("_dirty_memory")
@pytest.mark.parametrize("name", ["torch", "onednn"])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_an_expert_without_rows_in_some_classes_has_the_gradient_of_the_others(gelu, name):
    """The widest class writes gradients, the others add to them: zero must be written as well."""
    torch.manual_seed(SEED)
    bank = ExpertBank(4, 8, 5, gelu)
    counts = [(8, (0, 3, 0, 2)), (4, (0, 0, 2, 1)), (2, (0, 4, 0, 0))]
    rows = [leaf(1, sum(each), dim).float().detach().requires_grad_() for dim, each in counts]
    plain = [
        torch.cat(
            [
                torch.nn.functional.gelu(
                    x @ bank.up_weight_EFD[e, :, :dim].T + bank.up_bias_EF[e],
                    approximate=bank.approximate,
                )
                @ bank.down_weight_EDF[e, :dim].T
                + bank.down_bias_ED[e, :dim]
                for e, x in enumerate(each.squeeze(0).split(of_experts))
            ]
        )
        for each, (dim, of_experts) in zip(rows, counts, strict=True)
    ]
    parameters = list(bank.parameters())
    expected = torch.autograd.grad(sum(y.square().sum() for y in plain), [*rows, *parameters])

    with gemm(name):
        outs = bank(rows, ALONE, "layer 3", torch.tensor([each for _, each in counts]))
        grads = torch.autograd.grad(sum(y.square().sum() for y in outs), [*rows, *parameters])

    for out, y in zip(outs, plain, strict=True):
        assert out.shape == (1, *y.shape)
        torch.testing.assert_close(out[0], y)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)
    assert all((grad[0] == 0).all() for grad in grads[-4:])  # the expert that nobody chose


# The host.


class Reads(TorchFunctionMode):
    """Counts what the host reads without an operation on tensors that `NoSync` could see."""

    NAMES = ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.watched = {getattr(torch.Tensor, name) for name in self.NAMES}
        self.number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.number += func in self.watched
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_waits_once_in_the_forward_pass_of_a_layer_and_never_in_the_backward(
    layout, ranks
):
    layer, layout = dropless(noise=1.0, **LOSSES).train(), LAYOUTS[layout]
    batch = images_of_all(layout)[:3]

    def compute(rank):
        mine = copy.deepcopy(layer)
        mine.spread(rank, "layer 3")
        residual, x, gate = (
            each.detach().chunk(rank.parts, dim=1)[rank.rank].requires_grad_() for each in batch
        )
        with NoSync(), Reads() as forward:
            out, told = mine(residual, x, layout, gate)
            loss = out.sum() + told.aux_loss
        with NoSync(), Reads() as backward:
            loss.backward()
        assert all(each.grad is not None for each in (residual, x, gate, *mine.parameters()))
        return forward.number, backward.number

    assert Table(1, ranks).run(compute) == [(1, 0)] * ranks


def test_a_rest_of_the_images_takes_a_wait_of_its_own():
    layer, (residual, x, gate) = dropless(), operands(3, NESTED)

    with NoSync(), Reads() as reads:
        layer(residual, x, NESTED, gate)

    assert reads.number == 2


def test_reads_are_seen():
    with Reads() as reads:
        torch.ones(2).tolist()
        assert torch.ones(1)
        torch.ones(1).item()
        torch.ones(1).cpu()

    assert reads.number == 4


def test_a_plan_needs_no_values_at_all():
    probs = torch.empty(7, BATCH, 4, device="meta")

    plan = plan_rows(probs, NESTED, 2, 2)

    assert plan.count_WE.shape == (len(NESTED.segments), 4)
    assert [of.row_EQ.shape for of in plan.classes] == [
        (1, 2 * BATCH * (s.stop - s.start)) for s in NESTED.segments
    ]


# What is told of it.


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_report_is_that_of_a_static_layer_with_room_for_all(k):
    probs = torch.randn(7, BATCH, 4, dtype=torch.float64).softmax(-1)

    plan = plan_rows(probs, NESTED, 2, k)

    for of in plan.classes:
        told = of.routed.assignment
        static = top_k_assignment(of.routed.probs_GSE, k, of.routed.probs_GSE.shape[1])
        assert of.routed.dim == of.dim
        assert torch.equal(told.expert_GSK, static.expert_GSK)
        assert torch.equal(told.kept_GSK, static.kept_GSK)
        assert torch.equal(told.weight_GSK, static.weight_GSK)
        assert told.slot_GSK.shape == static.slot_GSK.shape
        assert told.choice_GEC.shape == told.filled_GEC.shape == (BATCH // 2, 4, 0)
    counts = [torch.bincount(of.routed.assignment.expert_GSK.flatten()) for of in plan.classes]
    assert plan.count_WE.tolist() == [each.tolist() for each in counts]


def test_its_load_has_no_drops_and_every_choice_is_used():
    layer, batch = favouring("one empty", dropless=True), images_of_all(NESTED)
    static = favouring("one empty", capacity_ratio=4.0)
    static.load_state_dict(layer.state_dict())

    sums, expected = (
        load_sums([each(*batch[:2], NESTED, None)[1]], DIMS, routing="tokens_choose")
        for each in (layer, static)
    )

    but_slots = [index for index, name in enumerate(FIELDS) if name != "slots"]
    torch.testing.assert_close(sums[..., but_slots], expected[..., but_slots])
    told = summary(sums)
    assert (told["moe/drop_rate"], told["moe/gate_dropped"], told["moe/unreached"]) == (0, 0, 0)
    assert told["moe/dead_experts"] == 1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_macs_are_those_of_every_choice_once(k):
    layer, layout = dropless(), Layout.of((2, 2, 1, 2), DIMS)
    layer.set_capacity(k=k, capacity_ratio=None, batch_priority=None)
    residual, x, _ = operands(2, layout)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(residual, x, layout, None)

    assert layer.macs(layout) == counter.get_total_flops() / 2 / 2  # of two images


def test_k_can_be_changed_and_what_means_nothing_is_refused():
    layer, batch = dropless(k=1), images_of_all(NESTED)
    static = random_layer(k=2, capacity_ratio=4.0)
    static.load_state_dict(layer.state_dict())
    layer.set_capacity(k=2, capacity_ratio=None, batch_priority=None)
    assert_close(layer(*batch[:2], NESTED, None)[0], static(*batch[:2], NESTED, None)[0], "output")

    for wrong in ({"capacity_ratio": 2.0}, {"batch_priority": False}):
        with pytest.raises(
            RoutingError,
            match=r"capacity_ratio and batch_priority mean nothing .*dropless true\); set k",
        ):
            layer.set_capacity(**({"k": 1, "capacity_ratio": None, "batch_priority": None} | wrong))
    assert layer.k == 2
    with pytest.raises(CapacityError, match=r"experts\.dropless true.* no number of slots; set"):
        layer.capacity(14, 7)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"routing": "experts_choose"},
            r"experts\.dropless needs experts\.routing tokens_choose, got experts_choose",
        ),
        (
            {"batch_priority": True},
            r"experts\.batch_priority picks .*; set one of the two to false",
        ),
        ({"k": 0}, r"experts\.k must be 1 or more, got 0"),
        ({"k": 5}, r"experts\.k must be experts\.num_experts or fewer, got 5 of 4"),
        ({"group_images": 0}, r"experts\.group_images must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        model(**wrong)


def model(**changes):
    experts = ExpertsConfig(placement="every", num_experts=4, group_images=2, dropless=True)
    return ModelConfig(
        image_size=16,
        patch_size=4,
        dim=16,
        depth=2,
        heads=2,
        nesting=DENSE,
        experts=replace(experts, **changes),
    )


def test_no_capacity_is_asked_for_one():
    assert model(capacity_ratio=1e-9).experts.dropless
