"""A step of a sparse layer, whole or as one of many ranks, and batches and layers for it."""

import copy

import torch

from mone_core.nested import Layout
from tests.mone_core.sparse_reference import FLAT, operands, random_layer

DIMS = (1, 2, 4, 8)
NESTED = Layout.of((2, 2, 1, 2), DIMS)
LAYOUTS = {
    "flat": FLAT,
    "nested": NESTED,
    "nested, two classes": Layout.of((0, 4, 3, 0), DIMS),
}
BATCH = 8  # of all ranks: the four of the largest table have one group of two images each
# Favour of every expert: added to the scores of all tokens.
SKEWS = {
    "balanced": (0, 0, 0, 0),
    "skewed": (0, 1, 2, 0),
    "one empty": (-40, 0, 0, 0),
    "all to one": (-40, 30, 40, -30),
}


def of_images(operand, rank):
    """A rank's images of an operand `NBX` of all, as a leaf of its own."""
    part = operand.detach().chunk(rank.parts, dim=1)[rank.rank]
    return part.contiguous().requires_grad_()


def step(layer, residual, x, gate, seed, layout, parts=1):
    """Output, auxiliary loss, and gradients by name, of a part of the batch's loss."""
    out, told = layer(residual, x, layout, gate)
    loss = (out * seed).sum() + told.aux_loss / parts
    leaves = {"residual": residual, "x": x, "gate": gate, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return out.detach(), told, dict(zip(leaves, grads, strict=True))


def step_of_one(layer, rank, operands, layout):
    """The same for the part of one rank, by a layer that keeps the rank's experts only."""
    layer = copy.deepcopy(layer)
    layer.spread(rank, "layer 3")
    residual, x, gate, seed = (of_images(each, rank) for each in operands)
    return step(layer, residual, x, gate, seed.detach(), layout, rank.parts)


def infer_on(table, layer, operands, layout, without):
    """Outputs for all images, computed by a table's ranks under `without` gradients."""

    def infer(rank):
        mine = copy.deepcopy(layer)
        mine.spread(rank, "layer 3")
        with without():
            residual, x, gate = (each.chunk(rank.parts, dim=1)[rank.rank] for each in operands[:3])
            return mine(residual, x, layout, gate)[0]

    return torch.cat(table.run(infer), dim=1)


def whole_gradient(name, grads, columns):
    """What all ranks' gradients of one name come to, ranks in order."""
    if name in ("residual", "x", "gate"):
        return torch.cat(grads, dim=1)
    if ".bank." not in f".{name}":
        return sum(grads)
    of_column = [sum(grads[column::columns]) for column in range(columns)]
    return torch.cat(of_column)


def assert_close(one, other, name):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=lambda m: f"{name}: {m}")


def images_of_all(layout):
    """Residual, x, gate, and gradient of the output; the first feature of x is close to 1."""
    residual, x, gate = operands(BATCH, layout)
    with torch.no_grad():
        x[..., 0] = 1 + 0.01 * x[..., 0]
    return residual, x, gate, torch.randn_like(residual)


def favouring(skew, **changes):
    """A layer whose router favours some experts."""
    layer = random_layer(**changes)
    with torch.no_grad():
        layer.router.weight[:, 0] += torch.tensor(SKEWS[skew])
    return layer
