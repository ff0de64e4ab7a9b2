"""A model as one of many ranks, simulated in one process: it computes what one alone computes.

How bytes travel is tested where it is decided, in `tests/cluster`.
"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

import mone_core.bank
from mone_core.bank import ExpertBank
from mone_core.experts import SparseMlp
from mone_core.models import DENSE
from mone_core.nested import Layout
from mone_core.parallel import expert_parameters, spread
from mone_core.ranks import ALONE
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
    of_images,
    step,
    step_of_one,
    whole_gradient,
)
from tests.mone_core.reference import EVERY_MODEL, EXPERTS, random_images, random_model
from tests.mone_core.simulated_ranks import SEED, Table
from tests.mone_core.sparse_reference import LOSSES, ROUTING, leaf, operands, random_layer

TABLES = [(1, 1), (1, 2), (1, 4), (2, 2), (4, 1)]  # rows: copies of the experts; columns
CHOICES = {
    "top 1": {"k": 1},
    "top 2": {"k": 2},
    "batch priority": {"batch_priority": True},
    "experts choose": {"routing": "experts_choose"},
}


def assert_ranks_equal_one_alone(layer, table, layout):
    """Output and all gradients; what is left is what all ranks' routers and the one's did."""
    all_operands = images_of_all(layout)
    torch.manual_seed(SEED)
    out, told, grads = step(layer, *all_operands, layout)

    steps = table.run(lambda rank: step_of_one(layer, rank, all_operands, layout))

    outs, tolds, parts = zip(*steps, strict=True)
    assert_close(torch.cat(outs, dim=1), out, "output")
    aux_losses = torch.stack([each.aux_loss.detach() for each in tolds])
    assert_close(aux_losses.mean(), told.aux_loss.detach(), "auxiliary loss")
    for name, grad in grads.items():
        theirs = whole_gradient(name, [each[name] for each in parts], table.columns)
        assert_close(theirs, grad, name)
    return tolds, told


def every_table(test):
    return pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t[0]}x{t[1]}")(test)


@every_table
@pytest.mark.parametrize("routing", CHOICES)
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("ratio", [0.3, 4.0])
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_many_ranks_compute_what_one_computes(layout, ratio, skew, routing, table):
    layer = favouring(skew, capacity_ratio=ratio, **CHOICES[routing])

    _, told = assert_ranks_equal_one_alone(layer, Table(*table), LAYOUTS[layout])

    if routing != "experts choose":
        seats = [each.assignment for each in told.classes]
        assert all(bool(each.kept_GSK.all()) for each in seats) == (ratio > 1)
        filled_E = torch.stack([each.filled_GEC.any(2).any(0) for each in seats]).any(0)
        if skew == "one empty":
            assert filled_E.tolist() == [False, True, True, True]
        if skew == "all to one":
            assert filled_E.tolist() == [False, layer.k == 2, True, False]


@every_table
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_noise_and_losses_of_training_do_not_depend_on_the_number_of_ranks(table, gelu):
    layer = random_layer(gelu, noise=1.0, **LOSSES).train()

    tolds, told = assert_ranks_equal_one_alone(layer, Table(*table), NESTED)

    for index, of_class in enumerate(told.classes):
        probs = [each.classes[index].probs_GSE for each in tolds]
        assert_close(torch.cat(probs), of_class.probs_GSE, "noisy probabilities")
    quiet = layer.eval()(*images_of_all(NESTED)[:2], NESTED, None)[1]
    assert (quiet.classes[0].probs_GSE != told.classes[0].probs_GSE).all()


@pytest.mark.usefixtures("_dirty_memory")
@every_table
@pytest.mark.parametrize("routing", CHOICES)
@pytest.mark.parametrize("skew", ["balanced", "all to one"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_poisoned_memory_never_leaks_from_rank_to_rank(layout, skew, routing, table):
    layer = favouring(skew, capacity_ratio=1.05, **CHOICES[routing])
    assert torch.empty(3).isnan().all()

    assert_ranks_equal_one_alone(layer, Table(*table), LAYOUTS[layout])


@every_table
def test_a_rest_of_a_ranks_images_is_a_group_of_its_own(table):
    """Ranks of three images in groups of two: as if each were alone with all experts."""
    layer, table = random_layer(capacity_ratio=0.6), Table(*table)
    world = len(table.ranks)
    residual, x, gate = operands(3 * world, NESTED)
    batch = (residual, x, gate, torch.randn_like(x))
    expected = [
        step(layer, *(of_images(each, rank) for each in batch), NESTED) for rank in table.ranks
    ]

    steps = table.run(lambda rank: step_of_one(layer, rank, batch, NESTED))

    for (out, *_), (expected_out, *_) in zip(steps, expected, strict=True):
        assert_close(out, expected_out, "output")
    for name in expected[0][2]:
        theirs = whole_gradient(name, [grads[name] for _, _, grads in steps], table.columns)
        pieces = [grads[name] for _, _, grads in expected]
        whole = torch.cat(pieces, dim=1) if name in ("residual", "x", "gate") else sum(pieces)
        assert_close(theirs, whole, name)


@pytest.mark.usefixtures("_dirty_memory")
@every_table
@pytest.mark.parametrize("counts", [(4, 2, 1, 0), (3, 4, 0, 0), (7, 0, 0, 0)])
def test_weights_past_the_widest_class_have_a_gradient_of_exactly_zero(counts, table):
    layer, layout = random_layer(), Layout.of(counts, DIMS)
    batch = images_of_all(layout)

    steps = Table(*table).run(lambda rank: step_of_one(layer, rank, batch, layout))

    for _, _, grads in steps:  # zero, not None: optimizers and sums over ranks want every gradient
        up, down = grads["bank.up_weight_EFD"], grads["bank.down_weight_EDF"]
        for past in (up[..., layout.reach :], down[:, layout.reach :]):
            assert past.numel()
            assert (past == 0).all()
        assert (grads["bank.down_bias_ED"][:, layout.reach :] == 0).all()
        assert (up[..., : layout.reach] != 0).any()


@pytest.mark.parametrize("table", [(1, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_class_is_sent_there_and_back_at_its_own_width(layout, table):
    layer, layout, table = random_layer(k=1), LAYOUTS[layout], Table(*table)
    batch = images_of_all(layout)

    steps = table.run(lambda rank: step_of_one(layer, rank, batch, layout))

    for rank, (_, told, _) in zip(table.ranks, steps, strict=True):
        seats = [(each.dim, each.assignment.choice_GEC.shape) for each in told.classes]
        here = [(4, groups * capacity, dim) for dim, (groups, _, capacity) in seats]
        ranks = rank.expert_ranks
        there = [(4 // ranks, ranks * slots, dim) for _, slots, dim in here]
        assert [(way, tuple(each.shape)) for way, each in rank.handed] == 2 * [
            *[("to experts", shape) for shape in here],
            *[("to tokens", shape) for shape in there],
        ]
        assert [dim for _, _, dim in here] == [segment.dim for segment in layout.segments]
        assert all(each.is_contiguous() for _, each in rank.handed)
        numbers = sum(each.numel() for _, each in rank.handed)
        assert numbers == 4 * sum(4 * slots * dim for _, slots, dim in here)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_sends_half_as_often(without):
    layer, table, batch = random_layer(), Table(1, 2), images_of_all(NESTED)
    expected, _ = layer(*batch[:2], NESTED, batch[2])

    out = infer_on(table, layer, batch, NESTED, without)

    assert_close(out, expected.detach(), "output")
    assert [len(rank.handed) for rank in table.ranks] == [2 * len(NESTED.segments)] * 2


def test_narrow_tokens_send_their_share_of_what_a_flat_layer_sends():
    """Eight tokens of an image, two of each width: as many slots as one class of eight has."""
    sent = {}
    for counts in [(2, 2, 2, 2), (0, 0, 0, 8)]:
        layer = random_layer(k=1, capacity_ratio=1.0)
        layout, table = Layout.of(counts, DIMS), Table(1, 2)
        batch = images_of_all(layout)
        table.run(partial(step_of_one, layer, operands=batch, layout=layout))
        sent[counts] = [sum(each.numel() for _, each in rank.handed) for rank in table.ranks]
    slots = BATCH // 2 * 8 * 1  # of a rank's tokens and all experts
    assert sent[0, 0, 0, 8] == [4 * slots * 8] * 2
    assert sent[2, 2, 2, 2] == [4 * slots // 4 * (1 + 2 + 4 + 8)] * 2


def test_classes_travel_while_others_are_computed_and_the_widest_goes_first():
    table, layout = Table(1, 2), Layout.of((0, 2, 1, 4), DIMS)
    layer, batch = random_layer(), images_of_all(layout)

    table.run(lambda rank: step_of_one(layer, rank, batch, layout))

    def exchanges(there, back):
        there, back = (
            [f"layer 3, width {dim}, {what}" for dim in (8, 4, 2)] for what in (there, back)
        )
        computed = [(("wait", come), ("send", go)) for come, go in zip(there, back, strict=True)]
        yield from (("send", each) for each in there)
        yield from (event for pair in computed for event in pair)
        yield from (("wait", each) for each in back)

    assert table.ranks[0].log == table.ranks[1].log
    assert table.ranks[0].log == [
        *exchanges("inputs", "outputs"),
        *exchanges("gradients of outputs", "gradients of inputs"),
    ]


def test_what_is_sent_is_contiguous_however_it_lies_in_memory():
    """Inputs in another order of axes, and the gradient of a sum: one number for all."""
    torch.manual_seed(SEED)
    whole = ExpertBank(4, 8, 5, "tanh").double()
    inputs = [leaf(6, d, 4).permute(2, 0, 1) for d in (8, 2)]

    def compute(rank):
        bank = copy.deepcopy(whole)
        bank.keep(rank.held(4))
        outs = bank(inputs, rank, "layer 3")
        return torch.autograd.grad(sum(each.sum() for each in outs), inputs)

    table = Table(1, 2)
    for grads in table.run(compute):
        expected = torch.autograd.grad(sum(each.sum() for each in whole(inputs)), inputs)
        for grad, other in zip(grads, expected, strict=True):
            assert_close(grad, other, "input")
    assert all(each.is_contiguous() for rank in table.ranks for _, each in rank.handed)


MODELS = {
    "V-MoE": EVERY_MODEL["V-MoE"],
    "nested sparse": EVERY_MODEL["nested sparse"],
    "dropless": {"experts": replace(EXPERTS, dropless=True)},
    "nested sparse, random router": {"experts": EXPERTS, "assignment": "random"},
    "two random routers": {
        "experts": replace(EXPERTS, group_images=1, batch_priority=True),
        "assignment": "random",
        "depth": 4,
        "router_layers": (0, 2),
    },
    "random router": EVERY_MODEL["random router"],
    "factorised clips": {**EVERY_MODEL["factorised clips, class tokens"], "assignment": "random"},
}


def steps_of_model(model, pixels, seed, parts=1):
    """Two forward passes, so that the second continues the first one's random numbers."""
    outs = [model(pixels), model(pixels)]
    loss = sum((each.logits_BK * seed).sum() + each.aux_loss / parts for each in outs)
    loss.backward()
    return outs, {name: parameter.grad for name, parameter in model.named_parameters()}


@every_table
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_in_training_do_not_depend_on_the_number_of_ranks(name, table):
    model = random_model(**MODELS[name]).train()
    table, pixels = Table(*table), random_images(BATCH, config=model.config)
    seed = torch.randn(BATCH, 5, dtype=torch.float64)

    def compute(rank):
        mine = copy.deepcopy(model)
        spread(mine, rank)
        parts = [each.chunk(rank.parts)[rank.rank] for each in (pixels, seed)]
        return steps_of_model(mine, *parts, rank.parts)

    steps = table.run(compute)
    torch.manual_seed(SEED)
    alone, grads = steps_of_model(model, pixels, seed)

    for index, one in enumerate(alone):
        outs = [of_rank[index] for of_rank, _ in steps]
        assert_close(torch.cat([each.logits_BK for each in outs]), one.logits_BK, "logits")
        for router, routed in enumerate(one.routed):
            experts = torch.cat([each.routed[router].expert_BN for each in outs])
            assert torch.equal(experts, routed.expert_BN)
    for parameter, grad in grads.items():
        if grad is not None:
            theirs = [of_rank[parameter] for _, of_rank in steps]
            assert_close(whole_gradient(parameter, theirs, table.columns), grad, parameter)


def test_a_router_of_random_numbers_gives_every_image_its_own():
    model = random_model(assignment="random")

    routed = model(random_images(BATCH, config=model.config)).routed[0]

    assert len({tuple(each) for each in routed.expert_BN.tolist()}) == BATCH


def test_one_process_alone_has_it_all_and_sends_nothing():
    tensor = torch.randn(4, 3, 2)

    assert (ALONE.parts, ALONE.expert_ranks) == (1, 1)
    assert ALONE.share(tensor, axis=1) is tensor
    assert ALONE.held(4) == range(4)
    assert ALONE.to_experts(tensor, "layer 3")() is tensor
    assert ALONE.to_tokens(tensor, "layer 3")() is tensor


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_keeps_its_experts_and_all_that_is_no_expert(rank):
    model = random_model(experts=EXPERTS, depth=4)
    model.encoder.blocks[3].mlp.bank.up_bias_EF.requires_grad_(False)
    whole = copy.deepcopy(model)
    of_two = Table(2, 2).ranks[rank]
    first = 2 * (rank % 2)

    spread(model, of_two)

    before, experts = dict(whole.named_parameters()), expert_parameters(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, parameter in model.named_parameters():
        expected = before[name][first : first + 2] if name in experts else before[name]
        assert torch.equal(parameter, expected)
        assert parameter.requires_grad == before[name].requires_grad
        assert parameter.untyped_storage().nbytes() == 8 * parameter.numel()  # the rest is gone
    assert model.encoder.ranks is of_two
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseMlp)}
    assert [(n, m.where) for n, m in layers.items()] == [(n, n) for n in layers]
    assert list(layers) == ["encoder.blocks.1.mlp", "encoder.blocks.3.mlp"]
    assert all(layer.ranks is of_two for layer in layers.values())
    assert model.macs() == whole.macs()


def test_parameters_of_experts_are_told_by_name():
    model = random_model(experts=EXPERTS, depth=4)
    stacked = ("up_weight_EFD", "up_bias_EF", "down_weight_EDF", "down_bias_ED")

    experts = expert_parameters(model)

    assert list(experts) == [
        f"encoder.blocks.{layer}.mlp.bank.{name}" for layer in (1, 3) for name in stacked
    ]
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is each for name, each in experts.items())
    assert expert_parameters(random_model(nesting=DENSE)) == {}


@every_table
@pytest.mark.parametrize("routing", ROUTING)
def test_ranks_that_stack_their_experts_compute_what_one_computes(routing, table, monkeypatch):
    # As on accelerators; there is none here to do it by itself.
    monkeypatch.setattr(mone_core.bank, "_parts", lambda stacked: (stacked,))
    layer = random_layer(capacity_ratio=0.6, **ROUTING[routing])

    assert_ranks_equal_one_alone(layer, Table(*table), NESTED)
