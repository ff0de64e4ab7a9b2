"""Exported weights: the same model comes back, and nothing else does."""

from dataclasses import replace

import pytest
import torch

from mone_core.models import ModelConfig, build_model
from pipelines.errors import RunError
from pipelines.files import write_json
from pipelines.weights import MODEL_CONFIG, WEIGHTS, load_weights, save_weights, step_of_weights
from tests.pipelines.tiny import same_bits

CONFIG = ModelConfig(image_size=16, patch_size=4, num_classes=3, dim=16, depth=2, heads=2)


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = build_model(CONFIG)
    torch.nn.init.normal_(model.head.classify.weight)
    return model


def test_a_model_comes_back_as_it_went(model, tmp_path):
    save_weights(tmp_path / "new" / "folder", model, step=42)

    again = load_weights(tmp_path / "new" / "folder")

    assert again.config == CONFIG
    assert same_bits(dict(again.state_dict()), dict(model.state_dict()))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images).logits_BK, model(images).logits_BK)
    assert step_of_weights(tmp_path / "new" / "folder") == 42


def test_only_safetensors_and_json_are_written(model, tmp_path):
    save_weights(tmp_path, model, step=0)

    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL_CONFIG, WEIGHTS]
    assert WEIGHTS.endswith(".safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"model\.json does not exist"):
        load_weights(tmp_path)


def test_weights_that_do_not_fit_their_configuration_are_refused_in_one_line(model, tmp_path):
    save_weights(tmp_path, model, step=0)
    write_json(tmp_path / MODEL_CONFIG, replace(CONFIG, depth=3))

    with pytest.raises(
        RunError,
        match=r"weights\.safetensors does not fit model\.json beside it: .*blocks\.2.*agai",
    ) as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-8], lambda _: b""])
def test_a_cut_off_file_is_refused(model, tmp_path, damage):
    save_weights(tmp_path, model, step=0)
    path = tmp_path / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(RunError, match=r"weights\.safetensors does not fit .*; export it again"):
        load_weights(tmp_path)


def test_missing_weights_are_refused(model, tmp_path):
    save_weights(tmp_path, model, step=0)
    (tmp_path / WEIGHTS).unlink()

    with pytest.raises(RunError, match=r"weights\.safetensors does not fit .*No such file"):
        load_weights(tmp_path)
