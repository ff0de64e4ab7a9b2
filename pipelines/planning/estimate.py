"""Memory and time of a training step on one mesh of a described cluster, by formula.

The step is any rank's: capacities are constants and nested widths are shared out per image, so all
ranks have the same load and none waits for another. Experts are spread over a row of
the mesh, all else is on every rank. What is counted comes from `work`, seconds from
`compute` and `links`; which meshes there are, and why one is refused, is in `meshes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.topology import Mesh
from mone_core.flops import nested_features
from mone_core.models import ModelConfig
from pipelines.planning.clusters import Cluster
from pipelines.planning.compute import (
    expert_seconds,
    gemm_seconds,
    other_seconds,
    update_seconds,
)
from pipelines.planning.links import Exchange, exchange, reduction
from pipelines.planning.work import Work, work_of

_FLOAT = 4  # bytes of weights, gradients, moments and the residual stream


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one device.

    Attributes:
        weights: In float32, and once more in the cluster's dtype where that is another.
        gradients: In float32.
        moments: Both of AdamW's, in float32.
        activations: What the forward pass keeps for the backward pass.
        exchange: One layer's tokens on their way to experts: sent and received.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    exchange: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.activations + self.exchange


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One training step on one mesh; bytes and seconds are one rank's.

    Attributes:
        mesh: Rows that replicate, columns that share the experts.
        images: Images of a rank.
        memory: Of a device, at the budget that needs most.
        exchange_bytes: Tokens that leave the rank, in all exchanges of all sparse layers.
        exchange_seconds: How long they take, hidden or not.
        reduction_bytes: Gradients that leave the rank.
        reduction_seconds: How long they take, hidden or not.
        gemm_seconds: All products, at the share of peak of the cluster's description.
        other_seconds: What memory and softmax add: norms, GELU, moving tokens to slots, the update.
        exposed_seconds: Communication that hides behind nothing.
    """

    mesh: Mesh
    images: int
    memory: Memory
    exchange_bytes: float
    exchange_seconds: float
    reduction_bytes: float
    reduction_seconds: float
    gemm_seconds: float
    other_seconds: float
    exposed_seconds: float

    @property
    def step_seconds(self) -> float:
        """The whole step."""
        return self.gemm_seconds + self.other_seconds + self.exposed_seconds

    @property
    def efficiency(self) -> float:
        """Share of the step that is products."""
        return self.gemm_seconds / self.step_seconds

    @property
    def images_per_second(self) -> float:
        """Of all ranks together."""
        return self.mesh.world * self.images / self.step_seconds


def estimate(
    model: ModelConfig,
    batch: int,
    mesh: Mesh,
    cluster: Cluster,
    *,
    budgets: Sequence[float] = (),
    together: bool = False,
) -> Estimate:
    """What a training step takes.

    Args:
        model: The model.
        batch: Images of a step over all ranks; whole routing groups on each.
        mesh: Of no more ranks than the cluster has.
        cluster: The machines.
        budgets: Effective capacities that are trained at; none: the model's own.
        together: A step computes all budgets; otherwise one of them, and times and bytes are
            means over budgets.

    Raises:
        CapacityError: A budget is out of reach, or experts are dropless: slots are counted here.
        UsageError: The model takes clips.
    """
    images = batch // mesh.world
    works = [work_of(model, each) for each in budgets or (model.nesting.effective_capacity,)]
    exchanges = [each for work in works for each in _exchanges(work, images, mesh, cluster)]
    share = 1.0 if together else 1 / len(works)
    gemm = share * sum(gemm_seconds(work, images, cluster) for work in works)
    other = share * sum(other_seconds(work, images, mesh.expert, cluster) for work in works)
    experts = works[0].expert_parameters / mesh.expert
    held = works[0].dense_parameters + experts
    reduced, reducing = reduction(works[0].dense_parameters, experts, mesh, cluster)
    backward = gemm * 2 / 3 if cluster.overlap else 0.0  # what the reduction can hide behind
    return Estimate(
        mesh=mesh,
        images=images,
        memory=_memory(works, images, mesh, cluster, held=held, together=together),
        exchange_bytes=share * sum(each.num_bytes for each in exchanges),
        exchange_seconds=share * sum(each.seconds for each in exchanges),
        reduction_bytes=reduced,
        reduction_seconds=reducing,
        gemm_seconds=gemm,
        other_seconds=other + update_seconds(held, cluster),
        exposed_seconds=share * sum(each.exposed_seconds for each in exchanges)
        + max(0.0, reducing - backward),
    )


def _exchanges(work: Work, images: int, mesh: Mesh, cluster: Cluster) -> list[Exchange]:
    """Of every sparse layer: the forward pass, and the backward pass with twice the products."""
    found = []
    for layer in work.layers:
        if slots := layer.rows_of_experts(images):
            forward = expert_seconds(layer, work.config, images, mesh.expert, cluster)
            backward = [2 * each for each in forward]
            found += [exchange(slots, each, mesh, cluster) for each in (forward, backward)]
    return found


def _memory(
    works: Sequence[Work],
    images: int,
    mesh: Mesh,
    cluster: Cluster,
    *,
    held: float,
    together: bool,
) -> Memory:
    """Of a device that holds so many parameters."""
    copy = cluster.item if cluster.item != _FLOAT else 0
    kept = [_activations(work, images, cluster) for work in works]
    travelling = [
        2 * cluster.item * sum(slots * dim for slots, dim in layer.rows_of_experts(images))
        for work in works
        for layer in work.layers
    ]
    return Memory(
        weights=(_FLOAT + copy) * held,
        gradients=_FLOAT * held,
        moments=2 * _FLOAT * held,
        activations=sum(kept) if together else max(kept),
        exchange=max(travelling) if mesh.expert > 1 else 0.0,
    )


def _activations(work: Work, images: int, cluster: Cluster) -> float:
    """Bytes that the blocks keep from the forward for the backward pass."""
    config, item = work.config, cluster.item
    total = float(_FLOAT * 3 * config.image_size**2 * images)
    for layer in work.layers:
        rows = images * layer.num_tokens
        # The stream before either norm; and normed for attention; q, k, v; mixed, as made and as
        # read; normed for the MLP. Log-sums of attention's softmax.
        total += rows * config.dim * (2 * _FLOAT + (1 + 3 + 2 + 1) * item)
        total += _FLOAT * rows * config.heads
        if slots := layer.rows_of_experts(images):  # in and out of experts; GELU's input and output
            total += 2 * item * sum(count * (dim + layer.hidden) for count, dim in slots)
        else:
            total += 2 * item * rows * layer.hidden
            total += item * images * nested_features(layer.tokens) if layer.gated else 0
    return total
