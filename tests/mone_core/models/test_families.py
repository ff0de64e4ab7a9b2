"""Every model of the family, each one configuration away, against the per-token reference."""

from dataclasses import replace

import pytest
import torch
from torch import _dynamo as dynamo

from mone_core.errors import CapacityError, MoneError, RoutingError
from mone_core.models import (
    DENSE,
    ExpertsConfig,
    NestingConfig,
    SkippingConfig,
    VideoConfig,
    build_model,
)
from tests.mone_core.no_sync import NoSync
from tests.mone_core.reference import (
    EVERY_MODEL,
    TINY,
    assert_equals_the_reference,
    random_images,
    random_model,
    share_out,
    tiny,
)

CLIP = VideoConfig(frames=4, tubelet=2, temporal_depth=1)
SMALL = {"image_size": 4, "dim": 8, "depth": 2, "widths": (0.25, 0.5, 1.0)}


def assert_family_equals_the_reference(**changes):
    model = random_model(**changes)
    assert_equals_the_reference(model, random_images(2, config=model.config))
    return model


@pytest.mark.parametrize("budget", [0.125, 0.4, 1.0])
def test_a_class_token_is_read_at_full_width_and_outside_of_the_routing(budget):
    model = assert_family_equals_the_reference(pool="cls", effective_capacity=budget)

    assert sum(model.encoder.plan.counts) == 16
    assert model.encoder.plan.routed.segments[0].dim == 16
    assert model.encoder.plan.routed.segments[-1].stop == 17


@pytest.mark.parametrize("pool", ["gap", "cls"])
@pytest.mark.parametrize("layers", [(1,), (0, 1), (0, 2), (1, 2, 3)])
def test_routers_may_stand_before_any_layers(pool, layers):
    model = assert_family_equals_the_reference(pool=pool, depth=4, router_layers=layers)

    assert len(model.encoder.routers) == len(layers)
    assert len(model.encoder.alphas) == 4 - layers[0]


def test_a_router_may_see_normed_tokens():
    assert_family_equals_the_reference(router_input="normed", router_layers=(0, 1))


def test_layers_before_the_first_router_are_at_full_width_for_all():
    late, none = random_model(router_layers=(1,)), random_model(assignment="constant")
    none.set_effective_capacity(1.0)
    none.load_state_dict({name: late.state_dict()[name] for name in none.state_dict()}, strict=True)
    seen = []
    for model in (late, none):
        model.encoder.blocks[0].register_forward_hook(lambda _b, _i, out: seen.append(out))
        model(random_images(1) * 0 + 1)

    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("pool", ["gap", "cls"])
@pytest.mark.parametrize("width", [0.125, 0.5, 1.0])
def test_matvit_computes_every_token_at_one_nested_width(width, pool):
    model = assert_family_equals_the_reference(
        assignment="constant", effective_capacity=width, pool=pool
    )

    assert len(model.encoder.routers) == len(model.encoder.alphas) == 0
    assert model.realised_effective_capacity == width


@pytest.mark.parametrize("width", [0.125, 0.5, 1.0])
def test_matformer_slices_the_hidden_layer_of_the_mlp_alone(width):
    model = assert_family_equals_the_reference(
        assignment="constant", slices="hidden", effective_capacity=width
    )

    assert {block.width for block in model.encoder.blocks} == {int(64 * width)}


def test_mone_at_one_width_is_matvit_with_the_same_weights():
    """The paper's reading of the baseline: a constant router, alpha at rest."""
    nested, matvit = random_model(alpha=0.0), random_model(assignment="constant")
    share_out(nested, (0, 0, 16, 0))
    matvit.load_state_dict(nested.state_dict(), strict=False)
    images = random_images(2)

    torch.testing.assert_close(
        nested(images).logits_BK, matvit(images).logits_BK, rtol=0, atol=1e-12
    )


def test_a_single_width_is_a_dense_model_without_a_router():
    model = random_model(widths=(1.0,), effective_capacity=1.0)

    assert_equals_the_reference(model, random_images(2))
    assert model.config.nesting == DENSE
    assert not [name for name, _ in model.named_parameters() if "router" in name or "alpha" in name]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_mixture_of_depths_computes_only_the_best_tokens_of_some_blocks(every, capacity):
    skipping = SkippingConfig(every=every, capacity=capacity)
    model = assert_family_equals_the_reference(nesting=DENSE, skipping=skipping, depth=4)

    computed = [
        block.layout.segments[0].stop for block in model.encoder.blocks if hasattr(block, "score")
    ]
    assert computed == [int(16 * capacity)] * (4 // every)


def test_a_random_router_draws_anew_and_scales_nothing():
    model = random_model(assignment="random")
    images = random_images(2)

    first, second = model(images), model(images)
    assert not torch.equal(first.routed[0].expert_BN, second.routed[0].expert_BN)
    for expert_N in first.routed[0].expert_BN:
        assert tuple(expert_N.bincount(minlength=4).tolist()) == model.encoder.plan.counts
    torch.manual_seed(3)
    decided = [model(images).routed[0].expert_BN]
    torch.manual_seed(3)
    assert_equals_the_reference(model, images, decided)


@pytest.mark.parametrize(
    ("allocation", "budget", "counts"),
    [
        ("greedy", 0.5, (10, 0, 0, 6)),
        ("uniform", 0.47, (4, 4, 4, 4)),
        ("proportionate", 0.27, (9, 4, 2, 1)),
        ("mod_greedy", 0.4, (10, 0, 0, 6)),
    ],
)
def test_other_allocations_equal_the_reference(allocation, budget, counts):
    model = assert_family_equals_the_reference(allocation=allocation, effective_capacity=budget)

    assert model.encoder.plan.counts == counts


def test_tokens_that_mod_greedy_drops_keep_their_embedding():
    model = random_model(allocation="mod_greedy", effective_capacity=0.25)
    images = random_images(1)

    encoded = model.encoder(model.embed(images))

    x_ND = model.embed(images)[0]
    skipped_N = encoded.routed[0].expert_BN[0] == 0
    assert int(skipped_N.sum()) == 12
    assert torch.equal(encoded.x_NBD[4:, 0], x_ND[skipped_N])
    assert model.realised_effective_capacity == 0.25


@pytest.mark.parametrize("pool", ["gap", "cls"])
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_factorised_vivit_routes_every_frame_on_its_own(pool, budget):
    model = assert_family_equals_the_reference(
        pool=pool, video=CLIP, effective_capacity=budget, **SMALL
    )

    output = model(random_images(3, config=model.config))
    assert output.logits_BK.shape == (3, 5)
    assert output.routed[0].expert_BN.shape == (6, 4)  # 3 clips of 2 steps
    for expert_N in output.routed[0].expert_BN:
        assert tuple(expert_N.bincount(minlength=3).tolist()) == model.encoder.plan.counts


@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_a_joint_vivit_is_one_long_image(pool):
    joint = replace(CLIP, attention="joint")
    model = assert_family_equals_the_reference(
        pool=pool, video=joint, effective_capacity=0.4, **SMALL
    )

    assert model(random_images(2, config=model.config)).routed[0].expert_BN.shape == (2, 8)


def test_the_temporal_encoder_is_dense_whatever_the_budget():
    model = build_model(tiny(video=CLIP, effective_capacity=0.2))

    assert model.temporal_encoder.config.nesting == DENSE
    assert len(model.temporal_encoder.routers) == 0
    before = model.temporal_encoder.plan
    model.set_effective_capacity(0.9)
    assert model.temporal_encoder.plan == before


def test_clips_of_another_length_are_refused_with_both_shapes():
    model = build_model(tiny(video=CLIP))

    with pytest.raises(MoneError, match=r"clips of shape \[1, 3, 3, 8, 8\] .* \[B, 4, 3, 8, 8\]"):
        model(torch.zeros(1, 3, 3, 8, 8))
    with pytest.raises(MoneError, match=r"images of shape \[1, 4, 3, 8, 8\] .* \[B, 3, 8, 8\]"):
        build_model(TINY)(torch.zeros(1, 4, 3, 8, 8))


EXPERTS = ExpertsConfig(placement="every", spacing=2, num_experts=4, group_images=2)


@pytest.mark.parametrize("pool", ["gap", "cls"])
@pytest.mark.parametrize("nesting", [DENSE, NestingConfig()])
def test_v_moe_is_a_vit_and_each_nesting_of_it_runs_and_learns(pool, nesting):
    model = build_model(tiny(pool=pool, nesting=nesting, experts=EXPERTS))
    torch.nn.init.normal_(model.head.classify.weight)

    output = model(random_images(4, dtype=torch.float32))
    (output.logits_BK.square().mean() + output.aux_loss).backward()

    assert len(output.dispatched) == 1
    assert output.aux_loss > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder.blocks[1].mlp.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("nesting", [DENSE, NestingConfig(effective_capacity=0.4)])
def test_one_expert_with_room_for_all_is_the_model_without_experts(nesting):
    """The weight of a lone expert is softmax over one, which is 1."""
    one = replace(EXPERTS, num_experts=1, k=1, noise=0.0, load_weight=0.0, capacity_ratio=1.0)
    sparse, plain = random_model(nesting=nesting, experts=one), random_model(nesting=nesting)
    state = dict(plain.state_dict())
    for name, ours in (("up", "up_{}_E{}"), ("down", "down_{}_E{}")):
        axes = {"up": ("FD", "F"), "down": ("DF", "D")}[name]
        for kind, letters in zip(("weight", "bias"), axes, strict=True):
            value = state.pop(f"encoder.blocks.1.mlp.{name}.{kind}")
            state[f"encoder.blocks.1.mlp.bank.{ours.format(kind, letters)}"] = value[None]
    state["encoder.blocks.1.mlp.router.weight"] = sparse.encoder.blocks[1].mlp.router.weight
    sparse.load_state_dict(state)
    images = random_images(4)

    torch.testing.assert_close(
        sparse(images).logits_BK, plain(images).logits_BK, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("placement", "spacing", "depth", "layers"),
    [
        ("every", 2, 12, (1, 3, 5, 7, 9, 11)),
        ("every", 3, 8, (2, 5)),
        ("last", 2, 8, (5, 7)),
        ("last", 2, 12, (9, 11)),
        ("last", 2, 24, (21, 23)),
        ("last", 5, 32, (23, 25, 27, 29, 31)),
        ("none", 2, 12, ()),
    ],
)
def test_experts_stand_where_the_paper_has_them(placement, spacing, depth, layers):
    assert ExpertsConfig(placement=placement, spacing=spacing).layers(depth) == layers


def test_capacity_may_change_after_training_and_touches_no_weight():
    model = random_model(nesting=DENSE, experts=EXPERTS).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = random_images(4)
    usual, macs = model(images).logits_BK, model.macs()

    model.set_capacity(k=1, capacity_ratio=0.5, batch_priority=True)
    assert model.macs() < macs
    assert not torch.equal(model(images).logits_BK, usual)
    model.set_capacity(k=2, capacity_ratio=1.05, batch_priority=False)

    assert torch.equal(model(images).logits_BK, usual)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_capacity_for_a_model_without_experts_is_refused():
    with pytest.raises(RoutingError, match=r"no sparse experts .*placement every or last"):
        build_model(TINY).set_capacity(k=1)


def test_k_and_ratio_out_of_range_are_refused():
    model = build_model(tiny(nesting=DENSE, experts=EXPERTS))
    with pytest.raises(
        RoutingError, match=r"k must be a whole number between 1 and the 4 experts, got 5"
    ):
        model.set_capacity(k=5)
    with pytest.raises(CapacityError, match=r"capacity_ratio must be above 0 and finite, got 0"):
        model.set_capacity(capacity_ratio=0)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("nested", "MoNE ViT"),
        ("dense", "ViT"),
        ("MatViT", "MatViT (ViT)"),
        ("MatFormer", "MatFormer (ViT)"),
        ("Mixture-of-Depths", "Mixture-of-Depths ViT"),
        ("V-MoE", "V-MoE"),
        ("nested sparse", "nested V-MoE"),
        ("factorised clips", "MoNE ViViT"),
        ("random router", "MoNE ViT (random)"),
        ("MoD greedy", "MoNE ViT (mod_greedy)"),
    ],
)
def test_a_model_is_called_by_its_name(name, family):
    assert tiny(**EVERY_MODEL[name]).family == family


def forward_and_backward(model, pixels):
    output = model(pixels)
    (output.logits_BK.square().sum() + output.aux_loss).backward()
    return output


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_the_host_never_waits_for_a_number_of_any_model(name):
    model = build_model(tiny(**EVERY_MODEL[name]))
    pixels = random_images(2, dtype=torch.float32, config=model.config)
    with NoSync():  # fails by itself
        forward_and_backward(model, pixels)

    assert model.head.classify.weight.grad is not None


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_model_runs_on_shapes_alone(name):
    """The meta device has no numbers: no shape depends on one, nothing recompiles for one."""
    with torch.device("meta"):
        model = build_model(tiny(**EVERY_MODEL[name]))
        output = forward_and_backward(model, random_images(2, config=model.config).float())

    assert output.logits_BK.shape == (2, 5)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("_dirty_memory")
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_no_element_of_any_gradient_is_left_unwritten(name):
    model = build_model(tiny(**EVERY_MODEL[name]))
    torch.nn.init.normal_(model.head.classify.weight)

    forward_and_backward(model, random_images(3, dtype=torch.float32, config=model.config))

    unwritten = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert unwritten == []


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_model_trains_under_autocast(name):
    """Products in bfloat16; weights, gradients and the residual stream stay in float32."""
    torch.manual_seed(1)
    model = build_model(tiny(**EVERY_MODEL[name])).eval()
    torch.nn.init.normal_(model.head.classify.weight)
    pixels = random_images(2, dtype=torch.float32, config=model.config)
    exact = model(pixels).logits_BK
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels)
        loss = output.logits_BK.float().square().mean()
    loss.backward()

    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if not output.routed and not output.dispatched and "Depths" not in name:
        # 8 bits of mantissa over a few layers; routed tokens may also go another way.
        torch.testing.assert_close(output.logits_BK.float(), exact, rtol=0.05, atol=0.05)


def test_a_small_class_keeps_a_slot_and_a_small_group_is_refused():
    """The last images of an epoch, or a narrow budget, must not end a training."""
    model = build_model(tiny(experts=replace(EXPERTS, num_experts=8, k=1, group_images=3)))
    model.set_effective_capacity(0.2)
    assert 1 in model.encoder.plan.counts  # a token an image: 3 / 8 of a slot in a whole group

    model.set_capacity(capacity_ratio=0.3)  # a lone image is worth .6 of a slot
    model(random_images(4, dtype=torch.float32))  # a group of three and one of a single image
    model.set_capacity(capacity_ratio=0.01)
    with pytest.raises(CapacityError, match=r"an expert gets 0\.06 slots for 48 tokens .* raise"):
        model(random_images(1, dtype=torch.float32))


def test_the_losses_of_all_sparse_layers_add_up():
    model = build_model(tiny(depth=4, nesting=DENSE, experts=EXPERTS))

    output = model(random_images(2, dtype=torch.float32))

    told = [each.aux_loss for each in output.dispatched]
    assert len(told) == 2
    torch.testing.assert_close(output.aux_loss, told[0] + told[1])


def test_a_fresh_head_has_the_bias_that_is_asked_for():
    model = build_model(tiny(head_bias=-10.0))

    assert (model(random_images(1, dtype=torch.float32)).logits_BK == -10).all()


def test_a_random_router_draws_for_every_image():
    expert_BN = random_model(assignment="random")(random_images(4)).routed[0].expert_BN

    assert len({tuple(expert_N.tolist()) for expert_N in expert_BN}) == 4


def test_where_experts_choose_k_means_nothing_and_is_refused():
    choosy = replace(EXPERTS, routing="experts_choose")
    model = build_model(tiny(nesting=DENSE, experts=choosy))

    with pytest.raises(RoutingError, match=r"k and batch_priority mean nothing where .* set capa"):
        model.set_capacity(k=1)
    with pytest.raises(RoutingError, match=r"k and batch_priority mean nothing where experts choo"):
        model.set_capacity(batch_priority=True)


def test_budgets_that_a_model_cannot_meet_are_left_out_of_the_usual_ones():
    usual = (0.2, 0.5, 1.0)

    assert NestingConfig().reachable(usual) == usual
    assert NestingConfig(widths=(0.5, 1.0)).reachable(usual) == (0.5, 1.0)
    assert DENSE.reachable(usual) == (1.0,)
    uniform = NestingConfig(allocation="uniform", effective_capacity=0.47)
    assert uniform.reachable(usual) == (0.47,)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated")
@pytest.mark.parametrize("name", ["nested", "V-MoE"])
def test_a_compiled_model_is_one_graph_and_never_compiles_again(name):
    """At a fixed budget: shapes do not depend on data, and nothing breaks the graph."""
    dynamo.reset()
    model = build_model(tiny(depth=2, **EVERY_MODEL[name]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    forward_and_backward(compiled, random_images(2, dtype=torch.float32))

    with dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            output = forward_and_backward(compiled, random_images(2, dtype=torch.float32))
    assert output.logits_BK.shape == (2, 5)
    dynamo.reset()
