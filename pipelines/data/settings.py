"""How samples are read, put in order and varied: the parts of `DataConfig`, each checked when made.

What they mean is defined where they are used: `order`, `reader`, `transforms`, `augment`, `clips`.
`RowConfig` joins those that decide about pixels with what a model wants of them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mone_core.errors import ConfigError

MOST_LANES = 256  # of an order that nobody asked to have more
MOST_GIB = 1e9  # of a cache: its bytes still fit an integer of 64 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """In which order an epoch's samples come, see `pipelines.data.order`.

    Attributes:
        lanes: Equal segments that the permuted samples are cut into; every batch takes equally many
            of each, and workers share them out. Divides `train.batch_size`, and the workers
            divide it. 0: the greatest common divisor of the batch size and 256.
        window: Samples of a lane that are shuffled among each other; what is read next lies
            within a window of every lane.
    """

    lanes: int = 0
    window: int = 4096

    def __post_init__(self) -> None:
        problems = []
        if self.lanes < 0:
            problems.append(f"lanes must be 0 (automatic) or more, got {self.lanes}")
        if self.window < 1:
            problems.append(f"window must be 1 or more, got {self.window}")
        raise_if_any("data.order", problems)

    def lanes_of(self, batch_size: int) -> int:
        """The number of lanes for a global batch."""
        return self.lanes or math.gcd(batch_size, MOST_LANES)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadConfig:
    """How bytes become pixels, and what happens where they do not.

    Attributes:
        threads: Decoding threads per worker.
        prefetch: Batches that are made ahead of the one in use.
        decoder: "pillow", or "simplejpeg": libjpeg-turbo and torch's resize, with
            Pillow for every image that these cannot take; the pixels differ by rounding.
        check: Compare a sample's bytes with its crc32 when it is "first" read, or "never".
        remote: How an object store is read: whole "shards" into the cache, or "ranges".
        cache: Folder for shards of an object store; None: below the user's cache folder.
        cache_gib: Size of that cache, GiB, as far as its disk has the room; the shards used longest
            ago leave first. All workers of a host share it.
        on_corrupt: What a sample does that does not decode: "raise" stops the run, "skip" puts
            the sample that follows in its place and counts it.
        corrupt_share: Share of a worker's samples that may be skipped before the run stops: of all
            epochs (or evaluations) that it has begun since it started, the present one counted
            whole.
    """

    threads: int = 2
    prefetch: int = 2
    decoder: Literal["pillow", "simplejpeg"] = "pillow"
    check: Literal["first", "never"] = "first"
    remote: Literal["shards", "ranges"] = "shards"
    cache: Path | None = None
    cache_gib: float = 64.0
    on_corrupt: Literal["raise", "skip"] = "raise"
    corrupt_share: float = 0.001

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be 1 or more, got {getattr(self, name)}"
            for name in ("threads", "prefetch")
            if getattr(self, name) < 1
        ]
        if not 0 < self.cache_gib < MOST_GIB:
            problems.append(
                f"cache_gib must be above 0 and below {MOST_GIB:g}, got {self.cache_gib}"
            )
        if not 0 <= self.corrupt_share <= 1:
            problems.append(f"corrupt_share is a share from 0 to 1, got {self.corrupt_share}")
        raise_if_any("data.read", problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How training images and clips are varied; drawn once per image or clip.

    Attributes:
        crop_area: Share of the image that a random crop covers, least and most.
        crop_ratio: Width over height of that crop, least and most.
        antialias: Shrink crops of images without aliasing. False: a pixel is drawn between four of
            the crop's however much it shrinks, as big_vision and V-MoE train. Clips and tests are
            never aliased.
        flip: Probability of a horizontal flip; 0 where direction is the class, as in SSv2.
        randaugment_layers: Operations of RandAugment (arXiv 1909.13719) on every image.
        randaugment_magnitude: Their strength, 0 to 30 (`moderate` settings use 10 to 20).
        color_jitter: Probability of changed brightness, contrast, saturation and hue.
        grey: Probability of turning grey.
        mixup: Concentration of the Dirichlet distribution of mixing weights; 0: no mixup.
        mixup_images: Images that are mixed into one.
    """

    crop_area: tuple[float, float] = (0.05, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    antialias: bool = True
    flip: float = 0.5
    randaugment_layers: int = 0
    randaugment_magnitude: float = 10.0
    color_jitter: float = 0.0
    grey: float = 0.0
    mixup: float = 0.0
    mixup_images: int = 2

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            problems.append(f"crop_area must rise within (0, 1], got {self.crop_area}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            problems.append(
                f"crop_ratio must rise and be above 0 and finite, got {self.crop_ratio}"
            )
        for name in ("flip", "color_jitter", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} is a probability from 0 to 1, got {getattr(self, name)}")
        if self.randaugment_layers < 0:
            problems.append(f"randaugment_layers must be 0 or more, got {self.randaugment_layers}")
        if not 0 <= self.randaugment_magnitude <= 30:
            problems.append(
                f"randaugment_magnitude must lie in 0 to 30, got {self.randaugment_magnitude}"
            )
        if not 0 <= self.mixup < math.inf:
            problems.append(f"mixup must be 0 (none) or more, and finite, got {self.mixup}")
        if self.mixup_images < 2:
            problems.append(f"mixup_images must be 2 or more, got {self.mixup_images}")
        raise_if_any("data.augment", problems)

    @property
    def mixed(self) -> int:
        """Images that make up one training image; 1 without mixup."""
        return self.mixup_images if self.mixup else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Which frames of a video make a clip, and how videos are tested.

    Attributes:
        stride: Frames of the source from one chosen frame to the next.
        scale_jitter: The short side of a training clip over `data.eval_resize`, least and most
            (ViViT: 0.9 to 1.33); a square of the model's size is then cut out at random.
        views: Clips in time that a test averages over.
        crops: Squares of each, side by side along the longer side; 1: the centre.
    """

    stride: int = 1
    scale_jitter: tuple[float, float] = (1.0, 1.25)
    views: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be 1 or more, got {getattr(self, name)}"
            for name in ("stride", "views", "crops")
            if getattr(self, name) < 1
        ]
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1] < math.inf:
            problems.append(
                f"scale_jitter must rise and be above 0 and finite, got {self.scale_jitter}"
            )
        raise_if_any("data.clip", problems)

    def views_of(self, frames: int) -> int:
        """Views of a sample in a test of clips of so many frames; an image, one frame, has one."""
        return 1 if frames == 1 else self.views * self.crops


@dataclass(frozen=True, kw_only=True, slots=True)
class RowConfig:
    """What becomes of a sample.

    Attributes:
        image_size: Height and width of the pixels.
        frames: Frames of a clip; 1: images.
        resize: Short side that test images and videos are scaled to, and that a training clip's
            scale jitter starts from.
        read: Threads, decoder, object stores, and what bad samples do.
        augment: How training samples are varied.
        clip: Which frames of a video make a clip or a test's views.
    """

    image_size: int
    frames: int
    resize: int
    read: ReadConfig
    augment: AugmentConfig
    clip: ClipConfig


def raise_if_any(where: str, problems: list[str]) -> None:
    """Refuse a part of a configuration, naming all that is wrong with it."""
    if problems:
        raise ConfigError(where, problems)
