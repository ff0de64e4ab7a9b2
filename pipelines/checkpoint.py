"""Checkpoints: folders that are whole or do not count.

`step_<n>/` holds safetensors files written by torch's distributed checkpoint (every
rank writes its share; any number of ranks reads them), `config.json`, `position.json` and, last of
all, `COMMITTED` with the size and hash of every other file. A folder without that marker is
what a killed run left behind, and nobody reads it. No pickle is written or read.
"""

import dataclasses
import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import AdamW

from cluster.backends import Backend
from mone_core.models import ViT
from mone_core.parallel import expert_parameters
from pipelines.config import CONFIG, RunConfig, differences, read_config, write_config
from pipelines.data.order import Position
from pipelines.errors import RunError
from pipelines.files import read_json, write_json

CHECKPOINTS = "checkpoints"
COMMITTED = "COMMITTED"
POSITION = "position.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step_\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of a checkpoint as it was when the checkpoint was committed."""

    bytes: int
    sha256: str


class Checkpoints:
    """The checkpoints of one run, seen from one of its training processes.

    Args:
        run: The run's folder, shared by all ranks.
        config: Saved with every checkpoint.
        backend: For the moments when ranks must wait for each other.
    """

    def __init__(self, run: Path, config: RunConfig, backend: Backend) -> None:
        self._folder = run / CHECKPOINTS
        self._config = config
        self._backend = backend

    def save(self, step: int, model: nn.Module, optimizer: AdamW, position: Position) -> None:
        """Write `step_<step>/`, then keep the newest `train.keep_checkpoints` and no others."""
        folder = self._folder / f"step_{step}"
        if self._backend.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # left unfinished by a killed run
            folder.mkdir(parents=True)
        self._backend.barrier("beginning a checkpoint")
        with _quiet_without_process_group():
            dcp_save(
                self._whole(_tensors(model, optimizer), model),
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                no_dist=not dist.is_initialized(),
            )
        if self._backend.rank == 0:
            write_config(folder, self._config)
            write_json(folder / POSITION, position)
            write_json(folder / COMMITTED, _records(folder))
            self._drop_old()
        self._backend.barrier("finishing a checkpoint")

    def restore_newest(self, model: nn.Module, optimizer: AdamW) -> tuple[int, Position] | None:
        """Load the newest whole checkpoint; None when there is none.

        Returns:
            Optimizer steps done, and where the data goes on.
        """
        folder = self._folder / f"step_{self._agreed_step()}"
        if not folder.is_dir():
            return None
        step = step_of(folder)
        tensors = _room(model)
        # Loads in place: of the tensor of all experts the part that is this rank's.
        _load(self._whole(tensors, model), folder)
        _put_moments(tensors, model, optimizer, step)
        return step, read_json(folder / POSITION, Position, otherwise=RunError)

    def _whole(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The same, this rank's experts as a part of one `[E, ...]` tensor of all experts."""
        experts = set(expert_parameters(model))
        return {
            name: self._backend.stacked(tensor) if _parameter(name) in experts else tensor
            for name, tensor in tensors.items()
        }

    def _agreed_step(self) -> int:
        """Rank 0 looks and the others take its word: a shared disk may show them other files."""
        found = newest_checkpoint(self._folder.parent) if self._backend.rank == 0 else None
        step = step_of(found) if found else -1
        self._backend.barrier("looking for a checkpoint")  # whose files rank 0 has read through
        mine = torch.tensor(step if self._backend.rank == 0 else 0, device=self._backend.device)
        return int(self._backend.sum_over_ranks(mine, "agreeing on a checkpoint"))

    def _drop_old(self) -> None:
        run = self._folder.parent
        kept = committed(run)[: self._config.train.keep_checkpoints]
        for folder in _folders(run):
            if folder not in kept:  # too old, or left unfinished by a killed run
                (folder / COMMITTED).unlink(missing_ok=True)  # first: half a folder never counts
                shutil.rmtree(folder)


def committed(run: Path) -> list[Path]:
    """A run's checkpoints that were written to the end, newest first."""
    return [folder for folder in _folders(run) if (folder / COMMITTED).is_file()]


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files are what its marker says; damaged ones are passed over."""
    for folder in committed(run):
        wrong = damage(folder)
        if not wrong:
            return folder
        warnings.warn(f"passing over {folder}: {wrong}", stacklevel=2)
    return None


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, in words; empty when nothing is."""
    try:
        records = read_json(checkpoint / COMMITTED, dict[str, FileRecord], otherwise=RunError)
    except RunError as error:
        return str(error)
    for name, record in records.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _record(checkpoint / name) != record:
            return f"{name} was changed after it was written"
    return ""


def _folders(run: Path) -> list[Path]:
    """Every checkpoint folder, finished or not, newest first; other names are not ours."""
    found = (run / CHECKPOINTS).glob("step_*")
    return sorted((f for f in found if _NAME.fullmatch(f.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoint_of(run: Path) -> Path:
    """The newest whole checkpoint of a run, or the checkpoint itself if `run` is one.

    Raises:
        RunError: Neither; says what was looked for.
    """
    if (run / COMMITTED).is_file():
        if wrong := damage(run):
            raise RunError(f"checkpoint {run} is damaged: {wrong}; name another one of its run")
        return run
    read_config(run)
    found = newest_checkpoint(run)
    if found is None:
        raise RunError(
            f"{run} has no finished checkpoint yet; run `mone train` on it to the first one"
        )
    return found


def load_weights(checkpoint: Path, model: ViT) -> None:
    """Load a checkpoint's weights into a model of the same configuration.

    Raises:
        RunError: The checkpoint is of another model; names the fields that differ.
    """
    config = read_config(checkpoint)
    if config.model != model.config:
        odd = differences(config, dataclasses.replace(config, model=model.config))
        raise RunError(
            f"checkpoint {checkpoint} is of another model: {', '.join(odd)}; build the model "
            f"from the {CONFIG} beside the weights"
        )
    tensors = {name: torch.empty_like(value) for name, value in _weights(model).items()}
    _load(tensors, checkpoint)
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})


def _parameter(name: str) -> str:
    """The parameter that a tensor of a checkpoint is, or is a moment of."""
    kind, _, rest = name.partition(".")
    return rest if kind == "model" else rest.rpartition(".")[0]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value.detach() for name, value in model.state_dict().items()}


def _tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by name. Adam's own step count is the run's."""
    moments = {
        f"optimizer.{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
    }
    return _weights(model) | moments


def _room(model: nn.Module) -> dict[str, Tensor]:
    """Empty tensors of the names and shapes that `_tensors` gives, also before a first step."""
    moments = {
        f"optimizer.{name}.{moment}": torch.empty_like(parameter)
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
    }
    return {name: torch.empty_like(value) for name, value in _weights(model).items()} | moments


def _put_moments(tensors: dict[str, Tensor], model: nn.Module, optimizer: AdamW, step: int) -> None:
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    for name, parameter in model.named_parameters():
        moments = {moment: tensors[f"optimizer.{name}.{moment}"] for moment in _MOMENTS}
        # Where fused updates want it; the others read it on the host.
        where = parameter.device if optimizer.defaults["fused"] else "cpu"
        count = torch.tensor(float(step), device=where)
        optimizer.state[parameter] = {"step": count, **moments}


def _load(tensors: dict[str, Tensor], folder: Path) -> None:
    with _quiet_without_process_group():
        dcp_load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not dist.is_initialized(),
        )


def _records(folder: Path) -> dict[str, FileRecord]:
    return {path.name: _record(path) for path in sorted(folder.iterdir())}


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


@contextmanager
def _quiet_without_process_group() -> Iterator[None]:
    """One process alone is what was asked for; torch warns of it all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
