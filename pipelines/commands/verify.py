"""Compare shards and index with their manifest: files, sizes, hashes of every byte."""

import argparse
from collections.abc import Sequence

from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.verify import Progress, left_in, verify
from pipelines.errors import DatasetError
from pipelines.storage import Place, place
from pipelines.terminal import Meter, Terminal

EXAMPLE = "mone verify data/digits/train"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument(
        "folder",
        type=place,
        help="dataset folder with a manifest.json, or one of such folders; also s3:// or gs://",
    )
    args = parser.parse_args(arguments)
    terminal = Terminal()
    broken: list[str] = []
    for folder in datasets(args.folder):
        problems = _problems(folder, terminal)
        for problem in problems:
            terminal.say(f"{folder}: {problem}")
        broken += [f"{folder}: {problem}" for problem in problems]
        if not problems:
            manifest = read_manifest(folder)
            terminal.say(
                f"{manifest.samples} samples in {len(manifest.shards)} shards are whole: {folder}"
            )
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise DatasetError(f"{broken[0]}{more}; restore it or make the shards again")
    return 0


def _problems(folder: Place, terminal: Terminal) -> list[str]:
    left = left_in(folder)
    if left:
        return [f"has no {MANIFEST}, though it holds {left}"]
    with terminal.meter(f"verifying {folder}") as meter:
        return verify(folder, _progress(meter))


def _progress(meter: Meter) -> Progress:
    return lambda done, total: meter.update(done, total, f"{done / 1e6:.0f}/{total / 1e6:.0f} MB")


def datasets(folder: Place) -> list[Place]:
    """The folder itself if it is a dataset, else those that lie in it, unfinished ones too."""
    if (folder / MANIFEST).is_file() or not folder.is_folder():
        return [folder]
    inside = [folder / entry.name for entry in folder.entries() if entry.is_folder]
    return [each for each in inside if (each / MANIFEST).is_file() or left_in(each)] or [folder]
