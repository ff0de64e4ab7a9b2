"""How the journeys start `mone`, and flags that make a training short."""

import os
import sys
from collections.abc import Iterable

# Enough to pass through every hop, far too little to learn.
SHORT = (
    *("--train.steps", "40", "--train.log-every", "5"),
    *("--train.checkpoint-every", "10", "--train.eval-every", "20"),
    *("--train.eval-budgets", "0.5", "--optim.warmup-steps", "5"),
)


def environment() -> dict[str, str]:
    """This process's environment without what would send a command to another cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def command_line(arguments: Iterable[object]) -> list[str]:
    """`mone ...` for this interpreter."""
    return [sys.executable, "-m", "pipelines", *map(str, arguments)]
