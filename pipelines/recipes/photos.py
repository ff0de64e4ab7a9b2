"""A small model for small photographs: what `mone demo --archive` trains."""

from pathlib import Path

from mone_core.models import ModelConfig
from pipelines.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pipelines.data.settings import AugmentConfig, ReadConfig


def photos() -> RunConfig:
    """MoNE on 64-pixel photographs, a few minutes on two cores: a first look, not a result.

    Source: our own setting.
    Command: `mone demo --archive FOLDER_OF_SYNSET_TARS`.
    """
    return RunConfig(
        recipe="photos",
        out=Path("runs/photos"),
        model=ModelConfig(
            image_size=64, patch_size=8, dim=96, depth=4, heads=4, positions="sincos"
        ),
        data=DataConfig(
            root="data/photos",
            eval_resize=64,
            read=ReadConfig(threads=1),
            augment=AugmentConfig(crop_area=(0.35, 1.0)),
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=200),
        train=TrainConfig(steps=2000, batch_size=64, log_every=25, eval_every=500),
        parallel=ParallelConfig(num_workers=2),
    )
