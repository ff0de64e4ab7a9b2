"""MoNE ViTs on ImageNet-21K, as far as the paper tells."""

from dataclasses import replace
from pathlib import Path

from mone_core.models import VIT_SIZES
from pipelines.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pipelines.data.settings import AugmentConfig, ReadConfig

_IMAGES = 13_151_276  # of the winter21 release; steps below are 300 epochs of them
_BATCH = 4096
# Of big_vision: training crops shrink by bilinear sampling without antialiasing.
_CROP = AugmentConfig(antialias=False, randaugment_layers=2)


def mone_vit_s16() -> RunConfig:
    """MoNE ViT-S/16 on ImageNet-21K, trained at nine budgets.

    Source: arXiv 2407.19985, section 5, which trains with the AugReg recipe of big_vision
    (batch 4096, Adam 1e-3, decay 1e-4, clip 1, 10,000 steps of warm-up, 300 epochs, sigmoid loss,
    head bias -10; crop and flip; augmentation by size, here RandAugment 2 layers of magnitude 0).
    The paper names no number of epochs for its own runs. Unlike there, crops are drawn by
    torchvision's rule and not by TensorFlow's (`draw_crop`), and tests shrink by an antialiased
    bilinear filter, not by area. As there, training crops shrink without antialiasing.
    Command: `mone train --recipe mone_vit_s16 --data.root SHARDS`.
    Not trained: no number is claimed.
    """
    return _imagenet21k("S", replace(_CROP, randaugment_magnitude=0))


def mone_vit_b16() -> RunConfig:
    """MoNE ViT-B/16 on ImageNet-21K: as `mone_vit_s16`, with RandAugment (2, 10) and mixup 0.2.

    Source: as there. Its mixup draws one weight for a whole batch, ours one for each image.
    Command: `mone train --recipe mone_vit_b16 --data.root SHARDS`.
    Not trained: no number is claimed.
    """
    return _imagenet21k("B", replace(_CROP, randaugment_magnitude=10, mixup=0.2))


def mone_vit_l16() -> RunConfig:
    """MoNE ViT-L/16 on ImageNet-21K: as `mone_vit_b16`, with RandAugment (2, 15) and mixup 0.5.

    Source: as there.
    Command: `mone train --recipe mone_vit_l16 --data.root SHARDS`.
    Not trained: no number is claimed.
    """
    return _imagenet21k("L", replace(_CROP, randaugment_magnitude=15, mixup=0.5))


def _imagenet21k(size: str, augment: AugmentConfig) -> RunConfig:
    name = f"mone_vit_{size.lower()}16"
    return RunConfig(
        recipe=name,
        out=Path("runs") / name,
        model=replace(VIT_SIZES[size], num_classes=21_843, head_bias=-10.0),
        data=DataConfig(root="data/imagenet21k", read=ReadConfig(threads=8), augment=augment),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=1e-4, warmup_steps=10_000),
        train=TrainConfig(
            steps=300 * _IMAGES // _BATCH,
            batch_size=_BATCH,
            loss="sigmoid",
            log_every=100,
            eval_every=10_000,
            checkpoint_every=1_000,
        ),
        parallel=ParallelConfig(num_workers=8, device="cuda"),
    )
