"""What the router does with the first validation images."""

import numpy as np
import pytest
import torch

from mone_core.models import ModelConfig, VideoConfig, build_model
from pipelines.data.batch import Batch, model_input
from pipelines.evaluate import validation_stream
from pipelines.routing import routing_examples, without_common_words
from tests.pipelines import tiny

BUDGETS = (0.2, 1.0)
NAMES = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    return tiny.tiny_config(tiny.write_data(folder / "data", val=5), folder / "run")


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(3)
    model = build_model(config.model)
    torch.nn.init.normal_(model.head.classify.weight)
    return model


def test_images_labels_predictions_and_experts_are_those_of_the_model(model, config):
    stream = validation_stream(config)

    found = routing_examples(model, stream, BUDGETS, NAMES, count=3)

    batch = next(iter(stream))
    assert np.array_equal(found.images_uint8, batch.pixels_RTHWC[:3, 0].numpy())
    assert found.labels == tuple(NAMES[label] for label in batch.labels_R[:3])
    assert found.budgets == BUDGETS
    assert found.widths == config.model.nesting.widths
    assert found.expert.shape == (2, 3, 4, 4)
    for row, budget in enumerate(BUDGETS):
        model.set_effective_capacity(budget)
        output = model(model_input(batch.pixels_RTHWC[:3]))
        assert np.array_equal(found.expert[row].reshape(3, 16), output.routed[0].expert_BN.numpy())
        predicted = [NAMES[k] for k in output.logits_BK.argmax(dim=1)]
        assert [of_image[row] for of_image in found.predictions] == predicted


def test_every_budget_sends_as_many_patches_to_each_width_as_it_may(model, config):
    found = routing_examples(model, validation_stream(config), BUDGETS, NAMES)

    for row, budget in enumerate(BUDGETS):
        model.set_effective_capacity(budget)
        for image in found.expert[row]:
            assert np.bincount(image.ravel(), minlength=4).tolist() == list(
                model.encoder.plan.counts
            )
    assert (found.expert[1] == 3).all()


def test_padding_is_not_shown(model, config):
    found = routing_examples(model, validation_stream(config), BUDGETS, NAMES, count=8)

    assert len(found.images_uint8) == len(found.labels) == len(found.predictions) == 5


def test_samples_that_were_left_out_are_not_shown_either(model):
    size = model.config.image_size
    pixels = torch.randint(0, 256, (4, 1, size, size, 3), dtype=torch.uint8)
    valid = torch.tensor([False, True, True, True])
    batch = Batch(pixels_RTHWC=pixels, labels_R=torch.tensor([0, 1, 2, 3]), valid_B=valid)

    found = routing_examples(model, [batch], BUDGETS, NAMES, count=2)

    assert np.array_equal(found.images_uint8, pixels[1:3, 0].numpy())
    assert found.labels == ("green", "blue")


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_of_a_clip_its_steps_are_shown_each_with_its_own_routing(attention):
    torch.manual_seed(0)
    video = VideoConfig(frames=12, tubelet=2, temporal_depth=1, attention=attention)
    sizes = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}
    model = build_model(ModelConfig(**sizes, num_classes=4, video=video)).eval()
    pixels = torch.randint(0, 256, (6, 12, 8, 8, 3), dtype=torch.uint8)  # 3 clips, 2 views each
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    batch = Batch(pixels_RTHWC=pixels, labels_R=labels, valid_B=torch.tensor([True, True, True]))

    found = routing_examples(model, [batch], (0.5,), NAMES, count=8)

    frames = [0, 4, 6, 10]  # first frames of steps 0, 2, 3, 5 of six
    shown = pixels[[1, 3]][:, frames].flatten(0, 1)
    assert np.array_equal(found.images_uint8, shown.numpy())
    assert found.labels == ("red",) * 4 + ("green",) * 4
    with torch.no_grad():
        model.set_effective_capacity(0.5)
        expert_BN = model(model_input(pixels[[1, 3]])).routed[0].expert_BN
    of_steps = expert_BN.reshape(2, 6, 2, 2)[:, [0, 2, 3, 5]].flatten(0, 1)
    assert np.array_equal(found.expert[0], of_steps.numpy())


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["Moving something left", "Moving something up left"], ["left", "up left"]),
        (["Moving it", "Moving it up"], ["it", "it up"]),
        (["tench", "great white shark"], ["tench", "great white shark"]),
        (["one name alone"], ["alone"]),
        (["two  spaces", "no more"], ["two  spaces", "no more"]),
    ],
)
def test_words_that_all_names_begin_with_are_not_shown(names, shown):
    assert without_common_words(names) == shown
