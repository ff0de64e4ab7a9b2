"""From a configuration to what a training process works with; one function a part."""

import torch

from cluster.backends import Backend
from mone_core.gemm import use_gemm
from mone_core.models import ViT, build_model
from mone_core.parallel import expert_parameters, spread
from pipelines.checkpoint import Checkpoints
from pipelines.config import RunConfig
from pipelines.data.order import Position
from pipelines.data.ray_reader import RayStream
from pipelines.data.stream import TrainStream
from pipelines.errors import RunError
from pipelines.evaluate import validation_stream
from pipelines.optim import build_optimizer
from pipelines.run_data import RunData
from pipelines.storage import place
from pipelines.train import Reporter, Run, TrainBatches
from pipelines.weights import start_from


def build_run(config: RunConfig, backend: Backend, reporter: Reporter, data: RunData) -> Run:
    """Everything that training needs on this rank.

    Raises:
        DatasetError: Also if what this rank reads are not the `data` that the run began with.
    """
    _check_groups(config, backend)
    use_gemm(config.parallel.gemm)
    core = initial_model(config)
    spread(core, backend)
    experts = frozenset(expert_parameters(core))
    blocks = list(core.encoder.blocks) if config.parallel.shard else []
    return Run(
        config=config,
        backend=backend,
        core=core,
        model=backend.place(core, experts, blocks),
        experts=experts,
        optimizer=build_optimizer(core, config.optim, fused=backend.fused_updates),
        stream=training_stream(config, backend, data),
        validation=validation_stream(config, data, rank=backend.rank, world=backend.world),
        checkpoints=Checkpoints(config.out, config, backend),
        reporter=reporter,
        start=Position(seed=config.train.seed, epoch=0, step=0),
    )


def _check_groups(config: RunConfig, backend: Backend) -> None:
    """Images that are routed together must lie on one device, however many a worker drives."""
    experts, devices = config.model.experts, backend.mesh.world
    at_once = config.train.batch_size // (devices * config.train.microbatches)
    if experts.placement != "none" and at_once % experts.group_images:
        raise RunError(
            f"model.experts.group_images must divide the {at_once} images that each of {devices} "
            f"devices computes at once, got {experts.group_images}; set it to a divisor, or "
            f"train.batch_size to a multiple of "
            f"{devices * config.train.microbatches * experts.group_images}"
        )


def initial_model(config: RunConfig) -> ViT:
    """The weights that training begins with: those of `train.start_from`, or fresh ones."""
    torch.manual_seed(config.train.seed)  # also for what the weights to start from do not hold
    model = build_model(config.model)
    if config.train.start_from is not None:
        start_from(model, config.train.start_from, config.train.start_allow)
    return model


def training_stream(config: RunConfig, backend: Backend, data: RunData) -> TrainBatches:
    """This rank's training batches."""
    stream = RayStream if config.data.reader == "ray" else TrainStream
    return stream(
        place(config.data.root) / "train",
        config.rows,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        rank=backend.rank,
        world=backend.world,
        order=config.data.order,
        host_ranks=backend.host_ranks,
        digest=data.train,
    )
