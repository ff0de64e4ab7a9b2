"""Weights that leave a run: a safetensors file beside the model's configuration.

What a registry keeps and a retraining starts from. Optimizer state stays in checkpoints.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mone_core.models import ModelConfig, ViT, build_model
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


def step_of_weights(folder: Path) -> int:
    """Training steps behind the weights in a folder."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return int(file.metadata()["step"])
