"""The MoNE ViT: against a per-token reference and a plain ViT, and what a budget may change."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mone_core.capacity import token_counts
from mone_core.errors import CapacityError, MoneError
from mone_core.losses import softmax_loss
from mone_core.models import VIT_SIZES, NestingConfig, build_model
from mone_core.routing import sort_by_width
from tests.mone_core.reference import (
    TINY,
    assert_equals_the_reference,
    random_images,
    random_model,
    share_out,
    tiny,
)

BUDGETS = (0.125, 0.2, 0.3, 0.5, 0.7, 0.95, 1.0)
EMPTY_CLASSES = ((0, 5, 0, 11), (3, 0, 13, 0), (0, 16, 0, 0), (15, 1, 0, 0), (1, 0, 0, 15))


@pytest.mark.parametrize("alpha_for", ["layer", "model"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, -0.4])
@pytest.mark.parametrize("budget", [0.125, 0.3, 0.5, 1.0])
def test_every_budget_equals_the_per_token_reference(budget, alpha, alpha_for):
    model = random_model(
        alpha=alpha, nesting=NestingConfig(alpha=alpha_for, effective_capacity=budget)
    )

    assert_equals_the_reference(model, random_images(2))


@pytest.mark.parametrize("counts", EMPTY_CLASSES)
def test_empty_width_classes_equal_the_per_token_reference(counts):
    model = random_model()
    share_out(model, counts)

    assert_equals_the_reference(model, random_images(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"gelu": "erf", "norm_eps": 1e-3},
        {"widths": (0.5, 1.0), "effective_capacity": 0.7},
        {"widths": (0.25, 0.625, 1.0), "heads": 4, "mlp_dim": 48, "depth": 1},
    ],
)
def test_other_shapes_equal_the_per_token_reference(changes):
    assert_equals_the_reference(random_model(**changes), random_images(3))


class PlainViT(torch.nn.Module):
    """A dense pre-norm ViT with mean pooling, of torch's own layers, taking the same weights."""

    def __init__(self, nested):
        super().__init__()
        config = nested.config
        self.config = config
        self.conv = torch.nn.Conv2d(3, config.dim, config.patch_size, config.patch_size)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(
                config.dim,
                config.heads,
                config.hidden,
                dropout=0,
                activation=lambda x: F.gelu(x, approximate="tanh"),
                layer_norm_eps=config.norm_eps,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.depth)
        )
        self.norm = torch.nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = torch.nn.Linear(config.dim, config.num_classes)
        self.position = torch.nn.Parameter(torch.zeros(config.num_patches, config.dim))
        self.to(nested.head.classify.weight.dtype)
        self.load_state_dict(_plain_names(nested))

    def forward(self, images):
        x = self.conv(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def _plain_names(nested):
    state = nested.state_dict()
    weight = state["embed.project.weight"]
    size = nested.config.patch_size
    plain = {
        "conv.weight": weight.view(-1, 3, size, size),
        "conv.bias": state["embed.project.bias"],
        "position": state["embed.position_ND"],
    }
    parts = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.out.",
        "linear1.": "mlp.up.",
        "linear2.": "mlp.down.",
        "norm1.": "attention_norm.",
        "norm2.": "mlp_norm.",
    }
    for kind in ("weight", "bias"):
        plain["norm." + kind] = state["norm." + kind]
        plain["head." + kind] = state["head.classify." + kind]
        for layer in range(nested.config.depth):
            for theirs, ours in parts.items():
                plain[f"layers.{layer}.{theirs}{kind}"] = state[
                    f"encoder.blocks.{layer}.{ours}{kind}"
                ]
    return plain


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_at_full_width_and_alpha_0_it_is_a_plain_vit(dtype, atol):
    model = random_model(alpha=0.0, dtype=dtype, effective_capacity=1.0)
    images = random_images(3, dtype=dtype)

    torch.testing.assert_close(model(images).logits_BK, PlainViT(model)(images), rtol=0, atol=atol)


def test_a_vit_s_of_real_size_is_a_plain_vit_at_full_width():
    model = build_model(
        replace(VIT_SIZES["S"], depth=3, nesting=NestingConfig(effective_capacity=1.0))
    )
    torch.nn.init.normal_(model.head.classify.weight, std=0.02)
    images = torch.randn(1, 3, 224, 224)

    with torch.no_grad():
        torch.testing.assert_close(model(images).logits_BK, PlainViT(model)(images))


def test_nesting_adds_only_the_router_and_alpha():
    model = build_model(TINY)
    plain = sum(parameter.numel() for parameter in PlainViT(model).parameters())
    router = TINY.dim * 4 + 4

    assert sum(parameter.numel() for parameter in model.parameters()) == (
        plain + router + TINY.depth
    )


def narrow_model(counts):
    """A model whose image can be told apart by which weights it reads."""
    model = random_model()
    share_out(model, counts)
    return model


@pytest.mark.parametrize(
    ("part", "beyond"),
    [
        ("attention.qkv.weight", (slice(None), slice(4, None))),
        ("attention.out.weight", slice(4, None)),
        ("attention.out.bias", slice(4, None)),
        ("mlp.up.weight", (slice(None), slice(4, None))),
        ("mlp.down.weight", slice(4, None)),
        ("mlp.down.bias", slice(4, None)),
    ],
)
def test_a_narrow_expert_is_a_prefix_of_the_wide_one(part, beyond):
    """Past the prefix a change reaches the wide alone; within it, both: one memory."""
    images = random_images(1)
    narrow, wide = narrow_model((0, 16, 0, 0)), narrow_model((0, 0, 0, 16))
    wide.load_state_dict(narrow.state_dict())
    narrow_before, wide_before = narrow(images).logits_BK, wide(images).logits_BK
    for model in (narrow, wide):
        model.get_parameter(f"encoder.blocks.0.{part}").data[beyond] += 1
    assert torch.equal(narrow(images).logits_BK, narrow_before)
    assert (wide(images).logits_BK - wide_before).abs().max() > 1e-4

    share_out(narrow, (0, 0, 0, 16))  # the same object, wide: it holds the changed weights
    assert torch.equal(narrow(images).logits_BK, wide(images).logits_BK)
    narrow.get_parameter(f"encoder.blocks.0.{part}").data += 1
    share_out(narrow, (0, 16, 0, 0))
    assert (narrow(images).logits_BK - narrow_before).abs().max() > 1e-4


def test_the_products_read_the_stored_weights_without_a_copy():
    """What autograd keeps for the backward pass is the parameter's own memory."""
    model = random_model()
    kept = set()

    def note(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(random_images(1))

    for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"):
        weight = model.get_parameter(f"encoder.blocks.0.{part}.weight")
        assert weight.untyped_storage().data_ptr() in kept


def test_features_past_a_tokens_width_stay_at_their_embedding():
    model = random_model(depth=4)
    images = random_images(2)
    after = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _block, _inputs, x_NBD: after.append(x_NBD))

    output = model(images)

    x_BND = model.embed(images)
    order_BN = sort_by_width(output.routed[0].expert_BN)
    dims = torch.tensor(model.config.dims)
    assert len(after) == 4
    for image in range(2):
        embedded = x_BND[image, order_BN[image]]
        width = dims[output.routed[0].expert_BN[image, order_BN[image]]].unsqueeze(1)
        past = torch.arange(model.config.dim) >= width
        for x_NBD in after:
            assert torch.equal(x_NBD[:, image][past], embedded[past])
        changed = (after[-1][:, image] != embedded) | past
        assert changed.all()


def test_patches_that_move_with_their_positions_take_their_experts_along():
    model, images = random_model(), random_images(2)
    order = torch.randperm(16)
    size = TINY.patch_size
    patches = F.unfold(images, size, stride=size)[..., order]
    moved_images = F.fold(patches, (TINY.image_size,) * 2, size, stride=size)
    moved = copy.deepcopy(model)
    moved.embed.position_ND.data = model.embed.position_ND.data[order]

    before, after = model(images), moved(moved_images)

    assert torch.equal(after.routed[0].expert_BN, before.routed[0].expert_BN[:, order])
    torch.testing.assert_close(after.routed[0].probs_BNE, before.routed[0].probs_BNE[:, order])
    torch.testing.assert_close(after.logits_BK, before.logits_BK, rtol=0, atol=1e-12)


def test_experts_and_probabilities_are_told_in_raster_order():
    """One patch unlike all others, with a router that wants it: its own place is named."""
    model = random_model(effective_capacity=0.3)
    share_out(model, (15, 0, 0, 1))
    images = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    images[:, :, 4:6, 2:4] = 1  # row 2, column 1 of a grid of 4
    with torch.no_grad():
        model.embed.position_ND.zero_()
        model.encoder.routers[0].score.weight.zero_()
        model.encoder.routers[0].score.weight[3] = model.embed.project.weight.sum(1)

    output = model(images)

    assert output.routed[0].expert_BN[0].nonzero().flatten().tolist() == [2 * 4 + 1]
    assert output.routed[0].expert_BN.reshape(4, 4)[2, 1] == 3
    assert output.routed[0].probs_BNE[0, :, 3].argmax() == 2 * 4 + 1
    assert not output.routed[0].probs_BNE.requires_grad


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_image_is_the_same_alone_and_in_a_batch(budget):
    model, images = random_model(effective_capacity=budget), random_images(2)

    together = model(images)
    alone = [model(image.unsqueeze(0)) for image in images]

    torch.testing.assert_close(
        together.logits_BK, torch.cat([one.logits_BK for one in alone]), rtol=0, atol=1e-12
    )
    assert torch.equal(
        together.routed[0].expert_BN, torch.cat([one.routed[0].expert_BN for one in alone])
    )


def test_counts_are_met_in_every_image_at_every_budget():
    model, images = random_model(), random_images(5)
    for budget in BUDGETS:
        model.set_effective_capacity(budget)
        counts = token_counts(TINY.nesting.capacity(budget), 16)

        for expert_N in model(images).routed[0].expert_BN:
            assert tuple(expert_N.bincount(minlength=4).tolist()) == counts
        spent = sum(n * d for n, d in zip(counts, TINY.dims, strict=True)) / (16 * TINY.dim)
        assert model.realised_effective_capacity == pytest.approx(spent, abs=1e-15)


def test_changing_the_budget_touches_no_weight():
    model, images = random_model(effective_capacity=0.5), random_images(2)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    first = model(images).logits_BK
    for budget in BUDGETS:
        model.set_effective_capacity(budget)
        model(images)
    model.set_effective_capacity(0.5)

    assert torch.equal(model(images).logits_BK, first)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (place, value) in before.items():
        assert after[name].data_ptr() == place
        assert torch.equal(after[name], value)


def test_a_budget_out_of_reach_is_refused_and_the_old_one_kept():
    model = random_model(effective_capacity=0.5)
    counts = model.encoder.plan.counts
    with pytest.raises(CapacityError, match=r"effective capacity 0\.05 is out of reach.* 0\.125 "):
        model.set_effective_capacity(0.05)

    assert model.encoder.plan.counts == counts


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 4, 16), (2, 3, 7, 7), (2, 1, 8, 8)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape):
    model = random_model()
    with pytest.raises(MoneError, match=rf"{shape[1]}.*{shape[2]}.*8"):
        model(torch.randn(shape, dtype=torch.float64))


def test_a_fresh_model_has_alpha_0_and_scores_all_classes_alike():
    model = build_model(TINY)

    assert [scale().item() for scale in model.encoder.alphas] == [0, 0]
    assert (model(random_images(2, dtype=torch.float32)).logits_BK == 0).all()


def trained(push, optimizer_class, steps=6):
    """A few steps to or from the labels: alpha's first slope, then alphas and router gradients."""
    torch.manual_seed(0)
    model = random_model(alpha=0.0, dtype=torch.float32)
    images, labels = random_images(4, dtype=torch.float32), torch.tensor([0, 1, 2, 3])
    optimizer = optimizer_class(model.encoder.alphas.parameters(), lr=1e-3)
    slopes, alphas, router_grads = [], [], []
    for _ in range(steps):
        model.zero_grad()
        (push * softmax_loss(model(images).logits_BK, labels).mean()).backward()
        optimizer.step()
        slopes.append([scale.raw.grad.item() for scale in model.encoder.alphas])
        alphas.append([scale().item() for scale in model.encoder.alphas])
        router_grads.append(model.encoder.routers[0].score.weight.grad.abs().max().item())
    return slopes[0], alphas, router_grads


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("push", [1, -1])
def test_alpha_and_router_come_alive_whichever_way_alpha_is_pushed(push, optimizer_class):
    """At alpha = 0 the router has no gradient; after one step it has, and keeps it."""
    slope, alphas, router_grads = trained(push, optimizer_class)

    assert slope == [-other for other in trained(-push, optimizer_class)[0]]
    assert all(value != 0 for value in slope)
    assert router_grads[0] == 0
    assert all(grad > 0 for grad in router_grads[1:])
    assert all(0 < alpha < 1 for alpha in alphas[0])


def test_positions_may_start_as_two_dimensional_sines():
    """Each place has its own; features of a row do not change along it, nor of a column down it."""
    model = build_model(tiny(positions="sincos"))
    table = model.embed.position_ND.detach().view(4, 4, TINY.dim)
    in_x, in_y = table[..., : TINY.dim // 2], table[..., TINY.dim // 2 :]

    assert torch.equal(in_x, in_x[:1].expand_as(in_x))
    assert torch.equal(in_y, in_y[:, :1].expand_as(in_y))
    assert torch.cdist(table.flatten(0, 1), table.flatten(0, 1)).fill_diagonal_(1).min() > 1e-2
    assert model.embed.position_ND.requires_grad


def test_one_alpha_for_the_model_when_asked():
    assert len(build_model(tiny(alpha="model")).encoder.alphas) == 1
    assert len(build_model(tiny(alpha="layer")).encoder.alphas) == TINY.depth


@pytest.mark.usefixtures("_dirty_memory")
@pytest.mark.parametrize("counts", [*EMPTY_CLASSES, (7, 5, 3, 1), (16, 0, 0, 0), (0, 0, 0, 16)])
def test_no_gradient_element_is_left_unwritten(counts):
    model = random_model()
    share_out(model, counts)

    model(random_images(2)).logits_BK.sum().backward()

    unwritten = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert unwritten == []


def test_a_forward_and_backward_pass_never_look_at_their_numbers():
    """The meta device has shapes and no numbers: nothing waits for the host, or retraces."""
    with torch.device("meta"):
        model = build_model(VIT_SIZES["B"])
        output = model(torch.empty(2, 3, 224, 224))
        output.logits_BK.sum().backward()

    assert output.logits_BK.shape == (2, 1000)
    assert output.routed[0].expert_BN.shape == (2, 196)
    assert output.routed[0].probs_BNE.shape == (2, 196, 4)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_in_bfloat16_runs_and_routes_in_float32():
    model = random_model(dtype=torch.bfloat16)

    output = model(random_images(2, dtype=torch.bfloat16))
    output.logits_BK.sum().backward()

    assert output.logits_BK.dtype == torch.bfloat16
    assert output.routed[0].probs_BNE.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_images_may_come_channels_last():
    model, images = random_model(), random_images(2)

    channels_last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(channels_last).logits_BK, model(images).logits_BK)


def test_a_few_steps_of_training_learn_at_every_budget():
    model = build_model(tiny(dim=32, effective_capacity=0.5))
    images = torch.randn(8, 3, 8, 8)
    labels = torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    budgets = (0.3, 0.5, 1.0)
    for step in range(90):
        model.set_effective_capacity(budgets[step % 3])
        optimizer.zero_grad()
        softmax_loss(model(images).logits_BK, labels).mean().backward()
        optimizer.step()
    with torch.no_grad():
        for budget in budgets:
            model.set_effective_capacity(budget)
            assert model(images).logits_BK.argmax(1).tolist() == labels.tolist()
