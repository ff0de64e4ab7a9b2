"""Weights that leave a run, and weights that one begins with.

What leaves is a safetensors file beside the model's configuration: what a registry keeps and a
retraining starts from. Optimizer state stays in checkpoints. What a run begins with may also
be a file of somebody else's model (`mone_core.warmstart`).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mone_core.errors import WeightsError
from mone_core.models import ModelConfig, ViT, build_model
from mone_core.warmstart import Allowed, Report, Weights, load, read_npz
from pipelines.errors import RunError
from pipelines.files import read_json, write_json

WEIGHTS = "weights.safetensors"
MODEL_CONFIG = "model.json"


def save_weights(folder: Path, model: ViT, *, step: int) -> None:
    """Write a model's weights and configuration into a folder.

    Args:
        folder: Made if it is not there.
        model: What to write.
        step: Training steps behind these weights, kept with them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"step": str(step)})
    write_json(folder / MODEL_CONFIG, model.config)


def load_weights(folder: Path) -> ViT:
    """Make the model that `save_weights` wrote.

    Raises:
        RunError: The folder holds no such model, or weights and configuration disagree.
    """
    config = read_json(folder / MODEL_CONFIG, ModelConfig, otherwise=RunError)
    model = build_model(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"{folder / WEIGHTS} does not fit {MODEL_CONFIG} beside it: {reason}; export it again"
        ) from error
    return model


def start_from(model: ViT, path: Path, allow: Collection[Allowed] = ()) -> Report:
    """Fill a fresh model with weights that were trained elsewhere, or as another model.

    Args:
        model: Changed only if all fits.
        path: A folder that `save_weights` wrote, or a `.safetensors` or `.npz` file.
        allow: Differences that are meant, see `mone_core.warmstart.load`.

    Raises:
        RunError: There is no such file, or the weights do not fit; all that is wrong is named.
    """
    weights = _own_weights(path) if path.is_dir() else _read_file(path)
    try:
        return load(model, weights, allow=allow)
    except WeightsError as error:
        raise RunError(
            f"train.start_from {path}: {error}; set model.* as there, or allow what is meant with "
            f"train.start_allow"
        ) from error


def _own_weights(folder: Path) -> Weights:
    config = read_json(folder / MODEL_CONFIG, ModelConfig, otherwise=RunError)
    return Weights(family="mone", config=config, state=_read_safetensors(folder / WEIGHTS))


def _read_file(path: Path) -> Mapping[str, Tensor] | Mapping[str, np.ndarray]:
    if not path.exists():
        raise RunError(
            f"train.start_from {path} does not exist; give a folder with {WEIGHTS} and "
            f"{MODEL_CONFIG}, as the model registry keeps them, or a .safetensors or .npz file"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix != ".npz":
        raise RunError(
            f"train.start_from {path} is neither a folder of exported weights nor a .safetensors "
            f"or .npz file; convert it to safetensors first (pickled checkpoints are not read)"
        )
    try:
        return read_npz(path)
    except (OSError, ValueError, BadZipFile) as error:
        raise RunError(f"{path} cannot be read as .npz: {error}; fetch it again") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read as safetensors: {error}; fetch it again") from error
    return tensors


def step_of_weights(folder: Path) -> int:
    """Training steps behind the weights in a folder."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return int(file.metadata()["step"])
