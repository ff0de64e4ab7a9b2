"""Estimate memory, traffic and time of a recipe on a described cluster, for every mesh.

A mesh is data x expert ranks. Nothing is run: formulas and the cluster's numbers are all there is.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cluster.topology import Mesh
from pipelines.config import RunConfig
from pipelines.flags import run_config
from pipelines.planning.clusters import cluster_names, load_cluster
from pipelines.planning.estimate import Estimate
from pipelines.planning.meshes import Plan, as_plain, plan_run
from pipelines.terminal import Terminal

EXAMPLE = "mone plan mone_vit_b16 --cluster h100x64 --model.experts.placement every"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("recipe", help="see `mone recipes`; flags that set its fields come behind")
    parser.add_argument(
        "--cluster",
        required=True,
        help=f"{', '.join(cluster_names())}, or a file like theirs",
    )
    parser.add_argument("--workers", type=int, help="ranks (default: all devices of the cluster)")
    parser.add_argument("--config", type=Path, help="YAML file of values laid over the recipe")
    parser.add_argument("--json", action="store_true", help="print bytes and seconds as JSON")
    args, flags = parser.parse_known_args(arguments)
    config = run_config(args.recipe, args.config, flags, command="plan")
    plan = plan_run(
        config.model,
        config.train.batch_size,
        load_cluster(args.cluster),
        workers=args.workers,
        budgets=config.train.budgets,
        together=config.train.budgets_per_step == "all",
    )
    if args.json:
        print(json.dumps({"recipe": config.recipe} | as_plain(plan)))
        return 0
    show_plan(Terminal(), plan, own=_own_mesh(config))
    return 0


def show_plan(terminal: Terminal, plan: Plan, own: Mesh | None) -> None:
    """Three tables of the meshes that fit, best first; then the others, and what it all rests on.

    Args:
        own: The mesh that the recipe itself asks for, to be marked.
    """
    terminal.say(f"{plan.workers} of {plan.cluster.devices} devices: {plan.cluster.what}")
    names = [_name(each.mesh, own) for each in plan.fitting]
    for title, header, row in _TABLES if plan.fitting else ():
        rows = [(name, *row(each)) for name, each in zip(names, plan.fitting, strict=True)]
        terminal.table(title, ("mesh", *header), rows)
    if plan.refused:
        rows = [(_name(each.mesh, own), each.reason) for each in plan.refused]
        terminal.table("refused", ("mesh", "reason"), rows)
    terminal.say("mesh: data x expert ranks; * is the recipe's own")
    for each in plan.assumptions:
        terminal.say(f"assumed: {each}")
    best = f"best: {names[0]}" if plan.fitting else "no mesh fits"
    terminal.say(f"{len(plan.fitting)} of {len(plan.fitting) + len(plan.refused)} meshes; {best}")


def _name(mesh: Mesh, own: Mesh | None) -> str:
    return f"{mesh.data} x {mesh.expert}" + (" *" if mesh == own else "")


def _own_mesh(config: RunConfig) -> Mesh | None:
    """The recipe's table of ranks; of XLA devices its workers do not tell it."""
    parallel = config.parallel
    return None if parallel.device == "xla" else Mesh.of(parallel.num_workers, parallel.expert)


def _time(each: Estimate) -> tuple[str, ...]:
    return (
        *_scaled(
            1e3, each.gemm_seconds, each.other_seconds, each.exposed_seconds, each.step_seconds
        ),
        f"{100 * each.efficiency:.0f} %",
        f"{each.images_per_second:.0f}",
    )


def _traffic(each: Estimate) -> tuple[str, ...]:
    return (
        str(each.images),
        *_scaled(1e-6, each.exchange_bytes),
        *_scaled(1e3, each.exchange_seconds),
        *_scaled(1e-6, each.reduction_bytes),
        *_scaled(1e3, each.reduction_seconds),
    )


def _memory(each: Estimate) -> tuple[str, ...]:
    of = each.memory
    parts = (of.weights, of.gradients, of.moments, of.activations, of.exchange, of.total)
    return _scaled(1e-6, *parts)


def _scaled(factor: float, *values: float) -> tuple[str, ...]:
    """Three digits or more."""
    return tuple(f"{factor * each:.{0 if factor * each >= 100 else 2}f}" for each in values)


_TABLES = (
    (
        "a training step, in ms",
        ("GEMM", "other", "exposed", "step", "efficiency", "images/s"),
        _time,
    ),
    (
        "what leaves a rank in a step",
        ("images", "tokens MB", "ms", "gradients MB", "ms"),
        _traffic,
    ),
    (
        "memory of a device, in MB",
        ("weights", "gradients", "moments", "activations", "exchange", "total"),
        _memory,
    ),
)
