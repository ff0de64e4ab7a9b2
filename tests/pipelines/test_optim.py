"""The optimizer: which weights decay, and the rate at each step."""

import math

import pytest
import torch

from mone_core.models import ExpertsConfig, build_model
from pipelines.config import OptimConfig
from pipelines.optim import build_optimizer, learning_rate, set_learning_rate
from tests.mone_core.reference import tiny

CONFIG = OptimConfig(learning_rate=0.4, warmup_steps=4, weight_decay=0.1, betas=(0.8, 0.9))


def test_the_rate_rises_to_the_peak_and_falls_as_half_a_cosine():
    rates = [learning_rate(step, 12, CONFIG) for step in range(12)]

    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[8] == pytest.approx(0.2)  # half-way down
    assert rates[6] == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[11] < 0.02
    assert learning_rate(12, 12, CONFIG) == pytest.approx(0.0)


def test_without_warm_up_the_first_rate_is_the_peak():
    config = OptimConfig(learning_rate=0.4, warmup_steps=0)

    assert learning_rate(0, 10, config) == 0.4


def test_a_run_shorter_than_its_warm_up_only_rises():
    rates = [learning_rate(step, 3, CONFIG) for step in range(3)]

    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_a_run_as_long_as_its_warm_up_ends_at_the_peak():
    assert learning_rate(3, 4, CONFIG) == pytest.approx(0.4)


def test_matrices_decay_and_vectors_alphas_and_positions_do_not():
    experts = ExpertsConfig(placement="every", num_experts=2)
    model = build_model(tiny(depth=2, pool="cls", experts=experts))
    optimizer = build_optimizer(model, CONFIG)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }

    decayed = {name for name, p in model.named_parameters() if decay[id(p)] > 0}
    assert decayed == {
        "embed.project.weight",
        "encoder.routers.0.score.weight",
        "encoder.blocks.0.attention.qkv.weight",
        "encoder.blocks.0.attention.out.weight",
        "encoder.blocks.0.mlp.up.weight",
        "encoder.blocks.0.mlp.down.weight",
        "encoder.blocks.1.attention.qkv.weight",
        "encoder.blocks.1.attention.out.weight",
        "encoder.blocks.1.mlp.router.weight",
        "encoder.blocks.1.mlp.bank.up_weight_EFD",
        "encoder.blocks.1.mlp.bank.down_weight_EDF",
        "head.classify.weight",
    }
    assert {decay[id(p)] for p in model.parameters()} == {0.0, 0.1}


def test_an_update_is_adams_with_the_configured_moments_decay_and_rate():
    linear = torch.nn.Linear(2, 2).double()
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    optimizer = build_optimizer(linear, CONFIG)
    set_learning_rate(optimizer, 0.25)
    linear.weight.grad = torch.full_like(linear.weight, 3.0)
    linear.bias.grad = torch.full_like(linear.bias, -3.0)

    optimizer.step()

    # The first step of Adam is the sign of the gradient, whatever its size.
    torch.testing.assert_close(linear.weight.detach(), weight * (1 - 0.25 * 0.1) - 0.25)
    torch.testing.assert_close(linear.bias.detach(), bias + 0.25)
    state = optimizer.state[linear.weight]
    torch.testing.assert_close(state["exp_avg"], torch.full_like(weight, 3.0 * 0.2))
    torch.testing.assert_close(state["exp_avg_sq"], torch.full_like(weight, 9.0 * 0.1))
