"""MoNE ViViTs on Kinetics-400 and Something-Something-v2, as far as the papers tell."""

from dataclasses import replace
from pathlib import Path

from mone_core.models import VIVIT_SIZES, ModelConfig
from pipelines.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pipelines.data.settings import AugmentConfig, ClipConfig, ReadConfig

_BATCH = 64
_JITTER = (0.9, 1.33)


def mone_vivit_k400() -> RunConfig:
    """MoNE ViViT-B/16x2 on Kinetics-400 at e_c 0.4, for the MACs of 30 dense epochs.

    Source: arXiv 2407.19985, sections 4.4 and 5, which takes all else from ViViT (arXiv
    2103.15691, table 7): 32 frames of stride 2, crop 224 of 256, scale jitter, flip, colour jitter
    0.8, grey 0.1, batch 64, clip 1, 2.5 epochs of warm-up. The paper fine-tunes a nested (MatViT)
    model of the same data: give it with `--train.start-from`. It tests 8 clips in time; ViViT's
    4 x 3 is `--data.clip.views 4 --data.clip.crops 3`. There SGD with momentum, here AdamW, so the
    rate is ours; there frames shrink without antialiasing and scale jitter is one factor for each
    side, here they shrink with it and the factor is one for both.
    Command: `mone train --recipe mone_vivit_k400 --data.root SHARDS --train.start-from NESTED`.
    Not trained: no number is claimed.
    """
    clips, epochs = 214_834, 69  # 30 epochs * 283.3 / 122.8 GMACs, of a dense model and of e_c 0.4
    return _clips(
        "mone_vivit_k400",
        VIVIT_SIZES["B/16x2"],
        epochs * clips // _BATCH,
        warmup=5 * clips // (2 * _BATCH),
        budgets=(0.4,),
        data=DataConfig(
            root="data/kinetics400",
            read=ReadConfig(threads=8),
            augment=AugmentConfig(color_jitter=0.8, grey=0.1),
            clip=ClipConfig(stride=2, scale_jitter=_JITTER, views=8),
        ),
    )


def mone_vivit_ssv2() -> RunConfig:
    """MoNE ViViT-B/16x2 on Something-Something-v2, trained at nine budgets.

    Source: arXiv 2407.19985, section 5 (Train-Adaptive, as many MACs as the dense model's 35
    epochs), which takes all else from ViViT (arXiv 2103.15691, table 7, and its configuration of
    SSv2): 32 frames of stride 1, crop 256 of 288, scale jitter, RandAugment (2, 20), mixup 0.3,
    label smoothing 0.3, batch 64, clip 1, 2.5 epochs of warm-up. Never flipped, unlike there:
    left and right are classes. Stochastic depth 0.3 is left out; AdamW with a rate of ours instead
    of SGD. Fine-tunes a nested model, tests, and scales frames, as `mone_vivit_k400`.
    Command: `mone train --recipe mone_vivit_ssv2 --data.root SHARDS --train.start-from NESTED`.
    Not trained: no number is claimed.
    """
    # 35 epochs over 0.58, the share of the dense MACs that the nine budgets cost on average.
    clips, epochs = 168_913, 60
    return _clips(
        "mone_vivit_ssv2",
        replace(VIVIT_SIZES["B/16x2"], image_size=256, num_classes=174),
        epochs * clips // _BATCH,
        warmup=5 * clips // (2 * _BATCH),
        budgets=TrainConfig().budgets,
        label_smoothing=0.3,
        data=DataConfig(
            root="data/ssv2",
            eval_resize=288,
            read=ReadConfig(threads=8),
            augment=AugmentConfig(
                flip=0.0, randaugment_layers=2, randaugment_magnitude=20, mixup=0.3
            ),
            clip=ClipConfig(stride=1, scale_jitter=_JITTER, views=8),
        ),
    )


def _clips(
    name: str,
    model: ModelConfig,
    steps: int,
    *,
    warmup: int,
    budgets: tuple[float, ...],
    data: DataConfig,
    label_smoothing: float = 0.0,
) -> RunConfig:
    return RunConfig(
        recipe=name,
        out=Path("runs") / name,
        model=model,
        data=data,
        optim=OptimConfig(
            learning_rate=1e-4,
            weight_decay=0.05,
            warmup_steps=warmup,
            label_smoothing=label_smoothing,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=_BATCH,
            budgets=budgets,
            eval_budgets=(0.2, 0.4, 0.6, 1.0),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=1_000,
        ),
        parallel=ParallelConfig(num_workers=8, device="cuda"),
    )
