"""What a recipe comes to, as text: its whole configuration, its parameters, what it costs.

`python -m tests.golden.write` writes one file a recipe beside this one. They are kept under
version control: a change that should change nothing shows no difference.
"""

from pathlib import Path

import torch

from mone_core.models import build_model
from pipelines.config import to_yaml
from pipelines.recipes import RECIPES

FOLDER = Path(__file__).parent
BUDGETS = (0.2, 0.5, 1.0)


def golden(recipe: str) -> str:
    """The text of one recipe."""
    config = RECIPES[recipe]()
    with torch.device("meta"):  # names and shapes only: a ViT-B costs nothing
        model = build_model(config.model)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    lines = [to_yaml(config).rstrip(), "", "parameters:"]
    lines += [f"  {name} {shape}" for name, shape in shapes.items()]
    lines += [f"  in all {sum(p.numel() for p in model.parameters()):,}", "", "MACs of an image:"]
    for budget in config.model.nesting.reachable(BUDGETS):
        model.set_effective_capacity(budget)
        counts = list(model.encoder.plan.counts)
        lines.append(f"  e_c {budget}: {model.macs():,} with tokens {counts}")
    return "\n".join(lines) + "\n"


def golden_file(recipe: str) -> Path:
    """Where a recipe's text is kept."""
    return FOLDER / f"{recipe}.txt"


def write_all() -> None:
    """Write every recipe's file, and remove those of recipes that are gone."""
    for path in FOLDER.glob("*.txt"):
        path.unlink()
    for recipe in RECIPES:
        golden_file(recipe).write_text(golden(recipe))
        print(f"{recipe} -> {golden_file(recipe)}")


if __name__ == "__main__":
    write_all()
