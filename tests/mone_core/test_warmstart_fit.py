"""Weights in a model that differs from theirs: what is carried over, and what is refused."""

from dataclasses import replace

import pytest
import torch

from mone_core.errors import WeightsError
from mone_core.models import (
    DENSE,
    ExpertsConfig,
    ModelConfig,
    NestingConfig,
    SkippingConfig,
    VideoConfig,
    build_model,
)
from mone_core.warmstart import Stated, Weights, convert, load, upcycle
from mone_core.warmstart.resize import resize_positions
from tests.mone_core import foreign

TINY = ModelConfig(
    image_size=12,
    patch_size=4,
    num_classes=5,
    dim=16,
    depth=4,
    heads=2,
    mlp_dim=24,
    nesting=DENSE,
)
CLS = replace(TINY, pool="cls")
NESTED = NestingConfig(effective_capacity=1.0)
ROOMY = ExpertsConfig(placement="every", num_experts=3, k=3, capacity_ratio=4.0)
FACTORISED = VideoConfig(frames=6, tubelet=2, temporal_depth=1)
JOINT = VideoConfig(frames=6, tubelet=2, attention="joint")


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomised(config):
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def weights_of(model):
    return Weights(family="mone", config=model.config, state=model.state_dict())


def images(batch=2, size=12):
    return torch.randn(batch, 3, size, size)


def assert_same(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# Positions and kernels


@pytest.mark.parametrize("config", [TINY, CLS], ids=["gap", "cls"])
def test_a_larger_image_keeps_the_row_of_the_class_token(config):
    small, large = randomised(config), build_model(replace(config, image_size=20))
    cls = int(config.pool == "cls")

    report = load(large, weights_of(small))

    old, new = small.embed.position_ND, large.embed.position_ND
    assert torch.equal(new[:cls], old[:cls])
    assert torch.equal(new[cls:], resize_positions(old[cls:], (1, 3, 3), (1, 5, 5)))
    assert report.notes == ("embed.position_ND: resized from 3 x 3 to 5 x 5",)


def test_a_clip_of_identical_frames_gives_the_tokens_of_the_image():
    image_model, x = randomised(CLS), images()
    clip_model = build_model(replace(CLS, video=FACTORISED)).eval()
    joint_model = build_model(replace(CLS, video=JOINT)).eval()
    load(clip_model, weights_of(image_model))
    load(joint_model, weights_of(image_model))
    clip = x.unsqueeze(1).expand(-1, 6, -1, -1, -1)

    tokens = image_model.embed(x)

    assert_same(clip_model.embed(clip), tokens.repeat_interleave(3, dim=0))
    joint = joint_model.embed(clip)
    assert_same(joint[:, :1], tokens[:, :1])
    assert_same(joint[:, 1:], tokens[:, 1:].repeat(1, 3, 1))


def test_an_image_model_begins_a_clip_model_whose_temporal_part_is_fresh():
    image_model, model = randomised(CLS), build_model(replace(CLS, video=FACTORISED))
    before = snapshot(model)

    report = load(model, weights_of(image_model))

    after = model.state_dict()
    assert set(report.fresh) == {name for name in after if name.startswith("temporal_")}
    assert set(report.filled) == set(after) - set(report.fresh)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    assert torch.equal(
        after["encoder.blocks.2.mlp.up.weight"], image_model.encoder.blocks[2].mlp.up.weight
    )
    assert report.notes == ("embed.project.weight: central frame of 2",)


def test_longer_clips_resize_temporal_positions():
    config = replace(CLS, video=FACTORISED)
    short, long = (
        randomised(config),
        build_model(replace(config, video=replace(FACTORISED, frames=10))),
    )

    report = load(long, weights_of(short))

    old, new = short.temporal_position_TD, long.temporal_position_TD
    assert torch.equal(new[[0, 1, 3, 5]], old)
    assert_same(new[2], (old[1] + old[2]) / 2)
    assert report.notes == ("temporal_position_TD: resized from 3 to 5",)
    assert not report.fresh


# Dense to nested and sparse


@pytest.mark.parametrize("config", [TINY, CLS], ids=["gap", "cls"])
@pytest.mark.parametrize("layers", [(0,), (1, 3)], ids=str)
def test_a_nested_model_at_full_capacity_computes_what_the_dense_one_does(config, layers):
    dense, x = randomised(config), images()

    model = upcycle(dense, replace(config, nesting=replace(NESTED, router_layers=layers))).eval()

    assert_same(model(x).logits_BK, dense(x).logits_BK, 1e-12)
    assert all(alpha().item() == 0 for alpha in model.encoder.alphas)


def test_routers_and_alphas_of_a_nested_model_stay_as_they_were():
    dense, model = randomised(TINY), build_model(replace(TINY, nesting=NESTED))
    before = snapshot(model)

    report = load(model, weights_of(dense))

    assert all(n.startswith(("encoder.routers.", "encoder.alphas.")) for n in report.fresh)
    assert {name.split(".")[1] for name in report.fresh} == {"routers", "alphas"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.fresh)
    assert not report.notes


def test_a_nested_clip_model_begins_from_images():
    dense = randomised(CLS)

    model = upcycle(dense, replace(CLS, nesting=NESTED, video=FACTORISED))

    assert model(torch.randn(2, 6, 3, 12, 12)).logits_BK.shape == (2, 5)


def test_one_expert_with_room_for_all_is_the_mlp():
    """Its weight is a softmax over one expert: 1."""
    dense, x = randomised(TINY), images()
    experts = replace(ROOMY, num_experts=1, k=1)

    model = upcycle(dense, replace(TINY, experts=experts)).eval()

    assert_same(model(x).logits_BK, dense(x).logits_BK, 1e-12)


@pytest.mark.parametrize("placement", ["every", "last"])
def test_all_experts_together_with_room_for_all_are_the_mlp(placement):
    """With k = E the weights of equal experts add up to 1."""
    dense, x = randomised(CLS), images()

    model = upcycle(dense, replace(CLS, experts=replace(ROOMY, placement=placement))).eval()

    assert_same(model(x).logits_BK, dense(x).logits_BK)


def test_fewer_experts_than_all_give_their_share_of_the_mlp():
    """A token's MLP output is the dense one times the sum of the weights that it used."""
    dense = randomised(replace(TINY, depth=2))
    config = replace(dense.config, experts=replace(ROOMY, k=2))
    model = upcycle(dense, config).eval()
    x_NBD = torch.randn(9, 2, 16)
    ours, theirs = model.encoder.blocks[1], dense.encoder.blocks[1]
    layout = model.encoder.plan.full
    normed_NBD = ours.mlp_norm(x_NBD)
    share_NB1 = ours.mlp.router(normed_NBD).softmax(-1).topk(2).values.sum(-1, keepdim=True)

    sparse_NBD, _ = ours.mlp(torch.zeros_like(x_NBD), normed_NBD, layout, None)

    dense_NBD = theirs.mlp(torch.zeros_like(x_NBD), normed_NBD, layout, None)
    assert share_NB1.max() < 1
    assert_same(sparse_NBD, share_NB1 * dense_NBD)


def test_nested_sparse_experts_at_full_capacity_compute_what_the_dense_model_does():
    dense, x = randomised(TINY), images()

    model = upcycle(dense, replace(TINY, nesting=NESTED, experts=ROOMY)).eval()

    assert_same(model(x).logits_BK, dense(x).logits_BK)


def test_upcycling_reports_copies_and_leaves_routers_fresh():
    dense, model = randomised(TINY), build_model(replace(TINY, experts=ROOMY))

    report = load(model, weights_of(dense))

    assert report.fresh == tuple(f"encoder.blocks.{i}.mlp.router.weight" for i in (1, 3))
    assert report.notes[0] == "encoder.blocks.{1,3}.mlp.bank.up_weight_EFD: 3 copies of the MLP's"
    assert not report.dropped


def test_noise_tells_experts_apart_in_proportion_to_their_weights():
    dense = randomised(replace(TINY, mlp_dim=1024))
    config = replace(dense.config, experts=ROOMY)

    bank = upcycle(dense, config, noise=0.1).encoder.blocks[1].mlp.bank

    weight = dense.encoder.blocks[1].mlp.up.weight
    change = bank.up_weight_EFD - weight
    assert_same(change.std() / weight.std(), torch.tensor(0.1), 2e-3)
    assert not torch.equal(change[0], change[1])
    assert torch.equal(bank.up_bias_EF[2], dense.encoder.blocks[1].mlp.up.bias)


def test_without_noise_all_experts_are_equal():
    bank = upcycle(randomised(TINY), replace(TINY, experts=ROOMY)).encoder.blocks[3].mlp.bank

    assert torch.equal(bank.down_weight_EDF[0], bank.down_weight_EDF[2])


def test_noise_below_zero_is_refused():
    with pytest.raises(WeightsError, match="noise must be 0 or more, got -1"):
        upcycle(randomised(TINY), TINY, noise=-1)


def test_the_new_model_has_the_precision_of_the_dense_one():
    dense = randomised(TINY).to(torch.bfloat16)

    assert upcycle(dense, replace(TINY, nesting=NESTED)).norm.weight.dtype == torch.bfloat16


def test_a_file_is_upcycled_in_one_step():
    state, x = foreign.AUGREG.state(), images()
    weights = convert(state)
    config = replace(weights.config, experts=ROOMY, nesting=NESTED)

    model = upcycle(weights, config).eval()

    theirs = foreign.AUGREG.forward(state, x.permute(0, 2, 3, 1).numpy())
    assert_same(model(x).logits_BK, torch.from_numpy(theirs), 1e-9)


def test_experts_survive_a_change_of_nesting():
    sparse, x = randomised(replace(TINY, experts=ROOMY)), images()

    model = upcycle(sparse, replace(sparse.config, nesting=NESTED)).eval()

    assert_same(model(x).logits_BK, sparse(x).logits_BK)


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, skipping=SkippingConfig(every=2, capacity=0.5)),
        replace(TINY, nesting=NestingConfig(assignment="random")),
        replace(TINY, nesting=NestingConfig(router_input="normed", router_layers=(0, 2))),
        replace(TINY, nesting=NestingConfig(assignment="constant", slices="hidden")),
    ],
    ids=["skipping", "random", "normed", "matformer"],
)
def test_every_baseline_begins_from_dense_weights(config):
    report = load(build_model(config), weights_of(randomised(TINY)))

    parts = ("routers", "router_norms", "alphas", "score")
    assert all(any(part in name for part in parts) for name in report.fresh)


# Heads


def test_a_head_of_other_classes_is_refused_unless_a_new_one_is_allowed():
    old = randomised(TINY)
    model = randomised(replace(TINY, num_classes=7, head_bias=-3.0))

    with pytest.raises(
        WeightsError,
        match=r"for this model, the head has 7 classes, that of the weights 5 classes\. Nothing",
    ):
        load(model, weights_of(old))
    report = load(model, weights_of(old), allow=["head"])

    assert report.fresh == ("head.classify.weight", "head.classify.bias")
    assert report.dropped == ("head.classify.weight", "head.classify.bias")
    assert report.notes == ("the head has 7 classes, that of the weights 5 classes",)
    assert not model.head.classify.weight.any()
    assert (model.head.classify.bias == -3.0).all()


def test_a_head_that_fits_is_kept_though_a_new_one_is_allowed():
    old, model = randomised(TINY), build_model(TINY)

    load(model, weights_of(old), allow=["head"])

    assert torch.equal(model.head.classify.weight, old.head.classify.weight)


def test_a_new_head_keeps_the_tanh_layer_that_both_have():
    state = foreign.AUGREG.state()
    config = replace(convert(state).config, num_classes=9)
    with_layer = build_model(config)
    without = build_model(replace(config, pre_logits=False))

    kept = load(with_layer, state, allow=["head"])
    dropped = load(without, state, allow=["head"])

    assert "head.pre_logits.weight" in kept.filled
    assert "head.pre_logits.weight" in dropped.dropped


def test_a_tanh_layer_that_the_weights_lack_is_fresh_with_the_head():
    model = build_model(replace(TINY, pre_logits=True))

    report = load(model, weights_of(randomised(TINY)), allow=["head"])

    assert set(report.fresh) == {name for name in model.state_dict() if name.startswith("head.")}


# What is refused


def test_a_class_token_against_a_mean_is_refused_unless_allowed():
    with_cls, without = randomised(CLS), build_model(TINY)

    with pytest.raises(
        WeightsError, match=r"for this model, pool is gap, that of the weights cls\. No"
    ):
        load(without, weights_of(with_cls))
    report = load(without, weights_of(with_cls), allow=["pool"])

    assert report.dropped == ("embed.cls_D",)
    assert report.notes == ("pool is gap, that of the weights cls",)
    assert torch.equal(without.embed.position_ND, with_cls.embed.position_ND[1:])


def test_a_mean_against_a_class_token_leaves_the_token_fresh():
    without, with_cls = randomised(TINY), build_model(CLS)
    first = with_cls.embed.position_ND[0].clone()

    report = load(with_cls, weights_of(without), allow=["pool"])

    assert report.fresh == ("embed.cls_D",)
    assert "embed.position_ND: the class token's row stays as it was" in report.notes
    assert torch.equal(with_cls.embed.position_ND[0], first)
    assert torch.equal(with_cls.embed.position_ND[1:], without.embed.position_ND)


def test_another_arithmetic_than_the_weights_were_trained_with_is_refused_unless_allowed():
    state, stated = foreign.timm_state(), Stated(heads=2, norm_eps=1e-5)
    model = build_model(CLS)  # tanh, 1e-6

    with pytest.raises(
        WeightsError,
        match=r"gelu is tanh, that of the weights erf; norm_eps is 1e-06, that of .* 1e-05\. ",
    ):
        load(model, state, stated=stated)
    assert len(load(model, state, stated=stated, allow=["gelu", "norm_eps"]).notes) == 2


def test_other_heads_of_the_same_shapes_are_refused():
    model = build_model(replace(CLS, heads=4))

    with pytest.raises(WeightsError, match="attention has 4 heads, that of the weights 2"):
        load(model, foreign.AUGREG.state(), allow=["head"])


def test_all_that_is_in_the_way_is_told_at_once_and_the_model_stays_as_it_was():
    state = foreign.timm_state()
    del state["blocks.0.norm1.bias"]
    state["cls_token2"] = torch.zeros(1)
    model = build_model(
        replace(CLS, depth=3, num_classes=8, patch_size=6, gelu="erf", norm_eps=1e-6)
    )
    before = snapshot(model)

    with pytest.raises(
        WeightsError,
        match=r"^these weights \(timm ViT\) do not fit: "
        r"in the file, missing: blocks.0.norm1.bias; extra: cls_token2; "
        r"for this model, extra: encoder.blocks.3.attention_norm.weight, encoder.blocks.3.*"
        r"misshaped: embed.project.weight is \[16, 48\] but must be \[16, 108\]; "
        r"the head has 8 classes, that of the weights 5 classes\. Nothing was loaded; "
        r"take the model that they are of, or allow a difference .*\(head, pool, gelu, norm_eps\)$",
    ):
        load(model, state)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_more_blocks_than_the_weights_have_are_missing():
    model = build_model(replace(TINY, depth=6))

    with pytest.raises(
        WeightsError, match=r"missing: encoder.blocks.\{4,5\}.attention_norm.weight, "
    ):
        load(model, weights_of(randomised(TINY)))


def test_another_width_is_misshaped():
    with pytest.raises(
        WeightsError,
        match=r"misshaped: embed.cls_D is \[16\] but must be \[8\], embed.position_ND is",
    ):
        load(build_model(replace(CLS, dim=8)), weights_of(randomised(CLS)))


def test_experts_are_not_dropped_for_a_dense_model():
    with pytest.raises(
        WeightsError,
        match=r"missing: encoder.blocks.\{1,3\}.mlp.up.weight, .*extra: .*1,3\}.mlp.router.weight",
    ):
        load(build_model(TINY), weights_of(randomised(replace(TINY, experts=ROOMY))))


def test_another_number_of_experts_is_misshaped():
    model = build_model(replace(TINY, experts=replace(ROOMY, num_experts=4)))

    with pytest.raises(WeightsError, match=r"mlp.router.weight is \[3, 16\] but must be \[4, 16\]"):
        load(model, weights_of(randomised(replace(TINY, experts=ROOMY))))


def test_routers_that_the_weights_have_are_not_left_fresh():
    """One router where two are wanted is no whole set of weights."""
    one = randomised(replace(TINY, nesting=NestingConfig()))
    two = build_model(replace(TINY, nesting=NestingConfig(router_layers=(0, 2))))

    with pytest.raises(WeightsError, match=r"missing: encoder.routers.1"):
        load(two, weights_of(one))


def test_clips_are_no_beginning_for_images():
    clips = randomised(replace(CLS, video=FACTORISED))

    with pytest.raises(
        WeightsError,
        match=r"extra: temporal_cls_D, .*misshaped: embed.project.weight is \[16, 96\] but must be",
    ):
        load(build_model(CLS), weights_of(clips))


def test_a_difference_that_cannot_be_allowed_is_told():
    with pytest.raises(
        WeightsError, match=r"cannot allow 'heads'; differences that can be allowed are \('head', "
    ):
        load(build_model(TINY), {}, allow=["heads"])
    with pytest.raises(WeightsError, match="cannot allow 'heads'"):
        upcycle(build_model(TINY), TINY, allow=["heads"])
