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


def widths_of_rows(plan):
    """Features of every row, a token of an image."""
    return [of.dim for of in plan.classes for _ in range(of.rows.start, of.rows.stop)]


def slots_like(plan, make):
    """A tensor per class, as `dispatch` returns them."""
    return [make(*of.row_EQ.shape, of.dim) for of in plan.classes]


def kept_choices(plan):
    """Whether a choice has a slot, all classes together."""
    return torch.cat([of.kept_rK for of in plan.classes])


def filled_only(plan, each_EQd):
    """What is not to be read, cut off."""
    return [
        each.where(of.filled_EQ.unsqueeze(-1), 0)
        for of, each in zip(plan.classes, each_EQd, strict=True)
    ]


def every_plan(test):
    test = pytest.mark.parametrize("counts", COUNTS)(test)
    test = pytest.mark.parametrize("assign", ASSIGN)(test)
    return pytest.mark.parametrize("group", GROUPS)(test)


@every_plan
def test_the_tables_of_rows_and_of_slots_tell_the_same(counts, assign, group):
    probs = random_probs()
    plan = plan_slots(probs, Layout.of(counts, DIMS), group, assign)
    assert (plan.weight_RK[~kept_choices(plan)] == 0).all()
    for of in plan.classes:
        k, num_slots = of.slot_rK.shape[1], of.row_EQ.shape[1]
        from_rows = {
            (int(of.slot_rK[row, choice]), row * k + choice)
            for row, choice in of.kept_rK.nonzero().tolist()
        }
        from_slots = {
            (expert * num_slots + place, int(of.choice_EQ[expert, place]))
            for expert, place in of.filled_EQ.nonzero().tolist()
        }

        assert from_rows == from_slots
        assert len(from_rows) == of.kept_rK.sum() == of.filled_EQ.sum() > 0
        assert torch.equal((of.choice_EQ // k)[of.filled_EQ], of.row_EQ[of.filled_EQ])
        probs_rE, weight_rK = probs.flatten(0, 1)[of.rows], plan.weight_RK[of.rows]
        for slot, choice in from_rows:
            row = choice // k
            assert weight_rK[row, choice % k] == probs_rE[row, slot // num_slots]


@every_plan
def test_all_indices_can_be_followed_even_where_nothing_is_kept(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)

    for of in plan.classes:
        for index, end in (
            (of.row_EQ, of.rows.stop - of.rows.start),
            (of.choice_EQ, plan.weight_RK[of.rows].numel()),
            (of.slot_rK, of.row_EQ.numel()),
        ):
            assert index.dtype == torch.int64
            assert (index >= 0).all()
            assert (index < end).all()


@every_plan
def test_a_dropped_choice_points_to_a_filled_slot(counts, assign, group):
    """Whoever reads it and multiplies by nothing finds numbers, wherever empty slots have none."""
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)

    for of in plan.classes:
        assert of.filled_EQ.flatten()[of.slot_rK].all()


@every_plan
def test_classes_are_laid_out_as_tokens_are_and_widest_first(counts, assign, group):
    probs, layout = random_probs(), Layout.of(counts, DIMS)
    plan = plan_slots(probs.requires_grad_(), layout, group, assign)

    assert [(of.rows.start, of.rows.stop, of.dim) for of in plan.classes] == [
        (s.start * BATCH, s.stop * BATCH, s.dim) for s in layout.segments
    ]
    assert [of.dim for of in plan.classes] == sorted({of.dim for of in plan.classes}, reverse=True)
    for of, segment in zip(plan.classes, layout.segments, strict=True):
        routed = of.routed
        assert routed.dim == of.dim
        assert not routed.probs_GSE.requires_grad
        probs_NBE = probs[segment.start : segment.stop]
        expected = [probs_NBE[:, b : b + group].transpose(0, 1) for b in range(0, BATCH, group)]
        assert torch.equal(routed.probs_GSE, torch.stack([e.flatten(0, 1) for e in expected]))
        assert torch.equal(routed.assignment.kept_GSK, assign(routed.probs_GSE).kept_GSK)


@every_plan
def test_a_class_and_a_group_have_slots_of_their_own(counts, assign, group):
    """Not even a dropped choice points anywhere else."""
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    for of in plan.classes:
        capacity = of.routed.assignment.choice_GEC.shape[2]
        owner = [g for g in range(BATCH // group) for _ in range(capacity)]

        assert of.row_EQ.shape == (EXPERTS, len(owner))
        for row, slots in enumerate(of.slot_rK.tolist()):
            for slot in slots:
                assert owner[slot % len(owner)] == row % BATCH // group
        for rows in of.row_EQ.tolist():
            assert [row % BATCH // group for row in rows] == owner


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
    assert {tuple(place) for place in kept_choices(plan).nonzero().tolist()} == expected


@every_plan
def test_dispatch_copies_the_features_of_a_tokens_width(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    x = leaf(6, BATCH, 4)

    out = dispatch(x, plan)

    for of, slots in zip(plan.classes, out, strict=True):
        rows = x.flatten(0, 1)[of.rows, : of.dim][of.row_EQ]
        assert slots.shape == (EXPERTS, of.row_EQ.shape[1], of.dim)
        assert slots.is_contiguous()
        assert torch.equal(slots[of.filled_EQ], rows[of.filled_EQ])


@every_plan
def test_combine_adds_weighted_slots_to_the_residual(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    residual, y = torch.randn(6, BATCH, 4).double(), slots_like(plan, leaf)
    weight = 2 * plan.weight_RK
    before, widths = residual.clone(), widths_of_rows(plan)
    expected = residual.flatten(0, 1).clone()
    for of, y_EQd in zip(plan.classes, y, strict=True):
        for row, choice in of.kept_rK.nonzero().tolist():
            of_slot = y_EQd.detach().flatten(0, 1)[of.slot_rK[row, choice]]
            at = of.rows.start + row
            expected[at, : of.dim] += weight[at, choice] * of_slot

    out = combine(residual, y, weight, plan)

    torch.testing.assert_close(out, expected.view_as(out), rtol=0, atol=1e-14)
    assert torch.equal(residual, before)
    past = torch.tensor([[i >= width for i in range(4)] for width in widths]).view_as(out)
    assert torch.equal(out[past], residual[past])
    lost = ~kept_choices(plan).any(1)
    assert torch.equal(out.flatten(0, 1)[lost], residual.flatten(0, 1)[lost])


@every_plan
def test_numerical_gradients_agree(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    kept = kept_choices(plan)
    x, residual, y = leaf(6, BATCH, 4), leaf(6, BATCH, 4), slots_like(plan, leaf)
    weight = leaf(*plan.weight_RK.shape)

    # What is not to be read is cut off on both sides, so that differences do not see it.
    def in_slots(x):
        return tuple(filled_only(plan, dispatch(x, plan)))

    def back(residual, weight, *y):
        return combine(residual, filled_only(plan, y), weight.where(kept, 0), plan)

    assert torch.autograd.gradcheck(in_slots, x, fast_mode=True)
    assert torch.autograd.gradcheck(back, (residual, weight, *y), fast_mode=True)


@every_plan
def test_a_dropped_choice_has_a_gradient_of_zero(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    kept = kept_choices(plan)
    residual, y = leaf(6, BATCH, 4), slots_like(plan, leaf)
    weight = plan.weight_RK.clone().requires_grad_()

    combine(residual, y, weight, plan).sum().backward()

    assert (weight.grad[~kept] == 0).all()
    assert (weight.grad[kept] != 0).all()


@every_plan
def test_an_empty_slot_has_a_gradient_of_zero(counts, assign, group):
    """Exactly: it points to somebody's row, and nobody's output comes from it."""
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    y, kept = slots_like(plan, leaf), kept_choices(plan)
    weight = torch.ones_like(plan.weight_RK).where(kept, 0)

    combine(leaf(6, BATCH, 4), y, weight, plan).sum().backward()

    for of, y_EQd in zip(plan.classes, y, strict=True):
        assert (y_EQd.grad[of.filled_EQ] == 1).all()
        assert (y_EQd.grad[~of.filled_EQ] == 0).all()


def test_operands_and_gradients_may_lie_in_memory_in_any_order():
    plan = plan_slots(random_probs(), Layout.of((2, 1, 3), DIMS), 2, vanilla)
    kept = kept_choices(plan)
    x, residual = leaf(BATCH, 6, 4).transpose(0, 1), leaf(4, BATCH, 6).permute(2, 1, 0)
    y = [each.permute(1, 2, 0) for each in slots_like(plan, lambda e, q, d: leaf(d, e, q))]
    weight = leaf(*reversed(plan.weight_RK.shape)).t().where(kept, 0)

    def gradients(x, residual, weight, *y):
        out = combine(residual, y, weight, plan)
        slots = dispatch(x, plan)
        assert all(each.is_contiguous() for each in slots)
        total = out.sum() + sum(each.sum() for each in slots)  # gradients of stride 0
        return out, *torch.autograd.grad(total, (x, residual, weight, *y))

    ours = gradients(x, residual, weight, *y)
    plain = gradients(*(each.contiguous() for each in (x, residual, weight, *y)))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)


def test_outputs_of_experts_get_gradients_in_their_own_dtype():
    """Experts may compute in 16 bits between a residual stream and weights of 32."""
    plan = plan_slots(random_probs(), Layout.of((2, 1, 3), DIMS), 2, vanilla)
    y = slots_like(plan, lambda *shape: torch.randn(shape).bfloat16().requires_grad_())
    weight = plan.weight_RK.float().requires_grad_()

    out = combine(torch.randn(6, BATCH, 4), y, weight, plan)
    out.sum().backward()

    assert out.dtype == weight.grad.dtype == torch.float32
    assert all(each.grad.dtype == torch.bfloat16 for each in y)


def skewed_plan(counts=(2, 1, 3)):
    """Every token wants expert 2 first and expert 1 next: expert 0 stays empty."""
    probs = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).expand(6, BATCH, EXPERTS)
    plan = plan_slots(probs, Layout.of(counts, DIMS), 2, tight)
    assert not any(of.filled_EQ[0].any() for of in plan.classes)
    assert not kept_choices(plan).all()
    return plan


@pytest.mark.parametrize("counts", COUNTS)
def test_features_past_a_tokens_width_are_never_read(counts):
    """Neither of tokens on their way to slots nor of gradients on theirs."""
    plan = skewed_plan(counts)
    past = torch.tensor([[i >= width for i in range(4)] for width in widths_of_rows(plan)])
    poison = torch.ones(6, BATCH, 4, dtype=torch.float64)
    poison = poison.masked_fill(past.view_as(poison), float("nan"))
    y, residual = slots_like(plan, leaf), leaf(6, BATCH, 4)
    weight = leaf(*plan.weight_RK.shape)

    slots = dispatch(poison, plan)
    out = combine(residual, y, weight.where(kept_choices(plan), 0), plan)
    grads = torch.autograd.grad(out, (weight, *y), poison)

    assert all(each.isfinite().all() for each in slots)
    assert all(each.isfinite().all() for each in grads)


@pytest.mark.parametrize("counts", COUNTS)
def test_empty_slots_are_never_read(counts):
    """As an output of experts, and as a gradient that comes back from them."""
    plan = skewed_plan(counts)
    poison = slots_like(plan, lambda *shape: torch.ones(shape, dtype=torch.float64))
    for of, each in zip(plan.classes, poison, strict=True):
        each[~of.filled_EQ] = float("nan")
    x, residual, weight = leaf(6, BATCH, 4), leaf(6, BATCH, 4), leaf(*plan.weight_RK.shape)
    y = [each.clone().requires_grad_() for each in poison]

    out = combine(residual, y, weight.where(kept_choices(plan), 0), plan)
    grads = torch.autograd.grad(out.sum(), (residual, weight))
    grads += torch.autograd.grad(dispatch(x, plan), x, poison)

    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("_dirty_memory")
@every_plan
def test_nothing_is_left_unwritten(counts, assign, group):
    plan = plan_slots(random_probs(), Layout.of(counts, DIMS), group, assign)
    x, residual, y = leaf(6, BATCH, 4), leaf(6, BATCH, 4), slots_like(plan, leaf)
    weight = leaf(*plan.weight_RK.shape)

    slots = dispatch(x, plan)
    total = sum(each.sum() for each in slots)
    total = total + combine(residual, y, weight.where(kept_choices(plan), 0), plan).sum()
    grads = torch.autograd.grad(total, (x, residual, weight, *y))

    assert torch.empty(3).isnan().all()
    assert all(each.isfinite().all() for each in (*slots, *grads))
