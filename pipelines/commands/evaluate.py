"""Evaluate one set of weights at many compute budgets: accuracy, MACs, latency."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.results import RESULTS, Results
from pipelines.run_report import evaluate_run
from pipelines.skipped import SKIPPED
from pipelines.terminal import Terminal

EXAMPLE = "mone evaluate runs/digits --effective-capacity 0.2 0.3 0.4 0.5 0.7 1.0"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("run", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument(
        "--effective-capacity",
        type=float,
        nargs="+",
        metavar="E_C",
        help="mean width per token over the full width; several are evaluated with one model "
        "(default: the usual ones that the model can meet)",
    )
    parser.add_argument("--k", type=int, help="sparse experts: how many a token chooses")
    parser.add_argument("--capacity-ratio", type=float, help="sparse experts: slots over choices")
    parser.add_argument(
        "--batch-priority",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="sparse experts: fill slots by score instead of by position",
    )
    parser.add_argument(
        "--data.read.on_corrupt",
        "--data.read.on-corrupt",
        choices=("raise", "skip"),
        help="what a sample does that does not decode (default: as in training)",
    )
    parser.add_argument(
        "--data.read.corrupt_share",
        "--data.read.corrupt-share",
        type=float,
        metavar="SHARE",
        help="samples that may be skipped (default: as in training)",
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead")
    args = parser.parse_args(arguments)
    asked = args.effective_capacity
    results = evaluate_run(
        args.run,
        tuple(dict.fromkeys(asked)) if asked else None,
        sparse=_given(args, "", "k", "capacity_ratio", "batch_priority"),
        read=_given(args, "data.read.", "on_corrupt", "corrupt_share"),
    )
    if args.json:
        print(json.dumps(asdict(results)))
        return 0
    terminal = Terminal()
    show_results(terminal, results)
    if results.skipped:
        terminal.say(f"warning: {results.skipped} skipped, named in {args.run / SKIPPED}")
    terminal.say(f"{len(results.settings)} budgets -> {args.run / RESULTS}")
    return 0


def _given(args: argparse.Namespace, prefix: str, *names: str) -> dict[str, Any]:
    """Those of some options that were given, without their prefix."""
    values = {name: getattr(args, prefix + name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def show_results(terminal: Terminal, results: Results) -> None:
    """The short table of an evaluation."""
    terminal.table(
        f"{results.name}, step {results.step}: one set of weights, "
        f"{results.settings[0].samples} validation samples"
        f"{f', {results.skipped} skipped' if results.skipped else ''}",
        ("effective capacity", "MMACs", "accuracy", "latency ms", "samples/s"),
        [
            (
                f"{s.effective_capacity:.2f}",
                f"{s.macs / 1e6:.2f}",
                f"{100 * s.accuracy:.1f} %",
                f"{s.latency_ms:.2f}",
                f"{s.images_per_second:.0f}",
            )
            for s in results.settings
        ],
    )
