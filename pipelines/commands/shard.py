"""Turn a raw archive (a folder of synset tars, as ImageNet-21K unpacks) into WebDataset shards.

Streaming and parallel on Ray Data. A second run does nothing; an interrupted one continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cluster.session import ray_session
from pipelines.data.archive import find_tars
from pipelines.data.manifest import read_manifest
from pipelines.data.plan import Part
from pipelines.data.shards import (
    SAMPLES_PER_SHARD,
    Progress,
    ShardingReport,
    add_archive,
    write_shards,
)
from pipelines.errors import UsageError
from pipelines.terminal import Meter, Terminal

EXAMPLE = "mone shard winter21/ data/imagenet21k --val-fraction 0.01"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    _add_arguments(parser)
    args = parser.parse_args(arguments)
    if not 0 <= args.val_fraction < 1:
        raise UsageError(f"--val-fraction is a share from 0 to below 1, got {args.val_fraction}")
    if args.append and (args.val_fraction or args.classes_of):
        raise UsageError("--append keeps the dataset's classes; leave out the other options")
    find_tars(args.archive)  # a wrong path is told at once, not after Ray has started
    terminal = Terminal()
    with ray_session(verbose=args.verbose):
        for out, part in _parts(args):
            report = _shard(args, out, part, terminal)
            terminal.say(_line(report))
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, help="folder of <synset>.tar files; left unchanged")
    parser.add_argument("out", type=Path, help="folder for the shards, manifest and index")
    parser.add_argument("--append", action="store_true", help="add as the dataset's next version")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        help="hold this share out: OUT/train and OUT/val, by a hash of each sample's key",
    )
    parser.add_argument("--classes-of", type=Path, help="take the labels of this dataset folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default 0)")
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="upper limit of a shard"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="stop above this share of bad images"
    )
    parser.add_argument("--verbose", action="store_true", help="let Ray write to the terminal too")


def _parts(args: argparse.Namespace) -> list[tuple[Path, Part]]:
    if not args.val_fraction:
        return [(args.out, "all")]
    return [(args.out / "train", "train"), (args.out / "val", "val")]


def _shard(args: argparse.Namespace, out: Path, part: Part, terminal: Terminal) -> ShardingReport:
    with terminal.meter(f"sharding {out}", "parts") as meter:
        progress = _progress(meter)
        if args.append:
            return add_archive(
                args.archive,
                out,
                samples_per_shard=args.samples_per_shard,
                max_bad_fraction=args.max_bad_fraction,
                progress=progress,
            )
        return write_shards(
            args.archive,
            out,
            seed=args.seed,
            samples_per_shard=args.samples_per_shard,
            max_bad_fraction=args.max_bad_fraction,
            classes=read_manifest(args.classes_of).classes if args.classes_of else None,
            part=part,
            val_fraction=args.val_fraction,
            progress=progress,
        )


def _progress(meter: Meter) -> Progress:
    return lambda what, done, total: meter.update(done, total, what)


def _line(report: ShardingReport) -> str:
    manifest = report.manifest
    if report.did_nothing:
        return (
            f"{report.folder} holds these {manifest.samples} samples in {len(manifest.shards)} "
            f"shards already; nothing to do"
        )
    skipped = f", {len(report.skipped)} skipped (named in manifest.json)" if report.skipped else ""
    return (
        f"{report.samples} samples{skipped}; version {manifest.version}: {manifest.samples} in "
        f"{len(manifest.shards)} shards of {len(manifest.classes)} classes -> {report.folder}"
    )
