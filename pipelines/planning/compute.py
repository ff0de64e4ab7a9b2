"""How long a device computes in a training step: products, and what comes on top of them.

Products run at a share of the device's peak, or as fast as memory gives them their operands where
that is slower, as it is for narrow width classes. On top come attention's softmax, everything
that reads and writes memory without multiplying matrices, the calls of torch themselves, and
the update of the weights.

Axes: B images of a rank, N tokens of an image, R = B * N rows, D model width, F hidden width.
"""

from mone_core.models import ModelConfig
from mone_core.roofline import (
    CORE_BACKWARD,
    CORE_PASSES,
    CORE_PASSES_BACKWARD,
    STREAM_PASSES,
    STREAM_PASSES_BACKWARD,
    product,
)
from pipelines.planning.clusters import Cluster
from pipelines.planning.work import Layer, Work

_GELU_PASSES = 2 + 3  # of R * F: reads one and writes one; its gradient reads two and writes one
_CORE_SHARE = 0.5  # of the products' speed: softmax takes its time between two of them
# Of a parameter, all in float32: AdamW reads weight, gradient and both moments and writes all but
# the gradient; clipping reads the gradient twice and writes it once.
_UPDATE_BYTES = 4 * (7 + 3)


def gemm_seconds(work: Work, images: int, cluster: Cluster) -> float:
    """All products of a step at their share of peak: two gradients for each one forward."""
    return cluster.product_seconds(3 * 2 * work.macs * images)


def other_seconds(work: Work, images: int, expert_ranks: int, cluster: Cluster) -> float:
    """What a step's blocks take beyond `gemm_seconds`, without communication and update."""
    return sum(_beside(layer, work, images, expert_ranks, cluster) for layer in work.layers)


def update_seconds(parameters: float, cluster: Cluster) -> float:
    """Clipping and AdamW: long rows of memory, at its peak."""
    return _UPDATE_BYTES * parameters / cluster.numbers.memory_bytes_per_second


def expert_seconds(
    layer: Layer, config: ModelConfig, images: int, expert_ranks: int, cluster: Cluster
) -> list[float]:
    """What a rank's experts compute for each width class, forward, widest first."""
    held = config.experts.num_experts / expert_ranks
    return [
        2 * _product(cluster, rows, dim, layer.hidden, copies=held)[1]
        for rows, dim in layer.rows_of_experts(images)
    ]


def calls(layer: Layer, held_experts: float) -> float:
    """Calls of torch in a block, forward and backward, without those that only make views.

    Counted on the blocks of `mone_core`; they go class by class, and expert by expert.
    """
    classes = len(layer.tokens.segments)
    if not layer.slots:
        return 37 * (1 + classes) if layer.gated else 47
    return 131 + 89 * classes + (18 * classes - 2) * held_experts


def _beside(layer: Layer, work: Work, images: int, expert_ranks: int, cluster: Cluster) -> float:
    dim, rows = work.config.dim, images * layer.num_tokens
    tokens = [(images * (each.stop - each.start), each.dim) for each in layer.tokens.segments]
    slots = layer.rows_of_experts(images)
    held = work.config.experts.num_experts / expert_ranks
    products = [(each, wide, 1.0) for each in tokens for wide in (3 * dim, dim)]
    products += [(each, layer.hidden, held) for each in 2 * slots]
    products += [] if slots else [(each, layer.hidden, 1.0) for each in 2 * tokens]
    moved = (STREAM_PASSES + STREAM_PASSES_BACKWARD) * rows * dim
    moved += _GELU_PASSES * layer.hidden * (sum(each for each, _ in slots) if slots else rows)
    if slots:  # into slots: read and write each; out: read each, write the tokens; backward alike
        moved += 2 * (3 * _features(slots) + _features(tokens))
    held_up = 0.0
    for (count, width), wide, copies in products:
        at_share, real = _product(cluster, count, width, wide, copies=copies)
        held_up += 3 * (real - at_share)  # both gradients touch the same three matrices
    core = _core_held_up(cluster, rows, layer.num_tokens, dim)
    called = cluster.numbers.call_seconds * calls(layer, held)
    return held_up + core + called + cluster.traffic_seconds(cluster.item * moved)


def _core_held_up(cluster: Cluster, rows: int, num_tokens: int, dim: int) -> float:
    """What attention's core takes beyond its products at their share of peak."""
    flops, features = 4 * rows * num_tokens * dim, cluster.item * rows * dim
    passes = ((1.0, CORE_PASSES), (CORE_BACKWARD, CORE_PASSES_BACKWARD))
    real = sum(
        cluster.device.seconds(times * flops, moved * features, _CORE_SHARE)
        for times, moved in passes
    )
    return real - cluster.product_seconds(3 * flops)


def _product(
    cluster: Cluster, rows: int, dim: int, wide: int, *, copies: float
) -> tuple[float, float]:
    """Seconds of a linear layer at its share of peak, and with memory where that is slower.

    Args:
        copies: Weights that are read: experts that share the rows.
    """
    flops, elements = product(rows, dim, wide, copies)
    return cluster.product_seconds(flops), cluster.device.seconds(flops, cluster.item * elements)


def _features(classes: list[tuple[int, int]]) -> int:
    return sum(rows * dim for rows, dim in classes)
