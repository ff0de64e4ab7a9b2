"""Add new data to a dataset, train on from the champion, and promote the model if it is not worse.

The new archive becomes the next version of the dataset's training part; old shards stay as they
are. One retraining at a time per dataset.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.config import to_yaml
from pipelines.errors import UsageError
from pipelines.flags import add_run_arguments, run_config
from pipelines.retrain import run_retraining
from pipelines.storage import place
from pipelines.terminal import Terminal

EXAMPLE = "mone retrain --archive new_tars/ --recipe digits --train.steps 500"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument(
        "--archive", required=True, help="new samples, in any layout that `mone shard` reads"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="accuracy that the challenger may lose at a budget; below 0: must gain (default 0)",
    )
    parser.add_argument("--out", type=Path, help="folder (default runs/retrain_RECIPE)")
    add_run_arguments(parser)
    args, flags = parser.parse_known_args(arguments)
    if not -1 <= args.tolerance <= 1:
        raise UsageError(
            f"--tolerance is a difference of accuracies, -1 to 1, got {args.tolerance}"
        )
    config = run_config(
        args.recipe, args.config, flags, command="retrain", help_config=args.help_config
    )
    config = replace(config, out=args.out or Path("runs") / f"retrain_{args.recipe}")
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    terminal = Terminal()
    verdict = run_retraining(
        place(args.archive).absolute(),
        config,
        terminal,
        tolerance=args.tolerance,
        verbose=args.verbose,
    )
    terminal.say(f"report -> {verdict.report}")
    return 0
