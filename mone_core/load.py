"""How full sparse experts are: sums over tokens on the device, and what they say on the host.

`load_sums` turns what a model reports of one forward pass (`Output.dispatched`) into one small
tensor of sums; it never makes the host wait, and all shapes are known beforehand. Every number
is a sum over tokens, so steps, microbatches and ranks add by `+`, and n ranks together report what
one process would. Rates are made of the sums once they are read: `load_rows` for every expert,
`summary` for a row of metrics. No file is read or written here.

Axes: L sparse layers, W width classes (narrowest first), E experts, F fields; G groups of S tokens,
K choices of a token, P classes of equal shape.

Source of the quantities: arXiv 2106.05974, appendix on routing; arXiv 2202.09368, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mone_core.dispatch import RoutedClass
from mone_core.errors import RoutingError
from mone_core.experts import Dispatched

Routing = Literal["tokens_choose", "experts_choose"]

# What is summed. The first three belong to a whole width class of a layer: they stand with each
# expert and must not be added over experts.
FIELDS = (
    "tokens",  # tokens of the class
    "unreached",  # of these, tokens that no expert takes: all their choices dropped, or not chosen
    "reached_once",  # of these, tokens that exactly one expert takes; the others have two or more
    "slots",  # slots of the expert; where nothing is dropped (dropless) what it computes, "used"
    "wanted",  # choices of the expert, kept or dropped; where experts choose, those they took
    "used",  # filled slots
    "gate_wanted",  # routing probability of what is wanted
    "gate_kept",  # routing probability of what is used
    "importance",  # probability of the expert, summed over all tokens
    "entropy",  # -p log p of the expert, summed over all tokens, nats
)
DEAD = 0.01  # an expert with less than this share of an even share of the tokens is dead


def load_sums(dispatched: Sequence[Dispatched], dims: Sequence[int], *, routing: Routing) -> Tensor:
    """Sum over the tokens of one forward pass what their routers did.

    Where experts choose, tokens want nothing, so nothing is dropped: "wanted" is what was taken.
    What can go wrong there is seen in "unreached".

    Args:
        dispatched: What the sparse layers report, `Output.dispatched`.
        dims: The model's widths, narrowest first, `ModelConfig.dims`; a dense model has one.
        routing: Who chooses, `ExpertsConfig.routing`.

    Returns:
        `LWEF` of the order of `FIELDS`, float64, on the device of the routers, without gradient.
        A width that has no tokens is 0. Probabilities are those that choices were made from,
        noise included.

    Raises:
        RoutingError: There are no sparse layers, or a class's width is not in `dims`.
    """
    if not dispatched:
        raise RoutingError(
            "a model without sparse experts has no load to sum; ask only models with "
            "experts.placement every or last"
        )
    widths = {dim: index for index, dim in enumerate(dims)}
    cells: dict[tuple[int, int], Tensor] = {}
    for members in _of_equal_shape(dispatched):
        parts = _sums([of for _, of in members], experts_choose=routing == "experts_choose")
        for (layer, of), part_EF in zip(members, parts.unbind(), strict=True):
            if of.dim not in widths:
                raise RoutingError(
                    f"a width class has {of.dim} features, but the model's widths are "
                    f"{tuple(dims)}; give the dims of the model that ran"
                )
            cell = layer, widths[of.dim]
            cells[cell] = cells[cell] + part_EF if cell in cells else part_EF
    absent_EF = torch.zeros_like(next(iter(cells.values())))
    layers = range(len(dispatched))
    every = [cells.get((layer, width), absent_EF) for layer in layers for width in widths.values()]
    return torch.stack(every).view(len(layers), len(widths), *absent_EF.shape)


def _of_equal_shape(dispatched: Sequence[Dispatched]) -> list[list[tuple[int, RoutedClass]]]:
    """All classes with their layers, those of equal shapes together: few large operations."""
    alike: dict[object, list[tuple[int, RoutedClass]]] = {}
    for layer, told in enumerate(dispatched):
        for of in told.classes:
            seats = of.assignment
            key = (of.dim, of.probs_GSE.shape, seats.expert_GSK.shape, seats.choice_GEC.shape)
            alike.setdefault(key, []).append((layer, of))
    return list(alike.values())


def _sums(classes: Sequence[RoutedClass], *, experts_choose: bool) -> Tensor:
    """The fields of every class, `PEF`."""
    probs_PGSE = torch.stack([of.probs_GSE for of in classes])
    expert_PGSK = torch.stack([of.assignment.expert_GSK for of in classes])
    kept_PGSK = torch.stack([of.assignment.kept_GSK for of in classes])
    wanted_PGSK = kept_PGSK if experts_choose else torch.ones_like(kept_PGSK)
    # The experts of a token differ, so no two of its choices meet: no atomic additions.
    nobody_PGSE = torch.zeros_like(probs_PGSE, dtype=torch.bool)
    wanted_PGSE = nobody_PGSE.scatter(3, expert_PGSK, wanted_PGSK)
    kept_PGSE = nobody_PGSE.scatter(3, expert_PGSK, kept_PGSK)
    times_PGS = kept_PGSK.sum(dim=3)
    groups, tokens, _ = classes[0].probs_GSE.shape
    capacity = classes[0].assignment.choice_GEC.shape[2]
    wanted_PE = _over_tokens(wanted_PGSE)
    of_class = [
        torch.full_like(wanted_PE, groups * tokens),
        _over_tokens(times_PGS == 0).unsqueeze(1).expand_as(wanted_PE),
        _over_tokens(times_PGS == 1).unsqueeze(1).expand_as(wanted_PE),
        torch.full_like(wanted_PE, groups * capacity) if capacity else wanted_PE,
    ]
    of_expert = [
        wanted_PE,
        _over_tokens(kept_PGSE),
        _over_tokens(probs_PGSE.where(wanted_PGSE, 0)),
        _over_tokens(probs_PGSE.where(kept_PGSE, 0)),
        _over_tokens(probs_PGSE),
        _over_tokens(_surprise(probs_PGSE)),
    ]
    return torch.stack(of_class + of_expert, dim=-1)


def _over_tokens(x: Tensor) -> Tensor:
    """Sum over groups and their tokens, `PGS...` -> `P...`; float64, so that counts stay whole."""
    return x.sum(dim=(1, 2), dtype=torch.float64)


def _surprise(probs: Tensor) -> Tensor:
    """-p log p, 0 where p is 0."""
    return -probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRow:
    """What the tokens of one width did at one expert of one layer.

    Attributes:
        layer: The block, counted from 0.
        expert: The expert, counted from 0.
        width: Features of the tokens.
        fill: Used slots over slots.
        drop_rate: Share of the choices of this expert that got no slot; 0 where there are none.
        gate_dropped: The same by routing probability.
        token_share: Share of the layer's used slots of this width that are this expert's.
        entropy: Of the router in nats, mean over tokens; of (layer, width) as the next three.
        by_none, by_one, by_more: Shares of tokens that 0, 1, and 2 or more experts take.
    """

    layer: int
    expert: int
    width: int
    fill: float
    drop_rate: float
    gate_dropped: float
    token_share: float
    entropy: float
    by_none: float
    by_one: float
    by_more: float


def load_rows(sums_LWEF: Tensor, layers: Sequence[int], dims: Sequence[int]) -> tuple[LoadRow, ...]:
    """The rates of every expert, by layer, width and expert; waits for the device.

    Args:
        sums_LWEF: Sums of `load_sums`, added up over whatever is to be looked at.
        layers: The blocks that have experts, `ExpertsConfig.layers(depth)`.
        dims: The widths, as for `load_sums`.

    Returns:
        One row per (layer, width, expert) of the widths that have tokens.
    """
    of = _by_field(sums_LWEF)
    all_used = of["used"].sum(dim=2, keepdim=True).expand_as(of["used"])
    entropy = of["entropy"].sum(dim=2, keepdim=True).expand_as(of["entropy"])
    rates = {
        "fill": _share(of["used"], of["slots"]),
        "drop_rate": _dropped(of["used"], of["wanted"]),
        "gate_dropped": _dropped(of["gate_kept"], of["gate_wanted"]),
        "token_share": _share(of["used"], all_used),
        "entropy": _share(entropy, of["tokens"]),
        "by_none": _share(of["unreached"], of["tokens"]),
        "by_one": _share(of["reached_once"], of["tokens"]),
        "by_more": _share(of["tokens"] - of["unreached"] - of["reached_once"], of["tokens"]),
    }
    return tuple(
        LoadRow(
            layer=layers[at],
            expert=expert,
            width=dims[width],
            **{name: rate[at, width, expert].item() for name, rate in rates.items()},
        )
        for at, width, expert in (of["tokens"] > 0).nonzero().tolist()
    )


def drop_rates(sums_LWEF: Tensor) -> Tensor:
    """Share of the choices of every layer that got no slot, all widths together, `L`."""
    of = _by_field(sums_LWEF)
    return _dropped(of["used"].sum(dim=(1, 2)), of["wanted"].sum(dim=(1, 2)))


def unreached_shares(sums_LWEF: Tensor) -> Tensor:
    """Share of the tokens of every layer that no expert takes, all widths together, `L`."""
    of = _by_field(sums_LWEF)
    return _share(of["unreached"].sum(dim=(1, 2)), of["tokens"].sum(dim=(1, 2)))


def dead_experts(sums_LWEF: Tensor) -> list[tuple[int, int]]:
    """Experts that hardly any token reaches: (layer counted among the sparse ones, expert)."""
    used_LE = _by_field(sums_LWEF)["used"].sum(dim=1)
    dead_LE = used_LE < DEAD * used_LE.mean(dim=1, keepdim=True)
    return [(layer, expert) for layer, expert in dead_LE.nonzero().tolist()]


def summary(sums_LWEF: Tensor) -> dict[str, float]:
    """A handful of numbers for a row of metrics; waits for the device.

    Args:
        sums_LWEF: Sums of `load_sums` over the steps and ranks of the row.

    Returns:
        Over all layers, widths and experts: `moe/drop_rate` and `moe/gate_dropped` (shares of
        choices and of their routing probability; 0 where experts choose), `moe/unreached` (share
        of tokens that no expert takes), `moe/fill_min` (used over slots of the emptiest expert at
        one width), `moe/entropy` (nats per token and layer), `moe/dead_experts` (how many).
    """
    of = _by_field(sums_LWEF)
    total = {name: each.sum() for name, each in of.items()}
    num_experts = sums_LWEF.shape[2]
    return {
        "moe/drop_rate": _dropped(total["used"], total["wanted"]).item(),
        "moe/gate_dropped": _dropped(total["gate_kept"], total["gate_wanted"]).item(),
        "moe/unreached": _share(total["unreached"], total["tokens"]).item(),
        "moe/fill_min": (of["used"] / of["slots"]).nan_to_num(nan=1.0).min().item(),
        "moe/entropy": num_experts * _share(total["entropy"], total["tokens"]).item(),
        "moe/dead_experts": float(len(dead_experts(sums_LWEF))),
    }


def _by_field(sums_LWEF: Tensor) -> dict[str, Tensor]:
    """The fields by name, on the host."""
    return dict(zip(FIELDS, sums_LWEF.cpu().unbind(-1), strict=True))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, 0 of nothing."""
    return (part / whole).where(whole != 0, 0.0)


def _dropped(kept: Tensor, wanted: Tensor) -> Tensor:
    """`1 - kept / wanted`, 0 where nothing was wanted."""
    return _share(wanted - kept, wanted)
