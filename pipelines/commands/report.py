"""Write a run's report: one self-contained HTML file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.publish import publish_report
from pipelines.run_report import REPORT

EXAMPLE = "mone report runs/digits"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("run", type=Path, help="a run's folder")
    args = parser.parse_args(arguments)
    problem = publish_report(args.run)
    print(f"report -> {args.run / REPORT}")
    if problem:
        print(f"warning: MLflow did not take it: {problem}")
    return 0
