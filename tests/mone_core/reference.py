"""The slow, obvious forms that the fast ones must equal: one token at a time, nothing sorted.

Written from the equations of arXiv 2407.19985 (section 3.1, eq. 1 and 5 to 7, algorithm 1) with
pre-norm over full D; shares no code with `mone_core` but the parameters and alpha's value.
Also the small models that the tests run both on. Sparse experts have a reference of their own.
"""

import math
from dataclasses import fields, replace

import torch
import torch.nn.functional as F

from mone_core.losses import softmax_loss
from mone_core.models import (
    DENSE,
    ExpertsConfig,
    ModelConfig,
    NestingConfig,
    SkippingConfig,
    VideoConfig,
    build_model,
)
from mone_core.models.encoder import Plan
from mone_core.nested import Layout

TINY = ModelConfig(image_size=8, patch_size=2, num_classes=5, dim=16, depth=2, heads=2)
_OF_NESTING = {field.name for field in fields(NestingConfig)}

EXPERTS = ExpertsConfig(placement="every", num_experts=4, group_images=2)
CLIP = VideoConfig(frames=4, tubelet=2, temporal_depth=1)
# What to change of TINY, in the words of `tiny`.
EVERY_MODEL = {
    "nested": {},
    "nested, class token": {"pool": "cls"},
    "dense": {"nesting": DENSE},
    "two routers, the first late": {"depth": 4, "router_layers": (1, 3)},
    "MatViT": {"assignment": "constant"},
    "MatFormer": {"assignment": "constant", "slices": "hidden"},
    "random router": {"assignment": "random"},
    "MoD greedy": {"allocation": "mod_greedy"},
    "Mixture-of-Depths": {"nesting": DENSE, "skipping": SkippingConfig(every=2)},
    "V-MoE": {"nesting": DENSE, "experts": EXPERTS, "pool": "cls", "pre_logits": True},
    "expert choice": {"nesting": DENSE, "experts": replace(EXPERTS, routing="experts_choose")},
    "nested sparse": {"experts": EXPERTS},
    "factorised clips": {"video": CLIP},
    "factorised clips, class tokens": {"video": CLIP, "pool": "cls", "experts": EXPERTS},
    "joint clips": {"video": replace(CLIP, attention="joint")},
    "narrow hidden layer": {"mlp_dim": 24},
}


def tiny(**changes):
    """TINY with other values, those of its nesting named like the others."""
    return changed(TINY, **changes)


def changed(config, **changes):
    """A configuration with other values, those of its nesting named like the others."""
    nesting = {name: changes.pop(name) for name in list(changes) if name in _OF_NESTING}
    if nesting:
        changes["nesting"] = replace(config.nesting, **nesting)
    return replace(config, **changes)


def random_model(*, alpha=0.3, dtype=torch.float64, **changes):
    """A small model with no parameter at its starting value, and alpha where it is wanted."""
    model = build_model(tiny(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for scale in model.encoder.alphas:
            scale.raw.fill_(alpha)  # signed: |raw| close to alpha, on either side of 0
    return model


def random_images(batch, *, dtype=torch.float64, config=TINY):
    frames = (config.video.frames,) if config.video.frames > 1 else ()
    return torch.randn(batch, *frames, 3, config.image_size, config.image_size, dtype=dtype)


def share_out(model, counts):
    """Give the model whole tokens per expert, narrowest first, without going over a budget."""
    dims = model.config.dims
    with_cls = (*counts[:-1], counts[-1] + (model.config.pool == "cls"))
    full = Layout.of((sum(with_cls),), dims[-1:])
    model.encoder.plan = Plan(tuple(counts), full, Layout.of(with_cls, dims), 0)


def assert_equals_the_reference(model, pixels, decided=None):
    """Logits, experts and the gradient of every parameter, to 1e-10."""
    labels = torch.arange(len(pixels)) % model.config.num_classes
    output = model(pixels)
    logits, experts = slow_forward(model, pixels, decided)
    assert [each.expert_BN.tolist() for each in output.routed] == experts
    torch.testing.assert_close(output.logits_BK, logits, rtol=0, atol=1e-10)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(softmax_loss(output.logits_BK, labels).mean(), parameters)
    theirs = torch.autograd.grad(
        softmax_loss(logits, labels).mean(), parameters, materialize_grads=True
    )
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def slow_routing(probs_NE, counts):
    """Algorithm 1 for one image, on Python numbers."""
    probs = [list(row) for row in probs_NE]
    expert = [0] * len(probs)
    free = set(range(len(probs)))
    for j in reversed(range(1, len(counts))):
        for n in sorted(free, key=lambda n: (-probs[n][j], n))[: counts[j]]:
            expert[n] = j
            free.remove(n)
    return expert


def slow_forward(model, pixels, decided=None):
    """Logits `BK` and the experts of every router, each token computed on its own.

    Args:
        decided: Experts per router and input where chance decided them, not a router.
    """
    p, config = dict(model.named_parameters()), model.config
    logits, experts = [], []
    for sample in pixels:
        inputs = _inputs(sample, p, config)
        pooled = []
        for tokens in inputs:
            given = None if decided is None else [each[len(experts)].tolist() for each in decided]
            tokens, expert = _encode(tokens, model.encoder, "encoder.", p, given)
            experts.append(expert)
            pooled.append(_pool(tokens, "norm", p, config))
        out = pooled[0] if len(inputs) == 1 else _temporal(pooled, model, p)
        if config.pre_logits:
            out = torch.tanh(_linear(out, p, "head.pre_logits"))
        logits.append(_linear(out, p, "head.classify"))
    by_router = [list(each) for each in zip(*experts, strict=True)]
    return torch.stack(logits), by_router


def _inputs(sample, p, config):
    """Token lists that the encoder sees: of an image, of every step, or of a whole clip."""
    clip = sample.view(-1, *sample.shape[-3:])
    steps = [
        _patches(clip[t : t + config.video.tubelet], config.patch_size)
        for t in range(0, len(clip), config.video.tubelet)
    ]
    if config.video.attention == "joint":
        steps = [[patch for step in steps for patch in step]]
    inputs = []
    for step in steps:
        tokens = [_linear(patch, p, "embed.project") for patch in step]
        if config.pool == "cls":
            tokens = [p["embed.cls_D"], *tokens]
        inputs.append([x + p["embed.position_ND"][n] for n, x in enumerate(tokens)])
    return inputs


def _patches(frames, size):
    """Flat patches of one tubelet, values in the order colour, frame, row, column."""
    rows, columns = frames.shape[2] // size, frames.shape[3] // size
    return [
        frames[:, :, y * size : (y + 1) * size, x * size : (x + 1) * size].transpose(0, 1).flatten()
        for y in range(rows)
        for x in range(columns)
    ]


def _temporal(pooled, model, p):
    tokens = pooled
    if model.config.pool == "cls":
        tokens = [p["temporal_cls_D"], *tokens]
    tokens = [x + p["temporal_position_TD"][t] for t, x in enumerate(tokens)]
    tokens, _ = _encode(tokens, model.temporal_encoder, "temporal_encoder.", p, None)
    return _pool(tokens, "temporal_norm", p, model.config)


def _pool(tokens, norm, p, config):
    if config.pool == "cls":
        return _norm(tokens[0], p, norm, config)
    return sum(_norm(x, p, norm, config) for x in tokens) / len(tokens)


def _encode(tokens, encoder, at, p, decided):
    """All blocks over one input; tokens stay where they are."""
    config, nesting = encoder.config, encoder.config.nesting
    first = int(config.pool == "cls")
    constant = nesting.slices == "model" and nesting.assignment == "constant"
    start = config.dims[encoder.plan.counts.index(max(encoder.plan.counts))]
    widths = [start if constant else config.dim] * len(tokens)
    chosen, experts = None, []
    for layer in range(config.depth):
        if nesting.routed and layer in nesting.router_layers:
            probs = _probabilities(tokens[first:], len(experts), at, p, config)
            counts = encoder.plan.counts
            expert = decided[len(experts)] if decided else slow_routing(_plain(probs), counts)
            experts.append(expert)
            dims = (0, *config.dims[1:]) if nesting.allocation == "mod_greedy" else config.dims
            widths = [config.dim] * first + [dims[e] for e in expert]
            if nesting.learned:
                chosen = [0.0] * first + [row[e] for row, e in zip(probs, expert, strict=True)]
        gates = [1.0] * len(tokens)
        if chosen is not None:
            behind = 0 if nesting.alpha == "model" else layer - nesting.router_layers[0]
            alpha = encoder.alphas[behind]()
            gates = [alpha * r + 1 for r in chosen]
        tokens = _layer(tokens, widths, gates, layer, encoder, f"{at}blocks.{layer}.", p)
    return tokens, experts


def _probabilities(tokens, router, at, p, config):
    if config.nesting.assignment == "random":
        return None
    if config.nesting.router_input == "normed":
        tokens = [_norm(x, p, f"{at}router_norms.{router}", config) for x in tokens]
    return [_linear(x, p, f"{at}routers.{router}.score").softmax(-1) for x in tokens]


def _plain(probs):
    return [row.tolist() for row in probs]


def _layer(tokens, widths, gates, layer, encoder, at, p):
    """One block; tokens that it does not compute pass as they are."""
    config = encoder.config
    hidden = config.hidden
    if config.nesting.slices == "hidden":
        hidden = encoder.blocks[layer].width
    if config.skipping.every and layer % config.skipping.every == config.skipping.every - 1:
        scores = [p[at + "score.weight"][0] @ x for x in tokens]
        best = sorted(range(len(tokens)), key=lambda n: -scores[n].item())
        inside = sorted(best[: int(config.skipping.capacity * len(tokens))])
    else:
        scores = None
        inside = [n for n, width in enumerate(widths) if width]
    among = [tokens[n] for n in inside]
    computed = _block(
        among, [widths[n] for n in inside], [gates[n] for n in inside], hidden, at, p, config
    )
    out = list(tokens)
    for n, before, after in zip(inside, among, computed, strict=True):
        out[n] = after if scores is None else before + scores[n] * (after - before)
    return out


def _block(tokens, widths, gates, hidden, at, p, config):
    mixed = _attention(tokens, widths, at, p, config)
    w_out, b_out = p[at + "attention.out.weight"], p[at + "attention.out.bias"]
    w_up, b_up = p[at + "mlp.up.weight"][:hidden], p[at + "mlp.up.bias"][:hidden]
    w_down, b_down = p[at + "mlp.down.weight"][:, :hidden], p[at + "mlp.down.bias"]
    out = []
    for x, o, d, gate in zip(tokens, mixed, widths, gates, strict=True):
        z = x + _pad(w_out[:d] @ o + b_out[:d], len(x))
        u = _norm(z, p, at + "mlp_norm", config)
        h = _gelu(w_up[:, :d] @ u[:d] + b_up, config.gelu)
        out.append(z + gate * _pad(w_down[:d] @ h + b_down[:d], len(x)))
    return out


def _attention(tokens, widths, at, p, config):
    """Every token attends to all tokens, at full width and with all heads."""
    weight, bias = p[at + "attention.qkv.weight"], p[at + "attention.qkv.bias"]
    q, k, v = [], [], []
    for x, d in zip(tokens, widths, strict=True):
        u = _norm(x, p, at + "attention_norm", config)
        for into, part in zip((q, k, v), (weight[:, :d] @ u[:d] + bias).chunk(3), strict=True):
            into.append(part)
    mixed = []
    size = config.dim // config.heads
    for n in range(len(tokens)):
        heads = []
        for head in range(config.heads):
            of = slice(head * size, (head + 1) * size)
            scores = torch.stack([q[n][of] @ k[m][of] for m in range(len(tokens))])
            share = (scores / math.sqrt(size)).softmax(-1)
            heads.append(sum(share[m] * v[m][of] for m in range(len(tokens))))
        mixed.append(torch.cat(heads))
    return mixed


def _gelu(x, kind):
    if kind == "erf":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _norm(x, p, name, config):
    centred = x - x.mean()
    scaled = centred / torch.sqrt((centred**2).mean() + config.norm_eps)
    return scaled * p[name + ".weight"] + p[name + ".bias"]


def _linear(x, p, name):
    return p[name + ".weight"] @ x + p[name + ".bias"]


def _pad(y, dim):
    return F.pad(y, (0, dim - len(y)))
