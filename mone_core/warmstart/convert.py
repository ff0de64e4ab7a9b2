"""Foreign tensors -> this package's names and shapes, at the sizes that they have.

All that is wrong with a file is told at once. What each parameter is made of is in `rules`; fitting
the result to another model is in `fit`.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mone_core.errors import WeightsError
from mone_core.models import ModelConfig
from mone_core.warmstart.names import KINDS, Family, Tensors, source_of, unscanned
from mone_core.warmstart.problems import Problems
from mone_core.warmstart.rules import Rule, rules_of
from mone_core.warmstart.sizes import NOTHING_STATED, Stated, sizes_of

BFLOAT16 = np.dtype("V2")  # what numpy makes of JAX's bfloat16 in a file


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights in this package's names.

    Attributes:
        family: Where they come from.
        config: The model that they are of. Where the file has no head, `num_classes` is 1 and
            `state` has no `head.classify`.
        state: Tensors by name.
    """

    family: Family
    config: ModelConfig
    state: Mapping[str, Tensor]


def read_npz(path: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an `.npz` file. Nothing in it is run.

    Raises:
        WeightsError: It is not there, or is not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"cannot read weights from {path}: {str(error).splitlines()[0]}; it must be an .npz "
            f"file of plain arrays"
        ) from error


def config_of(tensors: Tensors, *, stated: Stated = NOTHING_STATED) -> ModelConfig:
    """The model that weights are of: a dense or V-MoE one, for images or for clips.

    Sizes are read off the shapes; GELU flavour and LN eps are the family's. How experts take
    tokens (K, C) is in no file: those are the defaults.

    Raises:
        WeightsError: The family is unknown, or a size cannot be read off.
        ConfigError: The sizes do not go together.
    """
    return sizes_of(source_of(tensors), unscanned(tensors), stated)


def convert(tensors: Tensors, *, stated: Stated = NOTHING_STATED) -> Weights:
    """Rename and reshape, losing nothing.

    Raises:
        WeightsError: As `config_of`; or the file is not whole: every missing, extra and
            misshaped parameter is listed.
        ConfigError: The sizes do not go together.
    """
    weights, problems = translate(tensors, stated)
    told = list(problems.told())
    if told:
        raise WeightsError(
            f"these weights ({KINDS[weights.family]}) are not whole: {'; '.join(told)}. "
            f"Take another copy of the file, or another model"
        )
    return weights


def translate(tensors: Tensors, stated: Stated) -> tuple[Weights, Problems]:
    """As `convert`, but what is wrong comes back, with zeros standing in for it."""
    source, tensors = source_of(tensors), unscanned(tensors)
    config = sizes_of(source, tensors, stated)
    problems, used = Problems(), set[str]()
    state = {}
    for rule in rules_of(source, tensors, config):
        used.update(rule.theirs)
        state[rule.ours] = _made(rule, tensors, problems)
    problems.extra = [name for name in tensors if name not in used]
    return Weights(family=source.family, config=config, state=state), problems


def _made(rule: Rule, tensors: Tensors, problems: Problems) -> Tensor:
    parts = []
    for name, shape in rule.theirs.items():
        array = tensors.get(name)
        part = torch.zeros(()).expand(shape)
        if array is None:
            problems.missing.append(name)
        elif tuple(array.shape) != shape:
            problems.shape(name, array.shape, shape)
        elif not _is_floating_point(array):
            problems.others.append(f"{name} holds {array.dtype}, not floating point numbers")
        else:
            part = _tensor(array)
        parts.append(part)
    return rule.make(*parts)


def _is_floating_point(array: Tensor | np.ndarray[Any, Any]) -> bool:
    if isinstance(array, Tensor):
        return array.is_floating_point()
    return bool(array.dtype.kind == "f" or array.dtype == BFLOAT16)


def _tensor(array: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
