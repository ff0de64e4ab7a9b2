"""Nested linear layers: against masked full-width ones, numerical gradients, and dirty memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mone_core.errors import CapacityError
from mone_core.nested import Layout, Segment, nested_in, nested_mlp, nested_out

DIMS = (1, 2, 4)
COUNTS = [(2, 2, 1), (5, 0, 0), (0, 5, 0), (0, 0, 5), (0, 3, 2), (3, 2, 0), (4, 0, 1)]
BATCH, HIDDEN = 2, 3


def widths_of(counts, dims=DIMS):
    """Features of each token, widest first."""
    pairs = zip(reversed(counts), reversed(dims), strict=True)
    return list(itertools.chain.from_iterable([dim] * count for count, dim in pairs))


def mask_of(counts, dims=DIMS):
    """1 where a token computes a feature: `[N, 1, D]`."""
    rows = [[float(i < width) for i in range(dims[-1])] for width in widths_of(counts, dims)]
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1)


def masked_in(x, weight, bias, mask):
    return (x * mask) @ weight.t() + bias


def masked_out(residual, h, weight, bias, mask, gate=None):
    return residual + (1 if gate is None else gate) * mask * (h @ weight.t() + bias)


def masked_mlp(residual, x, up, up_bias, down, down_bias, mask, gate=None, approximate="tanh"):
    h = F.gelu(masked_in(x, up, up_bias, mask), approximate=approximate)
    return masked_out(residual, h, down, down_bias, mask, gate)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def operands(num_tokens=5, dim=DIMS[-1]):
    """x or residual, hidden, weight up, bias up, weight down, bias down, gate."""
    return (
        leaf(num_tokens, BATCH, dim),
        leaf(num_tokens, BATCH, HIDDEN),
        leaf(HIDDEN, dim),
        leaf(HIDDEN),
        leaf(dim, HIDDEN),
        leaf(dim),
        leaf(num_tokens, BATCH, 1),
    )


def test_a_layout_puts_the_widest_tokens_first_and_leaves_out_empty_classes():
    layout = Layout.of((3, 0, 2, 1), (2, 4, 8, 16))

    assert layout.dim == 16
    assert layout.segments == (Segment(0, 1, 16), Segment(1, 3, 8), Segment(3, 6, 2))
    assert layout.reach == 16


def test_a_layout_keeps_the_full_width_where_no_token_has_it():
    layout = Layout.of((3, 1, 0, 0), (2, 4, 8, 16))

    assert layout.dim == 16
    assert layout.reach == 4


@pytest.mark.parametrize("counts", COUNTS)
def test_segments_cover_every_element_that_is_computed_once(counts):
    covered = torch.zeros(5, 4)
    for segment in Layout.of(counts, DIMS).segments:
        covered[segment.start : segment.stop, : segment.dim] += 1

    assert torch.equal(covered, mask_of(counts).squeeze(1).float())


@pytest.mark.parametrize(
    ("counts", "dims"),
    [
        ((1, 2), (1, 2, 4)),
        ((1, 2), (4, 2)),
        ((1, 2), (2, 2)),
        ((3, -1), (1, 2)),
        ((0, 0), (1, 2)),
        ((), ()),
    ],
)
def test_counts_and_dims_that_do_not_pair_up_are_refused(counts, dims):
    with pytest.raises(
        CapacityError,
        match=r"need one count \(0 or more, one above 0\) per nested dim and rising dims, "
        r"got counts \(.*\) for",
    ):
        Layout.of(counts, dims)


@pytest.mark.parametrize("counts", COUNTS)
def test_nested_in_equals_a_masked_full_width_layer(counts):
    x, _, weight, bias, *_ = operands()
    out = nested_in(x, weight, bias, Layout.of(counts, DIMS))
    expected = masked_in(x, weight, bias, mask_of(counts))

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    assert out.is_contiguous()
    compare_gradients(out, expected, (x, weight, bias))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_nested_out_equals_a_masked_full_width_layer(counts, gated):
    x, h, _, _, weight, bias, gate = operands()
    gate = gate if gated else None
    out = nested_out(x, h, weight, bias, Layout.of(counts, DIMS), gate)
    expected = masked_out(x, h, weight, bias, mask_of(counts), gate)

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    assert out.is_contiguous()
    compare_gradients(out, expected, (x, h, weight, bias, *([gate] if gated else [])))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_nested_mlp_equals_two_masked_full_width_layers(counts, gated, approximate):
    x, _, *weights, gate = operands()
    residual, gate = leaf(5, BATCH, 4), gate if gated else None
    out = nested_mlp(residual, x, *weights, Layout.of(counts, DIMS), gate, approximate=approximate)
    expected = masked_mlp(residual, x, *weights, mask_of(counts), gate, approximate)

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    assert out.is_contiguous()
    inputs = (residual, x, *weights, *([gate] if gated else []))
    compare_gradients(out, expected, inputs)


def test_nested_mlp_gives_the_same_numbers_whether_or_not_gradients_are_wanted():
    x, _, *weights, gate = operands()
    arguments = (leaf(5, BATCH, 4), x, *weights, Layout.of((2, 2, 1), DIMS), gate)
    learning = nested_mlp(*arguments)
    with torch.no_grad():
        plain = nested_mlp(*arguments)
    with torch.inference_mode():
        inference = nested_mlp(*arguments)

    assert learning.requires_grad
    assert not plain.requires_grad
    assert torch.equal(plain, learning)
    assert torch.equal(inference, learning)


def test_a_graph_that_is_kept_can_be_walked_twice():
    """Nothing that was saved is written over."""
    x, h, weight_up, bias_up, weight_down, bias_down, gate = operands()
    layout = Layout.of((2, 2, 1), DIMS)
    mlp = nested_mlp(x, x, weight_up, bias_up, weight_down, bias_down, layout, gate)
    plain = nested_out(x, h, weight_down, bias_down, layout, gate)
    out = mlp.sum() + plain.sum() + nested_in(x, weight_up, bias_up, layout).sum()
    leaves = (x, h, weight_up, bias_up, weight_down, bias_down, gate)

    once = torch.autograd.grad(out, leaves, retain_graph=True)
    twice = torch.autograd.grad(out, leaves)
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


def compare_gradients(out, expected, inputs):
    seed = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, seed)
    theirs = torch.autograd.grad(expected, inputs, seed)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", COUNTS)
def test_numerical_gradients_agree(counts):
    x, h, weight_up, bias_up, weight_down, bias_down, gate = operands()
    layout = Layout.of(counts, DIMS)

    assert torch.autograd.gradcheck(lambda *a: nested_in(*a, layout), (x, weight_up, bias_up))
    assert torch.autograd.gradcheck(
        lambda x, h, w, b: nested_out(x, h, w, b, layout), (x, h, weight_down, bias_down)
    )
    assert torch.autograd.gradcheck(
        lambda x, h, w, b, g: nested_out(x, h, w, b, layout, g),
        (x, h, weight_down, bias_down, gate),
    )
    assert torch.autograd.gradcheck(
        lambda *a: nested_mlp(*a[:-1], layout, a[-1]),
        (x, leaf(*x.shape), weight_up, bias_up, weight_down, bias_down, gate),
    )


def test_operands_and_gradients_may_lie_in_memory_in_any_order():
    counts = (2, 2, 1)
    layout, mask = Layout.of(counts, DIMS), mask_of(counts)
    x = leaf(BATCH, 5, 4).transpose(0, 1)
    h = leaf(HIDDEN, BATCH, 5).permute(2, 1, 0)
    weight_up, weight_down = leaf(4, HIDDEN).t(), leaf(HIDDEN, 4).t()
    bias_up, bias_down, gate = leaf(HIDDEN), leaf(4), leaf(1, BATCH, 5).permute(2, 1, 0)

    up = nested_in(x, weight_up, bias_up, layout)
    compare_gradients(up, masked_in(x, weight_up, bias_up, mask), (x, weight_up, bias_up))
    inputs = (x, h, weight_down, bias_down)
    down = nested_out(*inputs, layout, gate)
    expected = masked_out(*inputs, mask, gate)
    compare_gradients(down, expected, (*inputs, gate))
    ours = torch.autograd.grad(nested_out(*inputs, layout, gate).sum(), (*inputs, gate))  # stride 0
    theirs = torch.autograd.grad(masked_out(*inputs, mask, gate).sum(), (*inputs, gate))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    inputs = (leaf(4, BATCH, 5).permute(2, 1, 0), x, weight_up, bias_up, weight_down, bias_down)
    mlp, expected = nested_mlp(*inputs, layout, gate), masked_mlp(*inputs, mask, gate)
    compare_gradients(mlp, expected, (*inputs, gate))


def test_the_residual_is_read_and_never_written():
    x, h, weight_up, bias_up, weight, bias, gate = operands()
    layout, before = Layout.of((2, 2, 1), DIMS), x.detach().clone()

    nested_out(x, h, weight, bias, layout, gate).sum().backward()
    nested_mlp(x, leaf(*x.shape), weight_up, bias_up, weight, bias, layout, gate).sum().backward()

    assert torch.equal(x, before)


@pytest.mark.parametrize("counts", COUNTS)
def test_features_past_a_tokens_width_are_the_residuals_own(counts):
    x, h, _, _, weight, bias, gate = operands()
    out = nested_out(x, h, weight, bias, Layout.of(counts, DIMS), gate)
    past = mask_of(counts).expand_as(out) == 0

    assert torch.equal(out[past], x[past])


def test_what_lies_past_a_tokens_width_is_never_read():
    counts = (2, 2, 1)
    x, _, weight, bias, *_ = operands()
    poisoned = torch.where(mask_of(counts) == 1, x, float("nan"))

    out = nested_in(poisoned, weight, bias, Layout.of(counts, DIMS))
    (grad_weight,) = torch.autograd.grad(out.sum(), weight)
    mlp = nested_mlp(x, poisoned, weight, bias, *operands()[4:6], Layout.of(counts, DIMS))
    (grad_up,) = torch.autograd.grad(mlp.sum(), weight)

    assert out.isfinite().all()
    assert grad_weight.isfinite().all()
    assert mlp.isfinite().all()
    assert grad_up.isfinite().all()


@pytest.mark.usefixtures("_dirty_memory")
@pytest.mark.parametrize("counts", COUNTS)
def test_no_element_of_a_result_or_gradient_is_left_unwritten(counts):
    """Above all where the widest class is empty and nothing computes the last features."""
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    x, h, weight_up, bias_up, weight_down, bias_down, gate = operands()
    layout = Layout.of(counts, DIMS)

    up = nested_in(x, weight_up, bias_up, layout)
    down = nested_out(x, h, weight_down, bias_down, layout, gate)
    plain = nested_out(x, h, weight_down, bias_down, layout)
    mlp = nested_mlp(x, x, weight_up, bias_up, weight_down, bias_down, layout, gate)
    (up.sum() + down.sum() + plain.sum() + mlp.sum()).backward()

    results = {"up": up, "down": down, "plain": plain, "mlp": mlp}
    leaves = {"x": x, "h": h, "weight_up": weight_up, "bias_up": bias_up}
    leaves |= {"weight_down": weight_down, "bias_down": bias_down, "gate": gate}
    results |= {name: value.grad for name, value in leaves.items()}
    assert [name for name, value in results.items() if value.isnan().any()] == []


@pytest.mark.parametrize("counts", [(3, 2, 0), (5, 0, 0)])
def test_weights_that_no_token_reaches_get_a_gradient_of_exactly_zero(counts):
    """Zero, not None: optimizers and data-parallel training want every gradient."""
    x, h, weight_up, bias_up, weight_down, bias_down, _ = operands()
    layout = Layout.of(counts, DIMS)
    reached = layout.reach

    nested_in(x, weight_up, bias_up, layout).sum().backward()
    nested_out(x, h, weight_down, bias_down, layout).sum().backward()

    assert (weight_up.grad[:, reached:] == 0).all()
    assert (weight_down.grad[reached:] == 0).all()
    assert (bias_down.grad[reached:] == 0).all()

    weights = [leaf(*w.shape) for w in (weight_up, bias_up, weight_down, bias_down)]
    nested_mlp(x, x, *weights, layout).sum().backward()
    assert (weights[0].grad[:, reached:] == 0).all()
    assert all((weight.grad[reached:] == 0).all() for weight in weights[2:])


@pytest.mark.parametrize("counts", COUNTS)
def test_all_three_products_cost_only_the_features_that_are_used(counts):
    """Forward, and both gradients: no full-width product in disguise."""
    x, h, weight_up, bias_up, weight_down, bias_down, gate = operands()
    layout = Layout.of(counts, DIMS)
    once = 2 * BATCH * HIDDEN * sum(widths_of(counts))

    with FlopCounterMode(display=False) as counter:
        out = nested_in(x, weight_up, bias_up, layout)
        assert counter.get_total_flops() == once
        out.sum().backward()
        assert counter.get_total_flops() == 3 * once
    with FlopCounterMode(display=False) as counter:
        nested_out(x, h, weight_down, bias_down, layout, gate).sum().backward()
        assert counter.get_total_flops() == 3 * once
    with FlopCounterMode(display=False) as counter:
        out = nested_mlp(x, x, weight_up, bias_up, weight_down, bias_down, layout, gate)
        assert counter.get_total_flops() == 2 * once
        out.sum().backward()
        assert counter.get_total_flops() == 6 * once


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, _, weight, bias, *_ = operands()
    out = nested_in(x, weight, bias, Layout.of((2, 2, 1), DIMS))
    (grad,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
