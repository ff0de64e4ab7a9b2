"""What an accelerator cannot beat: the time that its data sheet leaves a layer, by formula.

A step of a layer takes as long as its products or as its memory traffic, whichever is longer;
steps follow each other. Rows measured there are shown as a share of it (`harness`). Two
layers are here, in bfloat16 on one device:

* `block_ms`: a nested transformer block. As a yardstick of what can be reached its products run
  at 70 % of the data sheet's peak and the attention core at half of that, so a very good kernel
  may come out above 100 %.
* `mlp_ms` and `experts_ms`: a dense or nested MLP, and the sparse layer around it, at 100 % of
  peak. What moves tokens to experts and back comes on top.

Throughout, activations are fused into the products: they cost nothing, and the hidden
layer is written once and read once. Routers are left out: a thousandth of the products.

Pure Python. Axes: D model width, F hidden width, R rows (tokens of all images).
"""

from collections.abc import Sequence

from mone_core.nested import Layout
from mone_core.roofline import (
    CORE_BACKWARD,
    CORE_PASSES,
    CORE_PASSES_BACKWARD,
    STREAM_PASSES,
    STREAM_PASSES_BACKWARD,
    Accelerator,
    product,
)

_BYTES = 2  # of a bfloat16
_GEMM_SHARE = 0.7  # of peak, in a block
_CORE_SHARE = 0.35  # of peak, in attention's core: softmax takes its time between two products

# By the whole name that torch reports: "GH200", "H100 PCIe" and slices of a device are others.
# Source: NVIDIA's data sheets of the A100, H100 and H200 Tensor Core GPU, SXM form; those of the
# latter two give the rate with sparsity, twice this.
ACCELERATORS = {
    "NVIDIA A100-SXM4-40GB": Accelerator(flops=312e12, bandwidth=1.555e12),
    "NVIDIA A100-SXM4-80GB": Accelerator(flops=312e12, bandwidth=2.039e12),
    "NVIDIA H100 80GB HBM3": Accelerator(flops=989e12, bandwidth=3.35e12),
    "NVIDIA H200": Accelerator(flops=989e12, bandwidth=4.8e12),
}


def block_ms(device: Accelerator, layout: Layout, images: int, *, training: bool) -> float:
    """A nested block with F = 4 D, forward, or forward and backward when training.

    The projections and the MLP run class by class at the class's width; attention's core,
    norms and residual sums see all features of all tokens. A dense block has one class.

    Args:
        layout: Tokens of one image and their widths.
        images: Images in the batch.
    """
    num_tokens, dim = layout.segments[-1].stop, layout.dim
    rows = images * num_tokens
    classes = _classes(layout, images)
    linears = sum(
        _product(device, classes, wide, share=_GEMM_SHARE)
        for wide in (3 * dim, dim, 4 * dim, 4 * dim)
    )
    core_flops, features = 4 * rows * num_tokens * dim, _BYTES * rows * dim
    seconds = linears + device.seconds(core_flops, CORE_PASSES * features, _CORE_SHARE)
    seconds += STREAM_PASSES * features / device.bandwidth
    if training:
        seconds += 2 * linears + device.seconds(
            CORE_BACKWARD * core_flops, CORE_PASSES_BACKWARD * features, _CORE_SHARE
        )
        seconds += STREAM_PASSES_BACKWARD * features / device.bandwidth
    return 1e3 * seconds


def mlp_ms(
    device: Accelerator,
    classes: Sequence[tuple[int, int]],
    hidden: int,
    *,
    experts: int = 1,
    training: bool,
) -> float:
    """The two layers of an MLP, or of several that share the rows equally.

    Args:
        classes: Rows of all images and experts, and their width, for each width class.
        hidden: F.
    """
    forward = 2 * _product(device, classes, hidden, copies=experts)
    return 1e3 * (3 if training else 1) * forward  # two products backward for each forward


def experts_ms(
    device: Accelerator,
    slots: Sequence[tuple[int, int]],
    hidden: int,
    *,
    experts: int,
    out_features: int,
    training: bool,
) -> float:
    """Sparse experts on one device: the MLPs on their slots, dispatch and combine.

    Args:
        slots: Slots of all experts, filled or not, and their width, for each width class.
        hidden: F.
        out_features: Features that come out: R * D.
    """
    in_slots = sum(rows * dim for rows, dim in slots)
    # Dispatch reads and writes every slot; combine reads every slot and writes every token. Their
    # gradients do the same the other way round.
    moved = _BYTES * (3 * in_slots + out_features) / device.bandwidth
    products = mlp_ms(device, slots, hidden, experts=experts, training=training)
    return products + 1e3 * (2 if training else 1) * moved


def _classes(layout: Layout, images: int) -> list[tuple[int, int]]:
    return [(images * (each.stop - each.start), each.dim) for each in layout.segments]


def _product(
    device: Accelerator,
    classes: Sequence[tuple[int, int]],
    wide: int,
    *,
    copies: int = 1,
    share: float = 1.0,
) -> float:
    """Seconds of a linear layer between each class's width and a full one, either way round.

    Its two gradients touch the same three matrices, and so take as long each.
    """
    counts = [product(rows, dim, wide, copies) for rows, dim in classes]
    return sum(device.seconds(flops, _BYTES * elements, share) for flops, elements in counts)
