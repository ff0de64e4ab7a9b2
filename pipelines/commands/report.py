"""Write a run's report: one self-contained HTML file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.run_report import REPORT, report_run

EXAMPLE = "mone report runs/digits"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("run", type=Path, help="a run's folder")
    args = parser.parse_args(arguments)
    report_run(args.run)
    print(f"report -> {args.run / REPORT}")
    return 0
