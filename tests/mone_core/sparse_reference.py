"""Slow sparse experts that the fast ones must equal, written from the specification.

Allocation is the plain loop over ranks and tokens on Python numbers. The flat layer is V-MoE's own
form: one-hot dispatch and combine tensors `SEC` and einsums over them. The nested layer takes every
token of every image by itself. They share no code with `mone_core`: they are given parameters by
name. Also the small layers that the tests run both on.

Axes here: B images in order, N tokens of an image, S tokens of a group (image by image), E experts,
C slots of an expert, D model width, F hidden width.
"""

import math
from dataclasses import dataclass, replace

import torch

from mone_core.experts import ExpertsConfig, SparseMlp
from mone_core.nested import Layout

HIDDEN = 5
FLAT = Layout.of((7,), (8,))
ROUTING = {
    "vanilla": {},
    "batch_priority": {"batch_priority": True},
    "experts_choose": {"routing": "experts_choose"},
}
CONFIG = ExpertsConfig(
    placement="every", num_experts=4, k=2, group_images=2, rounding="ceil", noise=0.0
)

LOSSES = {"importance_weight": 0.3, "load_weight": 0.5, "gshard_weight": 0.7, "z_weight": 1.1}


def random_layer(gelu="tanh", dim=8, **changes):
    """A layer with no parameter at its starting value."""
    layer = SparseMlp(dim, HIDDEN, replace(CONFIG, **changes), gelu).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def operands(batch, layout=FLAT, gated=True):
    """Residual, x, and a gate per token."""
    num_tokens = layout.segments[-1].stop
    shape = (num_tokens, batch, layout.dim)
    return leaf(*shape), leaf(*shape), leaf(num_tokens, batch, 1) if gated else None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a layer of sparse experts is meant to behave.

    `capacity` is written out for the rounding that the tests of whole layers use: upwards.
    """

    k: int = 1
    capacity_ratio: float = 1.05
    group_images: int = 2
    batch_priority: bool = False
    experts_choose: bool = False
    gelu: str = "tanh"

    def capacity(self, num_tokens, num_experts):
        choices = num_tokens * (1 if self.experts_choose else self.k)
        return min(num_tokens, math.ceil(choices * self.capacity_ratio / num_experts - 1e-9))

    def kept(self, probs_SE):
        """What has a seat in one group: (token, expert, slot), from a list of rows."""
        capacity = self.capacity(len(probs_SE), len(probs_SE[0]))
        if self.experts_choose:
            return slow_expert_choice(probs_SE, capacity)
        seats = slow_top_k(probs_SE, self.k, capacity, self.batch_priority)
        return [(token, expert, slot) for token, _, expert, slot in seats]


def slow_top_k(probs_SE, k, capacity, batch_priority):
    """Kept choices (token, rank, expert, slot) in the order of their placing."""
    best = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k] for row in probs_SE]
    order = list(range(len(probs_SE)))
    if batch_priority:
        order.sort(key=lambda t: (-max(probs_SE[t]), t))
    fill = [0] * len(probs_SE[0])
    kept = []
    for rank in range(k):
        for token in order:
            expert = best[token][rank]
            if fill[expert] < capacity:
                kept.append((token, rank, expert, fill[expert]))
            fill[expert] += 1
    return kept


def slow_expert_choice(probs_SE, capacity):
    """Choices of experts (token, expert, slot)."""
    tokens = range(len(probs_SE))
    kept = []
    for expert in range(len(probs_SE[0])):
        best = sorted(tokens, key=lambda t, e=expert: (-probs_SE[t][e], t))[:capacity]
        kept += [(token, expert, slot) for slot, token in enumerate(best)]
    return kept


def einsum_layer(residual_BND, x_BND, gate_BN, p, rules):
    """A flat layer with one-hot products, group by group.

    Args:
        p: Parameters by their names in `SparseMlp`.
    """
    outs = []
    for start in range(0, x_BND.shape[0], rules.group_images):
        part_BND = x_BND[start : start + rules.group_images]
        x_SD = part_BND.flatten(0, 1)
        probs_SE = (x_SD @ p["router.weight"].T).softmax(-1)
        num_tokens, num_experts = probs_SE.shape
        capacity = rules.capacity(num_tokens, num_experts)
        dispatch_SEC = torch.zeros(num_tokens, num_experts, capacity, dtype=x_SD.dtype)
        for token, expert, slot in rules.kept(probs_SE.tolist()):
            dispatch_SEC[token, expert, slot] = 1
        combine_SEC = torch.einsum("sec,se->sec", dispatch_SEC, probs_SE)
        in_ECD = torch.einsum("sec,sd->ecd", dispatch_SEC, x_SD)
        h_ECF = torch.einsum("ecd,efd->ecf", in_ECD, p["bank.up_weight_EFD"])
        h_ECF = _gelu(h_ECF + p["bank.up_bias_EF"].unsqueeze(1), rules.gelu)
        out_ECD = torch.einsum("ecf,edf->ecd", h_ECF, p["bank.down_weight_EDF"])
        out_ECD = out_ECD + p["bank.down_bias_ED"].unsqueeze(1)
        outs.append(torch.einsum("sec,ecd->sd", combine_SEC, out_ECD).view_as(part_BND))
    return residual_BND + gate_BN.unsqueeze(-1) * torch.cat(outs)


def nested_layer(residual_BND, x_BND, gate_BN, p, rules, classes):
    """A nested layer, one kept choice of one token at a time.

    Every width class fills slots of its own; the router reads all features.

    Args:
        classes: (tokens of an image, features) of every class, in the order of the tokens.
    """
    out = list(residual_BND.unbind(0))
    out = [list(image.unbind(0)) for image in out]
    first = 0
    for count, width in classes:
        for start in range(0, len(out), rules.group_images):
            images = range(start, min(start + rules.group_images, len(out)))
            places = [(b, n) for b in images for n in range(first, first + count)]
            _one_class(out, places, width, (x_BND, gate_BN, p), rules)
        first += count
    return torch.stack([torch.stack(image) for image in out])


def _one_class(out, places, width, operands, rules):
    x_BND, gate_BN, p = operands
    if not places:
        return
    probs = [(p["router.weight"] @ x_BND[at]).softmax(0) for at in places]
    for token, expert, _ in rules.kept([row.tolist() for row in probs]):
        b, n = places[token]
        up, up_bias = p["bank.up_weight_EFD"][expert], p["bank.up_bias_EF"][expert]
        down, down_bias = p["bank.down_weight_EDF"][expert], p["bank.down_bias_ED"][expert]
        h = _gelu(up[:, :width] @ x_BND[b, n, :width] + up_bias, rules.gelu)
        y = down[:width] @ h + down_bias[:width]
        rest = torch.zeros(x_BND.shape[2] - width, dtype=y.dtype)
        out[b][n] = out[b][n] + gate_BN[b, n] * probs[token][expert] * torch.cat([y, rest])


def _gelu(x, kind):
    if kind == "erf":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
