"""MoNE ViTs on ImageNet-21K, as far as the paper tells."""

from pathlib import Path

from mone_core.models import VIT_SIZES
from pipelines.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig

_IMAGES = 13_151_276  # of the winter21 release; steps below are 300 epochs of them
_BATCH = 4096


def mone_vit_s16() -> RunConfig:
    """MoNE ViT-S/16 on ImageNet-21K, trained at nine budgets.

    Source: arXiv 2407.19985, section 5, which trains with the AugReg recipe of big_vision
    (batch 4096, Adam 1e-3, decay 1e-4, clip 1, 10,000 steps of warm-up, 300 epochs). Crop and
    flip as there; RandAugment, mixup and the sigmoid loss are not in it yet.
    Command: `mone train --recipe mone_vit_s16 --data.root SHARDS --parallel.num-workers 8`.
    Not yet run at full length: no number is claimed.
    """
    return _imagenet21k("S")


def mone_vit_b16() -> RunConfig:
    """MoNE ViT-B/16 on ImageNet-21K; otherwise as `mone_vit_s16`, and not yet run either."""
    return _imagenet21k("B")


def _imagenet21k(size: str) -> RunConfig:
    name = f"mone_vit_{size.lower()}16"
    return RunConfig(
        recipe=name,
        out=Path("runs") / name,
        model=VIT_SIZES[size],
        data=DataConfig(root=Path("data/imagenet21k"), threads=8),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=1e-4, warmup_steps=10_000),
        train=TrainConfig(
            steps=300 * _IMAGES // _BATCH,
            batch_size=_BATCH,
            log_every=100,
            eval_every=10_000,
            checkpoint_every=1_000,
        ),
        parallel=ParallelConfig(num_workers=8, device="cuda"),
    )
