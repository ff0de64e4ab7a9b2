"""Beginning with weights of somebody else's model, or of one's own in another shape."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mone_core.models import DENSE, ExpertsConfig, build_model
from pipelines.errors import RunError
from pipelines.runner import check_start, open_run, resolve
from pipelines.train import Outcome
from pipelines.weights import save_weights, start_from
from tests.pipelines import tiny


@pytest.fixture
def config(tmp_path):
    config = resolve(tiny.tiny_config(tiny.write_data(tmp_path / "data"), tmp_path / "run"))
    return replace(config, train=replace(config.train, steps=2))


def starting_from(config, path, allow=(), **model):
    """The run with these weights to begin with, and a model changed in some fields."""
    return replace(
        config,
        model=replace(config.model, **model),
        train=replace(config.train, start_from=path, start_allow=allow),
    )


def trained_model(config):
    torch.manual_seed(5)
    model = build_model(config)
    torch.nn.init.normal_(model.head.classify.weight)
    return model


EXPERTS = ExpertsConfig(placement="every", num_experts=2, group_images=4)


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({}, "routers"),
        ({"experts": EXPERTS}, "mlp.router"),
        ({"image_size": 8}, "routers"),
    ],
)
def test_a_dense_model_begins_a_nested_or_sparse_one(change, fresh, config, tmp_path):
    dense = trained_model(replace(config.model, nesting=DENSE))
    save_weights(tmp_path / "dense", dense, step=9)
    run = starting_from(config, tmp_path / "dense", **change)

    report = check_start(run)
    outcome, _ = tiny.train_here(run)

    assert any(fresh in name for name in report.fresh)
    assert "head.classify.weight" in report.filled
    assert outcome is Outcome.FINISHED


def test_a_file_of_timm_begins_a_run(config, tmp_path):
    """Written under timm's names from a model of ours: the same weights arrive."""
    model = trained_model(replace(config.model, nesting=DENSE, gelu="erf", pool="cls"))
    save_file(timm_names(model), tmp_path / "vit.safetensors")
    run = starting_from(config, tmp_path / "vit.safetensors", gelu="erf", pool="cls")
    nested = build_model(run.model)

    start_from(nested, run.train.start_from)

    nested.set_effective_capacity(1.0)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(nested(pixels).logits_BK, model(pixels).logits_BK)
    assert open_run(run) == 0


def timm_names(model):
    state, dim, patch = model.state_dict(), model.config.dim, model.config.patch_size
    names = {
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
        "attention.qkv": "attn.qkv",
        "attention.out": "attn.proj",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }
    theirs = {
        "cls_token": state["embed.cls_D"].view(1, 1, dim),
        "pos_embed": state["embed.position_ND"][None],
        "patch_embed.proj.weight": state["embed.project.weight"].view(dim, 3, patch, patch),
        "patch_embed.proj.bias": state["embed.project.bias"],
    }
    for kind in ("weight", "bias"):
        theirs[f"norm.{kind}"] = state[f"norm.{kind}"]
        theirs[f"head.{kind}"] = state[f"head.classify.{kind}"]
        for layer in range(model.config.depth):
            for ours, name in names.items():
                value = state[f"encoder.blocks.{layer}.{ours}.{kind}"]
                theirs[f"blocks.{layer}.{name}.{kind}"] = value
    return {name: value.contiguous() for name, value in theirs.items()}


def test_other_classes_need_a_fresh_head_by_permission(config, tmp_path):
    save_weights(tmp_path / "w", trained_model(replace(config.model, num_classes=7)), step=1)

    with pytest.raises(
        RunError,
        match=r"train\.start_from .*/w: .*head.*; set model\.\* as there, or allow .*start_allow",
    ):
        open_run(starting_from(config, tmp_path / "w"))
    assert not config.out.exists()

    report = check_start(starting_from(config, tmp_path / "w", ("head",)))
    assert {"head.classify.weight", "head.classify.bias"} <= set(report.fresh)


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(config, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(RunError, match=r"none\.npz does not exist; give a folder .* file"):
        open_run(starting_from(config, tmp_path / "none.npz"))
    with pytest.raises(RunError, match=r"model\.pt is neither .* \(pickled checkpoints are not r"):
        open_run(starting_from(config, tmp_path / "model.pt"))
    assert not config.out.exists()


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_damaged_file_is_refused(suffix, config, tmp_path):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b"PK\3\4 rubbish")

    with pytest.raises(RunError, match=rf"damaged\.{suffix} cannot be read as .*; fetch it again"):
        open_run(starting_from(config, path))


def test_an_array_of_objects_is_not_unpickled(config, tmp_path):
    np.savez(tmp_path / "objects.npz", **{"cls": np.array([{}], dtype=object)})

    with pytest.raises(RunError, match=r"objects\.npz cannot be read as \.npz"):
        open_run(starting_from(config, tmp_path / "objects.npz"))
