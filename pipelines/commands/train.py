"""Train one run from a recipe; the same command goes on where it stopped."""

import argparse
from collections.abc import Sequence

from pipelines.config import to_yaml
from pipelines.flags import add_run_arguments, run_config
from pipelines.terminal import Terminal
from pipelines.training import EXIT_CODES, train_run

EXAMPLE = "mone train --recipe digits --out runs/first --train.steps 1000"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    add_run_arguments(parser)
    args, flags = parser.parse_known_args(arguments)
    config = run_config(
        args.recipe, args.config, flags, command="train", help_config=args.help_config
    )
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    terminal = Terminal()
    trained = train_run(config, terminal, verbose=args.verbose)
    terminal.say(trained.summary)
    return EXIT_CODES[trained.outcome]
