"""Every mesh of a run on a described cluster: estimates, best first, and why others are refused."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.topology import Mesh
from mone_core.models import ModelConfig
from pipelines.errors import UsageError
from pipelines.planning.clusters import Cluster
from pipelines.planning.estimate import Estimate, estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A mesh that a run cannot have.

    Attributes:
        reason: In words, with both numbers.
    """

    mesh: Mesh
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run would cost on a cluster.

    Attributes:
        fitting: The meshes that it can have, the shortest step first.
        refused: The others, fewest expert ranks first.
        assumptions: What the numbers rest on, a line each.
    """

    cluster: Cluster
    workers: int
    fitting: tuple[Estimate, ...]
    refused: tuple[Refused, ...]
    assumptions: tuple[str, ...]


def plan_run(
    model: ModelConfig,
    batch: int,
    cluster: Cluster,
    *,
    workers: int | None = None,
    budgets: Sequence[float] = (),
    together: bool = False,
) -> Plan:
    """Estimate every mesh of so many ranks.

    Only sparse experts are spread: a model without them has one mesh, of data ranks alone.

    Args:
        batch: Images of a step over all ranks.
        workers: Ranks; None: all devices of the cluster.
        budgets, together: What a step trains at, as in `estimate`.

    Raises:
        UsageError: More workers than devices, or none.
    """
    world = cluster.devices if workers is None else workers
    if not 1 <= world <= cluster.devices:
        raise UsageError(
            f"--workers must be 1 to {cluster.devices}, the devices of {cluster.name}, got "
            f"{world}; describe a larger cluster in a file of your own"
        )
    sparse = model.experts.placement != "none"
    columns = [n for n in range(1, world + 1) if world % n == 0] if sparse else [1]
    fitting, refused = [], []
    for mesh in (Mesh.of(world, n) for n in columns):
        reason = _does_not_divide(model, batch, mesh)
        found = (
            None
            if reason
            else estimate(model, batch, mesh, cluster, budgets=budgets, together=together)
        )
        if found and found.memory.total > cluster.room:
            reason = (
                f"does not fit memory: {found.memory.total / 1e9:.1f} GB of "
                f"{cluster.room / 1e9:.1f} GB a device"
            )
        if reason:
            refused.append(Refused(mesh=mesh, reason=reason))
        elif found:
            fitting.append(found)
    return Plan(
        cluster=cluster,
        workers=world,
        fitting=tuple(sorted(fitting, key=lambda each: (each.step_seconds, each.mesh.expert))),
        refused=tuple(refused),
        assumptions=tuple(_assumptions(model, cluster, budgets, together=together)),
    )


def as_plain(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values: bytes and seconds, nothing rounded."""
    return {
        "cluster": asdict(plan.cluster),
        "workers": plan.workers,
        "meshes": [
            asdict(each)
            | {
                "memory": asdict(each.memory) | {"total": each.memory.total},
                "step_seconds": each.step_seconds,
                "efficiency": each.efficiency,
                "images_per_second": each.images_per_second,
            }
            for each in plan.fitting
        ],
        "refused": [asdict(each) for each in plan.refused],
        "assumptions": list(plan.assumptions),
    }


def _does_not_divide(model: ModelConfig, batch: int, mesh: Mesh) -> str:
    """The first thing that the mesh cannot share out evenly, or nothing."""
    experts = model.experts
    if batch % mesh.world:
        return f"batch not divisible: {batch} images over {mesh.world} ranks"
    if experts.placement == "none":
        return ""
    if experts.num_experts % mesh.expert:
        return f"experts not divisible: {experts.num_experts} over {mesh.expert} ranks"
    if (batch // mesh.world) % experts.group_images:
        return (
            f"routing group not divisible: {batch // mesh.world} images of a rank in groups of "
            f"{experts.group_images}"
        )
    return ""


def _assumptions(
    model: ModelConfig, cluster: Cluster, budgets: Sequence[float], *, together: bool
) -> list[str]:
    n = cluster.numbers
    many = budgets or (model.nesting.effective_capacity,)
    at = f"effective capacity {many[0]:g}"
    if len(many) > 1:
        each = "all in every step" if together else "one a step, times and bytes are their mean"
        at = f"{len(many)} effective capacities from {min(many):g} to {max(many):g}, {each}"
    copy = "" if cluster.dtype == "float32" else f", a {cluster.dtype} copy of weights"
    fast = (
        f"{n.fast_bytes_per_second / 1e9:g} GB/s one way among {cluster.island} neighbouring ranks"
    )
    slow = (
        f", {n.slow_bytes_per_second / 1e9:g} GB/s beyond, both at once"
        if cluster.island < cluster.devices
        else ""
    )
    return [
        f"{model.family}; {at}; every rank has the same load",
        "train.microbatches 1 and parallel.shard false, whatever the recipe has",
        f"products: {_percent(n.product_share)} of {n.flops_per_second / 1e12:g} TFLOP/s in "
        f"{cluster.dtype}, attention's core half of that; or memory, where it is slower",
        f"memory traffic: {_percent(n.traffic_share)} of "
        f"{n.memory_bytes_per_second / 1e9:g} GB/s for norms and GELU, not fused; all of it for "
        f"the update of weights; "
        f"{1e6 * n.call_seconds:g} us a call of torch",
        f"links: {fast}{slow}; {_percent(n.exchange_share)} of it in an exchange of tokens "
        f"({cluster.dtype}), {_percent(n.reduction_share)} in the sum of gradients (float32)",
        "overlap: "
        + (
            "width classes travel while others are computed, widest first; gradients are summed "
            "behind the backward pass"
            if cluster.overlap
            else "none, communication and products follow each other"
        ),
        f"memory: {_percent(n.memory_share)} of {n.memory_bytes / 1e9:g} GB; float32 weights, "
        f"gradients and two moments{copy}; no recomputation; experts over expert ranks, all else "
        f"on every rank",
        "left out: reading data, evaluation, checkpoints, temporaries of one layer",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
