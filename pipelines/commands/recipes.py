"""List the recipes and what each is."""

import argparse
import inspect
from collections.abc import Sequence

from pipelines.recipes import RECIPES

EXAMPLE = "mone recipes"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.parse_args(arguments)
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"{name:<{width}}  {(inspect.getdoc(recipe) or '').splitlines()[0]}")
    return 0
