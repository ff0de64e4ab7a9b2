"""The layer of sparse experts: against the slow layers, poison, its switches, its cost."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mone_core.errors import CapacityError, RoutingError
from mone_core.experts import SparseMlp
from mone_core.nested import Layout
from tests.mone_core.no_sync import NoSync
from tests.mone_core.sparse_reference import (
    CONFIG,
    FLAT,
    HIDDEN,
    LOSSES,
    ROUTING,
    Rules,
    einsum_layer,
    nested_layer,
    operands,
    random_layer,
)

DIMS = (1, 2, 4, 8)
SIZES = [
    (experts, k, ratio)
    for experts in (1, 2, 4, 5)
    for k in sorted({1, min(2, experts), experts})
    for ratio in (0.25, 1.05, 4.0)
]


def rules_of(layer, gelu):
    config = layer.config
    return Rules(
        k=layer.k,
        capacity_ratio=layer.capacity_ratio,
        group_images=config.group_images,
        batch_priority=layer.batch_priority,
        experts_choose=config.routing == "experts_choose",
        gelu=gelu,
    )


def slow(layer, residual, x, gate, layout, gelu):
    """What the layer must return, by the slow form that fits the layout."""
    gate = torch.ones(*x.shape[:2], 1, dtype=x.dtype) if gate is None else gate
    images_first = [each.transpose(0, 1) for each in (residual, x, gate)]
    images_first[2] = images_first[2].squeeze(-1)
    operands = (*images_first, dict(layer.named_parameters()), rules_of(layer, gelu))
    if layout.segments == (layout.segments[0],) and layout.segments[0].dim == layout.dim:
        out_BND = einsum_layer(*operands)
    else:
        out_BND = nested_layer(*operands, [(s.stop - s.start, s.dim) for s in layout.segments])
    return out_BND.transpose(0, 1)


def assert_equals_the_reference(layer, residual, x, gate, layout=FLAT, gelu="tanh"):
    """Output, and every gradient; what is left is the layer's output and gradients by name."""
    leaves = {"residual": residual, "x": x, **dict(layer.named_parameters())}
    if gate is not None:
        leaves["gate"] = gate
    out, _ = layer(residual, x, layout, gate)
    expected = slow(layer, residual, x, gate, layout, gelu)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    seed = torch.randn_like(out)
    ours = torch.autograd.grad(out, list(leaves.values()), seed)
    theirs = torch.autograd.grad(expected, list(leaves.values()), seed, materialize_grads=True)
    for name, one, other in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    return out, dict(zip(leaves, ours, strict=True))


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize(("experts", "k", "ratio"), SIZES)
def test_the_layer_equals_one_hot_einsums(experts, k, ratio, routing):
    """Two whole groups and a remainder of one image; output and all gradients."""
    layer = random_layer(num_experts=experts, k=k, capacity_ratio=ratio, **ROUTING[routing])

    assert_equals_the_reference(layer, *operands(batch=5))


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_layer_equals_one_hot_einsums_with_either_gelu_and_with_no_gate(gelu, gated):
    assert_equals_the_reference(random_layer(gelu), *operands(batch=5, gated=gated), gelu=gelu)


@pytest.mark.parametrize(("batch", "group"), [(1, 2), (3, 8), (4, 2), (3, 1), (7, 3), (6, 6)])
def test_batches_of_any_size_are_cut_into_groups(batch, group):
    layer = random_layer(group_images=group, capacity_ratio=0.6)

    assert_equals_the_reference(layer, *operands(batch))
    _, told = layer(*operands(batch, gated=False)[:2], FLAT, None)
    sizes = [each.assignment.kept_GSK.shape[:2] for each in told.classes]
    images = [groups * tokens // 7 for groups, tokens in sizes]
    assert sum(images) == batch
    assert len(sizes) == (2 if batch > group and batch % group else 1)


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("ratio", [0.3, 4.0])
def test_skewed_routing_is_no_exception(routing, k, ratio):
    """All tokens want expert 2 first and expert 1 next; experts 0 and 3 may stay empty."""
    layer = random_layer(k=k, capacity_ratio=ratio, **ROUTING[routing])
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.tensor([-40.0, 30, 40, -30])
    residual, x, gate = operands(batch=5)
    with torch.no_grad():
        x[..., 0] = 1 + 0.01 * x[..., 0]

    _, grads = assert_equals_the_reference(layer, residual, x, gate)

    _, told = layer(residual, x, FLAT, gate)
    if routing != "experts_choose":
        filled = [each.assignment.filled_GEC.any(2).all(0) for each in told.classes]
        assert all(each.tolist() == [False, k == 2, True, False] for each in filled)
        for name in ("up_weight_EFD", "up_bias_EF", "down_weight_EDF", "down_bias_ED"):
            assert (grads["bank." + name][[0, 3]] == 0).all()
            assert (grads["bank." + name][2] != 0).any()


def test_a_token_that_loses_all_its_choices_is_left_as_it_was():
    layer = random_layer(capacity_ratio=0.25)
    residual, x, gate = operands(batch=4)

    out, told = layer(residual, x, FLAT, gate)

    (only,) = told.classes
    lost = ~only.assignment.kept_GSK.any(2).view(4, 7).t()
    assert lost.any()
    assert torch.equal(out[lost], residual[lost])
    assert (out[~lost] != residual[~lost]).any(-1).all()


@pytest.mark.parametrize("routing", ["vanilla", "batch_priority"])
def test_all_experts_and_room_for_all_is_the_weighted_sum_of_all_experts(routing):
    layer = random_layer(k=4, capacity_ratio=4.0, **ROUTING[routing])
    residual, x, _ = operands(batch=4)
    bank = layer.bank
    h = torch.einsum("nbd,efd->nbef", x, bank.up_weight_EFD) + bank.up_bias_EF
    h = torch.nn.functional.gelu(h, approximate="tanh")
    y = torch.einsum("nbef,edf->nbed", h, bank.down_weight_EDF) + bank.down_bias_ED
    probs = (x @ layer.router.weight.t()).softmax(-1)

    out, _ = layer(residual, x, FLAT, None)

    torch.testing.assert_close(out, residual + torch.einsum("nbed,nbe->nbd", y, probs))


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "counts",
    [(2, 2, 1, 2), (0, 3, 0, 4), (4, 2, 1, 0), (0, 0, 7, 0), (7, 0, 0, 0), (6, 0, 0, 1)],
)
def test_nested_experts_equal_one_token_at_a_time(counts, gated, routing):
    layer = random_layer(capacity_ratio=0.6, **ROUTING[routing])
    layout = Layout.of(counts, DIMS)
    residual, x, gate = operands(5, layout, gated)

    out, grads = assert_equals_the_reference(layer, residual, x, gate, layout)

    for segment in layout.segments:
        at = slice(segment.start, segment.stop)
        assert torch.equal(out[at, :, segment.dim :], residual[at, :, segment.dim :])
    reached = layout.reach  # zero, not None: optimizers want every gradient
    assert (grads["bank.up_weight_EFD"][:, :, reached:] == 0).all()
    assert (grads["bank.down_weight_EDF"][:, reached:] == 0).all()
    assert (grads["bank.down_bias_ED"][:, reached:] == 0).all()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("ratio", [0.25, 4.0])
def test_nested_experts_equal_one_token_at_a_time_with_any_capacity(k, ratio):
    layout = Layout.of((2, 2, 1, 2), DIMS)

    assert_equals_the_reference(
        random_layer(k=k, capacity_ratio=ratio), *operands(3, layout), layout
    )


def test_every_width_class_has_its_share_of_every_expert():
    layout = Layout.of((4, 0, 2, 1), DIMS)
    layer = random_layer(k=1, capacity_ratio=1.0, num_experts=2)

    _, told = layer(*operands(4, layout)[:2], layout, None)

    slots = [each.assignment.choice_GEC.shape for each in told.classes]
    assert slots == [(2, 2, 1), (2, 2, 2), (2, 2, 4)]  # groups, experts, of 2, 4 and 8 tokens


@pytest.mark.usefixtures("_dirty_memory")
@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("counts", [(0, 0, 0, 7), (2, 2, 1, 2), (4, 2, 1, 0)])
@pytest.mark.parametrize("ratio", [0.25, 4.0])
def test_poisoned_memory_never_leaks(counts, routing, ratio):
    """Empty slots, features past a width, an expert with no token: nothing of them is seen."""
    layer = random_layer(capacity_ratio=ratio, **ROUTING[routing])
    with torch.no_grad():
        layer.router.weight[0] = -20.0
    layout = Layout.of(counts, DIMS)
    residual, x, gate = operands(5, layout)
    with torch.no_grad():
        x.abs_()  # nobody wants expert 0
    assert torch.empty(3).isnan().all()

    assert_equals_the_reference(layer, residual, x, gate, layout)


def test_the_residual_and_the_input_are_read_and_never_written():
    residual, x, gate = operands(batch=5)
    before = [each.detach().clone() for each in (residual, x, gate)]

    random_layer()(residual, x, FLAT, gate)[0].sum().backward()

    assert all(torch.equal(*pair) for pair in zip((residual, x, gate), before, strict=True))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("counts", [(0, 0, 0, 7), (2, 2, 1, 2)])
def test_without_gradients_the_layer_computes_the_same(without, counts):
    layer, layout = random_layer(), Layout.of(counts, DIMS)
    residual, x, gate = operands(5, layout)
    expected, _ = layer(residual, x, layout, gate)

    with without():
        out, _ = layer(residual, x, layout, gate)

    assert torch.equal(out, expected)


def test_two_runs_agree_to_the_last_bit():
    layer, (residual, x, gate) = random_layer(), operands(batch=5)
    runs = []
    for _ in range(2):
        out, _ = layer(residual, x, FLAT, gate)
        runs.append([out, *torch.autograd.grad(out.sum(), [x, gate, *layer.parameters()])])

    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_score_in_float32(dtype):
    layer = random_layer(k=4, capacity_ratio=4.0)
    residual, x, _ = operands(batch=4)
    expected, _ = layer(residual, x, FLAT, None)

    out, told = layer.to(dtype)(residual.to(dtype), x.to(dtype), FLAT, None)

    assert out.dtype == dtype
    assert told.classes[0].assignment.weight_GSK.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.1)
    out.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


class Products(TorchDispatchMode):
    """Notes the dtype of every matrix product."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.dtypes.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


def test_autocast_reaches_the_experts_and_leaves_the_residual_alone():
    layer = random_layer().float()
    residual, x, _ = (each.detach().float() for each in operands(batch=5))
    expected, _ = layer(residual, x, FLAT, None)

    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        out, _ = layer(residual, x, FLAT, None)
        out.sum().backward()

    assert products.dtypes == {torch.bfloat16}
    assert out.dtype == torch.float32
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )
    near = (out - expected).abs().amax(-1) < 0.2  # a close score may fall the other way
    assert near.float().mean() > 0.8


def test_choices_are_weighted_in_float32_under_autocast():
    layer = random_layer(k=1, capacity_ratio=4.0).float()
    with torch.no_grad():
        layer.bank.down_weight_EDF.zero_()
        layer.bank.down_bias_ED.fill_(1)  # so that every expert's output is 1
    _, x, _ = (each.detach().float() for each in operands(batch=2))

    with torch.autocast("cpu", torch.bfloat16):
        out, told = layer(torch.zeros_like(x), x, FLAT, None)

    weight_NB1 = told.classes[0].assignment.weight_GSK.view(2, 7, 1).transpose(0, 1)
    torch.testing.assert_close(out, weight_NB1.expand_as(out), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 2])
def test_the_router_learns_through_the_weights_of_its_choices(k):
    """Not renormalised, so that even a single choice has a gradient."""
    layer = random_layer(k=k)

    layer(*operands(4)[:2], FLAT, None)[0].sum().backward()

    assert (layer.router.weight.grad != 0).all()


def test_experts_start_equal_and_apart_in_memory():
    layer = SparseMlp(64, 96, CONFIG, "tanh")
    bank = layer.bank

    for weight in (bank.up_weight_EFD, bank.down_weight_EDF):
        assert (weight == weight[0]).all()
        assert weight.std().item() == pytest.approx((2 / (64 + 96)) ** 0.5, rel=0.05)  # Xavier
        assert weight.is_contiguous()
    assert (bank.up_bias_EF == 0).all()
    assert (bank.down_bias_ED == 0).all()
    assert not torch.equal(bank.up_weight_EFD[0].flatten(), bank.down_weight_EDF[0].flatten())
    with torch.no_grad():
        bank.up_weight_EFD[0] += 1
    assert (bank.up_weight_EFD[0] != bank.up_weight_EFD[1]).all()


def test_the_router_has_no_bias_and_starts_with_unit_logits():
    router = SparseMlp(256, 4, replace(CONFIG, num_experts=64), "tanh").router

    assert router.bias is None
    assert router.weight.shape == (64, 256)
    assert router.weight.std().item() == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 1},
        {"k": 4},
        {"capacity_ratio": 0.3},
        {"batch_priority": True},
        {"k": 3, "capacity_ratio": 0.5, "batch_priority": True},
    ],
)
def test_a_changed_capacity_is_as_if_it_had_always_been(changes):
    layer = random_layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    built = SparseMlp(8, HIDDEN, replace(layer.config, **changes), "tanh").double().eval()
    built.load_state_dict(layer.state_dict())
    residual, x, gate = operands(batch=5)

    layer.set_capacity(**{"k": None, "capacity_ratio": None, "batch_priority": None, **changes})

    assert torch.equal(layer(residual, x, FLAT, gate)[0], built(residual, x, FLAT, gate)[0])
    assert layer.macs(FLAT) == built.macs(FLAT)
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert_equals_the_reference(layer, residual, x, gate)


def test_what_a_change_leaves_out_stays_as_it_was_last_set():
    layer = random_layer(batch_priority=True)

    layer.set_capacity(k=3, capacity_ratio=None, batch_priority=None)
    layer.set_capacity(k=None, capacity_ratio=0.5, batch_priority=None)
    assert (layer.k, layer.capacity_ratio, layer.batch_priority) == (3, 0.5, True)
    layer.set_capacity(k=None, capacity_ratio=None, batch_priority=False)
    assert (layer.k, layer.capacity_ratio, layer.batch_priority) == (3, 0.5, False)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"k": 0}, RoutingError, r"k must be a whole number between 1 and the 4 experts, got 0"),
        ({"k": 5}, RoutingError, r"k must be a whole number between 1 and the 4 experts, got 5"),
        ({"capacity_ratio": 0.0}, CapacityError, r"capacity_ratio must be above 0.*, got 0\.0"),
        ({"capacity_ratio": -1.0}, CapacityError, r"capacity_ratio must be above 0.*, got -1\.0"),
        (
            {"capacity_ratio": float("nan")},
            CapacityError,
            r"capacity_ratio must be above 0.*, got nan",
        ),
        ({"capacity_ratio": float("inf")}, CapacityError, r"capacity_ratio must be .*, got inf"),
        ({"k": 3, "capacity_ratio": -1.0}, CapacityError, r"capacity_ratio must be above 0"),
        (
            {"k": 5, "capacity_ratio": 0.5},
            RoutingError,
            r"k must be a whole number between 1 and the 4 experts",
        ),
    ],
)
def test_a_bad_capacity_is_refused_and_changes_nothing(changes, error, says):
    layer = random_layer()
    given = {"k": None, "capacity_ratio": None, "batch_priority": True, **changes}

    with pytest.raises(error, match=says):
        layer.set_capacity(**given)
    assert (layer.k, layer.capacity_ratio, layer.batch_priority) == (2, 1.05, False)


def test_an_expert_without_a_slot_is_refused_in_the_forward_pass():
    layer = random_layer(capacity_ratio=0.02, rounding="nearest")

    with pytest.raises(CapacityError, match=r"an expert gets 0\.14 slots for 14 tokens \(k 2, 4 e"):
        layer(*operands(4)[:2], FLAT, None)


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize(("k", "ratio"), [(1, 1.0), (2, 0.4), (4, 4.0)])
@pytest.mark.parametrize("counts", [(0, 0, 0, 7), (2, 2, 1, 2), (4, 2, 1, 0)])
def test_the_formula_of_its_cost_equals_the_products_it_makes(counts, k, ratio, routing):
    """And a backward pass costs twice as much: no slot or feature is computed in vain."""
    layer = random_layer(k=k, capacity_ratio=ratio, group_images=3, **ROUTING[routing])
    layout = Layout.of(counts, DIMS)
    residual, x, gate = operands(3, layout)

    with FlopCounterMode(display=False) as counter:
        out, _ = layer(residual, x, layout, gate)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert layer.macs(layout) == round(forward / 2 / 3)  # of three images
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("counts", [(0, 0, 0, 7), (2, 2, 1, 2)])
def test_the_host_never_waits(counts, routing):
    layer = random_layer(noise=1.0, **LOSSES, **ROUTING[routing]).train()
    layout = Layout.of(counts, DIMS)
    residual, x, gate = operands(5, layout)

    with NoSync():
        out, told = layer(residual, x, layout, gate)
        (out.sum() + told.aux_loss).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("routing", ROUTING)
def test_all_shapes_are_known_without_a_number(routing):
    """The meta device has no values that a host could read."""
    layer = random_layer(noise=1.0, **LOSSES, **ROUTING[routing]).train().to("meta")
    layout = Layout.of((2, 2, 1, 2), DIMS)
    residual, x, gate = (each.detach().to("meta").requires_grad_() for each in operands(5, layout))

    out, told = layer(residual, x, layout, gate)
    (out.sum() + told.aux_loss).backward()

    assert out.shape == x.grad.shape == (7, 5, 8)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: int(x[0]),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
        lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())),
        lambda x: x.unique(),
        lambda x: torch.unique(x.view(2, 2), dim=0),
        lambda x: x.unique_consecutive(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.long().abs().bincount(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1])),
    ],
)
def test_the_watch_sees_a_host_that_waits(waits):
    x = torch.tensor([1.0, -1.0, 2.0, -2.0])
    waits(x)

    with pytest.raises(AssertionError, match=r"^aten::"), NoSync():
        waits(x)


def test_the_watch_lets_whole_numbers_and_masks_of_equal_shape_pass():
    x, index = torch.randn(4, requires_grad=True), torch.tensor([3, 0])

    with NoSync():
        (x[index].sum() + x.where(x > 0, 0).sum() + x[:, None][1:].sum()).backward()
        again = x.detach().repeat_interleave(torch.tensor([1, 2, 0, 1]), output_size=4)

    assert x.grad is not None
    assert again.shape == (4,)
