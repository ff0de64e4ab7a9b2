"""A small model for small videos: what `mone demo --video --archive` trains."""

from pathlib import Path

from mone_core.models import ModelConfig, VideoConfig
from pipelines.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pipelines.data.settings import AugmentConfig, ClipConfig, ReadConfig


def clips() -> RunConfig:
    """MoNE on 64-pixel clips of 8 frames, some minutes on two cores: a first look, not a result.

    Never flipped, since classes of videos are often directions.

    Source: our own setting.
    Command: `mone demo --video --archive FOLDER`, of Kinetics, SSv2 or folders of videos.
    """
    return RunConfig(
        recipe="clips",
        out=Path("runs/clips"),
        model=ModelConfig(
            image_size=64,
            patch_size=8,
            dim=96,
            depth=4,
            heads=4,
            positions="sincos",
            video=VideoConfig(frames=8, tubelet=2, temporal_depth=2),
        ),
        data=DataConfig(
            root="data/clips",
            eval_resize=64,
            read=ReadConfig(threads=1),
            augment=AugmentConfig(flip=0.0),
            clip=ClipConfig(stride=4),
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
        train=TrainConfig(steps=1000, batch_size=32, log_every=25, eval_every=250),
        parallel=ParallelConfig(num_workers=2),
    )
