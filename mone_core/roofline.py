"""What a device needs for a part of a layer: its operations or its bytes, whichever takes longer.

The counts of a transformer block are here, for whoever asks how fast a device could be: benchmarks,
for the floor beside a measured row, and plans of runs on machines that are not at hand. What share
of a peak is reached is theirs to say.

Pure Python. Axes: R rows (tokens of all images), D model width.
"""

from dataclasses import dataclass

# Reads and writes of all R * D features in a block, whatever the budget. Forward: two norms read
# and write, two residual sums read two and write one. Backward: each of the four reads two and
# writes one.
STREAM_PASSES, STREAM_PASSES_BACKWARD = 10, 12
# Attention's core reads q, k, v and writes one; backward it reads five and writes three, and has
# five products instead of two: the scores are computed again.
CORE_PASSES, CORE_PASSES_BACKWARD = 4, 8
CORE_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """Peaks of a device.

    Attributes:
        flops: Dense (not 2:4 sparse) operations per second.
        bandwidth: Bytes per second from and to its memory.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, num_bytes: float, share: float = 1.0) -> float:
        """The longer of computing at a share of peak and moving bytes."""
        return max(flops / (share * self.flops), num_bytes / self.bandwidth)


def product(rows: int, dim: int, wide: int, copies: float = 1) -> tuple[int, float]:
    """Operations and elements of a linear layer between two widths, either way round.

    Its two gradients touch the same three matrices, and so have as many each.

    Args:
        copies: Weights that are read: experts that share the rows.
    """
    return 2 * rows * dim * wide, rows * (dim + wide) + copies * dim * wide
