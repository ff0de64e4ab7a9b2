"""The nested block: plain at full width, attention open to all, alpha that cannot freeze."""

import pytest
import torch
import torch.nn.functional as F

from mone_core.block import BoundedScale, NestedBlock
from mone_core.nested import Layout, nested_in

DIMS = (2, 4, 8, 16)
DIM, HEADS, TOKENS, BATCH = 16, 2, 6, 3


def block_of(gelu="tanh"):
    block = NestedBlock(DIM, HEADS, 4 * DIM, gelu=gelu, norm_eps=1e-6).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def run(block, x, counts, gate=None):
    gate = torch.ones(TOKENS, BATCH, 1, dtype=x.dtype) if gate is None else gate
    return block(x, Layout.of(counts, DIMS), gate)


def tokens():
    return torch.randn(TOKENS, BATCH, DIM, dtype=torch.float64)


def plain_block(block, x_NBD, gate):
    """A pre-norm ViT block of torch's own parts, with the same weights."""
    u = F.layer_norm(x_NBD, (DIM,), block.attention_norm.weight, block.attention_norm.bias, 1e-6)
    mha = torch.nn.MultiheadAttention(DIM, HEADS).double()
    mha.in_proj_weight, mha.in_proj_bias = block.attention.qkv.weight, block.attention.qkv.bias
    mha.out_proj.weight, mha.out_proj.bias = block.attention.out.weight, block.attention.out.bias
    z = x_NBD + mha(u, u, u, need_weights=False)[0]
    u = F.layer_norm(z, (DIM,), block.mlp_norm.weight, block.mlp_norm.bias, 1e-6)
    h = F.gelu(block.mlp.up(u), approximate=block.mlp.approximate)
    return z + gate * block.mlp.down(h)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_at_full_width_it_is_the_plain_block(gelu):
    block, x = block_of(gelu), tokens()
    gate = torch.rand(TOKENS, BATCH, 1, dtype=torch.float64) + 0.5

    torch.testing.assert_close(
        run(block, x, (0, 0, 0, TOKENS), gate), plain_block(block, x, gate), rtol=0, atol=1e-12
    )


def results_of(block, x, gate, counts):
    """Output, and gradients of the tokens, the gate and every parameter."""
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    out = run(block, x, counts, gate)
    leaves = {"x": x, "gate": gate, **dict(block.named_parameters())}
    grads = torch.autograd.grad((out.float() ** 2).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("counts", [(2, 2, 1, 1), (6, 0, 0, 0), (0, 3, 3, 0)])
def test_under_autocast_products_are_short_and_the_stream_and_gradients_are_not(gelu, counts):
    """bfloat16 keeps 8 bits; a few roundings in a row stay within 2 % of the largest element."""
    block, x = block_of(gelu).float(), tokens().float()
    gate = torch.rand(TOKENS, BATCH, 1) + 0.5
    expected = results_of(block, x, gate, counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        up = nested_in(x, block.mlp.up.weight, block.mlp.up.bias, Layout.of(counts, DIMS))
        got = results_of(block, x, gate, counts)

    assert up.dtype == torch.bfloat16
    for name, value in expected.items():
        assert got[name].dtype == torch.float32, name
        assert (got[name] - value).abs().max() <= 0.02 * value.abs().max(), name


def test_autocast_leaves_float64_alone():
    block, x, counts = block_of(), tokens(), (2, 2, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(block, x, counts)

    assert torch.equal(under, run(block, x, counts))


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_bfloat16_keeps_to_its_dtype_whatever_the_gates(gate_dtype):
    block, x, counts = block_of().bfloat16(), tokens().bfloat16(), (2, 2, 1, 1)
    gate = torch.rand(TOKENS, BATCH, 1).to(gate_dtype)
    expected = results_of(block_like(block).float(), x.float(), gate.float(), counts)
    got = results_of(block, x, gate, counts)

    assert got["gate"].dtype == gate_dtype
    for name, value in expected.items():
        assert got[name].dtype == (gate_dtype if name == "gate" else torch.bfloat16), name
        assert (got[name] - value).abs().max() <= 0.05 * value.abs().max(), name


def block_like(block):
    other = block_of()
    other.load_state_dict(block.state_dict())
    return other


def test_the_gate_may_be_left_out():
    block, x = block_of(), tokens()

    assert torch.equal(block(x, Layout.of((2, 2, 1, 1), DIMS)), run(block, x, (2, 2, 1, 1)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_whole_block_compiles_into_one_graph_and_once():
    """Counts are Python integers: nothing breaks the graph, the second step compiles nothing."""
    torch.compiler.reset()
    block, counts = block_of(), (2, 2, 1, 1)
    gate = torch.rand(TOKENS, BATCH, 1, dtype=torch.float64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    first, second = tokens(), tokens()
    results_of(compiled, first, gate, counts)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = results_of(compiled, second, gate, counts)

    expected = results_of(block, second, gate, counts)
    for name, value in expected.items():
        torch.testing.assert_close(
            got.get(name, got.get(f"_orig_mod.{name}")), value, rtol=0, atol=1e-10, msg=name
        )


def test_the_two_gelus_differ():
    tanh, erf, x = block_of("tanh"), block_of("erf"), tokens()
    erf.load_state_dict(tanh.state_dict())

    difference = (run(tanh, x, (0, 0, 0, 6)) - run(erf, x, (0, 0, 0, 6))).abs().max()
    assert 1e-6 < difference < 0.1


def test_the_gate_acts_on_the_mlp_branch_alone():
    """A gate of 0 leaves attention, and doubling the gate doubles only the MLP's part."""
    block, x, counts = block_of(), tokens(), (2, 2, 1, 1)
    ones = torch.ones(TOKENS, BATCH, 1, dtype=torch.float64)
    layout = Layout.of(counts, DIMS)

    after_attention = block.attention(x, block.attention_norm(x), layout)
    torch.testing.assert_close(run(block, x, counts, 0 * ones), after_attention)
    once = run(block, x, counts, ones) - after_attention
    twice = run(block, x, counts, 2 * ones) - after_attention
    torch.testing.assert_close(twice, 2 * once)


def test_every_token_attends_to_every_token_whatever_their_widths():
    """Changing the narrowest token moves the attention of the widest, and the other way round."""
    block, x, counts = block_of(), tokens(), (2, 2, 1, 1)
    before = run(block, x, counts)
    for changed, watched in ((TOKENS - 1, 0), (0, TOKENS - 1)):
        other = x.clone()
        other[changed, :, :2] += 1  # features that even the narrowest reads
        moved = (run(block, other, counts) - before)[watched].abs().amax(-1)
        assert (moved > 1e-6).all()


def test_images_of_a_batch_do_not_mix():
    block, x, counts = block_of(), tokens(), (2, 2, 1, 1)
    together = run(block, x, counts)
    other = x.clone()
    other[:, 1] += 1

    moved = (run(block, other, counts) - together).abs().amax((0, 2))
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0.1


def test_the_layer_norm_sees_features_past_the_width():
    """The mean and variance are over all D, so a far feature moves a narrow token."""
    block, x, counts = block_of(), tokens(), (TOKENS, 0, 0, 0)
    other = x.clone()
    other[..., -1] += 5

    moved = (run(block, other, counts) - run(block, x, counts))[..., :2].abs().max()
    assert moved > 1e-3


def test_a_block_starts_with_xavier_uniform_weights_and_no_bias():
    block = NestedBlock(64, 4, 256, gelu="tanh", norm_eps=1e-6)
    for layer in (block.attention.out, block.mlp.up, block.mlp.down):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert (layer.bias == 0).all()
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_alpha_starts_at_exactly_zero_with_slope_one():
    scale = BoundedScale()
    alpha = scale()
    alpha.backward()

    assert alpha == 0
    assert scale.raw.grad == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_stays_from_0_to_below_1(dtype):
    scale = BoundedScale().to(dtype)
    for raw in (-100, -20, -9.5, -3, -0.1, -1e-8, 0, 1e-8, 0.1, 3, 9.5, 20, 100):
        with torch.no_grad():
            scale.raw.fill_(raw)
        assert 0 <= scale() < 1, f"alpha is {scale().item()} at {raw}"


@pytest.mark.parametrize("raw", [-2.0, -0.5, -0.01, 0.01, 0.5, 2.0])
def test_alpha_has_a_slope_everywhere(raw):
    scale = BoundedScale().double()
    with torch.no_grad():
        scale.raw.fill_(raw)
    scale().backward()

    assert scale.raw.grad.sign() == (1 if raw > 0 else -1)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("push", [-1, 1])
def test_alpha_leaves_zero_whichever_way_it_is_pushed(push, optimizer):
    """Pushed down, it comes out small and positive on the other side; it never rests at 0."""
    scale = BoundedScale()
    steps = optimizer(scale.parameters(), lr=0.01)
    seen = []
    for _ in range(20):
        steps.zero_grad()
        (-push * scale()).backward()
        steps.step()
        seen.append(scale().item())

    assert seen[0] > 0
    assert sum(alpha > 0 for alpha in seen) >= 18
    if push > 0:
        assert seen == sorted(seen)
    else:
        assert max(seen) < 0.1
