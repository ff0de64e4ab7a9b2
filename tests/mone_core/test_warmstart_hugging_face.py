"""Weights of `transformers`: its own models compute the same numbers as ours."""

from dataclasses import replace

import pytest
import torch

from mone_core.errors import WeightsError
from mone_core.models import VideoConfig, build_model
from mone_core.warmstart import Stated, config_of, convert, load, source_of

WHY = "the reference of these tests; `pip install transformers`"
transformers = pytest.importorskip("transformers", reason=WHY)
safetensors = pytest.importorskip("safetensors.torch", reason=WHY)

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "num_labels": 7,
}
HEADS = Stated(heads=3)
CLIPS = Stated(heads=3, frames=4)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomised(model):
    """Double precision, and no parameter left at the zeros and ones of a fresh model."""
    model = model.double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def vit(**changes):
    return transformers.ViTConfig(**(SIZES | {"patch_size": 4} | changes))


def vivit(**changes):
    return transformers.VivitConfig(
        **(SIZES | {"num_frames": 4, "tubelet_size": [2, 4, 4]} | changes)
    )


def in_memory(model, folder):
    """Parameters by the names that the modules have."""
    return model.state_dict()


def in_a_file(model, folder):
    """Parameters by the names that files have, those on the hub too."""
    model.save_pretrained(folder)
    return safetensors.load_file(folder / "model.safetensors")


def built(tensors, stated):
    model = build_model(config_of(tensors, stated=stated)).eval()
    report = load(model, tensors, stated=stated)
    assert set(report.filled) == set(model.state_dict())
    return model


def assert_same(ours, theirs):
    assert theirs.std() > 0.1  # else nothing is shown
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("state_of", [in_memory, in_a_file])
@pytest.mark.parametrize("grid", [1, 3])
def test_a_vit_for_image_classification_computes_the_same(state_of, grid, tmp_path):
    theirs = randomised(transformers.ViTForImageClassification(vit(image_size=4 * grid)))
    x = torch.randn(2, 3, 4 * grid, 4 * grid)
    tensors = state_of(theirs, tmp_path)

    model = built(tensors, HEADS)

    assert source_of(tensors).family == "hf_vit"
    assert (model.config.gelu, model.config.norm_eps) == ("erf", 1e-12)
    with torch.no_grad():
        assert_same(model(x).logits_BK, theirs(x).logits)


@pytest.mark.parametrize("state_of", [in_memory, in_a_file])
def test_the_pooler_of_a_bare_vit_is_the_tanh_layer_before_the_head(state_of, tmp_path):
    theirs, x = randomised(transformers.ViTModel(vit())), torch.randn(2, 3, 12, 12)
    tensors = state_of(theirs, tmp_path)
    config = replace(config_of(tensors, stated=HEADS), num_classes=7)
    model = build_model(config).eval()

    with pytest.raises(
        WeightsError,
        match=r"the head has 7 classes behind a tanh layer, .* weights no classes behind",
    ):
        load(model, tensors)
    report = load(model, tensors, allow=["head"])

    assert report.fresh == ("head.classify.weight", "head.classify.bias")
    with torch.no_grad():
        features, _ = model.features(x)
        theirs = theirs(x)
        assert_same(model.norm(model.encoder(model.embed(x)).x_NBD).transpose(0, 1), theirs[0])
        assert_same(model.head.pre_logits(features).tanh(), theirs.pooler_output)


@pytest.mark.parametrize("state_of", [in_memory, in_a_file])
def test_a_vivit_for_video_classification_computes_the_same(state_of, tmp_path):
    theirs = randomised(transformers.VivitForVideoClassification(vivit()))
    x = torch.randn(2, 4, 3, 12, 12)
    tensors = state_of(theirs, tmp_path)

    model = built(tensors, CLIPS)

    assert source_of(tensors).family == "hf_vivit"
    assert (model.config.gelu, model.config.norm_eps) == ("tanh", 1e-6)
    assert model.config.video.attention == "joint"
    with torch.no_grad():
        assert_same(model(x).logits_BK, theirs(x).logits)


def test_a_bare_vivit_is_told_from_a_bare_vit_by_its_kernel():
    tensors = randomised(transformers.VivitModel(vivit())).state_dict()

    assert source_of(tensors).family == "hf_vivit"
    assert convert(tensors, stated=CLIPS).config.pre_logits


def test_the_usual_numbers_are_those_of_the_library():
    """GELU flavour and LN eps that no file of weights shows."""
    assert (vit().hidden_act, vit().layer_norm_eps) == ("gelu", 1e-12)
    assert (vivit().hidden_act, vivit().layer_norm_eps) == ("gelu_fast", 1e-6)


def test_a_checkpoint_with_other_numbers_is_taken_as_stated():
    changes = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}
    theirs = randomised(transformers.ViTForImageClassification(vit(**changes)))
    x = torch.randn(2, 3, 12, 12)

    model = built(theirs.state_dict(), Stated(heads=3, gelu="tanh", norm_eps=1e-3))

    with torch.no_grad():
        assert_same(model(x).logits_BK, theirs(x).logits)


def test_frames_of_a_vivit_must_be_stated_where_no_model_says_them():
    tensors = transformers.VivitForVideoClassification(vivit()).state_dict()
    joint = config_of(tensors, stated=CLIPS)
    longer = replace(joint, video=replace(joint.video, frames=8))

    with pytest.raises(
        WeightsError,
        match=r"position_embeddings is \[1, 19, 24\], .* how many frames .* state frames",
    ):
        config_of(tensors, stated=HEADS)
    with pytest.raises(WeightsError, match="state frames"):
        load(build_model(longer), tensors)
    with pytest.raises(WeightsError, match="19 rows, which are not 4 squares of patches"):
        config_of(tensors, stated=Stated(heads=3, frames=8))
    notes = load(build_model(longer), tensors, stated=CLIPS).notes
    assert notes == ("embed.position_ND: resized from 2 x 3 x 3 to 4 x 3 x 3",)


def test_a_vivit_with_joint_attention_is_no_beginning_of_a_factorised_one():
    tensors = transformers.VivitForVideoClassification(vivit()).state_dict()
    joint = config_of(tensors, stated=CLIPS)
    factorised = VideoConfig(frames=4, tubelet=2, temporal_depth=1)

    with pytest.raises(
        WeightsError,
        match=r"misshaped: embed.position_ND is of joint attention over 2 steps but must be of one",
    ):
        load(build_model(replace(joint, video=factorised)), tensors, stated=CLIPS)
