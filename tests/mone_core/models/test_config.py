"""ModelConfig: everything wrong is refused at once, before a model is made."""

import dataclasses
from dataclasses import replace

import pytest

from mone_core.capacity import capacity_distribution
from mone_core.errors import ConfigError
from mone_core.models import (
    DENSE,
    VIT_SIZES,
    ExpertsConfig,
    ModelConfig,
    NestingConfig,
    SkippingConfig,
    VideoConfig,
)
from tests.mone_core.reference import changed


def test_the_defaults_are_the_papers():
    config = ModelConfig()

    assert config.nesting.widths == (0.125, 0.25, 0.5, 1.0)
    assert config.dims == (48, 96, 192, 384)
    assert config.num_patches == 196
    assert (config.gelu, config.norm_eps, config.hidden) == ("tanh", 1e-6, 1536)
    assert (config.nesting.alpha, config.nesting.router_layers) == ("layer", (0,))
    assert config.pool == "gap"


def test_the_sizes_are_the_papers():
    sizes = {name: (c.dim, c.depth, c.heads, c.hidden // c.dim) for name, c in VIT_SIZES.items()}

    assert sizes == {
        "Ti": (192, 12, 3, 4),
        "S": (384, 12, 6, 4),
        "B": (768, 12, 12, 4),
        "L": (1024, 24, 16, 4),
    }


def test_capacity_takes_the_models_own_widths_and_parameters():
    config = NestingConfig(widths=(0.25, 0.5, 1.0), form="product", delta=3, beta=0.5)

    expected = capacity_distribution(0.6, (0.25, 0.5, 1), form="product", delta=3, beta=0.5)
    assert config.capacity(0.6) == expected


@pytest.mark.parametrize(
    "name", ["image_size", "patch_size", "num_classes", "dim", "depth", "heads", "mlp_dim"]
)
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_below_1_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"model: {name} must be 1 or more, got {value}"):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"image_size": 225},
            r"model: patch_size must divide image_size, got 16 and 225$",
        ),
        ({"image_size": 8}, r"model: patch_size must divide image_size, got 16 and 8$"),
        ({"heads": 5}, r"model: heads must divide dim, got 5 and 384$"),
        (
            {"dim": 36, "heads": 2},
            r"model: every width must be a whole number of features: widths \[0\.125\] of dim 36",
        ),
        (
            {"dim": 38, "heads": 2, "widths": (0.5, 1.0), "positions": "sincos"},
            r"model: positions sincos need a dim of 8 or more by fours, got 38$",
        ),
        ({"effective_capacity": 0.1}, r"model: effective capacity 0\.1 is out of reach"),
        ({"widths": (0.5, 0.25, 1.0)}, r"model: widths must rise strictly"),
        ({"widths": ()}, r"model: widths must rise strictly .*got \(\)"),
        ({"delta": 1.0}, r"model: delta must be above 1 and beta above 0, got delta=1\.0"),
        ({"beta": 0.0}, r"model: delta must be above 1 and beta above 0, .*beta=0\.0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(wrong, says):
    with pytest.raises(ConfigError, match=says):
        changed(ModelConfig(), **wrong)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gelu", "tanh"),
        ("positions", "normal"),
        ("form", "fraction"),
        ("allocation", "greedy"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name, known):
    """Not taken for one of the others."""
    with pytest.raises(ConfigError, match=rf"model: .*nonesuch.*{known}"):
        changed(ModelConfig(), **{name: "nonesuch"})


def test_several_problems_are_told_at_once():
    with pytest.raises(
        ConfigError, match=r"patch_size must .*; heads must .*; effective capacity 2\.0 is out of"
    ):
        changed(ModelConfig(), image_size=20, heads=7, effective_capacity=2.0)


def test_a_config_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError, match="depth"):
        ModelConfig().depth = 0


EXPERTS = ExpertsConfig(placement="every", spacing=2, num_experts=4, group_images=2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"experts": replace(EXPERTS, k=5)},
            r"model: experts\.k must be experts\.num_experts or fewer, got 5 of 4",
        ),
        (
            {"experts": replace(EXPERTS, capacity_ratio=0.0)},
            r"experts: capacity ratio must be above 0 and finite, got 0\.0",
        ),
        (
            {"experts": ExpertsConfig(placement="last", spacing=2)},
            r"experts\.spacing must be at most 1 for placement last and depth 2, got 2",
        ),
        ({"experts": replace(EXPERTS, noise=-1.0)}, r"experts\.noise must be 0 or more, got -1"),
        (
            {"experts": replace(EXPERTS, noise=0.0)},
            r"experts\.load_weight needs noise to define the load",
        ),
        (
            {"experts": replace(EXPERTS, num_experts=0)},
            r"experts\.num_experts must be 1 or more, got 0",
        ),
        (
            {"experts": replace(EXPERTS, rounding="down")},
            r"experts\.rounding 'down' does not exist; it must be one of .*ceil4",
        ),
        (
            {"nesting": NestingConfig(router_layers=(0, 2))},
            r"nesting\.router_layers must rise within 0 to 1 \(depth 2\), got \(0, 2\)",
        ),
        (
            {"nesting": NestingConfig(router_layers=())},
            r"nesting\.router_layers must rise within 0 to 1 .* got \(\)",
        ),
        (
            {"nesting": NestingConfig(slices="hidden")},
            r"nesting\.slices hidden cuts all tokens alike: .* constant, got learned",
        ),
        (
            {"nesting": NestingConfig(slices="hidden", assignment="constant"), "experts": EXPERTS},
            r"nesting\.slices hidden has no experts; set experts\.placement to none",
        ),
        (
            {"nesting": NestingConfig(assignment="constant", effective_capacity=0.3)},
            r"effective capacity 0\.3 .* constant width it must be one of \(0\.125, 0\.25",
        ),
        (
            {"skipping": SkippingConfig(every=2)},
            r"skipping is a baseline of its own: .*widths \(1\.0,\), .*none and pool gap",
        ),
        (
            {"nesting": DENSE, "skipping": SkippingConfig(every=3)},
            r"skipping\.every must be at most the depth of 2 .* got 3",
        ),
        (
            {"nesting": DENSE, "skipping": SkippingConfig(every=2, capacity=0.0)},
            r"skipping\.capacity must lie in \(0, 1\], got 0\.0",
        ),
        (
            {"nesting": DENSE, "skipping": SkippingConfig(every=2, capacity=0.01)},
            r"skipping\.capacity 0\.01 leaves no token of 16; it must be at least 1 / 16",
        ),
        (
            {"video": VideoConfig(frames=5, tubelet=2)},
            r"video\.tubelet must divide video\.frames, got 2 and 5",
        ),
        (
            {"nesting": NestingConfig(allocation="mod_greedy", effective_capacity=0.03)},
            r"effective capacity 0\.03 leaves none of 16 tokens .* at least 1 / 16",
        ),
        (
            {"experts": ExpertsConfig(placement="last"), "depth": 1},
            r"experts\.placement last needs a depth of 2 or more, got 1",
        ),
        (
            {"experts": replace(EXPERTS, num_experts=64, k=1, capacity_ratio=0.01)},
            r"experts: an expert gets 0\.005 slots for 32 tokens",
        ),
        (
            {"video": VideoConfig(temporal_depth=0)},
            r"video\.temporal_depth must be 1 or more, got 0",
        ),
        ({"dim": 16.0}, r"dim must be a whole number, got 16\.0"),
        ({"head_bias": float("nan")}, r"head_bias must be finite, got nan"),
        (
            {"nesting": NestingConfig(widths=[0.5, 1.0])},
            r"nesting\.widths must be a tuple, got \[0\.5, 1\.0\]",
        ),
        (
            {"nesting": NestingConfig(widths=(float("nan"), 1.0))},
            r"nesting\.widths must be finite, got \(nan, 1\.0\)",
        ),
        (
            {
                "nesting": NestingConfig(assignment="constant", slices="hidden", widths=(0.3, 1.0)),
                "mlp_dim": 24,
            },
            r"widths \[0\.3\] of mlp_dim 24 are not",
        ),
        ({"pool": "max"}, r"pool 'max' does not exist; it must be one of \('gap', 'cls'\)"),
        (
            {"video": VideoConfig(attention="axial")},
            r"video\.attention 'axial' does not exist; .*factorised",
        ),
    ],
)
def test_a_model_of_any_family_that_cannot_be_is_refused_with_its_value(wrong, says):
    with pytest.raises(ConfigError, match=says):
        ModelConfig(**{"image_size": 8, "patch_size": 2, "dim": 16, "depth": 2, "heads": 2} | wrong)
