"""Recipes are whole runs of buildable models, and keep to what their sources say."""

from dataclasses import replace

import pytest
import torch

from mone_core.errors import ConfigError
from mone_core.models import build_model
from pipelines.commands.demo import RECIPES as DEMO_RECIPES
from pipelines.recipes import RECIPES, get_recipe

IMAGENET = ("mone_vit_s16", "mone_vit_b16", "mone_vit_l16", "vmoe_b16_i21k")
VIDEO = ("motion_vivit", "clips", "mone_vivit_k400", "mone_vivit_ssv2")


def meta(recipe):
    with torch.device("meta"):
        return build_model(get_recipe(recipe).model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_its_run_and_its_model(recipe):
    config = get_recipe(recipe)
    model = meta(recipe)

    assert config.recipe == recipe
    assert config.out.name == recipe
    reachable = config.model.nesting.reachable(config.train.eval_budgets)
    macs = []
    for budget in sorted(reachable):
        model.set_effective_capacity(budget)
        macs.append(model.macs())
    assert macs == sorted(set(macs))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_its_source_and_its_command(recipe):
    said = RECIPES[recipe].__doc__

    assert "Source:" in said
    assert "Command: `mone " in said


@pytest.mark.parametrize("recipe", VIDEO)
def test_clip_models_nest_their_experts_in_the_spatial_encoder(recipe):
    config = get_recipe(recipe)

    assert config.model.family == "MoNE ViViT"
    assert config.model.video.attention == "factorised"


@pytest.mark.parametrize("recipe", ["motion_vivit", "clips", "mone_vivit_ssv2"])
def test_where_direction_is_the_class_nothing_is_flipped(recipe):
    assert get_recipe(recipe).data.augment.flip == 0


def test_training_clips_of_the_motion_demo_keep_the_pixels_that_were_drawn():
    data = get_recipe("motion_vivit").data

    assert data.eval_resize == 48
    assert data.clip.scale_jitter == (1.0, 1.0)


@pytest.mark.parametrize("recipe", IMAGENET)
def test_imagenet21k_is_trained_with_a_sigmoid_loss_from_rare_classes(recipe):
    config = get_recipe(recipe)

    assert config.train.loss == "sigmoid"
    assert config.model.head_bias == -10
    assert config.model.num_classes == 21_843
    assert config.train.batch_size == 4096


@pytest.mark.parametrize(
    ("recipe", "layers", "magnitude", "mixup"),
    [
        ("mone_vit_s16", 2, 0, 0.0),
        ("mone_vit_b16", 2, 10, 0.2),
        ("mone_vit_l16", 2, 15, 0.5),
        ("vmoe_b16_i21k", 2, 20, 0.5),
        ("mone_vivit_k400", 0, 10, 0.0),
        ("mone_vivit_ssv2", 2, 20, 0.3),
    ],
)
def test_augmentation_is_that_of_the_source(recipe, layers, magnitude, mixup):
    augment = get_recipe(recipe).data.augment

    assert augment.randaugment_layers == layers
    assert augment.randaugment_magnitude == magnitude
    assert augment.mixup == mixup


@pytest.mark.parametrize("recipe", IMAGENET)
def test_imagenet21k_crops_shrink_without_antialiasing(recipe):
    assert not get_recipe(recipe).data.augment.antialias


def test_vmoe_has_the_parameters_of_the_published_model():
    """12 blocks of 7.1 M, of which six have seven MLPs of 4.7 M more, and ImageNet-21K's head."""
    parameters = sum(p.numel() for p in meta("vmoe_b16_i21k").parameters())

    dense = 12 * 7_087_872 + (3 * 256 + 1) * 768 + 198 * 768 + 2 * 768
    sparse = 6 * (7 * 4_722_432 + 768 * 8)
    assert parameters == dense + sparse + 769 * 21_843


@pytest.mark.parametrize(
    ("recipe", "size", "resize", "stride", "gmacs"),
    [("mone_vivit_k400", 224, 256, 2, 283.3), ("mone_vivit_ssv2", 256, 288, 1, 374.0)],
)
def test_vivits_cost_what_their_papers_say(recipe, size, resize, stride, gmacs):
    config, model = get_recipe(recipe), meta(recipe)

    model.set_effective_capacity(1.0)
    assert model.macs() / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert (config.model.image_size, config.data.eval_resize) == (size, resize)
    assert (config.model.video.frames, config.data.clip.stride) == (32, stride)
    assert config.data.clip.scale_jitter == (0.9, 1.33)


@pytest.mark.parametrize(
    ("recipe", "clips", "epochs"),
    [("mone_vivit_k400", 214_834, 30), ("mone_vivit_ssv2", 168_913, 35)],
)
def test_vivits_train_for_the_macs_of_the_dense_model(recipe, clips, epochs):
    config, model = get_recipe(recipe), meta(recipe)

    def macs(budget):
        model.set_effective_capacity(budget)
        return model.macs()

    mean = sum(map(macs, config.train.budgets)) / len(config.train.budgets)
    spent = mean * config.train.steps * config.train.batch_size
    assert spent == pytest.approx(macs(1.0) * clips * epochs, rel=0.01)


def test_every_demo_takes_a_recipe_of_its_own_media():
    for (video, _), recipe in DEMO_RECIPES.items():
        assert (get_recipe(recipe).model.video.frames > 1) is video


def test_a_recipe_is_checked_as_any_run():
    config = get_recipe("motion_vivit")

    with pytest.raises(ConfigError, match=r"data\.eval_resize must be at least model\.image_size"):
        replace(config, data=replace(config.data, eval_resize=32))
