"""Walk the whole way on this machine: archive, shards, training, evaluation, report.

Without --archive the data are real handwritten digits that come with the installation: on
cluttered canvases, or with --video moving over clutter, where the direction is the class.
Run it again and it goes on where it stopped. Flags such as --train.steps 500 change the run.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.config import RunConfig, to_yaml
from pipelines.demo import run_demo
from pipelines.errors import UsageError
from pipelines.flags import add_run_arguments, run_config
from pipelines.storage import place
from pipelines.terminal import Terminal

EXAMPLE = "mone demo --video --out demo_video"
# Recipe by (video?, own archive?).
RECIPES = {
    (False, False): "digits",
    (False, True): "photos",
    (True, False): "motion_vivit",
    (True, True): "clips",
}


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default demo/)")
    parser.add_argument("--video", action="store_true", help="clips instead of images")
    parser.add_argument(
        "--archive", help="data to use instead, in any layout that `mone shard` reads"
    )
    add_run_arguments(parser, recipe="")
    args, flags = parser.parse_known_args(arguments)
    recipe = args.recipe or RECIPES[args.video, args.archive is not None]
    config = run_config(recipe, args.config, flags, command="demo", help_config=args.help_config)
    if args.video and config.model.video.frames == 1:
        raise UsageError(
            f"--video needs a recipe of clips, and {recipe} takes images; leave out one of the two"
        )
    config = _in_folder(config, args.out)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    archive = None if args.archive is None else place(args.archive).absolute()
    return run_demo(config, args.out, archive, Terminal(), verbose=args.verbose)


def _in_folder(config: RunConfig, out: Path) -> RunConfig:
    """The same run with everything it leaves behind below one folder."""
    return replace(
        config,
        out=out / "run",
        data=replace(config.data, root=str(out / "shards"), embedded=None),
        tracking=replace(
            config.tracking, uri=f"sqlite:///{(out / 'mlruns' / 'mlflow.db').absolute()}"
        ),
    )
