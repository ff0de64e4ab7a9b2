"""Losses: the textbook formula; those of routers on a worked example and in their layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mone_core.losses import (
    gshard_loss,
    importance_loss,
    load_loss,
    router_z_loss,
    sigmoid_loss,
    softmax_loss,
)
from mone_core.nested import Layout
from tests.mone_core.sparse_reference import FLAT, LOSSES, operands, random_layer

# One group of four tokens and three experts: probabilities, and logits with their noise.
PROBS = torch.tensor(
    [[[0.40, 0.35, 0.25], [0.50, 0.30, 0.20], [0.80, 0.15, 0.05], [0.30, 0.10, 0.60]]],
    dtype=torch.float64,
)
LOGITS = torch.tensor(
    [[[1, 0.2, 0], [0.3, 0.5, 0.1], [0, 0.4, 0.9], [0.6, 0.1, 0.2]]], dtype=torch.float64
)
NOISE = torch.tensor(
    [[[0.1, -0.2, 0.05], [0, 0.1, -0.1], [0.2, -0.1, 0], [-0.3, 0.2, 0.1]]], dtype=torch.float64
)
STD = 1 / 3
NO_LOSS = dict.fromkeys(LOSSES, 0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_softmax_loss_is_cross_entropy_in_nats_per_image(smoothing):
    logits = torch.randn(4, 7, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3])
    target = torch.full((4, 7), smoothing / 7, dtype=torch.float64)
    target[torch.arange(4), labels] += 1 - smoothing
    by_hand = -(target * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1)

    loss_B = softmax_loss(logits, labels, label_smoothing=smoothing)

    torch.testing.assert_close(loss_B, by_hand)


def test_equal_scores_cost_the_logarithm_of_the_classes():
    loss_B = softmax_loss(torch.zeros(2, 10), torch.tensor([1, 9]))

    torch.testing.assert_close(loss_B, torch.full((2,), 10.0).log())


def test_half_precision_scores_are_scored_in_float32():
    logits = torch.randn(3, 1000).bfloat16()
    labels = torch.tensor([1, 2, 3])

    loss_B = softmax_loss(logits, labels)

    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B, softmax_loss(logits.float(), labels))


def random_shares(rows, classes):
    return torch.rand(rows, classes, dtype=torch.float64).pow(4).softmax(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_softmax_loss_of_shares_is_their_cross_entropy(smoothing):
    logits, shares = torch.randn(4, 7, dtype=torch.float64), random_shares(4, 7)
    target = (1 - smoothing) * shares + smoothing / 7
    by_hand = -(target * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1)

    loss_B = softmax_loss(logits, shares, label_smoothing=smoothing)

    torch.testing.assert_close(loss_B, by_hand)
    theirs = F.cross_entropy(logits, shares, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(loss_B, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_sigmoid_loss_is_binary_cross_entropy_summed_over_classes(smoothing):
    logits, shares = torch.randn(4, 7, dtype=torch.float64), random_shares(4, 7)
    target = (1 - smoothing) * shares + smoothing / 7
    chance = 1 / (1 + (-logits).exp())
    by_hand = -(target * chance.log() + (1 - target) * (1 - chance).log()).sum(1)

    torch.testing.assert_close(sigmoid_loss(logits, shares, label_smoothing=smoothing), by_hand)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_cost_what_whole_shares_do(loss, smoothing):
    logits, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 5, 2, 2, 1])
    whole = F.one_hot(labels, 6).double()

    by_label = loss(logits, labels, label_smoothing=smoothing)

    torch.testing.assert_close(by_label, loss(logits, whole, label_smoothing=smoothing))


def test_scores_at_a_bias_of_minus_ten_cost_ten_for_the_own_class_alone():
    """V-MoE's head starts there: 21,843 classes cost hardly more than the one that is missed."""
    loss_B = sigmoid_loss(torch.full((2, 21_843), -10.0), torch.tensor([0, 9]))

    expected = 10 + 21_843 * math.log1p(math.exp(-10))
    torch.testing.assert_close(loss_B, torch.full((2,), expected))


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_of_half_precision_scores_are_those_of_float32(loss, soft):
    logits = torch.randn(3, 1000).bfloat16()
    targets = random_shares(3, 1000).bfloat16() if soft else torch.tensor([1, 2, 999])

    loss_B = loss(logits, targets)

    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B, loss(logits.float(), targets.float() if soft else targets))


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_scores_of_any_size_cost_a_finite_amount(loss):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]], requires_grad=True)

    loss_B = loss(logits, torch.tensor([1, 0]))
    loss_B.sum().backward()

    assert loss_B.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "chance"), [(softmax_loss, torch.softmax), (sigmoid_loss, None)])
def test_the_gradient_is_chance_less_target(loss, chance):
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    shares = random_shares(4, 7)

    (gradient,) = torch.autograd.grad(loss(logits, shares, label_smoothing=0.3).sum(), logits)

    chances = chance(logits, 1) if chance else logits.sigmoid()
    torch.testing.assert_close(gradient, chances - (0.7 * shares + 0.3 / 7))
    assert torch.autograd.gradcheck(lambda x: loss(x, shares), logits)


def random_probs(*shape):
    return torch.randn(shape, dtype=torch.float64).softmax(-1)


def noisy_pair(*shape, std=STD):
    logits = torch.randn(shape, dtype=torch.float64)
    return logits, logits + std * torch.randn_like(logits)


def squared_variation(amounts):
    mean = sum(amounts) / len(amounts)
    return sum((amount - mean) ** 2 for amount in amounts) / len(amounts) / mean**2


def slow_load(logits_SE, noisy_SE, k, std):
    """Expected share of tokens of every expert, one token and expert at a time."""
    load = [0.0] * len(logits_SE[0])
    for clean, noisy in zip(logits_SE, noisy_SE, strict=True):
        threshold = sorted(noisy, reverse=True)[k - 1]
        for e, z in enumerate(clean):
            phi = 0.5 * (1 + math.erf((threshold - z) / std / math.sqrt(2)))
            load[e] += (1 - phi) / len(logits_SE)
    return load


def test_importance_and_gshard_of_the_worked_example():
    assert importance_loss(PROBS).item() == pytest.approx(0.12875, abs=1e-12)
    assert gshard_loss(PROBS).item() == pytest.approx(1.33125, abs=1e-12)


@pytest.mark.parametrize(
    ("k", "loads", "loss"),
    [
        (1, (0.346389, 0.181654, 0.237345), 0.071916),
        (2, (0.624454, 0.572889, 0.515198), 0.006111),
    ],
)
def test_load_of_the_worked_example(k, loads, loss):
    by_hand = slow_load(LOGITS[0].tolist(), (LOGITS + NOISE)[0].tolist(), k, STD)

    assert by_hand == pytest.approx(loads, abs=5e-7)
    assert load_loss(LOGITS, LOGITS + NOISE, k, STD).item() == pytest.approx(loss, abs=5e-7)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_losses_of_any_scores_are_the_mean_of_every_groups_formula(k):
    probs = random_probs(3, 7, 5)
    logits, noisy = noisy_pair(3, 7, 5, std=0.2)
    importance, load, gshard = [], [], []
    for group in range(3):
        columns = list(zip(*probs[group].tolist(), strict=True))
        importance.append(squared_variation([sum(column) for column in columns]))
        pair = (logits[group].tolist(), noisy[group].tolist())
        load.append(squared_variation(slow_load(*pair, k, 0.2)))
        favourites = [row.index(max(row)) for row in probs[group].tolist()]
        products = [favourites.count(e) / 7 * sum(columns[e]) / 7 for e in range(5)]
        gshard.append(25 * sum(products) / 5)

    assert importance_loss(probs).item() == pytest.approx(sum(importance) / 3, rel=1e-12)
    assert load_loss(logits, noisy, k, 0.2).item() == pytest.approx(sum(load) / 3, rel=1e-9)
    assert gshard_loss(probs).item() == pytest.approx(sum(gshard) / 3, rel=1e-12)


def test_the_z_loss_is_the_mean_squared_logarithm_of_the_sum():
    by_hand = [math.log(sum(math.exp(z) for z in row)) ** 2 for row in LOGITS[0].tolist()]

    assert router_z_loss(LOGITS).item() == pytest.approx(sum(by_hand) / 4, rel=1e-12)


def test_perfect_balance_costs_nothing_and_gshard_one():
    probs = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7]]])
    logits = probs.log()

    assert importance_loss(probs).item() == pytest.approx(0, abs=1e-12)
    assert load_loss(logits, logits, 1, STD).item() == pytest.approx(0, abs=1e-12)
    assert gshard_loss(probs).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("experts", [2, 5])
def test_all_tokens_on_one_expert_cost_the_most_there_is(experts):
    """Squared variation of (1, 0, ..., 0) is E - 1; GShard's product is E."""
    logits = torch.zeros(2, 6, experts, dtype=torch.float64)
    logits[..., 1] = 100

    assert importance_loss(logits.softmax(-1)).item() == pytest.approx(experts - 1)
    assert load_loss(logits, logits, 1, 1 / experts).item() == pytest.approx(experts - 1)
    assert gshard_loss(logits.softmax(-1)).item() == pytest.approx(experts)


def test_neither_order_of_tokens_nor_of_experts_matters():
    probs = random_probs(2, 9, 4)
    logits, noisy = noisy_pair(2, 9, 4)
    tokens, experts = torch.randperm(9), torch.randperm(4)

    def losses(order):
        return torch.stack(
            [
                importance_loss(order(probs)),
                load_loss(order(logits), order(noisy), 2, STD),
                gshard_loss(order(probs)),
                router_z_loss(order(logits)),
            ]
        )

    before = losses(lambda each: each)
    torch.testing.assert_close(losses(lambda each: each[:, tokens]), before)
    torch.testing.assert_close(losses(lambda each: each[..., experts]), before)


def test_balance_is_told_per_group():
    """Two lopsided groups that even each other out are still lopsided."""
    probs = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])

    assert importance_loss(probs).item() == pytest.approx(0.64)
    assert importance_loss(probs.view(1, 2, 2)).item() == pytest.approx(0, abs=1e-12)


def test_adding_one_number_to_all_logits_changes_no_balance_but_the_z_loss():
    logits, noisy = noisy_pair(2, 9, 4)

    torch.testing.assert_close(
        load_loss(logits + 3, noisy + 3, 2, STD), load_loss(logits, noisy, 2, STD)
    )
    shifted = (logits.logsumexp(-1) + 3).square().mean()
    torch.testing.assert_close(router_z_loss(logits + 3), shifted)


def test_numerical_gradients_agree():
    probs = random_probs(2, 5, 3).requires_grad_()
    logits, noisy = (each.requires_grad_() for each in noisy_pair(2, 5, 3))

    assert torch.autograd.gradcheck(importance_loss, probs)
    assert torch.autograd.gradcheck(gshard_loss, probs)
    assert torch.autograd.gradcheck(router_z_loss, logits)
    for k in (1, 2, 3):  # the threshold moves with the noisy logits
        assert torch.autograd.gradcheck(lambda a, b, k=k: load_loss(a, b, k, STD), (logits, noisy))


def test_the_load_pulls_on_the_threshold_too():
    logits, noisy = noisy_pair(1, 5, 3)
    noisy.requires_grad_()

    load_loss(logits, noisy, 1, STD).backward()

    at_threshold = noisy.detach().argmax(2, keepdim=True)
    assert (noisy.grad.gather(2, at_threshold) != 0).all()
    assert (noisy.grad.scatter(2, at_threshold, 0) == 0).all()


def test_logits_of_any_size_cost_a_finite_amount():
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]]], requires_grad=True)

    total = load_loss(logits, logits, 1, STD) + router_z_loss(logits)
    total = total + importance_loss(logits.softmax(-1)) + gshard_loss(logits.softmax(-1))
    total.backward()

    assert total.isfinite()
    assert logits.grad.isfinite().all()


def by_group(logits_NBE, images):
    """All tokens of some images, image by image, as the only group."""
    return logits_NBE[:, images].transpose(0, 1).flatten(0, 1).unsqueeze(0)


@pytest.mark.parametrize("weights", [LOSSES, *({**NO_LOSS, n: w} for n, w in LOSSES.items())])
def test_the_auxiliary_loss_is_the_weighted_sum_of_its_parts(weights):
    """Importance and z of the clean logits, GShard of the noisy ones, load of both; by image."""
    layer = random_layer(noise=0.8, **weights).train()
    residual, x, _ = operands(batch=5)
    logits = x @ layer.router.weight.t()
    torch.manual_seed(7)
    noise = torch.cat([torch.randn_like(logits[:, :4]), torch.randn_like(logits[:, 4:])], dim=1)
    expected = 0
    for images in (slice(0, 2), slice(2, 4), slice(4, 5)):
        clean, noisy = by_group(logits, images), by_group(logits + 0.8 / 4 * noise, images)
        parts = (
            weights["importance_weight"] * importance_loss(clean.softmax(-1)),
            weights["load_weight"] * load_loss(clean, noisy, 2, 0.8 / 4),
            weights["gshard_weight"] * gshard_loss(noisy.softmax(-1)),
            weights["z_weight"] * router_z_loss(clean),
        )
        expected = expected + sum(parts) * (images.stop - images.start) / 5

    torch.manual_seed(7)
    aux_loss = layer(residual, x, FLAT, None)[1].aux_loss

    torch.testing.assert_close(aux_loss, expected)
    inputs = (x, layer.router.weight)
    ours = torch.autograd.grad(aux_loss, inputs, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)
    assert (ours[1] != 0).any()


def test_evaluation_has_neither_noise_nor_auxiliary_loss():
    layer, (residual, x, _) = random_layer(noise=1.0, **LOSSES), operands(batch=5)

    (out, told), (again, _) = (layer(residual, x, FLAT, None) for _ in range(2))

    assert torch.equal(out, again)
    assert told.aux_loss.item() == 0
    assert told.aux_loss.shape == ()


def test_training_draws_new_noise_each_time():
    layer, (residual, x, _) = random_layer(noise=1.0).train(), operands(batch=5)

    (out, _), (again, _) = (layer(residual, x, FLAT, None) for _ in range(2))

    assert not torch.equal(out, again)


def test_training_without_noise_computes_what_evaluation_does():
    layer, (residual, x, _) = random_layer(noise=0.0, load_weight=0.0), operands(batch=5)

    trained, evaluated = (mode()(residual, x, FLAT, None)[0] for mode in (layer.train, layer.eval))

    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize(("experts", "noise"), [(4, 1.0), (2, 0.5)])
def test_the_noise_is_normal_with_its_deviation_shared_by_the_experts(experts, noise):
    """On equal logits the weights are the softmax of the noise: log-ratios tell it."""
    layer = random_layer(
        dim=2, num_experts=experts, k=experts, capacity_ratio=experts, noise=noise, load_weight=0.0
    ).train()
    layout, x = Layout.of((4000,), (2,)), torch.zeros(4000, 2, 2, dtype=torch.float64)

    (only,) = layer(x, x, layout, None)[1].classes
    assignment = only.assignment

    assert assignment.kept_GSK.all()
    logs = assignment.weight_GSK.log()
    logs = torch.empty_like(logs).scatter(2, assignment.expert_GSK, logs)
    difference = logs[..., 0] - logs[..., 1]  # of two independent draws
    std = noise / experts
    assert difference.std().item() == pytest.approx(2**0.5 * std, rel=0.04)
    assert difference.mean().item() == pytest.approx(0, abs=0.05 * std)
    kurtosis = (difference**4).mean() / (difference**2).mean() ** 2
    assert kurtosis.item() == pytest.approx(3, abs=0.25)  # 2.4 if the noise were uniform


@pytest.mark.parametrize("experts", [1, 2])
def test_a_load_of_no_weight_is_not_computed(experts):
    """Without noise the load is 0 / 0."""
    weights = {**LOSSES, "load_weight": 0.0}
    layer = random_layer(num_experts=experts, k=1, noise=0.0, **weights).train()

    aux_loss = layer(*operands(4)[:2], FLAT, None)[1].aux_loss

    assert aux_loss.isfinite()


def test_a_z_loss_of_no_weight_is_not_computed():
    layer = random_layer(noise=0.0, **NO_LOSS).train()
    with torch.no_grad():
        layer.router.weight.mul_(1e200)  # squares overflow

    assert layer(*operands(4)[:2], FLAT, None)[1].aux_loss.item() == 0


class Count(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_losses_of_no_weight_cost_nothing():
    layer, (residual, x, _) = random_layer(noise=0.0, **NO_LOSS), operands(4)
    counts = []
    for mode in (layer.eval, layer.train):
        with Count() as count:
            mode()(residual, x, FLAT, None)
        counts.append(count.operations)

    assert counts[0] == counts[1] > 0


def test_the_load_is_that_of_the_present_number_of_choices():
    layer = random_layer(k=1, noise=1.0, **{**NO_LOSS, "load_weight": 1.0}).train()
    built = random_layer(k=3, noise=1.0, **{**NO_LOSS, "load_weight": 1.0}).train()
    built.load_state_dict(layer.state_dict())
    residual, x, _ = operands(4)

    layer.set_capacity(k=3, capacity_ratio=None, batch_priority=None)

    losses = []
    for each in (layer, built):
        torch.manual_seed(7)
        losses.append(each(residual, x, FLAT, None)[1].aux_loss)
    assert torch.equal(*losses)


def test_experts_that_choose_have_no_balance_to_lose():
    """The z-loss remains: it keeps logits small, however the choice is made."""
    layer = random_layer(routing="experts_choose", **LOSSES).train()
    residual, x, _ = operands(4)

    aux_loss = layer(residual, x, FLAT, None)[1].aux_loss

    z_loss = router_z_loss((x @ layer.router.weight.t()).flatten(0, 1).unsqueeze(0))
    torch.testing.assert_close(aux_loss, 1.1 * z_loss)


def test_the_auxiliary_loss_teaches_the_router_alone():
    layer = random_layer(noise=1.0, **LOSSES).train()

    layer(*operands(4)[:2], FLAT, None)[1].aux_loss.backward()

    assert (layer.router.weight.grad != 0).all()
    assert all(parameter.grad is None for parameter in layer.bank.parameters())
