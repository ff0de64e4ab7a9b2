"""Mixing weights: a Dirichlet distribution, the same on every rank and for ever."""

import numpy as np
import pytest

from pipelines.data.order import sample_seed
from pipelines.data.pixels.mixup import mixing_weights
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.settings import AugmentConfig


def draws(concentration, images=2, count=4000, seed=3):
    augment = AugmentConfig(mixup=concentration, mixup_images=images)
    return np.array([mixing_weights(augment, seed, 1, sample) for sample in range(count)])


@pytest.mark.parametrize("images", [2, 3, 5])
@pytest.mark.parametrize("concentration", [0.2, 0.5, 1.0, 8.0])
def test_weights_are_shares_that_descend(concentration, images):
    weights = draws(concentration, images, count=300)

    assert weights.dtype == np.float32
    assert weights.shape == (300, images)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (np.diff(weights, axis=1) <= 0).all()


@pytest.mark.parametrize("concentration", [0.2, 0.5, 1.0, 4.0])
def test_of_two_images_the_first_has_the_larger_share_of_a_beta_distribution(concentration):
    """Of it, (2 x - 1)^2 has the mean 1 / (2 a + 1), whichever share is called x."""
    larger = draws(concentration)[:, 0].astype(float)
    beta = np.random.default_rng(0).beta(concentration, concentration, 200_000)
    expected = np.maximum(beta, 1 - beta)

    assert ((2 * larger - 1) ** 2).mean() == pytest.approx(1 / (2 * concentration + 1), abs=0.02)
    assert larger.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert larger.std() == pytest.approx(expected.std(), abs=0.01)
    quarters = np.quantile(larger, [0.25, 0.5, 0.75])
    assert quarters == pytest.approx(np.quantile(expected, [0.25, 0.5, 0.75]), abs=0.02)


def test_of_three_images_the_shares_are_a_sorted_dirichlet():
    weights = draws(0.8, images=3)
    expected = np.sort(np.random.default_rng(0).dirichlet([0.8] * 3, 100_000))[:, ::-1]

    np.testing.assert_allclose(weights.mean(axis=0), expected.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(weights.std(axis=0), expected.std(axis=0), atol=0.01)


def test_weights_are_fixed_for_ever_by_seed_epoch_and_sample():
    augment = AugmentConfig(mixup=0.5, mixup_images=3)
    drawn = [
        mixing_weights(augment, 7, epoch, sample) for epoch, sample in [(0, 0), (0, 1), (3, 0)]
    ]

    expected = [
        [0.991362095, 0.00825198367, 0.00038589511],
        [0.388884038, 0.312546819, 0.298569143],
        [0.462888718, 0.436939895, 0.100171402],
    ]
    np.testing.assert_allclose(drawn, expected, rtol=3e-7)
    assert np.array_equal(drawn[0], mixing_weights(augment, 7, 0, 0))


def test_tiny_concentrations_leave_one_image_and_never_nothing():
    weights = draws(1e-6, count=50)

    assert np.isfinite(weights).all()
    assert (weights[:, 0] > 0.999).all()


def test_the_weights_say_nothing_about_the_crop():
    larger = draws(1.0, count=2000)[:, 0]
    crop = [SampleRandom(sample_seed(3, 1, sample)).uniform() for sample in range(2000)]

    assert np.corrcoef(larger, crop)[0, 1] == pytest.approx(0, abs=0.08)
