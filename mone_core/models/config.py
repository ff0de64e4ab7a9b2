"""What a model is, as data: sizes, nesting, experts, and the choices where the papers are silent.

One tree describes every model of the family. A dense ViT is a nested one with a single width;
V-MoE is a dense one with experts; a clip model is an image model with frames; and so on.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from mone_core import allocation
from mone_core.allocation import Allocation
from mone_core.block import Gelu
from mone_core.capacity import NESTED_WIDTHS, Form, capacity_distribution, token_counts
from mone_core.errors import CapacityError, ConfigError
from mone_core.experts import ExpertsConfig

Positions = Literal["normal", "sincos"]
Pool = Literal["gap", "cls"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NestingConfig:
    """Nested widths of one model, and how tokens come to theirs.

    Attributes:
        widths: Width of each nested expert over D, rising to 1; `(1.0,)` is a dense model.
        effective_capacity: Compute budget that a fresh model starts with, e_c.
        allocation: How a budget becomes shares of tokens: "entropy" is the paper's, see
            `mone_core.capacity`; the others are baselines, see `mone_core.allocation`.
        form, delta, beta: Parameters of the allocation "entropy".
        assignment: Who picks a token's width: the "learned" router, "random" numbers (a control),
            or nobody: "constant" computes every token at one width (MatViT).
        slices: What a width cuts: features of the "model" in attention and MLP (MoNE), or only
            the "hidden" layer of the MLP (MatFormer; constant assignment only).
        router_layers: Blocks before which a router (re)assigns tokens, from 0, rising. Blocks
            before the first are full width.
        router_input: Whether routers see raw "tokens" or "normed" ones.
        alpha: One alpha (eq. 1) per "layer", or one for the "model".
    """

    widths: tuple[float, ...] = NESTED_WIDTHS
    effective_capacity: float = 0.5
    allocation: Allocation = "entropy"
    form: Form = "fraction"
    delta: float = 2.0
    beta: float = 10.0
    assignment: Literal["learned", "random", "constant"] = "learned"
    slices: Literal["model", "hidden"] = "model"
    router_layers: tuple[int, ...] = (0,)
    router_input: Literal["tokens", "normed"] = "tokens"
    alpha: Literal["layer", "model"] = "layer"

    @property
    def routed(self) -> bool:
        """Whether tokens of one image may differ in width."""
        return len(self.widths) > 1 and self.assignment != "constant"

    @property
    def learned(self) -> bool:
        """Whether there is a router to train."""
        return self.routed and self.assignment == "learned"

    @property
    def skips(self) -> bool:
        """Whether tokens of the narrowest expert skip all blocks instead of being narrow."""
        return self.routed and self.allocation == "mod_greedy"

    def capacity(self, effective_capacity: float) -> tuple[float, ...]:
        """The capacity distribution of a budget: a share per width, narrowest first.

        Raises:
            CapacityError: The budget is out of reach.
        """
        if self.assignment == "constant":
            return allocation.constant(effective_capacity, self.widths)
        if self.allocation != "entropy":
            simple = {
                "greedy": allocation.greedy,
                "uniform": allocation.uniform,
                "proportionate": allocation.proportionate,
                "mod_greedy": allocation.mod_greedy,
            }
            return simple[self.allocation](effective_capacity, self.widths)
        return capacity_distribution(
            effective_capacity, self.widths, delta=self.delta, beta=self.beta, form=self.form
        )

    def counts(self, effective_capacity: float, num_patches: int) -> tuple[int, ...]:
        """Whole tokens per width of an input of so many patches, narrowest first.

        Raises:
            CapacityError: The budget is out of reach, or leaves no token to compute.
        """
        counts = token_counts(self.capacity(effective_capacity), num_patches)
        if self.skips and not counts[-1]:
            raise CapacityError(
                f"effective capacity {effective_capacity} leaves none of {num_patches} tokens to "
                f"compute with allocation mod_greedy; it must be at least 1 / {num_patches}"
            )
        return counts

    def reachable(self, budgets: Sequence[float]) -> tuple[float, ...]:
        """Those of some budgets that can be met; the model's own one if none can."""
        return tuple(filter(self._meets, budgets)) or (self.effective_capacity,)

    def _meets(self, budget: float) -> bool:
        try:
            self.capacity(budget)
        except CapacityError:
            return False
        return True


_LEAST = {"skipping.every": 0}  # all other whole numbers are 1 or more

DENSE = NestingConfig(widths=(1.0,), effective_capacity=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippingConfig:
    """Mixture-of-Depths, a baseline: some blocks compute only a share of the tokens.

    Attributes:
        every: Every n-th block skips tokens (2: blocks 1, 3, ...); 0: none does.
        capacity: Share of an image's tokens that such a block computes.
    """

    every: int = 0
    capacity: float = 0.125

    def tokens(self, num_tokens: int) -> int:
        """Tokens of an image that such a block computes."""
        return token_counts((1 - self.capacity, self.capacity), num_tokens)[1]

    def layers(self, depth: int) -> tuple[int, ...]:
        """Blocks that skip tokens, counted from 0."""
        return tuple(range(self.every - 1, depth, self.every)) if self.every else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Clips instead of images (ViViT).

    Attributes:
        frames: Frames of a clip; 1: the model takes images.
        tubelet: Frames of one tubelet; divides `frames`.
        attention: "factorised": a spatial encoder per tubelet frame, then a dense temporal one;
            or "joint" attention over space and time.
        temporal_depth: Blocks of the temporal encoder.
    """

    frames: int = 1
    tubelet: int = 1
    attention: Literal["factorised", "joint"] = "factorised"
    temporal_depth: int = 4

    @property
    def steps(self) -> int:
        """Temporal positions of a clip."""
        return self.frames // self.tubelet


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A vision transformer of the family: dense, nested, sparse, nested sparse; images or clips.

    Attributes:
        image_size: Pixels along each side of an input image.
        patch_size: Pixels along each side of a patch; divides `image_size`.
        num_classes: Outputs of the head.
        dim: Model width D.
        depth: Number of blocks (of the spatial encoder, where there are two).
        heads: Attention heads; divides `dim`.
        mlp_dim: Hidden width F of the MLPs; None is 4 D.
        pool: What the head reads: the mean of all tokens, or a class token, which is full width
            whatever the budget (at a constant width, as wide as all others).
        pre_logits: A tanh layer of width D before the head.
        head_bias: What the head's bias starts from.
        gelu: "tanh" as the JAX families, "erf" as timm and Hugging Face.
        norm_eps: Epsilon of every layer norm.
        positions: What the learned position table starts from: "normal" noise of 0.02, or
            "sincos", 2-D sines and cosines, which learn faster where training is short.
        nesting, experts, skipping, video: What makes it more than a dense image model.
    """

    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 1000
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_dim: int | None = None
    pool: Pool = "gap"
    pre_logits: bool = False
    head_bias: float = 0.0
    gelu: Gelu = "tanh"
    norm_eps: float = 1e-6
    positions: Positions = "normal"
    nesting: NestingConfig = field(default_factory=NestingConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    skipping: SkippingConfig = field(default_factory=SkippingConfig)
    video: VideoConfig = field(default_factory=VideoConfig)

    def __post_init__(self) -> None:
        problems = [*_wrong_numbers(self), *_unknown_choices(self)]
        if not problems:
            problems = [
                *self._size_problems(),
                *self._nesting_problems(),
                *self._expert_problems(),
                *self._skipping_problems(),
                *self._video_problems(),
            ]
        if problems:
            raise ConfigError("model", problems)

    @property
    def family(self) -> str:
        """What such a model is called: "MoNE ViT", "V-MoE", "nested V-MoE", "ViViT" and so on."""
        nesting = self.nesting
        body = "V-MoE" if self.experts.placement != "none" else "ViT"
        if self.video.frames > 1:
            body = body.replace("ViT", "ViViT") + ("" if body == "ViT" else " on clips")
        if self.skipping.every:
            return f"Mixture-of-Depths {body}"
        if len(nesting.widths) == 1:
            return body
        if nesting.assignment == "constant":
            return {"model": "MatViT", "hidden": "MatFormer"}[nesting.slices] + f" ({body})"
        usual = {"learned", "entropy"}
        odd = [word for word in (nesting.assignment, nesting.allocation) if word not in usual]
        note = f" ({', '.join(odd)})" if odd else ""
        return (f"nested {body}" if "MoE" in body else f"MoNE {body}") + note

    @property
    def hidden(self) -> int:
        """Hidden width F of the MLPs."""
        return 4 * self.dim if self.mlp_dim is None else self.mlp_dim

    @property
    def dims(self) -> tuple[int, ...]:
        """Features of each nested expert, narrowest first."""
        return tuple(round(width * self.dim) for width in self.nesting.widths)

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of what one encoder pass sees: an image, a frame, or (joint) a whole clip."""
        joint = self.video.steps if self.video.attention == "joint" else 1
        return joint * self.grid * self.grid

    def _size_problems(self) -> Iterator[str]:
        if self.image_size % self.patch_size:
            yield f"patch_size must divide image_size, got {self.patch_size} and {self.image_size}"
        if self.dim % self.heads:
            yield f"heads must divide dim, got {self.heads} and {self.dim}"
        if self.positions == "sincos" and (self.dim % 4 or self.dim < 8):
            yield f"positions sincos need a dim of 8 or more by fours, got {self.dim}"
        if not self.norm_eps > 0:
            yield f"norm_eps must be above 0, got {self.norm_eps}"

    def _nesting_problems(self) -> Iterator[str]:
        nesting = self.nesting
        try:
            nesting.counts(nesting.effective_capacity, self.num_patches)
        except CapacityError as error:
            yield str(error)
        if self.dims and self.dims[0] < 1:
            yield (
                f"the narrowest width must be a feature or more, got {nesting.widths[0]} of dim "
                f"{self.dim}"
            )
        cut = self.dim if nesting.slices == "model" else self.hidden
        split = [w for w in nesting.widths if abs(w * cut - round(w * cut)) > 1e-6]
        if split:
            yield (
                f"every width must be a whole number of features: widths {split} of "
                f"{'dim' if nesting.slices == 'model' else 'mlp_dim'} {cut} are not"
            )
        layers = nesting.router_layers
        rising = list(layers) == sorted(set(layers))
        if not layers or not rising or layers[0] < 0 or layers[-1] >= self.depth:
            yield (
                f"nesting.router_layers must rise within 0 to {self.depth - 1} (depth "
                f"{self.depth}), got {layers}"
            )
        if nesting.slices == "hidden" and nesting.assignment != "constant":
            yield (
                "nesting.slices hidden cuts all tokens alike: it needs nesting.assignment "
                f"constant, got {nesting.assignment}"
            )

    def _expert_problems(self) -> Iterator[str]:
        num_tokens = self.num_patches + (self.pool == "cls")
        yield from self.experts.problems(self.depth, num_tokens)
        if self.experts.placement != "none" and self.nesting.slices == "hidden":
            yield "nesting.slices hidden has no experts; set experts.placement to none"

    def _skipping_problems(self) -> Iterator[str]:
        skipping = self.skipping
        if not skipping.every:
            return
        if skipping.every > self.depth:
            yield (
                f"skipping.every must be at most the depth of {self.depth} (0: no block skips), "
                f"got {skipping.every}"
            )
        if not 0 < skipping.capacity <= 1:
            yield f"skipping.capacity must lie in (0, 1], got {skipping.capacity}"
        elif skipping.tokens(self.num_patches) < 1:
            yield (
                f"skipping.capacity {skipping.capacity} leaves no token of {self.num_patches}; "
                f"it must be at least 1 / {self.num_patches}"
            )
        if len(self.nesting.widths) > 1 or self.experts.placement != "none" or self.pool != "gap":
            yield (
                "skipping is a baseline of its own: it needs nesting.widths (1.0,), "
                "experts.placement none and pool gap"
            )

    def _video_problems(self) -> Iterator[str]:
        video = self.video
        if video.frames % video.tubelet:
            yield (
                f"video.tubelet must divide video.frames, got {video.tubelet} and {video.frames}"
            )


def _wrong_numbers(config: Any, prefix: str = "") -> Iterator[str]:
    """Whole numbers below 1 or not whole, and numbers that are none, in the whole tree."""
    for each in fields(config):
        value, name = getattr(config, each.name), prefix + each.name
        if is_dataclass(value):
            yield from _wrong_numbers(value, f"{name}.")
        elif each.type in (int, int | None) and value is not None:
            least = _LEAST.get(name, 1)
            if type(value) is not int:
                yield f"{name} must be a whole number, got {value!r}"
            elif value < least:
                yield f"{name} must be {least} or more, got {value}"
        elif get_origin(each.type) is tuple and not isinstance(value, tuple):
            yield f"{name} must be a tuple, got {value!r}"
        elif each.type is float or get_origin(each.type) is tuple:
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
                yield f"{name} must be finite, got {value!r}"


def _unknown_choices(config: Any, prefix: str = "") -> Iterator[str]:
    """Words that are none of a field's choices, in the whole tree."""
    for each in fields(config):
        value, name = getattr(config, each.name), prefix + each.name
        if is_dataclass(value):
            yield from _unknown_choices(value, f"{name}.")
        elif get_origin(each.type) is Literal and value not in get_args(each.type):
            yield f"{name} {value!r} does not exist; it must be one of {get_args(each.type)}"
