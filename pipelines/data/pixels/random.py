"""The random numbers of one sample: the same to the bit in every version and on every rank.

Which seed a sample has is the subject of `order`; what is drawn, and in which order, is written
where it is drawn (`transforms`, `augment`, `mixup`, `clips`).
"""

import math

from pipelines.data.order import GOLDEN_GAMMA, WORD_MASK, mix64


class SampleRandom:
    """The random numbers of one sample in one epoch: splitmix64, a hashed counter.

    Not numpy's Generator, whose distributions may change their stream between versions
    (NEP 19), while a resumed run must repeat its crops to the bit; and making one costs more
    than all the numbers a sample needs.
    """

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & WORD_MASK

    def word(self) -> int:
        """64 random bits as an int."""
        self._state = (self._state + GOLDEN_GAMMA) & WORD_MASK
        return mix64(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high), from 53 random bits."""
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)

    def below(self, limit: int) -> int:
        """An integer in [0, limit); its bias is below limit / 2^64."""
        return (self.word() * limit) >> 64

    def normal(self) -> float:
        """A number of the standard normal distribution (Box and Muller, without the second one)."""
        radius = math.sqrt(-2.0 * math.log(self._above_zero()))
        return radius * math.cos(math.tau * self.uniform())

    def log_gamma(self, shape: float) -> float:
        """The logarithm of a number of the gamma distribution with scale 1.

        The logarithm, since the numbers of a small shape are too small for a float. Marsaglia and
        Tsang (ACM TOMS 26, 2000); below a shape of 1 their boost by a power of a uniform number.

        Args:
            shape: Mean and variance of the distribution, above 0.
        """
        boost = 0.0
        if shape < 1.0:
            boost, shape = math.log(self._above_zero()) / shape, shape + 1.0
        d = shape - 1.0 / 3.0
        while True:
            x = self.normal()
            root = 1.0 + x / math.sqrt(9.0 * d)
            if root <= 0.0:
                continue
            log_cube = 3.0 * math.log(root)
            log_chance = 0.5 * x * x + d * (1.0 - root**3 + log_cube)
            if math.log(self._above_zero()) < log_chance:
                return math.log(d) + log_cube + boost

    def _above_zero(self) -> float:
        """A number strictly between 0 and 1, whose logarithm exists."""
        return ((self.word() >> 11) + 0.5) * 2.0**-53
