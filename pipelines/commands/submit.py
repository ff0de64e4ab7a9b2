"""Run any mone command as a job on a Ray cluster and follow its log to its end.

The command's own exit code becomes this one's. Ctrl-C stops following, not the job.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.jobs import submit
from pipelines.cli import VERBS
from pipelines.errors import UsageError, unknown_name

EXAMPLE = "mone submit --address http://127.0.0.1:8265 -- train --recipe digits"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("--address", required=True, help="job server, such as http://HOST:8265")
    parser.add_argument("--submission-id", help="name of the job; a known one is followed again")
    parser.add_argument("--working-dir", type=Path, help="folder to send along and run in")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment of the job"
    )
    parser.add_argument("command", nargs="+", help="after --, the command and its flags")
    own, command = _split(list(arguments))
    args = parser.parse_args([*own, "--", *command])
    if args.command[0] not in VERBS:
        raise UsageError(
            unknown_name("command", args.command[0], VERBS, next_step="`mone --help` lists all.")
        )
    outcome = submit(
        args.address,
        args.command,
        submission_id=args.submission_id,
        working_dir=args.working_dir,
        env=_environment(args.env),
        write=_write,
    )
    print(f"{outcome.submission_id}: {outcome.status.lower()}; {outcome.message}")
    return outcome.exit_code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the command behind `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--env takes NAME=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)
