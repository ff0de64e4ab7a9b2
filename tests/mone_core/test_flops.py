"""MACs: the printed tables, and a counter that watches the real forward pass of every model."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mone_core.flops import attention_macs, linear_macs, mlp_macs
from mone_core.models import (
    DENSE,
    VIT_SIZES,
    VIVIT_SIZES,
    VMOE_SIZES,
    ExpertsConfig,
    NestingConfig,
    SkippingConfig,
    build_model,
)
from mone_core.nested import Layout
from tests.mone_core.reference import EVERY_MODEL, changed, random_images, tiny

# GMACs at 224 px with 21,843 classes (Ti: 1000), without the router: dense, all tokens at D/2,
# D/4 and D/8, budgets .2 to .8, and Mixture-of-Depths.
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TABLE = {
    "Ti": (1.247, 0.726, 0.466, 0.336, 0.412, 0.515, 0.620, 0.722, 0.827, 0.931, 1.033, 0.703),
    "S": (4.582, 2.501, 1.461, 0.940, 1.243, 1.657, 2.074, 2.483, 2.905, 3.321, 3.727, 2.582),
    "B": (17.488, 9.164, 5.002, 2.921, 4.132, 5.788, 7.455, 9.090, 10.778, 12.445, 14.069, 9.835),
    "L": (
        *(61.255, 31.660, 16.862, 9.463),
        *(13.767, 19.656, 25.582, 31.395, 37.398, 43.324, 49.100),
        34.354,
    ),
}
CONSTANT = NestingConfig(assignment="constant", effective_capacity=1.0)

# GMACs of ViViT-FE B/16x2 with class tokens: dense, D/2, D/4, D/8, then budgets.
CLIP_BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
CLIP_TABLE = {
    224: (
        *(283.3, 149.5, 82.6, 49.1),
        *(56.6, 69.6, 82.9, 96.1, 108.9, 122.8, 136.1, 149.0, 176.0, 202.7, 228.6),
    ),
    256: (
        *(374.0, 199.4, 112.1, 68.5),
        *(78.1, 94.8, 112.4, 129.1, 146.3, 164.6, 182.4, 199.8, 234.1, 268.7, 303.9),
    ),
}

# Millions of parameters of V-MoE with 32 experts, a tanh layer and 18,291 classes: dense, Last-2,
# Last-5, Every-2. S has four odd-numbered blocks, so there is no Last-5 of it.
PLACEMENTS = (("none", 2), ("last", 2), ("last", 5), ("every", 2))
PARAMETERS = {
    "S/32": {("none", 2): 36.5, ("last", 2): 166.7, ("every", 2): 296.9},
    "B/32": dict(zip(PLACEMENTS, (102.1, 395.0, 834.2, 980.6), strict=True)),
    "B/16": dict(zip(PLACEMENTS, (100.5, 393.3, 832.6, 979.0), strict=True)),
    "L/32": dict(zip(PLACEMENTS, (325.3, 845.8, 1626.5, 3448.2), strict=True)),
    "L/16": dict(zip(PLACEMENTS, (323.1, 843.6, 1624.3, 3446.0), strict=True)),
    "H/14": dict(zip(PLACEMENTS, (655.8, 1469.0, 2688.6, 7160.8), strict=True)),
}


def config_of(size, **changes):
    return changed(VIT_SIZES[size], num_classes=1000 if size == "Ti" else 21843, **changes)


def on_meta(config):
    """Shapes without memory: a ViT-L takes no time."""
    with torch.device("meta"):
        return build_model(config)


def gmacs_at(model, budgets):
    told = []
    for budget in budgets:
        model.set_effective_capacity(budget)
        told.append(model.macs() / 1e9)
    return told


@pytest.mark.parametrize("size", TABLE)
def test_the_table_of_sizes_and_budgets_to_the_printed_digit(size):
    nested = on_meta(config_of(size))
    constant = on_meta(config_of(size, nesting=CONSTANT))
    skipping = on_meta(config_of(size, nesting=DENSE, skipping=SkippingConfig(every=2)))
    dim = nested.config.dim
    router = linear_macs(196, dim, 4) / 1e9
    scores = 6 * linear_macs(196, dim, 1) * (nested.config.depth // 12) / 1e9

    gmacs = gmacs_at(constant, (1.0, 0.5, 0.25, 0.125))
    gmacs += [value - router for value in gmacs_at(nested, BUDGETS)]
    gmacs += [skipping.macs() / 1e9 - scores]

    assert [round(value, 3) for value in gmacs] == list(TABLE[size])


@pytest.mark.parametrize("size", CLIP_TABLE)
def test_the_table_of_clips_to_the_printed_digit(size):
    config = changed(VIVIT_SIZES["B/16x2"], image_size=size)
    nested, constant = on_meta(config), on_meta(changed(config, nesting=CONSTANT))

    router = 16 * linear_macs(nested.config.num_patches, 768, 4) / 1e9  # not in the table

    gmacs = gmacs_at(constant, (1.0, 0.5, 0.25, 0.125))
    gmacs += [value - router for value in gmacs_at(nested, CLIP_BUDGETS)]

    assert gmacs == pytest.approx(list(CLIP_TABLE[size]), abs=0.0501)


def test_a_later_router_costs_the_layers_before_it_at_full_width():
    gmacs = []
    for layer in range(5):
        model = on_meta(changed(VIVIT_SIZES["B/16x2"], image_size=256, router_layers=(layer,)))
        gmacs += gmacs_at(model, (0.4,))

    assert gmacs == pytest.approx([164.6, 182.1, 199.5, 217.0, 234.4], rel=1e-3)


@pytest.mark.parametrize("size", PARAMETERS)
def test_v_moe_has_the_published_parameters(size):
    config = replace(VMOE_SIZES[size], num_classes=18_291, pre_logits=True)
    told = {}
    for placement, spacing in PARAMETERS[size]:
        experts = replace(config.experts, placement=placement, spacing=spacing)
        model = on_meta(replace(config, experts=experts))
        parameters = sum(p.numel() for p in model.parameters())
        told[placement, spacing] = round(parameters / 1e6, 1)

    assert told == PARAMETERS[size]


def test_v_moe_15b_has_the_published_parameters():
    model = on_meta(replace(VMOE_SIZES["15B"], num_classes=29_593))

    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 14705.1


# Forward cost over ViT-H/14's, in percent: V-MoE, table of inference settings.
RELATIVE = [
    ("L/16", "last", 2, {}, 38.98),
    ("L/16", "every", 2, {}, 49.88),
    ("H/14", "last", 5, {}, 111.10),
    ("H/14", "every", 2, {}, 135.53),
    ("H/14", "last", 5, {"k": 1}, 100.53),
    ("H/14", "last", 5, {"capacity_ratio": 0.5}, 100.03),
    ("H/14", "last", 5, {"capacity_ratio": 0.6}, 102.04),
]


@pytest.mark.parametrize(("size", "placement", "spacing", "setting", "percent"), RELATIVE)
def test_v_moe_costs_what_the_paper_says_of_its_settings(
    size, placement, spacing, setting, percent
):
    dense = on_meta(replace(VMOE_SIZES["H/14"], experts=ExpertsConfig()))
    config = VMOE_SIZES[size]
    experts = replace(config.experts, placement=placement, spacing=spacing)
    model = on_meta(replace(config, experts=experts))

    model.set_capacity(**setting)

    assert 100 * model.macs() / dense.macs() == pytest.approx(percent, abs=0.1)


def test_a_block_is_the_formula():
    """12 N D^2 e_c + 2 N^2 D: the linear part shrinks, the attention core never does."""
    n, d = 100, 64
    for counts, share in (((0, n), 1), ((n, 0), 2)):
        layout = Layout.of(counts, (32, d))
        expected = 12 * n * d * d // share + 2 * n * n * d
        assert attention_macs(layout) + mlp_macs(layout, 4 * d) == expected
    assert linear_macs(7, 3, 5) == 105


@pytest.mark.parametrize("budget", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_counter_on_the_real_forward_pass_of_every_model_agrees(name, budget):
    model = build_model(tiny(**EVERY_MODEL[name]))
    if len(model.config.nesting.widths) > 1:
        model.set_effective_capacity(budget)

    counted = flops_of(model, random_images(2, dtype=torch.float32, config=model.config))

    assert counted == pytest.approx(2 * 2 * model.macs(), rel=1e-9)


@pytest.mark.parametrize(("size", "budget"), [("Ti", 0.125), ("S", 0.3), ("S", 1.0), ("B", 0.7)])
def test_a_counter_on_a_model_of_real_size_agrees(size, budget):
    model = on_meta(config_of(size, effective_capacity=budget))

    counted = flops_of(model, torch.empty(2, 3, 224, 224, device="meta"))

    assert counted == pytest.approx(2 * 2 * model.macs(), rel=1e-9)


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
