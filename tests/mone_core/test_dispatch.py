"""Tokens to slots and back: index tables that agree, plain loops, numerical gradients, poison."""

import itertools

import pytest
import torch

from mone_core.dispatch import combine, dispatch, plan_slots
from mone_core.nested import Layout
from mone_core.routing import expert_choice, top_k_assignment
from tests.mone_core.sparse_reference import slow_top_k

DIMS = (1, 2, 4)
COUNTS = [(0, 0, 6), (2, 1, 3), (3, 0, 3), (2, 4, 0), (6, 0, 0)]
BATCH, EXPERTS = 4, 3
GROUPS = [1, 2, 4]  # images that are routed together


def vanilla(probs_GSE):
    return top_k_assignment(probs_GSE, 2, max(1, probs_GSE.shape[1] // 2))


def tight(probs_GSE):
    return top_k_assignment(probs_GSE, 2, 1, batch_priority=True)


def one_choice(probs_GSE):
    return top_k_assignment(probs_GSE, 1, 2)


def chosen(probs_GSE):
    return expert_choice(probs_GSE, max(1, probs_GSE.shape[1] // 3))


ASSIGN = [vanilla, tight, one_choice, chosen]


def random_probs(num_tokens=6):
    return torch.randn(num_tokens, BATCH, EXPERTS, dtype=torch.float64).mul(2).softmax(-1)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def width_of_rows(layout):
    """Features of every row, a token of an image."""
    widths = [[s.dim] * (s.stop - s.start) * BATCH for s in layout.segments]
    return list(itertools.chain.from_iterable(widths))


def used(plan):
    """Where `EQD` means something: filled slots, features of the slot's width."""
    mask = torch.zeros(*plan.filled_EQ.shape, plan.tokens.dim, dtype=torch.bool)
    for segment in plan.slots.segments:
        mask[:, segment.start : segment.stop, : segment.dim] = True
    return mask & plan.filled_EQ.unsqueeze(-1)


def every_plan(test):
    test = pytest.mark.parametrize("counts", COUNTS)(test)
    test = pytest.mark.parametrize("assign", ASSIGN)(test)
    return pytest.mark.parametrize("group", GROUPS)(test)


@every_plan
def test_the_tables_of_rows_and_of_slots_tell_the_same(counts, assign, group):
    probs = random_probs()
    plan = plan_slots(probs, Layout.of(counts, DIMS), group, assign)
    k, num_slots = plan.slot_RK.shape[1], plan.row_EQ.shape[1]
    from_rows = {
        (int(plan.slot_RK[row, choice]), row * k + choice)
        for row, choice in plan.kept_RK.nonzero().tolist()
    }
    from_slots = {
        (expert * num_slots + place, int(plan.choice_EQ[expert, place]))
        for expert, place in plan.filled_EQ.nonzero().tolist()
    }

    assert from_rows == from_slots
    assert len(from_rows) == plan.kept_RK.sum() == plan.filled_EQ.sum()
    assert torch.equal((plan.choice_EQ // k)[plan.filled_EQ], plan.row_EQ[plan.filled_EQ])
    assert (plan.weight_RK[~plan.kept_RK] == 0).all()
    probs_RE = probs.flatten(0, 1)
    for slot, choice in from_rows:
        row = choice // k
        assert plan.weight_RK[row, choice % k] == probs_RE[row, slot // num_slots]


@every_plan
def test_all_indices_can_be_followed_even_where_nothing_is_kept(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)

    for index, end in (
        (plan.row_EQ, 6 * BATCH),
        (plan.choice_EQ, plan.weight_RK.numel()),
        (plan.slot_RK, plan.row_EQ.numel()),
    ):
        assert index.dtype == torch.int64
        assert (index >= 0).all()
        assert (index < end).all()


@every_plan
def test_a_class_and_a_group_have_slots_of_their_own(counts, assign, group):
    """Features that a row has not got are never asked for, not even by a dropped choice."""
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    widths, num_slots = width_of_rows(plan.tokens), plan.row_EQ.shape[1]
    owner = []
    for slots, each in zip(plan.slots.segments, plan.assignments, strict=True):
        capacity = each.choice_GEC.shape[2]
        assert slots.stop - slots.start == BATCH // group * capacity
        owner += [(slots.dim, g) for g in range(BATCH // group) for _ in range(capacity)]

    assert len(owner) == num_slots
    for row, slots in enumerate(plan.slot_RK.tolist()):
        for slot in slots:
            assert owner[slot % num_slots] == (widths[row], row % BATCH // group)
    for rows in plan.row_EQ.tolist():
        assert [(widths[row], row % BATCH // group) for row in rows] == owner


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_tokens_compete_within_their_class_and_group_image_by_image(group, priority):
    counts, probs = (2, 1, 3), random_probs()
    layout = Layout.of(counts, DIMS)

    plan = plan_slots(
        probs,
        layout,
        group,
        lambda each: top_k_assignment(each, 2, 1, batch_priority=priority),
    )

    expected = set()
    for segment, start in itertools.product(layout.segments, range(0, BATCH, group)):
        images, tokens = range(start, start + group), range(segment.start, segment.stop)
        places = [(n, b) for b in images for n in tokens]
        rows = [probs[place].tolist() for place in places]
        for token, rank, _, _ in slow_top_k(rows, 2, 1, priority):
            n, b = places[token]
            expected.add((n * BATCH + b, rank))
    assert {tuple(place) for place in plan.kept_RK.nonzero().tolist()} == expected


@every_plan
def test_dispatch_copies_the_features_of_a_tokens_width(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    x = leaf(6, BATCH, 4)

    out = dispatch(x, plan)

    rows = x.flatten(0, 1)[plan.row_EQ]
    assert out.shape == (EXPERTS, plan.row_EQ.shape[1], 4)
    assert torch.equal(out[used(plan)], rows[used(plan)])


@every_plan
def test_combine_adds_weighted_slots_to_the_residual(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    residual, y = torch.randn(6, BATCH, 4).double(), leaf(EXPERTS, plan.row_EQ.shape[1], 4)
    weight = 2 * plan.weight_RK
    before, widths = residual.clone(), width_of_rows(plan.tokens)
    expected = residual.flatten(0, 1).clone()
    for row, choice in plan.kept_RK.nonzero().tolist():
        of_slot = y.detach().flatten(0, 1)[plan.slot_RK[row, choice], : widths[row]]
        expected[row, : widths[row]] += weight[row, choice] * of_slot

    out = combine(residual, y, weight, plan)

    torch.testing.assert_close(out, expected.view_as(out), rtol=0, atol=1e-14)
    assert torch.equal(residual, before)
    past = torch.tensor([[i >= width for i in range(4)] for width in widths]).view_as(out)
    assert torch.equal(out[past], residual[past])
    lost = ~plan.kept_RK.any(1)
    assert torch.equal(out.flatten(0, 1)[lost], residual.flatten(0, 1)[lost])


@every_plan
def test_numerical_gradients_agree(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    mask = used(plan)
    x, residual, y = leaf(6, BATCH, 4), leaf(6, BATCH, 4), leaf(*mask.shape)
    weight = leaf(*plan.weight_RK.shape)

    # What is not to be read is cut off on both sides, as the experts between the two do.
    def in_slots(x):
        return dispatch(x, plan).where(mask, 0)

    def back(residual, y, weight):
        return combine(residual, y.where(mask, 0), weight.where(plan.kept_RK, 0), plan)

    assert torch.autograd.gradcheck(in_slots, x, fast_mode=True)
    assert torch.autograd.gradcheck(back, (residual, y, weight), fast_mode=True)


@every_plan
def test_a_dropped_choice_has_a_gradient_of_zero(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    residual, y = leaf(6, BATCH, 4), leaf(EXPERTS, plan.row_EQ.shape[1], 4)
    weight = plan.weight_RK.clone().requires_grad_()

    combine(residual, y, weight, plan).sum().backward()

    assert (weight.grad[~plan.kept_RK] == 0).all()
    assert (weight.grad[plan.kept_RK] != 0).all()


def test_operands_and_gradients_may_lie_in_memory_in_any_order():
    plan = plan_slots(random_probs(), Layout.of((2, 1, 3), DIMS), 2, vanilla)
    mask = used(plan)
    x, residual = leaf(BATCH, 6, 4).transpose(0, 1), leaf(4, BATCH, 6).permute(2, 1, 0)
    y = leaf(4, *mask.shape[:2]).permute(1, 2, 0)
    weight = leaf(*reversed(plan.weight_RK.shape)).t().where(plan.kept_RK, 0)

    def gradients(x, residual, y, weight):
        out = combine(residual, y.where(mask, 0), weight, plan)
        total = out.sum() + dispatch(x, plan).where(mask, 0).sum()  # gradients of stride 0
        return out, *torch.autograd.grad(total, (x, residual, y, weight))

    ours = gradients(x, residual, y, weight)
    plain = gradients(*(each.contiguous() for each in (x, residual, y, weight)))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)


def skewed_plan(counts=(2, 1, 3)):
    """Every token wants expert 2 first and expert 1 next: expert 0 stays empty."""
    probs = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).expand(6, BATCH, EXPERTS)
    plan = plan_slots(probs, Layout.of(counts, DIMS), 2, tight)
    assert not plan.filled_EQ[0].any()
    assert not plan.kept_RK.all()
    return plan


@pytest.mark.parametrize("counts", COUNTS)
def test_features_past_a_slots_width_are_never_read(counts):
    plan = skewed_plan(counts)
    poison = torch.full((EXPERTS, plan.row_EQ.shape[1], 4), float("nan"), dtype=torch.float64)
    for segment in plan.slots.segments:
        poison[:, segment.start : segment.stop, : segment.dim] = 1
    assert_poison_stays(plan, poison)


@pytest.mark.parametrize("counts", COUNTS)
def test_empty_slots_are_never_read(counts):
    plan = skewed_plan(counts)
    poison = torch.ones(EXPERTS, plan.row_EQ.shape[1], 4, dtype=torch.float64)
    poison[~plan.filled_EQ] = float("nan")
    assert_poison_stays(plan, poison)


def assert_poison_stays(plan, poison):
    """As an output of experts, and as a gradient that comes back from them."""
    x, residual, weight = leaf(6, BATCH, 4), leaf(6, BATCH, 4), leaf(*plan.weight_RK.shape)
    y = poison.clone().requires_grad_()

    out = combine(residual, y, weight.where(plan.kept_RK, 0), plan)
    grads = torch.autograd.grad(out.sum(), (residual, weight))
    grads += torch.autograd.grad(dispatch(x, plan), x, poison)

    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("_dirty_memory")
@every_plan
def test_no_gradient_is_left_unwritten(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    mask = used(plan)
    x, residual, y = leaf(6, BATCH, 4), leaf(6, BATCH, 4), leaf(*mask.shape)
    weight = leaf(*plan.weight_RK.shape)

    total = dispatch(x, plan).where(mask, 0).sum()
    total = total + combine(residual, y, weight.where(plan.kept_RK, 0), plan).sum()
    grad_x, grad_residual, grad_y, grad_weight = torch.autograd.grad(
        total, (x, residual, y, weight)
    )

    assert grad_x.isfinite().all()
    assert grad_residual.isfinite().all()
    assert grad_y[mask].isfinite().all()
    assert grad_weight.isfinite().all()
    unused = grad_y[~plan.filled_EQ]
    assert ((unused == 0) | unused.isnan()).all()  # past its width a slot has no gradient at all
