"""V-MoE on ImageNet-21K, as its authors published it."""

from dataclasses import replace
from pathlib import Path

from mone_core.models import VMOE_SIZES
from pipelines.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pipelines.data.settings import AugmentConfig, ReadConfig

_IMAGES = 14_197_122 - 102_400  # of the fall11 release, less those that were held out
_BATCH = 4096


def vmoe_b16_i21k() -> RunConfig:
    """V-MoE-B/16 on ImageNet-21K: every other MLP is eight experts, of which a token takes two.

    Source: arXiv 2106.05974 and its public configuration of ImageNet-21K: 300 epochs, batch 4096,
    Adam 8e-4, decay 0.1 of kernels, clip 1, 10,000 steps of warm-up, capacity ratio 1.05, noise
    1/E, importance and load loss 0.005, sigmoid loss, head bias -10, RandAugment (2, 20), mixup of
    two images by a Dirichlet distribution of 0.5, training crops that shrink without antialiasing.
    There the rate falls along a line to 1e-5, here along a cosine to 0; there whole batches of a
    device compete for slots, here 8 images; there TensorFlow draws the crops, here torchvision's
    rule does (`draw_crop`); there tests shrink by area, here by an antialiased bilinear filter.
    Command: `mone train --recipe vmoe_b16_i21k --data.root SHARDS --parallel.expert 8`.
    Not trained: no number is claimed.
    """
    backbone = VMOE_SIZES["B/16"]
    return RunConfig(
        recipe="vmoe_b16_i21k",
        out=Path("runs/vmoe_b16_i21k"),
        model=replace(backbone, experts=replace(backbone.experts, num_experts=8)),
        data=DataConfig(
            root="data/imagenet21k",
            read=ReadConfig(threads=8),
            augment=AugmentConfig(
                antialias=False,
                randaugment_layers=2,
                randaugment_magnitude=20,
                mixup=0.5,
                mixup_images=2,
            ),
        ),
        optim=OptimConfig(learning_rate=8e-4, weight_decay=0.1, warmup_steps=10_000),
        train=TrainConfig(
            steps=300 * _IMAGES // _BATCH,
            batch_size=_BATCH,
            budgets=(1.0,),
            eval_budgets=(1.0,),
            loss="sigmoid",
            log_every=100,
            eval_every=10_000,
            checkpoint_every=1_000,
        ),
        parallel=ParallelConfig(num_workers=8, device="cuda"),
    )
