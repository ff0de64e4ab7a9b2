"""The slow, obvious forms that the fast ones must equal: one token at a time, nothing sorted.

Written from the equations of arXiv 2407.19985 (section 3.1, eq. 1 and 5 to 7, algorithm 1) with
pre-norm over full D; shares no code with `mone_core` but the parameters and alpha's value.
Also the small models that the tests run both on.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from mone_core.models import ModelConfig, build_model
from mone_core.nested import Layout

TINY = ModelConfig(image_size=8, patch_size=2, num_classes=5, dim=16, depth=2, heads=2)


def random_model(*, alpha=0.3, dtype=torch.float64, **changes):
    """A small model with no parameter at its starting value, and alpha where it is wanted."""
    model = build_model(replace(TINY, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for scale in model.alphas:
            scale.raw.fill_(alpha)  # signed: |raw| close to alpha, on either side of 0
    return model


def random_images(batch, *, dtype=torch.float64, config=TINY):
    return torch.randn(batch, 3, config.image_size, config.image_size, dtype=dtype)


def share_out(model, counts):
    """Give the model whole tokens per expert, narrowest first, without going over a budget."""
    model.counts = tuple(counts)
    model.layout = Layout.of(counts, model.config.dims)


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


def slow_forward(model, images):
    """Logits `BK` and experts `BN` of a NestedViT, each token computed on its own."""
    results = [_one_image(model, image) for image in images]
    return torch.stack([logits for logits, _ in results]), [expert for _, expert in results]


def _one_image(model, image):
    config, p = model.config, dict(model.named_parameters())
    tokens = _embed(image, config.patch_size, p)
    probs = [_linear(x, p, "router.score").softmax(-1) for x in tokens]
    expert = slow_routing([row.tolist() for row in probs], model.counts)
    widths = [config.dims[e] for e in expert]
    for layer in range(config.depth):
        alpha = model.alphas[layer if config.alpha_per_layer else 0]()
        gates = [alpha * row[e] + 1 for row, e in zip(probs, expert, strict=True)]
        tokens = _block(tokens, widths, gates, f"blocks.{layer}.", p, config)
    normed = [_norm(x, p, "norm", config) for x in tokens]
    return _linear(sum(normed) / len(normed), p, "head"), expert


def _embed(image, size, p):
    rows, columns = image.shape[1] // size, image.shape[2] // size
    tokens = []
    for row in range(rows):
        for column in range(columns):
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            position = p["embed.position_ND"][row * columns + column]
            tokens.append(_linear(patch.reshape(-1), p, "embed.project") + position)
    return tokens


def _block(tokens, widths, gates, at, p, config):
    mixed = _attention(tokens, widths, at, p, config)
    out = []
    for x, o, d, gate in zip(tokens, mixed, widths, gates, strict=True):
        w_out, b_out = p[at + "attention.out.weight"], p[at + "attention.out.bias"]
        w_up, b_up = p[at + "mlp.up.weight"], p[at + "mlp.up.bias"]
        w_down, b_down = p[at + "mlp.down.weight"], p[at + "mlp.down.bias"]
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


def _pad(x, dim):
    return F.pad(x, (0, dim - len(x)))
