"""Routing: algorithm 1 on the printed example, and what must hold for any scores."""

import pytest
import torch

from mone_core.capacity import token_counts
from mone_core.errors import RoutingError
from mone_core.routing import Router, expert_preferred_routing, sort_by_width
from tests.mone_core.reference import slow_routing

# Ten tokens, four experts; the assignments below were worked out by hand.
SCORES = torch.tensor(
    [
        [0.11, 0.21, 0.29, 0.39],
        [0.41, 0.31, 0.19, 0.09],
        [0.27, 0.26, 0.24, 0.23],
        [0.05, 0.15, 0.62, 0.18],
        [0.71, 0.12, 0.10, 0.07],
        [0.13, 0.50, 0.17, 0.20],
        [0.32, 0.28, 0.04, 0.36],
        [0.14, 0.18, 0.22, 0.46],
        [0.45, 0.06, 0.38, 0.11],
        [0.22, 0.57, 0.13, 0.08],
    ]
)


def random_scores(*shape):
    return torch.randn(shape, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize(
    ("shares", "experts"),
    [
        ((0.4, 0.3, 0.2, 0.1), (1, 2, 1, 3, 1, 2, 1, 4, 3, 2)),
        ((0.2, 0.2, 0.3, 0.3), (4, 1, 3, 3, 1, 2, 4, 4, 3, 2)),
        ((0.25, 0.25, 0.25, 0.25), (4, 1, 1, 3, 1, 2, 1, 4, 3, 2)),
        ((0, 0, 0, 1), (4,) * 10),
        ((1, 0, 0, 0), (1,) * 10),
    ],
)
def test_the_worked_example(shares, experts):
    counts = token_counts(shares, 10)
    expert_BN = expert_preferred_routing(SCORES.unsqueeze(0), counts)

    assert expert_BN.dtype == torch.int64
    assert [expert + 1 for expert in expert_BN[0].tolist()] == list(experts)


@pytest.mark.parametrize("counts", [(7, 5, 4, 1), (0, 9, 8, 0), (17, 0, 0, 0), (0, 0, 0, 17)])
def test_any_scores_are_routed_as_algorithm_1_says(counts):
    scores = random_scores(20, 17, 4)

    expert_BN = expert_preferred_routing(scores, counts)

    assert expert_BN.tolist() == [slow_routing(image, counts) for image in scores.tolist()]
    for image in expert_BN:
        assert tuple(image.bincount(minlength=4).tolist()) == counts


@pytest.mark.parametrize("num_tokens", [10, 196, 1000])
def test_equal_scores_go_to_the_earlier_token(num_tokens):
    """Hundreds of equal scores: an unstable sort or topk would mix them."""
    scores = torch.full((2, num_tokens, 3), 1 / 3)
    counts = (num_tokens - 8, 5, 3)

    expert_BN = expert_preferred_routing(scores, counts)

    assert expert_BN.tolist() == [[2] * 3 + [1] * 5 + [0] * (num_tokens - 8)] * 2


def test_few_distinct_scores_are_routed_as_algorithm_1_says():
    scores = torch.randint(0, 3, (10, 40, 4)) / 4

    expert_BN = expert_preferred_routing(scores, (10, 10, 10, 10))

    assert expert_BN.tolist() == [slow_routing(image, (10,) * 4) for image in scores.tolist()]


def test_scores_of_exactly_zero_never_bring_a_taken_token_back():
    """In half precision scores underflow: a taken token must not tie with them."""
    scores = torch.zeros(1, 6, 3)
    scores[..., 2] = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.1, 0.1])

    assert expert_preferred_routing(scores, (1, 2, 3)).tolist() == [[2, 2, 2, 1, 1, 0]]


def test_an_image_is_routed_the_same_alone_and_in_a_batch():
    scores = random_scores(2, 30, 4)
    counts = (12, 9, 6, 3)

    together = expert_preferred_routing(scores, counts)
    alone = [expert_preferred_routing(image.unsqueeze(0), counts) for image in scores]

    assert torch.equal(together, torch.cat(alone))


def test_routing_leaves_the_scores_as_they_were():
    scores = random_scores(2, 8, 4).requires_grad_()
    before = scores.detach().clone()

    expert_BN = expert_preferred_routing(scores, (2, 2, 2, 2))

    assert not expert_BN.requires_grad
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((2, 2, 2, 3), r"counts \(2, 2, 2, 3\) share out 9 tokens among 4 experts, but the scores"),
        ((5, 5), r"share out 10 tokens among 2 experts, but .* for 10 tokens and 4 experts"),
    ],
)
def test_counts_that_do_not_fit_the_scores_are_refused(counts, says):
    with pytest.raises(RoutingError, match=says):
        expert_preferred_routing(SCORES.unsqueeze(0), counts)


def test_tokens_are_sorted_widest_first_and_stay_in_order_within_a_width():
    expert_BN = torch.tensor([[1, 3, 0, 3, 1, 2], [0, 0, 0, 0, 0, 1]])

    assert sort_by_width(expert_BN).tolist() == [[1, 3, 5, 0, 4, 2], [5, 0, 1, 2, 3, 4]]


def test_sorting_moves_every_token_once():
    expert_BN = torch.randint(0, 4, (5, 300))
    order_BN = sort_by_width(expert_BN)

    assert torch.equal(order_BN.sort(dim=1).values, torch.arange(300).expand(5, 300))
    sorted_BN = expert_BN.gather(1, order_BN)
    assert (sorted_BN[:, 1:] <= sorted_BN[:, :-1]).all()
    within = sorted_BN[:, 1:] == sorted_BN[:, :-1]
    assert (order_BN[:, 1:] > order_BN[:, :-1])[within].all()


def test_the_router_is_a_linear_layer_and_a_softmax_over_experts():
    router = Router(6, 4).double()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    weight, bias = router.score.weight, router.score.bias
    with torch.no_grad():
        bias.normal_()
    exp = (x @ weight.t() + bias).exp()

    torch.testing.assert_close(router(x), exp / exp.sum(-1, keepdim=True))
    assert sum(parameter.numel() for parameter in router.parameters()) == 6 * 4 + 4


def test_a_half_precision_router_scores_in_float32():
    router = Router(6, 4).bfloat16()

    probs = router(torch.randn(3, 2, 6, dtype=torch.bfloat16))

    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 2))
