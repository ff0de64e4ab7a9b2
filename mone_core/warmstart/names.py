"""What each family of weights calls the parameters of a ViT, and how a family is recognised.

Names only: what is inside the arrays is `convert`'s.

Sources: timm's `vision_transformer.py`; transformers' ViT and ViViT, whose files keep the names of
version 4 and whose modules have new ones since version 5; google-research/vision_transformer and
its AugReg files, whose names are older than Flax Linen's; google-research/big_vision (two places
for the position table, and blocks stacked by `scan`); google-research/vmoe.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mone_core.block import Gelu
from mone_core.errors import WeightsError

Tensors = Mapping[str, Tensor | np.ndarray[Any, Any]]
Family = Literal["timm", "hf_vit", "hf_vivit", "big_vision", "vmoe", "mone"]

KINDS: dict[Family, str] = {
    "timm": "timm ViT",
    "hf_vit": "Hugging Face ViT",
    "hf_vivit": "Hugging Face ViViT",
    "big_vision": "AugReg or big_vision ViT (.npz)",
    "vmoe": "V-MoE (flat .npz)",
    "mone": "this package's own",
}
SCANNED = "Transformer/encoderblock/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """Names of modules, without the `.weight` or `/kernel` at their end.

    Attributes:
        block: What the names of a block's modules begin with; `{}` is its number.
        qkv: One module for queries, keys and values, or three.
        position: Places where a position table may be; the first one there counts.
        head_outside: Whether the head's name lacks the prefix that all others may have.
    """

    family: Family
    flax: bool = False
    gelu: Gelu
    norm_eps: float
    project: str
    cls: str
    position: tuple[str, ...]
    block: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    mlp_norm: str
    up: str
    down: str
    norm: str
    pre_logits: str
    classify: str
    head_outside: bool = False
    experts: str = ""
    router: str = ""

    def weight(self, module: str) -> str:
        """Name of a linear module's weight."""
        return module + ("/kernel" if self.flax else ".weight")

    def attention_of_a_block(self) -> re.Pattern[str]:
        """Matches the name of one weight in every block; groups: prefix, number of the block."""
        block = re.escape(self.block).replace(r"\{\}", r"(?P<block>\d+)")
        return re.compile(rf"(?P<prefix>(?:.*[./])?){block}{re.escape(self.weight(self.qkv[0]))}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A recognised set of names.

    Attributes:
        family: Whose they are.
        prefix: What stands before all of them: `vit.`, `params/`, `module.` or nothing.
        depth: Number of blocks.
        spelling: The names in detail; None if they are this package's own.
    """

    family: Family
    prefix: str
    depth: int
    spelling: Spelling | None

    def head(self) -> str:
        """Name of a foreign head's module."""
        assert self.spelling is not None, "own names need no spelling"
        prefix = self.prefix
        if self.spelling.head_outside:  # `a.vit.` -> `a.`
            prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
        return prefix + self.spelling.classify

    def position(self, tensors: Tensors) -> str:
        """Name of a foreign position table."""
        assert self.spelling is not None, "own names need no spelling"
        names = [self.prefix + name for name in self.spelling.position]
        return next((name for name in names if name in tensors), names[0])


def _flax(family: Family, trunk: str, attention: str, second: str, mlp: str) -> Spelling:
    return Spelling(
        family=family,
        flax=True,
        gelu="tanh",
        norm_eps=1e-6,
        project="embedding",
        cls="cls",
        position=(
            f"{trunk}/posembed_input/pos_embedding",
            f"{trunk}/pos_embedding",
            "pos_embedding",
        ),
        block=f"{trunk}/encoderblock_{{}}/",
        attention_norm="LayerNorm_0",
        qkv=tuple(f"{attention}/{part}" for part in ("query", "key", "value")),
        out=f"{attention}/out",
        mlp_norm=second,
        up=f"{mlp}/Dense_0",
        down=f"{mlp}/Dense_1",
        norm=f"{trunk}/encoder_norm",
        pre_logits="pre_logits",
        classify="head",
        experts="Moe/Mlp",
        router="Moe/Router/dense",
    )


def _hugging_face(block: str, attention: tuple[str, ...], out: str, up: str, down: str) -> Spelling:
    return Spelling(
        family="hf_vit",
        gelu="erf",
        norm_eps=1e-12,
        project="embeddings.patch_embeddings.projection",
        cls="embeddings.cls_token",
        position=("embeddings.position_embeddings",),
        block=block,
        attention_norm="layernorm_before",
        qkv=attention,
        out=out,
        mlp_norm="layernorm_after",
        up=up,
        down=down,
        norm="layernorm",
        pre_logits="pooler.dense",
        classify="classifier",
        head_outside=True,
    )


SPELLINGS = (
    Spelling(
        family="timm",
        gelu="erf",
        norm_eps=1e-6,
        project="patch_embed.proj",
        cls="cls_token",
        position=("pos_embed",),
        block="blocks.{}.",
        attention_norm="norm1",
        qkv=("attn.qkv",),
        out="attn.proj",
        mlp_norm="norm2",
        up="mlp.fc1",
        down="mlp.fc2",
        norm="norm",
        pre_logits="pre_logits.fc",
        classify="head",
    ),
    _hugging_face(
        "encoder.layer.{}.",
        tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    _hugging_face(
        "layers.{}.",
        tuple(f"attention.{part}_proj" for part in "qkv"),
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
    _flax(
        "big_vision", "Transformer", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"
    ),
    _flax(
        "big_vision", "Transformer", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"
    ),
    _flax("vmoe", "Encoder", "SelfAttention", "LayerNorm_1", "Mlp"),
)
OWN = re.compile(r"encoder\.blocks\.(?P<block>\d+)\.attention\.qkv\.weight")


def source_of(tensors: Tensors) -> Source:
    """Recognise whose weights these are by their names.

    Images and clips of Hugging Face have the same names and differ in the axes of the patch
    kernel.

    Raises:
        WeightsError: The names are of no known family.
    """
    own = [match for name in tensors if (match := OWN.fullmatch(name))]
    if own:
        return Source(family="mone", prefix="", depth=_depth(own), spelling=None)
    names = list(unscanned(tensors))
    for spelling in SPELLINGS:
        pattern = spelling.attention_of_a_block()
        found = [match for name in names if (match := pattern.fullmatch(name))]
        if found:
            prefix = found[0]["prefix"]
            kernel = tensors.get(f"{prefix}{spelling.project}.weight")
            if spelling.family == "hf_vit" and kernel is not None and kernel.ndim == 5:
                spelling = replace(spelling, family="hf_vivit", gelu="tanh", norm_eps=1e-6)
            return Source(
                family=spelling.family, prefix=prefix, depth=_depth(found), spelling=spelling
            )
    raise WeightsError(
        f"these weights are of no known family; their names begin with "
        f"{', '.join(sorted(tensors)[:4]) or 'nothing at all'}. Known are: "
        f"{', '.join(f'{family} ({kind})' for family, kind in KINDS.items())}; take a file of one "
        f"of them, or rename its parameters"
    )


def unscanned(tensors: Tensors) -> Tensors:
    """Blocks that big_vision's `scan` stacked in one array per parameter, as one array each."""
    if not any(SCANNED in name for name in tensors):
        return tensors
    out: dict[str, Tensor | np.ndarray[Any, Any]] = {}
    for name, value in tensors.items():
        if SCANNED in name and value.ndim:
            for block in range(value.shape[0]):
                out[name.replace(SCANNED, f"{SCANNED[:-1]}_{block}/")] = value[block]
        else:
            out[name] = value
    return out


def _depth(found: list[re.Match[str]]) -> int:
    return 1 + max(int(match["block"]) for match in found)
