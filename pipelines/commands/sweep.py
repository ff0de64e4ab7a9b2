"""Train a recipe once per compute budget as Ray Tune trials, and report them together."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.config import to_yaml
from pipelines.flags import add_run_arguments, run_config
from pipelines.sweep import run_sweep
from pipelines.terminal import Terminal

EXAMPLE = "mone sweep --recipe digits --effective-capacity 0.3 0.5 0.7"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("--effective-capacity", type=float, nargs="+", required=True, metavar="E_C")
    parser.add_argument("--out", type=Path, help="folder of the sweep (default runs/sweep_RECIPE)")
    add_run_arguments(parser)
    args, flags = parser.parse_known_args(arguments)
    config = run_config(
        args.recipe, args.config, flags, command="sweep", help_config=args.help_config
    )
    config = replace(config, out=args.out or Path("runs") / f"sweep_{args.recipe}")
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    terminal = Terminal()
    sweep = run_sweep(config, args.effective_capacity, terminal, verbose=args.verbose)
    terminal.table(
        "one run per budget",
        ("effective capacity", "MMACs", "accuracy", "latency ms"),
        [
            (
                f"{s.effective_capacity:.2f}",
                f"{s.macs / 1e6:.2f}",
                f"{100 * s.accuracy:.1f} %",
                f"{s.latency_ms:.2f}",
            )
            for result in sweep.results
            for s in result.settings
        ],
    )
    terminal.say(f"{len(sweep.results)} trials -> {sweep.report}")
    return 0
