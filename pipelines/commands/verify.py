"""Compare shards and index with their manifest: counts, sizes, hashes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.data.manifest import read_manifest
from pipelines.data.verify import verify
from pipelines.errors import DatasetError

EXAMPLE = "mone verify data/digits/train"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("folder", type=Path, help="dataset folder with a manifest.json")
    args = parser.parse_args(arguments)
    problems = verify(args.folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DatasetError(f"{args.folder}: {problems[0]}{more}")
    manifest = read_manifest(args.folder)
    print(f"{manifest.samples} samples in {len(manifest.shards)} shards are whole: {args.folder}")
    return 0
