"""The configuration of a foreign model, read off the shapes of its tensors.

Axes: D model width.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from mone_core.block import Gelu
from mone_core.errors import WeightsError
from mone_core.models import DENSE, ExpertsConfig, ModelConfig, VideoConfig
from mone_core.warmstart.names import KINDS, Source, Spelling, Tensors

HEAD_DIM = 64  # of all published ViTs up to L; files of torch do not say it
PLACEMENTS: tuple[Literal["every", "last"], ...] = ("every", "last")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stated:
    """What is said beside the tensors, because they do not show it; None where nothing is.

    Attributes:
        heads: Attention heads, for files of torch; D / 64 if not stated. Flax kernels show them.
        frames: Frames of a clip, for Hugging Face's ViViT.
        gelu, norm_eps: Where a file departs from its family's.
        config: The whole configuration, for this package's own weights.
    """

    heads: int | None = None
    frames: int | None = None
    gelu: Gelu | None = None
    norm_eps: float | None = None
    config: ModelConfig | None = None


NOTHING_STATED = Stated()


def sizes_of(source: Source, tensors: Tensors, stated: Stated) -> ModelConfig:
    """The model that recognised tensors are of.

    Raises:
        WeightsError: A size cannot be read off.
        ConfigError: The sizes do not go together.
    """
    if source.spelling is not None:
        return _Sizes(source, source.spelling, tensors, stated).config()
    if stated.config is None:
        raise WeightsError(
            "weights of this package do not show all sizes of their model; state the config that "
            "was saved beside them"
        )
    return stated.config


class _Sizes:
    """Reads the sizes of a foreign model off its tensors."""

    def __init__(
        self, source: Source, spelling: Spelling, tensors: Tensors, stated: Stated
    ) -> None:
        self.source, self.spelling, self.tensors, self.stated = source, spelling, tensors, stated

    def config(self) -> ModelConfig:
        spelling, stated = self.spelling, self.stated
        dim, patch, tubelet = self._patches()
        cls = self._name(spelling.cls) in self.tensors
        return ModelConfig(
            image_size=self._grid(tubelet, cls=cls) * patch,
            patch_size=patch,
            num_classes=self._classes(),
            dim=dim,
            depth=self.source.depth,
            heads=self._heads(dim),
            mlp_dim=self._hidden(),
            pool="cls" if cls else "gap",
            pre_logits=self._name(spelling.weight(spelling.pre_logits)) in self.tensors,
            gelu=stated.gelu or spelling.gelu,
            norm_eps=stated.norm_eps or spelling.norm_eps,
            nesting=DENSE,
            experts=self._experts(),
            video=self._video(tubelet),
        )

    def _name(self, module: str) -> str:
        return self.source.prefix + module

    def _block(self, block: int, module: str) -> str:
        return self._name(self.spelling.weight(self.spelling.block.format(block) + module))

    def _shape(self, name: str, axes: str) -> tuple[int, ...]:
        """Shape of a parameter that must have these axes."""
        if name not in self.tensors:
            raise WeightsError(
                f"these weights ({KINDS[self.source.family]}) lack {name}, from which sizes are "
                f"read; take another copy of the file"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != len(axes.split(", ")):
            raise WeightsError(
                f"{name} is {list(shape)} but its axes must be: {axes}; take another copy of the "
                f"file"
            )
        return shape

    def _patches(self) -> tuple[int, int, int]:
        """Model width, pixels along a patch, frames of a tubelet."""
        name = self._name(self.spelling.weight(self.spelling.project))
        frames = 1
        if self.spelling.flax:
            rows, columns, colours, dim = self._shape(name, "rows, columns, colours, features")
        elif self.source.family == "hf_vivit":
            axes = "features, colours, frames, rows, columns"
            dim, colours, frames, rows, columns = self._shape(name, axes)
        else:
            dim, colours, rows, columns = self._shape(name, "features, colours, rows, columns")
        if rows != columns or colours != 3:
            raise WeightsError(
                f"{name} takes patches of {rows} x {columns} pixels in {colours} colours; this "
                f"package has square patches in 3"
            )
        return dim, rows, frames

    def _classes(self) -> int:
        name = self.spelling.weight(self.source.head())
        if name not in self.tensors:
            return 1
        return self._shape(name, "classes, features")[1 if self.spelling.flax else 0]

    def _video(self, tubelet: int) -> VideoConfig:
        if self.source.family != "hf_vivit":
            return VideoConfig()
        name = self.source.position(self.tensors)
        shape = self._shape(name, "1, positions, features")
        if self.stated.frames is None:
            raise WeightsError(
                f"{name} is {list(shape)}, which does not show how many frames a clip has; state "
                f"frames"
            )
        return VideoConfig(frames=self.stated.frames, tubelet=tubelet, attention="joint")

    def _grid(self, tubelet: int, *, cls: bool) -> int:
        """Patches along a side, from the rows of the position table."""
        name = self.source.position(self.tensors)
        rows, steps = self._shape(name, "1, positions, features")[1], self._video(tubelet).steps
        for patches in (rows - cls, rows):  # newer files have no row for the class token
            side = math.isqrt(max(0, patches // steps)) if steps else 0
            if patches and steps * side * side == patches:
                return side
        raise WeightsError(
            f"{name} has {rows} rows, which are not {_squares(steps)}, with or without a class "
            f"token, for which there is {'a' if cls else 'no'} {self._name(self.spelling.cls)}; "
            f"this package takes square images"
        )

    def _first(self, module: str, axes: str) -> tuple[int, ...]:
        """Shape of a module's weight in the first block that has it."""
        names = [self._block(block, module) for block in self._blocks()]
        return self._shape(next((name for name in names if name in self.tensors), names[0]), axes)

    def _heads(self, dim: int) -> int:
        if self.spelling.flax:
            found = self._first(self.spelling.qkv[0], "features, heads, features of a head")[1]
            return self.stated.heads or found
        if self.stated.heads is None and dim % HEAD_DIM:
            raise WeightsError(
                f"these weights do not show their attention heads, and width {dim} is no multiple "
                f"of the usual {HEAD_DIM}; state heads"
            )
        return self.stated.heads or dim // HEAD_DIM

    def _hidden(self) -> int:
        if len(self._sparse_blocks()) == self.source.depth:
            return self._first(f"{self.spelling.experts}/Dense_0", "experts, in, out")[2]
        return self._first(self.spelling.up, "in, out")[1 if self.spelling.flax else 0]

    def _sparse_blocks(self) -> tuple[int, ...]:
        if not self.spelling.experts:
            return ()
        begin = [f"{self._name(self.spelling.block.format(b))}Moe/" for b in self._blocks()]
        return tuple(b for b in self._blocks() if any(n.startswith(begin[b]) for n in self.tensors))

    def _blocks(self) -> range:
        return range(self.source.depth)

    def _experts(self) -> ExpertsConfig:
        """Which blocks have experts, and how many."""
        layers, depth = self._sparse_blocks(), self.source.depth
        if not layers:
            return ExpertsConfig()
        num_experts = self._first(self.spelling.router, "features, experts")[1]
        any_k = ExpertsConfig(num_experts=num_experts, k=min(2, num_experts))
        for spacing in range(1, depth + 1):
            for placement in PLACEMENTS:
                config = replace(any_k, placement=placement, spacing=spacing)
                if config.layers(depth) == layers:
                    return config
        raise WeightsError(
            f"blocks {layers} of {depth} have experts, which is neither every n-th nor the last "
            f"n odd ones; this package has those placements"
        )


def _squares(steps: int) -> str:
    return "a square of patches" if steps == 1 else f"{steps} squares of patches"
