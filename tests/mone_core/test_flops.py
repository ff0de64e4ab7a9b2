"""MACs: the printed table, and a counter that watches the real forward pass."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mone_core.capacity import capacity_distribution, token_counts
from mone_core.flops import linear_macs, nested_block_macs
from mone_core.models import VIT_SIZES, ModelConfig, build_model

# GMACs at 224 px with 21,843 classes (Ti: 1000), without the router: dense, all tokens at D/2,
# D/4 and D/8, then budgets .2 to .8.
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TABLE = {
    "Ti": (1.247, 0.726, 0.466, 0.336, 0.412, 0.515, 0.620, 0.722, 0.827, 0.931, 1.033),
    "S": (4.582, 2.501, 1.461, 0.940, 1.243, 1.657, 2.074, 2.483, 2.905, 3.321, 3.727),
    "B": (17.488, 9.164, 5.002, 2.921, 4.132, 5.788, 7.455, 9.090, 10.778, 12.445, 14.069),
    "L": (61.255, 31.660, 16.862, 9.463, 13.767, 19.656, 25.582, 31.395, 37.398, 43.324, 49.100),
}


def config_of(size, **changes):
    return replace(VIT_SIZES[size], num_classes=1000 if size == "Ti" else 21843, **changes)


def on_meta(config):
    """Shapes without memory: a ViT-L takes no time."""
    with torch.device("meta"):
        return build_model(config)


@pytest.mark.parametrize("size", TABLE)
def test_the_table_of_sizes_and_budgets_to_the_printed_digit(size):
    config = config_of(size)
    counts = [(0, 0, 0, 196), (0, 0, 196, 0), (0, 196, 0, 0), (196, 0, 0, 0)]
    counts += [token_counts(capacity_distribution(budget), 196) for budget in BUDGETS]
    around = linear_macs(196, 3 * 16 * 16, config.dim) + linear_macs(
        1, config.dim, config.num_classes
    )

    gmacs = []
    for each in counts:
        block = nested_block_macs(each, config.dims, dim=config.dim, hidden=4 * config.dim)
        gmacs.append(round((around + config.depth * block) / 1e9, 3))

    assert gmacs == list(TABLE[size])


@pytest.mark.parametrize("size", TABLE)
def test_a_model_costs_the_table_and_its_router(size):
    model = on_meta(config_of(size))
    router = model.config.dim * 4 * 196 / 1e9
    for budget, gmacs in zip((1.0, *BUDGETS), TABLE[size][:1] + TABLE[size][4:], strict=True):
        model.set_effective_capacity(budget)

        assert model.macs() / 1e9 == pytest.approx(gmacs + router, abs=5.1e-4)


def test_a_block_is_the_formula():
    """12 N D^2 e_c + 2 N^2 D: the linear part shrinks, the attention core never does."""
    n, d = 100, 64
    assert nested_block_macs((0, n), (32, d), dim=d, hidden=4 * d) == 12 * n * d * d + 2 * n * n * d
    assert nested_block_macs((n, 0), (32, d), dim=d, hidden=4 * d) == 6 * n * d * d + 2 * n * n * d
    assert linear_macs(7, 3, 5) == 105


@pytest.mark.parametrize(("size", "budget"), [("Ti", 0.125), ("S", 0.3), ("S", 1.0), ("B", 0.7)])
def test_a_counter_on_the_forward_pass_agrees(size, budget):
    model = on_meta(config_of(size, effective_capacity=budget))

    counted = flops_of(model, torch.empty(2, 3, 224, 224, device="meta"))

    assert counted == pytest.approx(2 * 2 * model.macs(), rel=0.005)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_counter_on_a_forward_pass_with_real_numbers_agrees(budget):
    model = build_model(config_of("Ti", effective_capacity=budget))

    counted = flops_of(model, torch.randn(1, 3, 224, 224))

    assert counted == pytest.approx(2 * model.macs(), rel=0.005)


@pytest.mark.parametrize("budget", [0.125, 0.3, 1.0])
def test_training_costs_no_more_than_three_forward_passes(budget):
    """Both gradients shrink with the budget as the forward pass does."""
    model = on_meta(config_of("S", depth=4, effective_capacity=budget))

    counted = flops_of(model, torch.empty(1, 3, 224, 224, device="meta"), backward=True)

    assert counted <= 3 * 2 * model.macs()
    assert counted >= 2.5 * 2 * model.macs()


def flops_of(model, images, *, backward=False):
    """What torch counts; plain attention, since its fused CPU kernel is not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_BK = model(images).logits_BK
        if backward:
            logits_BK.sum().backward()
    return counter.get_total_flops()


def test_macs_follow_the_sizes_of_the_model():
    config = ModelConfig(
        image_size=32, patch_size=4, num_classes=7, dim=32, depth=3, heads=2, mlp_ratio=2
    )
    model = build_model(config)

    counted = flops_of(model, torch.randn(1, 3, 32, 32))

    assert counted == 2 * model.macs()
