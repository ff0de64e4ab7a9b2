"""One run, as one frozen tree of values: `RunConfig`.

Each part is checked when it is made, so a wrong value never gets past the laptop. Values come
from a recipe, then a YAML file, then flags (`cli`); what they resolve to is
printed by `--print-config`, saved with the run, and reads back to the same tree.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mone_core.errors import CapacityError, ConfigError
from mone_core.gemm import GemmName
from mone_core.models import ModelConfig
from mone_core.warmstart import Allowed
from pipelines.data.settings import (
    AugmentConfig,
    ClipConfig,
    OrderConfig,
    ReadConfig,
    RowConfig,
    raise_if_any,
)
from pipelines.errors import RunError, UsageError, unknown_name
from pipelines.files import read_json, write_json

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where samples come from, in which order, and how they are varied.

    Attributes:
        root: Folder, `s3://` or `gs://` address that holds `train/` and `val/`, each with a
            manifest.
        embedded: Data to make first when `root` does not exist; None: it must exist.
        eval_resize: Short side in pixels before the centre crop of an evaluation, and of training
            clips before jitter.
        reader: Who decodes: "threads" of each training process, or "ray": tasks of Ray Data
            anywhere in the cluster, from which batches travel to the workers; same order, same
            pixels.
        order: Sequence of samples.
        read: From bytes to pixels.
        augment: Variation of training images and clips.
        clip: Choice of frames; of videos alone.
    """

    root: str = "data"
    embedded: Literal["digits", "motion"] | None = None
    eval_resize: int = 256
    reader: Literal["threads", "ray"] = "threads"
    order: OrderConfig = field(default_factory=OrderConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)

    def __post_init__(self) -> None:
        raise_if_any("data", _below_one(self, "eval_resize"))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero.

    Attributes:
        learning_rate: Peak rate, reached after warm-up.
        weight_decay: Decoupled decay of matrices; vectors, biases and positions are not decayed.
        betas: Decay of the first and second moments.
        warmup_steps: Steps from rate 0 to the peak.
        clip_norm: Largest global gradient norm; larger gradients are scaled down to it.
        label_smoothing: Share of the target spread over all classes.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 100
    clip_norm: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not self.learning_rate > 0:
            problems.append(f"learning_rate must be above 0, got {self.learning_rate}")
        if not self.weight_decay >= 0:  # which also refuses what is no number
            problems.append(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must lie in [0, 1), got {self.betas}")
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not self.clip_norm > 0:
            problems.append(f"clip_norm must be above 0, got {self.clip_norm}")
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        raise_if_any("optim", problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, on what budgets, and what happens on the way.

    Attributes:
        steps: Optimizer steps in all.
        batch_size: Images of one step over all workers together.
        budgets: Effective capacities to train at; a single one trains at a fixed budget.
        budgets_per_step: "one" is drawn per step, the same on all workers (Train-Adaptive), or
            "all" are computed in every step and their losses added (MatViT).
        seed: Seed of the initial weights, the sample order, augmentation and budgets.
        log_every: Steps between metric rows.
        eval_every: Steps between evaluations on the validation set.
        eval_budgets: Effective capacities of those evaluations.
        checkpoint_every: Steps between checkpoints, a multiple of `log_every`.
        keep_checkpoints: How many of the newest checkpoints stay on disk.
        start_from: Weights to begin with: a folder as the model registry keeps it, or a
            `.safetensors` or `.npz` file of timm, Hugging Face, AugReg, big_vision or V-MoE. They
            may be of a dense, smaller or image model, see `mone_core.warmstart`. None begins with
            fresh ones.
        start_allow: Differences from those weights that are meant: "head" (a fresh head),
            "pool", "gelu", "norm_eps".
        microbatches: Equal parts that a worker computes its images in, one after the other;
            saves memory, and gives the gradient of the whole.
        loss: "softmax" cross entropy, or "sigmoid": one yes or no per class, summed over classes
            (V-MoE on ImageNet-21K).
    """

    steps: int = 1000
    batch_size: int = 64
    budgets: tuple[float, ...] = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
    budgets_per_step: Literal["one", "all"] = "one"
    seed: int = 0
    log_every: int = 50
    eval_every: int = 500
    eval_budgets: tuple[float, ...] = (0.2, 0.5, 1.0)
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    start_from: Path | None = None
    start_allow: tuple[Allowed, ...] = ()
    microbatches: int = 1
    loss: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        problems = _below_one(
            self,
            "steps",
            "batch_size",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "microbatches",
        )
        if not problems and self.checkpoint_every % self.log_every:
            problems.append(
                f"checkpoint_every must be a multiple of log_every, so that metric rows are the "
                f"same after a restart; got {self.checkpoint_every} and {self.log_every}"
            )
        if not self.budgets:
            problems.append("budgets must name at least one effective capacity")
        raise_if_any("train", problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Who computes.

    Attributes:
        num_workers: Training processes; divides `train.batch_size`.
        expert: Workers that share out the sparse experts among them, neighbours by number;
            divides `num_workers` and the experts. At 1 every worker has all experts. On "xla" it is
            devices that share them out.
        shard: Split dense weights, their gradients and moments over all workers (FSDP2), and
            gather each block's weights while it computes: saves memory, costs traffic.
        device: "cpu" or "cuda", one device per worker; "xla": TPU slices through torch-xla, one
            worker per host, which drives all of its devices.
        accelerator_type: Kind of TPU slice for "xla", such as "v4-16".
        topology: Chips along each axis of such a slice, such as "2x2x2".
        threads: Torch threads per worker on CPU.
        gemm: What computes float32 products on CPU, see `mone_core.gemm`; part of the run, since
            another choice rounds otherwise. `mone_core.gemm.fastest_gemm()` measures which suits.
        collective_timeout_s: Seconds that a worker waits for the others in a step before it fails.
    """

    num_workers: int = 1
    expert: int = 1
    shard: bool = False
    device: Literal["cpu", "cuda", "xla"] = "cpu"
    accelerator_type: str = ""
    topology: str = ""
    threads: int = 1
    gemm: GemmName = "torch"
    collective_timeout_s: int = 120

    def __post_init__(self) -> None:
        problems = _below_one(self, "num_workers", "expert", "threads", "collective_timeout_s")
        if not problems and self.device != "xla" and self.num_workers % self.expert:
            problems.append(
                f"expert must divide num_workers, got {self.expert} and {self.num_workers}"
            )
        if self.shard and self.device != "xla" and self.num_workers == 1:
            problems.append(
                "shard must be false for num_workers 1: there is nobody to split weights with"
            )
        if (self.device == "xla") != bool(self.accelerator_type and self.topology):
            problems.append(
                f"accelerator_type and topology must be set for device xla and for no other, got "
                f"{self.accelerator_type!r} and {self.topology!r} for {self.device}"
            )
        raise_if_any("parallel", problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs are kept.

    Attributes:
        uri: MLflow tracking address, such as `sqlite:///mlruns/mlflow.db` or `https://...`.
        experiment: MLflow experiment.
        model: Name in the model registry.
    """

    uri: str = "sqlite:///mlruns/mlflow.db"
    experiment: str = "mone"
    model: str = "mone"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run.

    Attributes:
        recipe: Name of the recipe that the values started from.
        out: The run's folder: config, checkpoints, metrics, results, report.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    recipe: str
    out: Path
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        problems = []
        parts = self.parallel.num_workers * self.train.microbatches
        if self.train.batch_size % parts:
            problems.append(
                f"parallel.num_workers times train.microbatches must divide train.batch_size, got "
                f"{self.parallel.num_workers} times {self.train.microbatches} and "
                f"{self.train.batch_size}"
            )
        if self.data.eval_resize < self.model.image_size:
            problems.append(
                f"data.eval_resize must be at least model.image_size, got "
                f"{self.data.eval_resize} and {self.model.image_size}"
            )
        problems += self._lane_problems()
        problems += self._budget_problems()
        problems += self._group_problems()
        raise_if_any("run", problems)

    @property
    def rows(self) -> RowConfig:
        """What becomes of a sample."""
        return RowConfig(
            image_size=self.model.image_size,
            frames=self.model.video.frames,
            resize=self.data.eval_resize,
            read=self.data.read,
            augment=self.data.augment,
            clip=self.data.clip,
        )

    def _lane_problems(self) -> list[str]:
        """Workers share out the lanes of the sample order, and a batch is as much of each lane."""
        batch, workers = self.train.batch_size, self.parallel.num_workers
        lanes = self.data.order.lanes_of(batch)
        if batch % lanes:
            return [f"data.order.lanes must divide train.batch_size, got {lanes} and {batch}"]
        if batch % workers == 0 and lanes % workers:  # what does not divide a batch is told already
            return [
                f"data.order.lanes must be a multiple of parallel.num_workers, got {lanes} and "
                f"{workers}; set it to a multiple of {workers} that divides train.batch_size "
                f"({batch})"
            ]
        return []

    def _budget_problems(self) -> list[str]:
        """The first budget out of reach of each list: the others are so for the same reason."""
        problems = []
        for name in ("budgets", "eval_budgets"):
            for budget in getattr(self.train, name):
                try:
                    self.model.nesting.counts(budget, self.model.num_patches)
                except CapacityError as error:
                    problems.append(f"train.{name}: {error}")
                    break
        return problems

    def _group_problems(self) -> list[str]:
        """Images that are routed together must not depend on how many workers there are."""
        experts, parallel = self.model.experts, self.parallel
        if experts.placement == "none":
            if parallel.expert == 1:
                return []
            return [
                f"parallel.expert must be 1 for a model without sparse experts "
                f"(model.experts.placement none), got {parallel.expert}: nested experts are parts "
                f"of one set of weights, and more workers are used best with images of their own"
            ]
        problems = []
        if experts.num_experts % parallel.expert:
            problems.append(
                f"parallel.expert must divide model.experts.num_experts, got {parallel.expert} "
                f"and {experts.num_experts}"
            )
        if experts.dropless and parallel.device == "xla":
            problems.append(
                "model.experts.dropless must be false for parallel.device xla: programs of XLA "
                "devices have fixed shapes, and rows are as many as tokens choose"
            )
        at_once = self.train.batch_size // (parallel.num_workers * self.train.microbatches)
        if at_once % experts.group_images:
            problems.append(
                f"model.experts.group_images must divide the {at_once} images that a worker "
                f"computes at once (train.batch_size {self.train.batch_size} over "
                f"parallel.num_workers {parallel.num_workers} and train.microbatches "
                f"{self.train.microbatches}), got {experts.group_images}"
            )
        return problems


def to_yaml(config: RunConfig) -> str:
    """The whole tree as YAML; `merge_yaml` of it gives the same tree back."""
    return yaml.safe_dump(as_plain(config), sort_keys=False)


def as_plain(config: RunConfig) -> dict[str, Any]:
    """The tree as nested dictionaries of JSON values."""
    plain: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return plain


def flatten(config: RunConfig) -> dict[str, Any]:
    """The tree as one level: "train.steps" -> 1000."""
    return dict(_leaves(as_plain(config), ""))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def merge_yaml(base: RunConfig, text: str, *, source: str) -> RunConfig:
    """Lay the values of a YAML document over a configuration.

    Args:
        base: What the document does not mention stays as here.
        text: A mapping like the one `to_yaml` writes, or a part of it.
        source: What to call the document in an error.

    Raises:
        UsageError: Not YAML, a field that does not exist (with near matches), or a value of
            the wrong type.
        ConfigError: Values that cannot be.
    """
    try:
        changes = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(changes, dict):
        raise UsageError(f"{source} must be a mapping such as `train: {{steps: 100}}`")
    merged = _merged(as_plain(base), changes, type(base), source, prefix="")
    return _validated(merged, source)


def read_config(run: Path) -> RunConfig:
    """The configuration saved with a run.

    Raises:
        RunError: The folder is not a run, or its configuration does not read back.
    """
    if not (run / CONFIG).is_file():
        raise RunError(
            f"{run} is not a run: it has no {CONFIG}; runs are made by "
            f"`mone train --recipe NAME --out {run}`"
        )
    return read_json(run / CONFIG, RunConfig, otherwise=RunError)


def write_config(run: Path, config: RunConfig) -> None:
    """Save the configuration with its run."""
    write_json(run / CONFIG, config)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The fields in which two configurations differ, as "train.steps 100 -> 200"."""
    before, after = flatten(old), flatten(new)
    return [f"{k} {before[k]} -> {after[k]}" for k in before if before[k] != after[k]]


def _merged(
    base: dict[str, Any], changes: dict[str, Any], kind: Any, source: str, *, prefix: str
) -> dict[str, Any]:
    types = {f.name: f.type for f in fields(kind)}
    merged = dict(base)
    for name, value in changes.items():
        if name not in types:
            known = [prefix + known for known in types]
            raise UsageError(
                f"{source}: "
                + unknown_name(
                    "config field",
                    f"{prefix}{name}",
                    known,
                    next_step="`mone train --recipe NAME --print-config` shows them all.",
                )
            )
        part = types[name]
        if is_dataclass(part) and isinstance(value, dict):
            value = _merged(merged[name], value, part, source, prefix=f"{prefix}{name}.")
        merged[name] = value
    return merged


def _validated(plain: dict[str, Any], source: str) -> RunConfig:
    """Check types strictly, as JSON would be."""
    try:
        return TypeAdapter(RunConfig).validate_json(json.dumps(plain, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
            raise cause from error
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{source}: {where}: {first['msg']}, got {first['input']!r}") from error


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; people mean a number."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _below_one(config: Any, *names: str) -> list[str]:
    return [
        f"{name} must be 1 or more, got {getattr(config, name)}"
        for name in names
        if getattr(config, name) < 1
    ]
