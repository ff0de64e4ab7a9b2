"""The demo's recipe: embedded handwritten digits, small enough for two cores."""

from pathlib import Path

from mone_core.models import ModelConfig
from pipelines.config import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)


def digits() -> RunConfig:
    """MoNE on real handwritten digits placed on larger canvases; trained at nine budgets.

    Source: our own setting, in the manner of arXiv 2407.19985 (Train-Adaptive, section 5).
    Command: `mone train --recipe digits`, or `mone demo` for the whole way.
    """
    return RunConfig(
        recipe="digits",
        out=Path("runs/digits"),
        model=ModelConfig(image_size=32, patch_size=4, num_classes=10, dim=64, depth=4, heads=4),
        data=DataConfig(
            root=Path("data/digits"),
            embedded="digits",
            crop_area=(0.7, 1.0),
            flip=0.0,
            eval_resize=32,
            threads=1,
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=200),
        train=TrainConfig(
            steps=4000,
            batch_size=64,
            log_every=25,
            eval_every=500,
            eval_budgets=(0.2, 0.5, 1.0),
            checkpoint_every=500,
        ),
        parallel=ParallelConfig(num_workers=2),
    )
