"""Foreign weights: their models compute the same here, and a file that is not whole is told so."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mone_core.errors import ConfigError, WeightsError
from mone_core.models import build_model
from mone_core.warmstart import Stated, config_of, convert, load, read_npz, source_of
from mone_core.warmstart.problems import in_few_words
from tests.mone_core import foreign

TIMM = Stated(heads=foreign.HEADS)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def built(tensors, stated=TIMM, **changes):
    """The model that tensors are of, filled with them."""
    model = build_model(replace(config_of(tensors, stated=stated), **changes)).eval()
    report = load(model, tensors, stated=stated)
    assert set(report.filled) == set(model.state_dict())
    assert not report.fresh
    assert not report.dropped
    return model


def images():
    return torch.randn(2, 3, foreign.SIZE, foreign.SIZE)


def assert_same(ours, theirs):
    theirs = torch.as_tensor(theirs)
    assert theirs.std() > 0.1  # else nothing is shown
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_logits": True},
        {"cls": False},
        {"cls_has_position": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_timm_vit_computes_the_same(options, prefix):
    state, x = foreign.timm_state(**options), images()

    model = built({prefix + name: tensor for name, tensor in state.items()})

    assert (model.config.gelu, model.config.norm_eps) == ("erf", 1e-6)
    assert_same(model(x).logits_BK, foreign.timm_forward(state, x))


FLAX = {
    "augreg": foreign.AUGREG,
    "linen": foreign.LINEN,
    "early big_vision": foreign.EARLY_BIG_VISION,
    "big_vision gap": foreign.BIG_VISION,
    "big_vision tok": foreign.BIG_VISION_TOK,
}


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("name", FLAX)
def test_a_vit_of_the_jax_families_computes_the_same_from_its_npz(name, prefix, tmp_path):
    state, x = FLAX[name].state(), images()
    np.savez(tmp_path / "vit.npz", **{prefix + key: array for key, array in state.items()})

    model = built(read_npz(tmp_path / "vit.npz"), Stated())

    assert (model.config.gelu, model.config.norm_eps) == ("tanh", 1e-6)
    assert model.config.heads == foreign.HEADS
    assert_same(model(x).logits_BK, FLAX[name].forward(state, x.permute(0, 2, 3, 1).numpy()))


def test_blocks_that_big_vision_stacked_for_a_scan_are_taken_apart():
    state, x = foreign.BIG_VISION.state(), images()

    model = built(foreign.scanned(state), Stated())

    assert_same(
        model(x).logits_BK, foreign.BIG_VISION.forward(state, x.permute(0, 2, 3, 1).numpy())
    )


SPARSE = {  # blocks with experts -> placement, spacing
    (1, 3): ("every", 2),
    (3,): ("last", 1),  # and every fourth of four
    (0, 1, 2, 3): ("every", 1),
}


@pytest.mark.parametrize("sparse", SPARSE, ids=str)
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_v_moe_computes_the_same_experts_included(sparse, cls, k, tmp_path):
    theirs = foreign.Flax(
        "Encoder", foreign.VMOE_PARTS, foreign.VMOE_POSITION, cls=cls, sparse=sparse, k=k
    )
    state, x = theirs.state(), images()
    np.savez(tmp_path / "vmoe.npz", **state)
    tensors = read_npz(tmp_path / "vmoe.npz")
    found = config_of(tensors)

    model = built(
        tensors, experts=replace(found.experts, k=k, capacity_ratio=float(foreign.EXPERTS))
    )

    assert (found.experts.placement, found.experts.spacing) == SPARSE[sparse]
    assert found.experts.num_experts == foreign.EXPERTS
    assert_same(model(x).logits_BK, theirs.forward(state, x.permute(0, 2, 3, 1).numpy()))


def test_last_n_placement_is_read_off_the_blocks():
    deep = foreign.VMOE.state()
    for name in list(deep):
        if "/encoderblock_" in name:  # blocks 4 to 7 like 0 to 3: experts in 1, 3, 5, 7
            i = int(name.split("encoderblock_")[1][0])
            deep[name.replace(f"encoderblock_{i}", f"encoderblock_{i + 4}")] = deep[name]
    for i in (1, 3):  # and none in 1 and 3
        deep = {n: a for n, a in deep.items() if f"encoderblock_{i}/Moe" not in n}
        for end, name in ((e, n) for e in ("kernel", "bias") for n in ("Dense_0", "Dense_1")):
            deep[f"Encoder/encoderblock_{i}/Mlp/{name}/{end}"] = deep[
                f"Encoder/encoderblock_0/Mlp/{name}/{end}"
            ]

    experts = convert(deep).config.experts

    assert (experts.placement, experts.spacing) == ("last", 2)


def test_bfloat16_arrays_of_jax_keep_their_numbers():
    state = foreign.BIG_VISION.state()
    kernel = torch.from_numpy(state["head/kernel"]).to(torch.bfloat16)
    state["head/kernel"] = kernel.view(torch.int16).numpy().view("V2")

    weights = convert(state)

    assert torch.equal(weights.state["head.classify.weight"], kernel.t())


def test_arrays_that_cannot_be_written_to_are_taken_too():
    state = foreign.BIG_VISION.state()
    for array in state.values():
        array.flags.writeable = False

    assert set(built(state, Stated()).state_dict()) == set(convert(state).state)


FAMILIES = {
    "timm": foreign.timm_state,
    "big_vision": foreign.AUGREG.state,
    "vmoe": foreign.VMOE.state,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised_by_its_names(family):
    source = source_of(FAMILIES[family]())

    assert (source.family, source.prefix, source.depth) == (family, "", foreign.DEPTH)


def test_own_weights_come_back_as_they_were():
    model = build_model(config_of(foreign.VMOE.state()))
    other = build_model(model.config)
    state = model.state_dict()

    report = load(other, state)

    assert source_of(state).family == "mone"
    assert set(report.filled) == set(state)
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    assert convert(state, stated=Stated(config=model.config)).config == model.config


def test_names_of_no_family_are_told_with_the_families():
    with pytest.raises(
        WeightsError,
        match=r"of no known family; their names begin with conv1.weight, fc.bias\. Known are: timm "
        r"\(timm ViT\), hf_vit .*big_vision .*vmoe .*mone \(this package's own\); take a file",
    ):
        source_of({"fc.bias": torch.zeros(1), "conv1.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="begin with nothing at all"):
        source_of({})


def test_all_that_is_wrong_with_a_file_is_told_at_once():
    state = foreign.timm_state()
    for i in (1, 2):
        del state[f"blocks.{i}.attn.proj.bias"]
    del state["norm.bias"]
    state["fc_norm.weight"] = torch.zeros(foreign.DIM)
    state["blocks.3.ls1.gamma"] = torch.zeros(foreign.DIM)
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    state["head.bias"] = torch.zeros(foreign.CLASSES, dtype=torch.int64)

    with pytest.raises(
        WeightsError,
        match=r"^these weights \(timm ViT\) are not whole: "
        r"missing: blocks.\{1,2\}.attn.proj.bias, norm.bias; "
        r"extra: fc_norm.weight, blocks.3.ls1.gamma; "
        r"misshaped: blocks.0.mlp.fc1.bias is \[3\] but must be \[24\]; "
        r"head.bias holds torch.int64, not floating point numbers\. Take another copy",
    ):
        convert(state, stated=TIMM)


def test_blocks_with_the_same_problem_are_told_together():
    names = [f"blocks.{i}.norm1.bias" for i in (0, 1, 2, 3, 5, 7, 8)]
    flax = [f"Encoder/encoderblock_{i}/LayerNorm_0/bias" for i in (10, 11)]

    assert in_few_words([*names, *flax, "blocks.4.norm2.bias", "norm.bias"]) == [
        "blocks.{0-3,5,7,8}.norm1.bias",
        "Encoder/encoderblock_{10,11}/LayerNorm_0/bias",
        "blocks.4.norm2.bias",
        "norm.bias",
    ]


def test_arrays_of_a_file_that_fail_are_told_by_their_own_names():
    state = foreign.VMOE.state()
    state["Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"] = np.zeros((3, 16, 7))
    state["opt/count"] = np.zeros((), dtype=np.int64)
    state["head/bias"] = np.array(["a"] * foreign.CLASSES)
    del state["Encoder/encoderblock_3/Moe/Router/dense/kernel"]

    with pytest.raises(
        WeightsError,
        match=r"missing: Encoder/encoderblock_3/Moe/Router/dense/kernel; extra: opt/count; "
        r"misshaped: Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel is \[3, 16, 7\] but must be "
        r"\[3, 16, 24\]; head/bias holds <U1",
    ):
        convert(state)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def test_sizes_that_cannot_be_read_are_told():
    timm = foreign.timm_state()
    with pytest.raises(WeightsError, match=r"timm ViT\) lack pos_embed, from which sizes are read"):
        config_of(without(timm, "pos_embed"), stated=TIMM)
    with pytest.raises(
        WeightsError, match=r"pos_embed is \[16\] but its axes must be: 1, positions"
    ):
        config_of(timm | {"pos_embed": torch.zeros(16)}, stated=TIMM)
    with pytest.raises(
        WeightsError, match=r"heads, and width 16 is no multiple .* 64; state heads"
    ):
        config_of(timm)
    with pytest.raises(
        WeightsError, match=r"pos_embed has 10 rows, .* square of patches, .* there is no cls_token"
    ):
        config_of(without(timm, "cls_token"), stated=TIMM)
    with pytest.raises(
        WeightsError, match=r"patches of 4 x 2 pixels in 1 colours; this package has"
    ):
        config_of(timm | {"patch_embed.proj.weight": torch.zeros(16, 1, 4, 2)}, stated=TIMM)
    with pytest.raises(ConfigError, match="heads must divide dim, got 3 and 16"):
        config_of(timm, stated=Stated(heads=3))
    with pytest.raises(WeightsError, match=r"of this package do not show all sizes .* the config"):
        config_of(build_model(config_of(timm, stated=TIMM)).state_dict())


def test_experts_in_other_blocks_than_we_place_them_are_told():
    theirs = foreign.Flax("Encoder", foreign.VMOE_PARTS, foreign.VMOE_POSITION, sparse=(0, 3))

    with pytest.raises(WeightsError, match=r"blocks \(0, 3\) of 4 have experts, which is neither"):
        config_of(theirs.state())


def test_heads_of_64_features_are_assumed_where_a_file_does_not_say():
    wide = {name: torch.zeros(()) for name in foreign.timm_state()}
    wide |= {
        "patch_embed.proj.weight": torch.zeros(192, 3, 16, 16),
        "pos_embed": torch.zeros(1, 197, 192),
        "blocks.0.mlp.fc1.weight": torch.zeros(768, 192),
        "head.weight": torch.zeros(10, 192),
    }

    config = config_of(wide)

    assert (config.heads, config.image_size, config.patch_size) == (3, 224, 16)
    assert (config.hidden, config.num_classes, config.pool) == (768, 10, "cls")


def test_what_is_stated_goes_before_what_is_usual():
    config = config_of(foreign.timm_state(), stated=Stated(heads=4, gelu="tanh", norm_eps=1e-5))

    assert (config.heads, config.gelu, config.norm_eps) == (4, "tanh", 1e-5)


def test_files_that_are_no_npz_are_told(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", a=np.array([{}, None], dtype=object))

    for name in ("text.npz", "one.npy", "objects.npz", "missing.npz"):
        with pytest.raises(
            WeightsError, match=rf"cannot read weights from .*{name}: .*; it must be an .npz file"
        ):
            read_npz(tmp_path / name)
