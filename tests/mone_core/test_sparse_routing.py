"""Places in experts of limited capacity: the worked example, the plain loop, what always holds."""

import pytest
import torch

from mone_core.errors import CapacityError, RoutingError
from mone_core.routing import expert_capacity, expert_choice, top_k_assignment
from tests.mone_core.sparse_reference import slow_expert_choice, slow_top_k

# Four tokens, three experts, two choices, two slots; worked out by hand.
SCORES = torch.tensor(
    [[0.40, 0.35, 0.25], [0.50, 0.30, 0.20], [0.80, 0.15, 0.05], [0.30, 0.10, 0.60]],
    dtype=torch.float64,
)
VANILLA = {(0, 0, 0), (1, 0, 1), (3, 2, 0), (0, 1, 0), (1, 1, 1)}
BY_PRIORITY = {(2, 0, 0), (3, 2, 0), (1, 0, 1), (2, 1, 0), (1, 1, 1)}

SHAPES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (5, 5)]  # E, K


def random_scores(*shape):
    return torch.randn(shape, dtype=torch.float64).softmax(-1)


def few_distinct_scores(*shape):
    """Whole numbers of sevenths: nearly every comparison is a tie."""
    return torch.randint(0, 3, shape).double() / 7


def kept_of(assignment, group=0):
    """(token, rank, expert, slot) of every kept choice, read from the side of the tokens."""
    capacity = assignment.choice_GEC.shape[2]
    found = set()
    for token, rank in assignment.kept_GSK[group].nonzero().tolist():
        slot = int(assignment.slot_GSK[group, token, rank])
        expert = int(assignment.expert_GSK[group, token, rank])
        assert slot // capacity == expert
        found.add((token, rank, expert, slot % capacity))
    return found


def seated_of(assignment, group=0):
    """(token, rank, expert, slot) of every filled slot, read from the side of the experts."""
    choices = assignment.expert_GSK.shape[2]
    found = set()
    for expert, slot in assignment.filled_GEC[group].nonzero().tolist():
        choice = int(assignment.choice_GEC[group, expert, slot])
        found.add((choice // choices, choice % choices, expert, slot))
    return found


def without_rank(kept):
    return {(token, expert, slot) for token, _, expert, slot in kept}


@pytest.mark.parametrize(
    ("patches", "experts", "ratio", "nearest", "ceil", "ceil4", "ceil8"),
    [
        (197, 8, 1.05, 414, 414, 416, 416),
        (577, 8, 1.5, 1731, 1731, 1732, 1736),
        (50, 32, 1.05, 26, 27, 28, 32),
        (257, 32, 1.05, 135, 135, 136, 136),
        (257, 32, 0.5, 64, 65, 68, 72),
    ],
)
def test_slots_of_the_published_models(patches, experts, ratio, nearest, ceil, ceil4, ceil8):
    """Eight images together, two experts a token, at the four roundings."""
    expected = {"nearest": nearest, "ceil": ceil, "ceil4": ceil4, "ceil8": ceil8}
    got = {
        rounding: expert_capacity(8 * patches, 2, experts, ratio, rounding=rounding)
        for rounding in expected
    }

    assert got == expected


@pytest.mark.parametrize(("num_tokens", "slots"), [(5, 2), (7, 4), (9, 4), (3, 2)])
def test_the_nearest_of_two_equally_near_numbers_is_the_even_one(num_tokens, slots):
    assert expert_capacity(num_tokens, 1, 2, 1.0, rounding="nearest") == slots


def test_a_hair_above_a_whole_number_does_not_make_another_slot():
    assert 100 * 1 * 1.1 / 10 > 11  # as floating point has it

    assert expert_capacity(100, 1, 10, 1.1, rounding="ceil") == 11
    assert expert_capacity(101, 1, 10, 1.1, rounding="ceil") == 12
    assert expert_capacity(80, 1, 11, 1.1, rounding="ceil8") == 8
    assert expert_capacity(160, 2, 8, 1.0, rounding="ceil8") == 40


@pytest.mark.parametrize("rounding", ["nearest", "ceil", "ceil4", "ceil8"])
def test_an_expert_never_gets_more_slots_than_there_are_tokens(rounding):
    assert expert_capacity(10, 2, 4, 4.0, rounding=rounding) == 10
    assert expert_capacity(10, 1, 1, 0.91, rounding="ceil8") == 10


def test_an_expert_without_a_slot_is_refused():
    with pytest.raises(
        CapacityError,
        match=r"an expert gets 0\.25 slots for 10 tokens \(k 1, 20 experts, capacity ratio 0\.5\); "
        r"it needs 1 or more: raise the capacity ratio, route more images together, or round up",
    ):
        expert_capacity(10, 1, 20, 0.5, rounding="nearest")
    assert expert_capacity(10, 1, 20, 0.5, rounding="ceil") == 1


def test_half_a_slot_is_none():
    with pytest.raises(CapacityError, match=r"an expert gets 0\.5 slots for 4 tokens"):
        expert_capacity(4, 1, 8, 1.0, rounding="nearest")


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("rounding", ["nearest", "ceil4"])
def test_a_ratio_that_means_nothing_is_refused(ratio, rounding):
    with pytest.raises(CapacityError, match=rf"capacity.ratio.* {ratio}"):
        expert_capacity(100, 1, 4, ratio, rounding=rounding)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(
        CapacityError,
        match=r"rounding 'up' does not exist; it must be one of "
        r"\('nearest', 'ceil', 'ceil4', 'ceil8'\)",
    ):
        expert_capacity(10, 1, 2, 1.0, rounding="up")


@pytest.mark.parametrize(("priority", "expected"), [(False, VANILLA), (True, BY_PRIORITY)])
def test_the_worked_example(priority, expected):
    assignment = top_k_assignment(SCORES.unsqueeze(0), 2, 2, batch_priority=priority)

    assert without_rank(kept_of(assignment)) == expected
    assert without_rank(seated_of(assignment)) == expected
    for token, expert, _ in expected:
        rank = assignment.expert_GSK[0, token].tolist().index(expert)
        assert assignment.weight_GSK[0, token, rank] == SCORES[token, expert]  # not renormalised


def test_a_token_may_lose_all_its_choices():
    vanilla = top_k_assignment(SCORES.unsqueeze(0), 2, 2)
    by_priority = top_k_assignment(SCORES.unsqueeze(0), 2, 2, batch_priority=True)

    assert vanilla.kept_GSK[0].any(1).tolist() == [True, True, False, True]
    assert by_priority.kept_GSK[0].any(1).tolist() == [False, True, True, True]
    assert vanilla.weight_GSK[0, 2].tolist() == [0, 0]


@pytest.mark.parametrize("make", [random_scores, few_distinct_scores])
@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize(("experts", "k"), SHAPES)
@pytest.mark.parametrize("capacity", [1, 3, 12])
def test_any_scores_are_placed_as_the_plain_loop_places_them(make, priority, experts, k, capacity):
    scores = make(4, 12, experts)

    assignment = top_k_assignment(scores, k, capacity, batch_priority=priority)

    for group, rows in enumerate(scores.tolist()):
        expected = set(slow_top_k(rows, k, capacity, priority))
        assert kept_of(assignment, group) == expected
        assert seated_of(assignment, group) == expected


@pytest.mark.parametrize("priority", [False, True])
def test_equal_scores_go_to_the_lower_expert_and_the_earlier_token(priority):
    """Hundreds of equal scores: an unstable sort or topk would mix them."""
    scores = torch.full((2, 500, 40), 1 / 40)

    assignment = top_k_assignment(scores, 2, 30, batch_priority=priority)

    assert (assignment.expert_GSK == torch.tensor([0, 1])).all()
    assert assignment.kept_GSK[..., 0].sum(1).tolist() == [30, 30]
    assert assignment.kept_GSK[:, :30].all()
    assert torch.equal(assignment.slot_GSK[0, :30, 0], torch.arange(30))


def test_every_first_choice_is_placed_before_any_second():
    """Token 0 comes first in line, but its second choice comes after token 2's first."""
    scores = torch.tensor([[[0.5, 0.4, 0.1], [0.6, 0.1, 0.3], [0.1, 0.7, 0.2]]])

    assignment = top_k_assignment(scores, 2, 1)

    assert without_rank(kept_of(assignment)) == {(0, 0, 0), (2, 1, 0), (1, 2, 0)}


def test_priority_goes_by_the_best_score_and_not_by_the_sum():
    """Token 0 has the larger sum of two, token 1 the larger best."""
    scores = torch.tensor([[[0.5, 0.49, 0.01], [0.6, 0.2, 0.2]]])

    assignment = top_k_assignment(scores, 2, 1, batch_priority=True)

    assert assignment.kept_GSK[0].tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize(("experts", "k"), SHAPES)
@pytest.mark.parametrize("capacity", [1, 4, 20])
def test_nothing_is_lost_and_nothing_twice(priority, experts, k, capacity):
    scores = random_scores(3, 20, experts) ** 3  # skewed, so that some are dropped
    assignment = top_k_assignment(scores, k, capacity, batch_priority=priority)
    expert, slot, kept, weight, choice, filled = assignment

    assert expert.shape == slot.shape == kept.shape == weight.shape == (3, 20, k)
    assert choice.shape == filled.shape == (3, experts, capacity)
    assert (slot >= 0).all()
    assert (slot < experts * capacity).all()
    wanted = torch.nn.functional.one_hot(expert, experts).sum((1, 2))
    assert torch.equal(filled.sum(2), wanted.clamp(max=capacity))  # as many as want to and fit
    assert (filled.int().diff(dim=2) <= 0).all()  # from the first slot on, without gaps
    assert torch.equal(kept.sum((1, 2)), filled.sum((1, 2)))
    for group in range(3):
        assert kept_of(assignment, group) == seated_of(assignment, group)
        assert len(kept_of(assignment, group)) == kept[group].sum()
    assert (weight[~kept] == 0).all()
    assert (choice[~filled] == 0).all()
    assert (expert.sort(2).values.diff(dim=2) > 0).all()  # no token twice in one expert
    assert torch.equal(weight[kept], scores.gather(2, expert)[kept])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_with_priority_the_order_of_tokens_does_not_matter(k):
    scores = random_scores(3, 30, 5)
    order = torch.randperm(30)

    one = top_k_assignment(scores, k, 5, batch_priority=True)
    other = top_k_assignment(scores[:, order], k, 5, batch_priority=True)

    for name in ("expert_GSK", "slot_GSK", "kept_GSK", "weight_GSK"):
        assert torch.equal(getattr(one, name)[:, order], getattr(other, name)), name
    assert torch.equal(one.filled_GEC, other.filled_GEC)
    tokens_of_one, tokens_of_other = one.choice_GEC // k, order[other.choice_GEC // k]
    assert torch.equal(tokens_of_one[one.filled_GEC], tokens_of_other[other.filled_GEC])


def test_without_priority_position_decides():
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]])

    assert top_k_assignment(scores, 1, 2).kept_GSK.flatten().tolist() == [True, True, False]
    flipped = top_k_assignment(scores.flip(1), 1, 2)
    assert flipped.kept_GSK.flatten().tolist() == [True, True, False]


@pytest.mark.parametrize(
    "assign",
    [
        lambda scores: top_k_assignment(scores, 2, 5),
        lambda scores: top_k_assignment(scores, 2, 5, batch_priority=True),
        lambda scores: expert_choice(scores, 5),
    ],
)
def test_a_group_is_placed_the_same_alone_and_among_others(assign):
    scores = random_scores(4, 16, 3)

    together = assign(scores)
    alone = [assign(group.unsqueeze(0)) for group in scores]

    for name, value in together._asdict().items():
        assert torch.equal(value, torch.cat([getattr(each, name) for each in alone])), name


def test_a_kept_choice_is_weighted_by_its_score_and_a_dropped_one_gets_no_gradient():
    scores = random_scores(2, 10, 4).requires_grad_()
    for assignment in (top_k_assignment(scores, 2, 3), expert_choice(scores, 3)):
        kept = torch.zeros_like(scores)
        kept = kept.scatter_add(2, assignment.expert_GSK, assignment.kept_GSK.double())

        (grad,) = torch.autograd.grad((3 * assignment.weight_GSK).sum(), scores)

        assert torch.equal(grad, 3 * kept)


def test_assigning_leaves_the_scores_as_they_were():
    scores = random_scores(2, 8, 4)
    before = scores.clone()

    top_k_assignment(scores, 2, 2, batch_priority=True)
    expert_choice(scores, 2)

    assert torch.equal(scores, before)


@pytest.mark.parametrize("make", [random_scores, few_distinct_scores])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("capacity", [1, 4, 12])
def test_experts_choose_as_the_plain_loop_chooses(make, experts, capacity):
    scores = make(4, 12, experts)

    assignment = expert_choice(scores, capacity)

    for group, rows in enumerate(scores.tolist()):
        expected = set(slow_expert_choice(rows, capacity))
        assert without_rank(kept_of(assignment, group)) == expected
        assert without_rank(seated_of(assignment, group)) == expected


def test_experts_that_choose_fill_every_slot_with_another_token():
    scores = random_scores(3, 20, 4)

    assignment = expert_choice(scores, 6)
    expert, _, kept, weight, choice, filled = assignment

    assert filled.all()
    assert (kept.sum(1) == 6).all()
    tokens = choice // 4
    assert (tokens.sort(2).values.diff(dim=2) > 0).all()
    assert torch.equal(choice % 4, torch.arange(4).view(1, 4, 1).expand(3, 4, 6))
    assert torch.equal(expert, torch.arange(4).expand(3, 20, 4))
    assert torch.equal(weight, scores * kept)
    for group in range(3):
        assert kept_of(assignment, group) == seated_of(assignment, group)


def test_the_order_of_tokens_does_not_matter_to_experts_that_choose():
    scores = random_scores(3, 30, 5)
    order = torch.randperm(30)

    one, other = expert_choice(scores, 7), expert_choice(scores[:, order], 7)

    for name in ("slot_GSK", "kept_GSK", "weight_GSK"):
        assert torch.equal(getattr(one, name)[:, order], getattr(other, name)), name
    assert torch.equal(one.choice_GEC // 5, order[other.choice_GEC // 5])


def test_equal_scores_bring_an_expert_the_earlier_tokens():
    assignment = expert_choice(torch.full((2, 500, 3), 1 / 3), 40)

    assert torch.equal(assignment.choice_GEC // 3, torch.arange(40).expand(2, 3, 40))


@pytest.mark.parametrize("k", [0, 4, -1])
def test_more_choices_than_experts_and_none_are_refused(k):
    with pytest.raises(RoutingError, match=rf"k must lie between 1 and the 3 experts, got {k}"):
        top_k_assignment(SCORES.unsqueeze(0), k, 2)


@pytest.mark.parametrize("capacity", [0, -3])
def test_experts_without_a_slot_are_refused(capacity):
    with pytest.raises(RoutingError, match=rf"capacity must be 1 or more slots, got {capacity}"):
        top_k_assignment(SCORES.unsqueeze(0), 1, capacity)


@pytest.mark.parametrize("capacity", [0, 5])
def test_experts_cannot_choose_more_tokens_than_there_are(capacity):
    with pytest.raises(
        RoutingError,
        match=rf"capacity must lie between 1 and the 4 tokens of a group, got {capacity}",
    ):
        expert_choice(SCORES.unsqueeze(0), capacity)
