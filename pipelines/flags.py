"""Recipe, then YAML file, then flags: how a command line becomes a `RunConfig`."""

import argparse
import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import tyro

from mone_core.errors import ConfigError
from pipelines.config import RunConfig, flatten, merge_yaml
from pipelines.errors import UsageError, unknown_name
from pipelines.recipes import get_recipe

_SHOW_ALL = "`mone train --recipe NAME --print-config` shows them all."


def add_run_arguments(parser: argparse.ArgumentParser, *, recipe: str | None = None) -> None:
    """Arguments of every command that takes a run: recipe, file, and where from there.

    Args:
        recipe: The recipe when none is named; None makes `--recipe` required.
    """
    parser.add_argument(
        "--recipe", default=recipe, required=recipe is None, help="see `mone recipes`"
    )
    parser.add_argument("--config", type=Path, help="YAML file of values laid over the recipe")
    parser.add_argument(
        "--print-config", action="store_true", help="print what would run, as YAML, and stop"
    )
    parser.add_argument("--verbose", action="store_true", help="let Ray write to the terminal too")
    parser.add_argument(
        "--help-config", action="store_true", help="list every flag that sets a config field"
    )


def run_config(
    recipe: str, file: Path | None, flags: Sequence[str], *, command: str, help_config: bool = False
) -> RunConfig:
    """Resolve a run's configuration.

    Args:
        recipe: Name of a recipe.
        file: YAML laid over the recipe.
        flags: `--train.steps 100` and the like, laid over both.
        command: The command, for the help text.
        help_config: Print every flag and exit.

    Raises:
        UsageError: An unknown recipe or field (with near matches) or a value of the wrong type.
        ConfigError: Values that cannot be.
    """
    config = get_recipe(recipe)
    if file is not None:
        if not file.is_file():
            raise UsageError(f"--config {file} does not exist; name a YAML file")
        config = merge_yaml(config, file.read_text(), source=str(file))
    arguments = ["--help"] if help_config else list(flags)
    return _with_flags(config, arguments, f"mone {command} --recipe {recipe}")


def _with_flags(config: RunConfig, flags: list[str], prog: str) -> RunConfig:
    output = io.StringIO()
    try:
        # tyro prints its errors as boxes; one line on stderr is what our commands promise.
        with contextlib.redirect_stderr(output):
            parsed, unknown = tyro.cli(
                RunConfig, default=config, args=flags, prog=prog, return_unknown_args=True
            )
    except SystemExit as exit_:
        if exit_.code == 0:
            raise
        if isinstance(exit_.__context__, ConfigError):
            raise exit_.__context__ from exit_
        raise UsageError(_one_line(output.getvalue())) from exit_
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise UsageError(unknown_name("config field", name, flatten(config), next_step=_SHOW_ALL))
    return parsed


def _one_line(boxed: str) -> str:
    """The words of tyro's framed message that say what is wrong.

    Its frame is drawn with box characters or, where the output is not UTF-8, with dashes.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    body = plain.partition("\n")[2]  # behind the title
    words = re.sub(r"[\u2500-\u257f]|-{3,}", " ", body)
    text = " ".join(re.split("Argument helptext:|For full helptext", words)[0].split())
    text = re.sub(r"^Error parsing (\S+):", r"\1:", text)
    return re.sub(r"^(\w+): \1:", r"\1:", text)
