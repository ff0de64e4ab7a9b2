"""The random numbers of a sample: fixed for ever, and distributed as they say."""

import math

import numpy as np
import pytest

from pipelines.data.pixels.random import SampleRandom


def test_random_words_are_fixed_for_ever_by_their_seed():
    rng = SampleRandom(0)

    assert [rng.word() for _ in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert SampleRandom(0).uniform() == (0xE220A8397B1DCDAF >> 11) / 2**53
    assert SampleRandom(0).below(1000) == 0xE220A8397B1DCDAF * 1000 // 2**64


def test_normal_and_gamma_numbers_are_fixed_for_ever_by_their_seed():
    """To the last bit or the one before: logarithms and cosines are the C library's."""
    rng = SampleRandom(2026)

    drawn = [rng.normal(), rng.log_gamma(0.2), rng.log_gamma(0.5), rng.log_gamma(7.5), rng.normal()]

    expected = [
        -0.5449768809542614,
        -1.8042799184771776,
        -0.26966183181497255,
        2.3892781363899513,
        -0.9905295258199888,
    ]
    assert drawn == pytest.approx(expected, rel=1e-14)
    assert rng.word() == 0x28363CE3DB2D4849


def test_random_numbers_are_even_and_stay_in_range():
    rng = SampleRandom(5)
    uniform = np.array([rng.uniform(2.0, 4.0) for _ in range(20_000)])
    below = np.bincount([rng.below(7) for _ in range(21_000)])

    assert uniform.min() >= 2.0
    assert uniform.max() < 4.0
    assert uniform.mean() == pytest.approx(3.0, abs=0.02)
    assert len(below) == 7
    assert np.abs(below - 3000).max() < 250


def test_normal_numbers_have_the_moments_and_shares_of_their_distribution():
    rng = SampleRandom(6)
    x = np.array([rng.normal() for _ in range(40_000)])

    assert x.mean() == pytest.approx(0, abs=0.02)
    assert x.var() == pytest.approx(1, abs=0.03)
    assert (x**3).mean() == pytest.approx(0, abs=0.08)
    assert (x**4).mean() == pytest.approx(3, abs=0.2)
    for at in (-1.5, 0.0, 1.0, 2.5):
        below = 0.5 * (1 + math.erf(at / math.sqrt(2)))
        assert (x < at).mean() == pytest.approx(below, abs=0.012)


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0, 2.0, 9.0])
def test_gamma_numbers_have_the_moments_of_their_distribution(shape):
    """Mean and variance are the shape; the mean logarithm is the digamma function's."""
    rng = SampleRandom(7)
    logs = np.array([rng.log_gamma(shape) for _ in range(40_000)])
    x = np.exp(logs)
    step = 1e-5
    digamma = (math.lgamma(shape + step) - math.lgamma(shape - step)) / (2 * step)

    assert x.mean() == pytest.approx(shape, rel=0.05)
    assert x.var() == pytest.approx(shape, rel=0.1)
    assert logs.mean() == pytest.approx(digamma, abs=0.02 + 0.02 / shape)


def test_gamma_numbers_of_one_are_exponential():
    rng = SampleRandom(8)
    x = np.exp([rng.log_gamma(1.0) for _ in range(40_000)])

    for at in (0.1, 0.5, 1.0, 3.0):
        assert (x < at).mean() == pytest.approx(1 - math.exp(-at), abs=0.012)


def test_gamma_numbers_of_tiny_shapes_keep_their_logarithm():
    rng = SampleRandom(9)
    logs = [rng.log_gamma(1e-4) for _ in range(100)]

    assert all(math.isfinite(log) for log in logs)
    assert min(logs) < -10_000  # e to this power is 0 as a float
