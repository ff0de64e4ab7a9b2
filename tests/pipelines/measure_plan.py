"""What `mone plan` says of this kind of machine against what gloo processes here take.

`python -m tests.pipelines.measure_plan` computes training steps of some models on two processes,
for both tables of ranks, and prints planned over measured time. Nothing else may run meanwhile.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from cluster.topology import Mesh
from mone_core.losses import softmax_loss
from mone_core.models import build_model
from mone_core.parallel import expert_parameters, spread
from pipelines.config import RunConfig
from pipelines.gradients import clip_gradients, compute_gradients
from pipelines.optim import build_optimizer
from pipelines.planning.clusters import load_cluster
from pipelines.planning.estimate import estimate
from pipelines.recipes import get_recipe
from tests.pipelines.tiny import on_ranks

ROUNDS, WARM_UP = 3, 2


def wider(recipe: str) -> RunConfig:
    """A recipe of the demo's with four times the width and a quarter of the images."""
    config = get_recipe(recipe)
    model = replace(config.model, dim=256)
    experts = replace(model.experts, group_images=4)
    return replace(
        config,
        recipe=f"{recipe}, D=256",
        model=replace(model, experts=experts),
        train=replace(config.train, batch_size=16),
    )


def other(recipe: str) -> RunConfig:
    """Another depth, width and batch, twice the experts and choices: nothing is fitted to it."""
    config = get_recipe(recipe)
    experts = replace(config.model.experts, num_experts=8, k=2, group_images=4)
    if config.model.experts.placement == "none":
        experts = config.model.experts
    return replace(
        config,
        recipe=f"{recipe}, D=160 L=6 K=2",
        model=replace(config.model, dim=160, depth=6, heads=5, experts=experts),
        train=replace(config.train, batch_size=24),
    )


# `local.yaml` is fitted to the first of these; the wider ones and the others check it.
CASES = (
    get_recipe("digits"),
    get_recipe("digits_vmoe"),
    get_recipe("digits_nested_vmoe"),
    wider("digits"),
    wider("digits_vmoe"),
    wider("digits_nested_vmoe"),
    other("digits"),
    other("digits_vmoe"),
    other("digits_nested_vmoe"),
)


def measure(backend, out: Path) -> None:
    """Runs on every rank: the mean over budgets of the median step, in seconds, per case."""
    taken = []
    for config in CASES:
        if config.model.experts.placement == "none" and backend.expert_ranks > 1:
            taken.append(None)
            continue
        taken.append(step_seconds(config, backend))
    if backend.rank == 0:
        out.write_text(json.dumps(taken))


def step_seconds(config: RunConfig, backend) -> float:
    """One training step without reading data."""
    torch.manual_seed(0)
    model = build_model(config.model)
    spread(model, backend)
    experts = frozenset(expert_parameters(model))
    placed = backend.place(model, experts)
    optimizer = build_optimizer(model, config.optim)
    images = config.train.batch_size // backend.world
    pixels = torch.randn(images, 3, config.model.image_size, config.model.image_size)
    labels = torch.randint(config.model.num_classes, (images,))

    def losses_of(_index):
        output = placed(pixels)
        return (softmax_loss(output.logits_BK, labels).mean() + output.aux_loss).reshape(1)

    times = {budget: [] for budget in config.train.budgets}
    for round_ in range(WARM_UP + ROUNDS):
        for budget, of_budget in times.items():
            model.set_effective_capacity(budget)
            for _ in range(3):
                backend.barrier("starting together")
                start = time.perf_counter()
                compute_gradients(placed, backend, 1, losses_of)
                clip_gradients(model, experts, config.optim.clip_norm, backend)
                optimizer.step()
                if round_ >= WARM_UP:
                    of_budget.append(time.perf_counter() - start)
    return statistics.mean(statistics.median(each) for each in times.values())


def main() -> None:
    """Measure, and print the table."""
    cluster = load_cluster("local")
    print(f"{'model':32} {'mesh':>6} {'planned ms':>11} {'measured ms':>12} {'ratio':>6}")
    for expert in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            on_ranks(measure, Path(folder), Path(folder) / "taken", world=2, expert=expert)
            taken = json.loads((Path(folder) / "taken").read_text())
        for config, seconds in zip(CASES, taken, strict=True):
            if seconds is None:
                continue
            mesh = Mesh.of(2, expert)
            planned = estimate(
                config.model,
                config.train.batch_size,
                mesh,
                cluster,
                budgets=config.train.budgets,
                together=False,
            ).step_seconds
            name = f"{mesh.data} x {mesh.expert}"
            print(
                f"{config.recipe:32} {name:>6} {1e3 * planned:11.1f} {1e3 * seconds:12.1f} "
                f"{planned / seconds:6.2f}"
            )


if __name__ == "__main__":
    main()
