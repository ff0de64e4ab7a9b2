"""Vision transformers as others store and compute them, at toy sizes with random weights.

Written from the published architectures, in the names and shapes of their files, and computed in
the plainest way: nothing here knows this package. The JAX families are computed by numpy on
`[B, height, width, 3]` images, timm's by torch on `[B, 3, height, width]` ones.

Axes: B images, N tokens, D model width, F hidden width, h heads, k features of a head, E experts.
"""

import numpy as np
import torch
import torch.nn.functional as F

DIM, HIDDEN, HEADS, DEPTH, PATCH, GRID, CLASSES, EXPERTS = 16, 24, 2, 4, 4, 3, 5, 3
SIZE = PATCH * GRID


def random_arrays(shapes, seed=0):
    """An array for each name, none of them anywhere near zero or one."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}


def timm_state(*, cls=True, pre_logits=False, cls_has_position=True, seed=0):
    """`timm.create_model("vit_...").state_dict()`."""
    norm, shapes = (DIM,), {}
    if cls:
        shapes["cls_token"] = (1, 1, DIM)
    shapes["pos_embed"] = (1, GRID * GRID + (cls and cls_has_position), DIM)
    shapes["patch_embed.proj.weight"] = (DIM, 3, PATCH, PATCH)
    shapes["patch_embed.proj.bias"] = (DIM,)
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.norm{n}.{end}": norm for n in (1, 2) for end in ("weight", "bias")}
        shapes |= _torch_linear(f"blocks.{i}.attn.qkv", DIM, 3 * DIM)
        shapes |= _torch_linear(f"blocks.{i}.attn.proj", DIM, DIM)
        shapes |= _torch_linear(f"blocks.{i}.mlp.fc1", DIM, HIDDEN)
        shapes |= _torch_linear(f"blocks.{i}.mlp.fc2", HIDDEN, DIM)
    shapes |= {"norm.weight": norm, "norm.bias": norm}
    if pre_logits:
        shapes |= _torch_linear("pre_logits.fc", DIM, DIM)
    shapes |= _torch_linear("head", DIM, CLASSES)
    return {name: torch.from_numpy(a) for name, a in random_arrays(shapes, seed).items()}


def timm_forward(state, images):
    """Logits of a timm ViT."""

    def norm(x, name):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
    cls, position = state.get("cls_token"), state["pos_embed"]
    if cls is not None and position.shape[1] == x.shape[1]:
        x = torch.cat([cls.expand(len(x), -1, -1), x + position], dim=1)
    elif cls is not None:
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1) + position
    else:
        x = x + position
    for i in range(DEPTH):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((scores @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm")
    x = x[:, 0] if cls is not None else x.mean(dim=1)
    if "pre_logits.fc.weight" in state:
        x = linear(x, "pre_logits.fc").tanh()
    return linear(x, "head")


def _torch_linear(name, fan_in, fan_out):
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


class Flax:
    """A ViT of one of the JAX code bases.

    Args:
        trunk: Name of the encoder: `Transformer`, or `Encoder` in V-MoE.
        parts: Names inside of a block: attention, second norm, MLP.
        position: Name of the position table.
        cls_has_position: The older order: first the class token, then positions.
        sparse: Blocks with experts.
        k: Experts that a token uses.
    """

    def __init__(
        self,
        trunk,
        parts,
        position,
        *,
        cls=True,
        cls_has_position=True,
        pre_logits=False,
        sparse=(),
        k=2,
    ):
        self.trunk, self.parts, self.position, self.cls = trunk, parts, position, cls
        self.cls_has_position, self.pre_logits = cls_has_position, pre_logits
        self.sparse, self.k = sparse, k

    def state(self, seed=0):
        """Arrays by '/'-joined names."""
        attention, second, mlp = self.parts
        head_dim, shapes = DIM // HEADS, {}
        if self.cls:
            shapes["cls"] = (1, 1, DIM)
        rows = GRID * GRID + (self.cls and self.cls_has_position)
        shapes[self.position] = (1, rows, DIM)
        shapes |= {"embedding/kernel": (PATCH, PATCH, 3, DIM), "embedding/bias": (DIM,)}
        for i in range(DEPTH):
            block = f"{self.trunk}/encoderblock_{i}"
            for name in ("LayerNorm_0", second):
                shapes |= {f"{block}/{name}/{end}": (DIM,) for end in ("scale", "bias")}
            for name in ("query", "key", "value"):
                shapes[f"{block}/{attention}/{name}/kernel"] = (DIM, HEADS, head_dim)
                shapes[f"{block}/{attention}/{name}/bias"] = (HEADS, head_dim)
            shapes[f"{block}/{attention}/out/kernel"] = (HEADS, head_dim, DIM)
            shapes[f"{block}/{attention}/out/bias"] = (DIM,)
            if i in self.sparse:
                shapes[f"{block}/Moe/Router/dense/kernel"] = (DIM, EXPERTS)
                shapes |= _flax_mlp(f"{block}/Moe/Mlp", (EXPERTS,))
            else:
                shapes |= _flax_mlp(f"{block}/{mlp}", ())
        shapes |= {f"{self.trunk}/encoder_norm/{end}": (DIM,) for end in ("scale", "bias")}
        if self.pre_logits:
            shapes |= {"pre_logits/kernel": (DIM, DIM), "pre_logits/bias": (DIM,)}
        shapes |= {"head/kernel": (DIM, CLASSES), "head/bias": (CLASSES,)}
        return random_arrays(shapes, seed)

    def forward(self, state, images):
        """Logits."""
        batch = len(images)
        cut = images.reshape(batch, GRID, PATCH, GRID, PATCH, 3)
        x = np.einsum("byixjc,ijcd->byxd", cut, state["embedding/kernel"])
        x = x.reshape(batch, GRID * GRID, DIM) + state["embedding/bias"]
        if not self.cls_has_position:
            x = x + state[self.position]
        if self.cls:
            x = np.concatenate([np.tile(state["cls"], (batch, 1, 1)), x], axis=1)
        if self.cls_has_position:
            x = x + state[self.position]
        for i in range(DEPTH):
            x = self._block(state, f"{self.trunk}/encoderblock_{i}", x)
        x = _norm(state, f"{self.trunk}/encoder_norm", x)
        x = x[:, 0] if self.cls else x.mean(axis=1)
        if self.pre_logits:
            x = np.tanh(_dense(state, "pre_logits", x))
        return _dense(state, "head", x)

    def _block(self, state, block, x):
        attention, second, mlp = self.parts
        y = _norm(state, f"{block}/LayerNorm_0", x)
        q, k, v = (
            np.einsum("bnd,dhk->bnhk", y, state[f"{block}/{attention}/{name}/kernel"])
            + state[f"{block}/{attention}/{name}/bias"]
            for name in ("query", "key", "value")
        )
        weights = _softmax(np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(DIM // HEADS))
        y = np.einsum("bhnm,bmhk->bnhk", weights, v)
        y = np.einsum("bnhk,hkd->bnd", y, state[f"{block}/{attention}/out/kernel"])
        x = x + y + state[f"{block}/{attention}/out/bias"]
        y = _norm(state, f"{block}/{second}", x)
        if f"{block}/Moe/Router/dense/kernel" in state:
            return x + self._experts(state, f"{block}/Moe", y)
        hidden = _gelu(_dense(state, f"{block}/{mlp}/Dense_0", y))
        return x + _dense(state, f"{block}/{mlp}/Dense_1", hidden)

    def _experts(self, state, name, y):
        """Every token through its k best experts, none of them ever full."""
        gates = _softmax(y @ state[f"{name}/Router/dense/kernel"])
        out = np.zeros_like(y)
        for b, n in np.ndindex(*y.shape[:2]):
            for e in np.argsort(-gates[b, n])[: self.k]:
                expert = {key: array[e] for key, array in state.items() if f"{name}/Mlp/" in key}
                hidden = _gelu(_dense(expert, f"{name}/Mlp/Dense_0", y[b, n]))
                out[b, n] += gates[b, n, e] * _dense(expert, f"{name}/Mlp/Dense_1", hidden)
        return out


ATTENTION = "MultiHeadDotProductAttention"
OLD, NEW = (
    (f"{ATTENTION}_1", "LayerNorm_2", "MlpBlock_3"),
    (f"{ATTENTION}_0", "LayerNorm_1", "MlpBlock_0"),
)
IN_MODULE = "Transformer/posembed_input/pos_embedding"

AUGREG = Flax("Transformer", OLD, IN_MODULE, pre_logits=True)
LINEN = Flax("Transformer", NEW, IN_MODULE)  # google-research/vision_transformer today
EARLY_BIG_VISION = Flax("Transformer", NEW, "Transformer/pos_embedding", cls=False)
BIG_VISION = Flax("Transformer", NEW, "pos_embedding", cls=False)
BIG_VISION_TOK = Flax("Transformer", NEW, "pos_embedding", cls_has_position=False)
VMOE_POSITION = "Encoder/posembed_input/pos_embedding"
VMOE_PARTS = ("SelfAttention", "LayerNorm_1", "Mlp")
VMOE = Flax("Encoder", VMOE_PARTS, VMOE_POSITION, sparse=(1, 3))


def scanned(state):
    """As big_vision stores a model whose blocks run in a `scan`: one array for all of them."""
    first = "Transformer/encoderblock_0/"
    blocks = [name.removeprefix(first) for name in state if name.startswith(first)]
    out = {name: array for name, array in state.items() if "/encoderblock_" not in name}
    for name in blocks:
        of_all = [state[f"Transformer/encoderblock_{i}/{name}"] for i in range(DEPTH)]
        out[f"Transformer/encoderblock/{name}"] = np.stack(of_all)
    return out


def _flax_mlp(name, lead):
    return {
        f"{name}/Dense_0/kernel": (*lead, DIM, HIDDEN),
        f"{name}/Dense_0/bias": (*lead, HIDDEN),
        f"{name}/Dense_1/kernel": (*lead, HIDDEN, DIM),
        f"{name}/Dense_1/bias": (*lead, DIM),
    }


def _dense(state, name, x):
    return x @ state[f"{name}/kernel"] + state[f"{name}/bias"]


def _norm(state, name, x):
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return x * state[f"{name}/scale"] + state[f"{name}/bias"]


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)
