"""Walk the whole way on this machine: archive, shards, training, evaluation, report.

Without --archive the data are real handwritten digits that come with the installation.
Run it again and it goes on where it stopped. Flags such as --train.steps 500 change the run.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.config import RunConfig, to_yaml
from pipelines.demo import run_demo
from pipelines.flags import add_run_arguments, run_config
from pipelines.terminal import Terminal

EXAMPLE = "mone demo --out demo"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default demo/)")
    parser.add_argument("--archive", type=Path, help="folder of synset tars to use instead")
    add_run_arguments(parser, recipe="")
    args, flags = parser.parse_known_args(arguments)
    recipe = args.recipe or ("photos" if args.archive else "digits")
    config = run_config(recipe, args.config, flags, command="demo", help_config=args.help_config)
    config = _in_folder(config, args.out)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    return run_demo(config, args.out, args.archive, Terminal(), verbose=args.verbose)


def _in_folder(config: RunConfig, out: Path) -> RunConfig:
    """The same run with everything it leaves behind below one folder."""
    return replace(
        config,
        out=out / "run",
        data=replace(config.data, root=out / "shards", embedded=None),
        tracking=replace(
            config.tracking, uri=f"sqlite:///{(out / 'mlruns' / 'mlflow.db').absolute()}"
        ),
    )
