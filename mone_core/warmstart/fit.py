"""Weights of one model as the beginning of another that differs in what training can mend.

* Another image size: position tables are resized; the class token's row is kept.
* Images -> clips: central-frame kernels; positions repeated over time (joint attention), or
  temporal ones fresh (factorised).
* Dense -> nested: the same weights, a fresh router, alpha 0; at effective capacity 1 the outputs
  are the dense model's.
* Dense -> sparse: every expert is a copy of the MLP, the routers are fresh. A token's MLP output
  is then the dense one times the sum of its router weights that were used: all of it with k = E
  and room for every choice, otherwise less.

Source: sparse upcycling, arXiv 2212.05055; clips, arXiv 2103.15691, section 3.4.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from mone_core.errors import WeightsError
from mone_core.models import ModelConfig, ViT, build_model
from mone_core.warmstart.convert import Weights, translate
from mone_core.warmstart.names import KINDS, Tensors, source_of
from mone_core.warmstart.problems import Problems, in_few_words
from mone_core.warmstart.resize import Grid, central_frame, resize_positions
from mone_core.warmstart.sizes import NOTHING_STATED, Stated

Allowed = Literal["head", "pool", "gelu", "norm_eps"]

# What a model may have and its weights lack altogether: then it stays as it was initialised.
FRESH_GROUPS = (
    re.compile(r"encoder\.routers\..*"),
    re.compile(r"encoder\.router_norms\..*"),
    re.compile(r"encoder\.alphas\..*"),
    re.compile(r"encoder\.blocks\.\d+\.score\.weight"),
    re.compile(r"temporal_.*"),
)
CLASS_TOKENS = ("embed.cls_D", "temporal_cls_D")
EXPERTS = re.compile(r"(?P<mlp>.*\.mlp)\.bank\.(?P<part>up|down)_(?P<kind>weight|bias)_\w+")
SPARSE_ROUTER = re.compile(r"(?P<mlp>.*\.mlp)\.router\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What became of every parameter.

    Attributes:
        filled: Parameters of the model that hold what the weights say.
        fresh: Parameters of the model that hold what it was initialised with.
        dropped: Parameters of the weights that are used nowhere, by permission.
        notes: What was resized, copied or made up, a line each.
    """

    filled: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def load(
    model: ViT,
    weights: Weights | Tensors,
    *,
    stated: Stated = NOTHING_STATED,
    allow: Collection[Allowed] = (),
) -> Report:
    """Fill a model with weights, or leave it as it is and say all that is in the way.

    Args:
        model: Any of the family.
        weights: Converted ones, or tensors as a file has them.
        stated: What the tensors do not show. Heads, frames and, for this package's own weights, the
            config are taken to be the model's if not stated.
        allow: Differences that are meant: "head" (a fresh zero head where the weights' own does
            not fit), "pool" (class token against mean), "gelu", "norm_eps".

    Raises:
        WeightsError: The weights are of no known family, or parameters are missing, extra or
            misshaped, all of them listed; or a difference is not allowed.
    """
    _check_allowed(allow)
    problems = Problems()
    if not isinstance(weights, Weights):
        weights, problems = translate(weights, _as_the_model(stated, weights, model.config))
    return _Fit(weights, model, allow, noise=0.0).into_model(problems)


def upcycle(
    dense: ViT | Weights,
    config: ModelConfig,
    *,
    noise: float = 0.0,
    allow: Collection[Allowed] = (),
) -> ViT:
    """Build the model of a configuration from the weights of a dense one.

    Args:
        dense: A model, or converted weights.
        config: Of the new model: nested, sparse or both.
        noise: Standard deviation of Gaussian noise on the weights of experts, over the standard
            deviation of those weights; from torch's seed.
        allow: As in `load`.

    Raises:
        WeightsError: As `load`, or the noise is below 0.
    """
    _check_allowed(allow)
    if not noise >= 0:
        raise WeightsError(f"noise must be 0 or more, got {noise}")
    if isinstance(dense, ViT):
        dense = Weights(family="mone", config=dense.config, state=dense.state_dict())
    like = next(iter(dense.state.values()))
    model = build_model(config).to(like.device, like.dtype)
    _Fit(dense, model, allow, noise).into_model(Problems())
    return model


def _check_allowed(allow: Collection[Allowed]) -> None:
    unknown = sorted(set(allow) - set(get_args(Allowed)))
    if unknown:
        raise WeightsError(
            f"cannot allow {', '.join(map(repr, unknown))}; differences that can be allowed are "
            f"{get_args(Allowed)}"
        )


def _as_the_model(stated: Stated, tensors: Tensors, config: ModelConfig) -> Stated:
    """Sizes that tensors do not show are those of the model that they are meant for."""
    source = source_of(tensors)
    if source.family == "mone":
        return replace(stated, config=stated.config or config)
    if source.spelling is not None and not source.spelling.flax:
        bias = tensors.get(f"{source.prefix}{source.spelling.project}.bias")
        same_width = bias is not None and tuple(bias.shape) == (config.dim,)
        stated = replace(stated, heads=stated.heads or (config.heads if same_width else None))
    if source.family == "hf_vivit" and stated.frames is None:
        table = tensors.get(f"{source.prefix}embeddings.position_embeddings")
        joint = config.video.frames > 1 and config.video.attention == "joint"
        if joint and table is not None and config.num_patches + 1 in table.shape[1:2]:
            stated = replace(stated, frames=config.video.frames)
    return stated


class _Fit:
    """One set of weights on its way into one model."""

    def __init__(
        self, weights: Weights, model: ViT, allow: Collection[Allowed], noise: float
    ) -> None:
        self.weights, self.model, self.allow, self.noise = weights, model, allow, noise
        self.config, self.theirs = model.config, weights.config
        self.ours: dict[str, Tensor] = model.state_dict()
        self.values: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.fresh: list[str] = []
        self.dropped: list[str] = []
        self.notes: list[str] = []
        self.problems = Problems()

    def into_model(self, of_the_file: Problems) -> Report:
        """Fill the model, if nothing is wrong with the file or with this."""
        self._compare()
        new_head = self._needs_new_head()
        for name in self.ours:
            if new_head and name.startswith("head."):
                self._fill_head(name)
            else:
                self._fill(name, self._value(name))
        self._note_the_rest(new_head=new_head)
        found = {"in the file": of_the_file.told(), "for this model": self.problems.told()}
        told = [f"{where}, {text}" for where in found if (text := "; ".join(found[where]))]
        if told:
            raise WeightsError(
                f"these weights ({KINDS[self.weights.family]}) do not fit: {'; '.join(told)}. "
                f"Nothing was loaded; take the model that they are of, or allow a difference that "
                f"is meant ({', '.join(get_args(Allowed))})"
            )
        with torch.no_grad():
            for name, value in self.values.items():
                self.ours[name].copy_(value)
        return Report(
            filled=tuple(name for name in self.values if name not in self.fresh),
            fresh=tuple(self.fresh),
            dropped=tuple(self.dropped),
            notes=tuple(in_few_words(self.notes)),
        )

    def _compare(self) -> None:
        """Differences that no shape shows."""
        ours, theirs = self.config, self.theirs
        if ours.heads != theirs.heads:
            self.problems.others.append(
                f"attention has {ours.heads} heads, that of the weights {theirs.heads}"
            )
        for name in ("pool", "gelu", "norm_eps"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            if mine == other:
                continue
            if name not in self.allow:
                self.problems.others.append(f"{name} is {mine}, that of the weights {other}")
            else:
                self.notes.append(f"{name} is {mine}, that of the weights {other}")

    def _needs_new_head(self) -> bool:
        """Whether the weights' own head cannot be kept."""
        ours, theirs = self.config, self.theirs
        has_head = "head.classify.weight" in self.weights.state
        if has_head and (ours.num_classes, ours.pre_logits) == (
            theirs.num_classes,
            theirs.pre_logits,
        ):
            return False
        what = f"{theirs.num_classes} classes" if has_head else "no classes"
        text = (
            f"the head has {ours.num_classes} classes{_through(ours)}, that of the weights "
            f"{what}{_through(theirs)}"
        )
        (self.notes if "head" in self.allow else self.problems.others).append(text)
        return True

    def _fill_head(self, name: str) -> None:
        """A fresh zero head behind their own tanh layer, if both have one."""
        if name.startswith("head.pre_logits.") and name in self.weights.state:
            self._fill(name, self._take(name))
            return
        self.fresh.append(name)
        if name == "head.classify.weight":
            self.values[name] = torch.zeros_like(self.ours[name])
        elif name == "head.classify.bias":
            self.values[name] = torch.full_like(self.ours[name], self.config.head_bias)

    def _fill(self, name: str, value: Tensor | None) -> None:
        must = self.ours[name].shape
        if value is None and self._may_stay_fresh(name):
            self.fresh.append(name)
        elif value is None:
            self.problems.missing.append(name)
        elif value.shape != must:
            self.problems.shape(name, value.shape, must)
        else:
            self.values[name] = value

    def _may_stay_fresh(self, name: str) -> bool:
        if name in CLASS_TOKENS and self.theirs.pool != self.config.pool:
            return True  # allowed, or already a problem
        if router := SPARSE_ROUTER.fullmatch(name):
            return f"{router['mlp']}.up.weight" in self.weights.state
        return any(
            group.fullmatch(name) and not any(map(group.fullmatch, self.weights.state))
            for group in FRESH_GROUPS
        )

    def _take(self, name: str) -> Tensor | None:
        """Their tensor of a name, which is thereby used."""
        value = self.weights.state.get(name)
        if value is not None:
            self.used.add(name)
        return value

    def _value(self, name: str) -> Tensor | None:
        """What a parameter of ours becomes; None if the weights have nothing for it."""
        if name == "embed.project.weight":
            return self._kernels(name)
        if name == "embed.position_ND":
            return self._positions(name, _grid(self.theirs), _grid(self.config))
        if name == "temporal_position_TD":
            old, new = (config.video.steps for config in (self.theirs, self.config))
            return self._positions(name, (old, 1, 1), (new, 1, 1))
        if expert := EXPERTS.fullmatch(name):
            return self._experts(name, expert)
        return self._take(name)

    def _kernels(self, name: str) -> Tensor | None:
        weight, tubelet = self._take(name), self.config.video.tubelet
        if weight is None or self.theirs.video.tubelet > 1 or tubelet == 1:
            return weight
        self.notes.append(f"{name}: central frame of {tubelet}")
        return central_frame(weight, tubelet)

    def _positions(self, name: str, old: Grid, new: Grid) -> Tensor | None:
        table_ND = self._take(name)
        if table_ND is None:
            return None
        if old[0] > 1 and new[0] == 1 and name == "embed.position_ND":
            self.problems.misshaped.append(
                f"{name} is of joint attention over {old[0]} steps but must be of one step"
            )
            return self.ours[name]
        cls = int(self.theirs.pool == "cls")
        out_ND = resize_positions(table_ND[cls:], old, new)
        if old != new:
            self.notes.append(f"{name}: resized from {_by(old)} to {_by(new)}")
        if self.config.pool != "cls":
            return out_ND
        if not cls:
            self.notes.append(f"{name}: the class token's row stays as it was")
        row_1D = table_ND[:1] if cls else self.ours[name][:1].to(out_ND)
        return torch.cat([row_1D, out_ND]) if row_1D.shape[1] == out_ND.shape[1] else out_ND

    def _experts(self, name: str, expert: re.Match[str]) -> Tensor | None:
        """Their experts, or as many copies of their MLP."""
        own = self._take(name)
        one = self._take(f"{expert['mlp']}.{expert['part']}.{expert['kind']}")
        if own is not None or one is None:
            return own
        count = self.config.experts.num_experts
        copies = one.expand(count, *one.shape)
        self.notes.append(f"{name}: {count} copies of the MLP's")
        if self.noise and expert["kind"] == "weight":
            noise = torch.randn(copies.shape, dtype=one.dtype, device=one.device)
            copies = copies + self.noise * one.std() * noise
        return copies

    def _note_the_rest(self, *, new_head: bool) -> None:
        """Parameters of theirs that nothing of ours was made of."""
        for name in self.weights.state:
            if name in self.used:
                continue
            no_cls = name in CLASS_TOKENS and self.config.pool != "cls"
            if no_cls or (new_head and name.startswith("head.")):
                self.dropped.append(name)
            else:
                self.problems.extra.append(name)


def _grid(config: ModelConfig) -> Grid:
    """Positions of one encoder input: temporal steps, rows, columns."""
    return config.num_patches // config.grid**2, config.grid, config.grid


def _by(grid: Grid) -> str:
    return " x ".join(str(size) for size in grid if size > 1 or grid == (1, 1, 1)) or "1"


def _through(config: ModelConfig) -> str:
    return " behind a tanh layer" if config.pre_logits else ""
