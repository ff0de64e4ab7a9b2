"""The command line: finds the verb, runs it, and turns our errors into one line.

Exit codes: 0 success, 1 our failure (with a traceback), 2 a user's mistake (one line), 3
stopped after a checkpoint, 130 interrupted at once. What a verb does is in `commands/`, one file
a verb, loaded only when it is asked for.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from cluster.errors import ClusterError
from pipelines.errors import PipelineError, RunFailedError, UsageError, unknown_name

VERBS = {
    "demo": "the whole way on embedded real data, in minutes, on this machine",
    "shard": "raw archive of images or videos -> WebDataset shards",
    "verify": "shards against their manifest",
    "train": "one run from a recipe; goes on by itself where it stopped",
    "evaluate": "one run at many compute budgets",
    "report": "a run as one HTML file",
    "sweep": "one run per compute budget, as Ray Tune trials",
    "retrain": "new data -> train on from the champion -> compare -> promote or not",
    "submit": "any of these as a job on a Ray cluster, followed to its end",
    "plan": "memory, traffic and time of a recipe on a described cluster, for every mesh",
    "schedule": "the manifest that runs retrain on a schedule",
    "verify-parallel": "prove that several processes train as one does, on this machine",
    "recipes": "list the recipes",
}


class Parser(argparse.ArgumentParser):
    """argparse that raises our error instead of printing a usage block."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('mone ')}: {message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry of `mone` and of `python -m pipelines`."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        Its exit code; the errors that a user can mend have been printed.
    """
    try:
        return _dispatch(list(arguments))
    except (PipelineError, ClusterError) as error:
        print(f"mone: {error}", file=sys.stderr)
        return 2
    except RunFailedError as error:
        print(f"mone: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mone: interrupted; what is finished stays", file=sys.stderr)
        return 130
    except ValueError as error:
        if type(error).__module__ != "mone_core.errors":  # not imported here: torch is slow
            raise
        print(f"mone: {error}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise UsageError(unknown_name("command", verb, VERBS, next_step="`mone --help` lists all."))
    command = importlib.import_module(f"pipelines.commands.{verb.replace('-', '_')}")
    parser = Parser(
        prog=f"mone {verb}",
        description=command.__doc__,
        epilog=f"Example: {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result: int = command.main(parser, rest)
    return result


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "mone: train vision transformers that spend compute where it matters",
            "",
            "usage: mone COMMAND ...   (mone COMMAND --help tells more)",
            "",
            *lines,
        ]
    )
