"""Parts of the data's configuration refuse what cannot be, by field, value and range."""

import pytest

from mone_core.errors import ConfigError
from pipelines.data.settings import AugmentConfig, ClipConfig, OrderConfig, ReadConfig

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrderConfig(lanes=-1), r"^data\.order: lanes must be 0 \(automatic\) or more"),
        (lambda: OrderConfig(window=0), r"window must be 1 or more, got 0"),
        (lambda: ReadConfig(threads=0), r"^data\.read: threads must be 1 or more, got 0"),
        (lambda: ReadConfig(prefetch=0), r"prefetch must be 1 or more, got 0"),
        (lambda: ReadConfig(cache_gib=0), r"cache_gib must be above 0 and below 1e\+09, got 0"),
        (lambda: ReadConfig(cache_gib=NAN), r"cache_gib must be above 0 and below .*, got nan"),
        (lambda: ReadConfig(cache_gib=INF), r"cache_gib must be above 0 and below .*, got inf"),
        (lambda: ReadConfig(cache_gib=1e300), r"cache_gib must be .*, got 1e\+300"),
        (lambda: ReadConfig(corrupt_share=NAN), r"corrupt_share is a share .*, got nan"),
        (lambda: ReadConfig(corrupt_share=2.0), r"corrupt_share is a share from 0 to 1, got 2\.0"),
        (
            lambda: AugmentConfig(crop_area=(0.5, 0.2)),
            r"^data\.augment: crop_area must rise within \(0, 1\], got \(0\.5, 0\.2\)",
        ),
        (lambda: AugmentConfig(crop_area=(0.0, 1.0)), r"crop_area must rise .* \(0\.0, 1\.0\)"),
        (lambda: AugmentConfig(crop_area=(NAN, 1.0)), r"crop_area must rise .* \(nan, 1\.0\)"),
        (lambda: AugmentConfig(crop_ratio=(0.0, 1.0)), r"crop_ratio must rise and be above 0"),
        (
            lambda: AugmentConfig(crop_ratio=(0.75, INF)),
            r"crop_ratio must rise and be above 0 and finite, got \(0\.75, inf\)",
        ),
        (lambda: AugmentConfig(flip=1.5), r"flip is a probability from 0 to 1, got 1\.5"),
        (lambda: AugmentConfig(grey=-0.1), r"grey is a probability from 0 to 1, got -0\.1"),
        (lambda: AugmentConfig(color_jitter=2), r"color_jitter is a probability .* got 2"),
        (lambda: AugmentConfig(randaugment_layers=-1), r"randaugment_layers must be 0 or more"),
        (lambda: AugmentConfig(randaugment_magnitude=31), r"must lie in 0 to 30, got 31"),
        (
            lambda: AugmentConfig(mixup=-1.0),
            r"mixup must be 0 \(none\) or more, and finite, got -1\.0",
        ),
        (
            lambda: AugmentConfig(mixup=INF),
            r"mixup must be 0 \(none\) or more, and finite, got inf",
        ),
        (lambda: AugmentConfig(mixup=NAN), r"mixup must be .* finite, got nan"),
        (lambda: AugmentConfig(mixup_images=1), r"mixup_images must be 2 or more, got 1"),
        (lambda: ClipConfig(stride=0), r"^data\.clip: stride must be 1 or more, got 0"),
        (lambda: ClipConfig(views=0, crops=0), r"views must be 1 .*; crops must be 1 or more"),
        (lambda: ClipConfig(scale_jitter=(2.0, 1.0)), r"scale_jitter must rise and be above 0"),
        (
            lambda: ClipConfig(scale_jitter=(0.9, INF)),
            r"scale_jitter must rise and be above 0 and finite, got \(0\.9, inf\)",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_field_value_and_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("batch_size", "lanes"), [(64, 64), (4096, 256), (96, 32), (100, 4), (7, 1)]
)
def test_nobody_need_choose_lanes(batch_size, lanes):
    assert OrderConfig().lanes_of(batch_size) == lanes
    assert OrderConfig(lanes=4).lanes_of(batch_size) == 4


def test_images_are_mixed_only_where_mixup_is_on():
    assert AugmentConfig().mixed == 1
    assert AugmentConfig(mixup=0.2).mixed == 2
    assert AugmentConfig(mixup=0.2, mixup_images=3).mixed == 3
