"""ModelConfig: everything wrong is refused at once, before a model is made."""

import dataclasses

import pytest

from mone_core.capacity import capacity_distribution
from mone_core.errors import ConfigError
from mone_core.models import VIT_SIZES, ModelConfig, NestingConfig
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
