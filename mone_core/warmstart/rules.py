"""How each parameter of ours is made from foreign ones.

Every parameter of ours is made by one `Rule` from one or more of theirs, whose names and shapes
the rule states; so a whole file is checked by walking the rules.

Kernels: torch stores `[out, in]` and `[out, in, rows, columns]`, Flax `[in, out]` and
`[rows, columns, in, out]`, attention kernels `[D, heads, D / heads]` and the reverse.

Axes: N positions, D model width, F hidden width, E experts.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mone_core.models import ModelConfig, build_model
from mone_core.warmstart.names import Source, Spelling, Tensors


class Rule(NamedTuple):
    """How one parameter of ours is made.

    Attributes:
        ours: Its name.
        theirs: What it is made of: names, and the shapes that they must have.
        make: From the tensors in that order.
    """

    ours: str
    theirs: dict[str, tuple[int, ...]]
    make: Callable[..., Tensor]


def rules_of(source: Source, tensors: Tensors, config: ModelConfig) -> Iterator[Rule]:
    """How each of our parameters is made from those of a source."""
    spelling = source.spelling
    if spelling is None:
        with torch.device("meta"):
            own = build_model(config).state_dict()
        yield from (Rule(name, {name: tuple(own[name].shape)}, _same) for name in own)
        return
    make = _FlaxRules(config) if spelling.flax else _TorchRules(config)
    prefix, dim = source.prefix, config.dim
    yield from make.project(prefix + spelling.project)
    if config.pool == "cls":
        yield Rule("embed.cls_D", {prefix + spelling.cls: (1, 1, dim)}, Tensor.flatten)
    yield _position_rule(source.position(tensors), tensors, config)
    for block in range(config.depth):
        theirs = prefix + spelling.block.format(block)
        ours = f"encoder.blocks.{block}"
        yield from make.norm(f"{ours}.attention_norm", theirs + spelling.attention_norm)
        yield from make.attention(f"{ours}.attention", theirs, spelling)
        yield from make.norm(f"{ours}.mlp_norm", theirs + spelling.mlp_norm)
        if block in config.experts.layers(config.depth):
            assert isinstance(make, _FlaxRules), "no family that torch stores has experts"
            yield from make.experts(f"{ours}.mlp", theirs, spelling)
        else:
            yield from make.linear(f"{ours}.mlp.up", theirs + spelling.up, dim, config.hidden)
            yield from make.linear(f"{ours}.mlp.down", theirs + spelling.down, config.hidden, dim)
    yield from make.norm("norm", prefix + spelling.norm)
    if config.pre_logits:
        yield from make.linear("head.pre_logits", prefix + spelling.pre_logits, dim, dim)
    if spelling.weight(source.head()) in tensors:
        yield from make.linear("head.classify", source.head(), dim, config.num_classes)


def _position_rule(name: str, tensors: Tensors, config: ModelConfig) -> Rule:
    rows = tensors[name].shape[1]
    missing = config.num_patches + (config.pool == "cls") - rows

    def with_row_of_class_token(table_1ND: Tensor) -> Tensor:
        table_ND = table_1ND.squeeze(0)
        return torch.cat([table_ND.new_zeros(missing, config.dim), table_ND])

    return Rule("embed.position_ND", {name: (1, rows, config.dim)}, with_row_of_class_token)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


class _TorchRules:
    """Rules for modules as torch stores them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def project(self, theirs: str) -> Iterator[Rule]:
        config = self.config
        frames = (config.video.tubelet,) if config.video.frames > 1 else ()
        shape = (config.dim, 3, *frames, config.patch_size, config.patch_size)
        yield Rule("embed.project.weight", {f"{theirs}.weight": shape}, _flat_patches)
        yield Rule("embed.project.bias", {f"{theirs}.bias": (config.dim,)}, _same)

    def norm(self, ours: str, theirs: str) -> Iterator[Rule]:
        for end in ("weight", "bias"):
            yield Rule(f"{ours}.{end}", {f"{theirs}.{end}": (self.config.dim,)}, _same)

    def linear(self, ours: str, theirs: str, fan_in: int, fan_out: int) -> Iterator[Rule]:
        yield Rule(f"{ours}.weight", {f"{theirs}.weight": (fan_out, fan_in)}, _same)
        yield Rule(f"{ours}.bias", {f"{theirs}.bias": (fan_out,)}, _same)

    def attention(self, ours: str, theirs: str, spelling: Spelling) -> Iterator[Rule]:
        dim, parts = self.config.dim, [theirs + part for part in spelling.qkv]
        rows = 3 * dim // len(parts)
        yield Rule(f"{ours}.qkv.weight", {f"{p}.weight": (rows, dim) for p in parts}, _stack)
        yield Rule(f"{ours}.qkv.bias", {f"{p}.bias": (rows,) for p in parts}, _stack)
        yield from self.linear(f"{ours}.out", theirs + spelling.out, dim, dim)


class _FlaxRules(_TorchRules):
    """Rules for modules as Flax stores them."""

    def project(self, theirs: str) -> Iterator[Rule]:
        dim, patch = self.config.dim, self.config.patch_size
        shape = (patch, patch, 3, dim)
        yield Rule("embed.project.weight", {f"{theirs}/kernel": shape}, _flat_flax_patches)
        yield Rule("embed.project.bias", {f"{theirs}/bias": (dim,)}, _same)

    def norm(self, ours: str, theirs: str) -> Iterator[Rule]:
        yield Rule(f"{ours}.weight", {f"{theirs}/scale": (self.config.dim,)}, _same)
        yield Rule(f"{ours}.bias", {f"{theirs}/bias": (self.config.dim,)}, _same)

    def linear(self, ours: str, theirs: str, fan_in: int, fan_out: int) -> Iterator[Rule]:
        yield Rule(f"{ours}.weight", {f"{theirs}/kernel": (fan_in, fan_out)}, Tensor.t)
        yield Rule(f"{ours}.bias", {f"{theirs}/bias": (fan_out,)}, _same)

    def attention(self, ours: str, theirs: str, spelling: Spelling) -> Iterator[Rule]:
        dim, heads = self.config.dim, self.config.heads
        parts, each = [theirs + part for part in spelling.qkv], (heads, dim // heads)
        yield Rule(f"{ours}.qkv.weight", {f"{p}/kernel": (dim, *each) for p in parts}, _flax_stack)
        yield Rule(f"{ours}.qkv.bias", {f"{p}/bias": each for p in parts}, _flax_bias_stack)
        out = theirs + spelling.out
        yield Rule(f"{ours}.out.weight", {f"{out}/kernel": (*each, dim)}, _flax_out)
        yield Rule(f"{ours}.out.bias", {f"{out}/bias": (dim,)}, _same)

    def experts(self, ours: str, theirs: str, spelling: Spelling) -> Iterator[Rule]:
        dim, hidden, count = self.config.dim, self.config.hidden, self.config.experts.num_experts
        router, mlp = f"{theirs}{spelling.router}/kernel", f"{theirs}{spelling.experts}/Dense_"
        yield Rule(f"{ours}.router.weight", {router: (dim, count)}, Tensor.t)
        up, down = f"{ours}.bank.up", f"{ours}.bank.down"
        yield Rule(f"{up}_weight_EFD", {f"{mlp}0/kernel": (count, dim, hidden)}, _transposed)
        yield Rule(f"{up}_bias_EF", {f"{mlp}0/bias": (count, hidden)}, _same)
        yield Rule(f"{down}_weight_EDF", {f"{mlp}1/kernel": (count, hidden, dim)}, _transposed)
        yield Rule(f"{down}_bias_ED", {f"{mlp}1/bias": (count, dim)}, _same)


def _flat_patches(kernel: Tensor) -> Tensor:
    return kernel.flatten(1)


def _flat_flax_patches(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1).flatten(1)


def _flax_stack(*kernels: Tensor) -> Tensor:
    return torch.cat([kernel.flatten(1).t() for kernel in kernels])


def _flax_bias_stack(*biases: Tensor) -> Tensor:
    return torch.cat([bias.flatten() for bias in biases])


def _flax_out(kernel: Tensor) -> Tensor:
    return kernel.flatten(0, 1).t()


def _transposed(kernel: Tensor) -> Tensor:
    return kernel.transpose(1, 2)
