"""Turn a raw archive of images or videos into WebDataset shards, manifest and index.

Streaming and parallel on Ray Data. A second run does nothing; an interrupted one continues.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence

from cluster.session import ray_session
from pipelines.data.manifest import MANIFEST, Resized, read_manifest
from pipelines.data.sharding.shards import (
    SAMPLES_PER_SHARD,
    Progress,
    ShardingReport,
    add_archive,
    add_parts,
    parts_of,
    write_parts,
)
from pipelines.data.sources import LAYOUTS, find_source
from pipelines.data.sources.base import Source
from pipelines.errors import UsageError
from pipelines.storage import Place, place
from pipelines.terminal import Meter, Terminal

EXAMPLE = "mone shard winter21/ data/imagenet21k --val-fraction 0.01"
QUALITY = 90


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    _add_arguments(parser)
    args = parser.parse_args(arguments)
    if args.append and (args.classes or args.resize is not None):
        raise UsageError(
            "--append keeps the dataset's classes and size of images; leave out --classes and "
            "--resize"
        )
    if args.quality is not None and args.resize is None:
        raise UsageError(f"--quality {args.quality} is that of --resize; give both or neither")
    classes = read_classes(args.classes) if args.classes else None
    source = find_source(args.archive, args.layout)
    terminal = Terminal()
    with ray_session(verbose=args.verbose):
        began = time.monotonic()
        with terminal.meter(f"sharding {args.out}") as meter:
            reports = _shard(source, classes, args, _progress(meter))
        seconds = time.monotonic() - began
    for report in reports:
        for line in _lines(report):
            terminal.say(line)
    if any(not report.did_nothing for report in reports):
        terminal.say(_throughput(reports, seconds))
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "archive", type=place, help="folder, tar or tar.gz, also s3:// or gs://; left unchanged"
    )
    parser.add_argument("out", type=place, help="folder for the shards, also s3:// or gs://")
    parser.add_argument(
        "--layout", choices=["auto", *LAYOUTS], default="auto", help="of the archive"
    )
    parser.add_argument("--append", action="store_true", help="add as the dataset's next version")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        help="hold this share out: OUT/train and OUT/val, by a hash of each sample's key",
    )
    parser.add_argument(
        "--classes",
        type=place,
        help="classes in label order: a file of one name a line, or a dataset folder",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default 0)")
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="upper limit of a shard"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="stop above this share of bad files"
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="re-encode images with a short side of at most this (default: original bytes)",
    )
    parser.add_argument(
        "--quality", type=int, help=f"JPEG quality of re-encoded images (default {QUALITY})"
    )
    parser.add_argument("--verbose", action="store_true", help="let Ray write to the terminal too")


def read_classes(where: Place) -> tuple[str, ...]:
    """Class names in label order, from a file of one a line or from a dataset folder.

    Raises:
        UsageError: There is neither, or the file holds no name, or one twice.
    """
    if not where.is_file():
        if not (where / MANIFEST).is_file():
            raise UsageError(
                f"--classes {where} is neither a file of class names, one a line, nor a dataset "
                f"folder with a {MANIFEST}"
            )
        return read_manifest(where).classes
    try:
        names = tuple(line.strip() for line in where.read_bytes().decode().splitlines())
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {where} is no text in UTF-8: {error}") from error
    names = tuple(name for name in names if name)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        what = f"names {twice[0]!r} twice" if twice else "holds no names"
        raise UsageError(f"--classes {where} {what}; write every class on a line of its own")
    return names


def _shard(
    source: Source,
    classes: tuple[str, ...] | None,
    args: argparse.Namespace,
    progress: Progress,
) -> tuple[ShardingReport, ...]:
    if not args.append:
        return write_parts(
            source,
            args.out,
            val_fraction=args.val_fraction,
            seed=args.seed,
            samples_per_shard=args.samples_per_shard,
            max_bad_fraction=args.max_bad_fraction,
            classes=classes,
            resized=_resized(args),
            progress=progress,
        )
    parts = parts_of(source, args.out, args.val_fraction)
    if any((part.out / MANIFEST).is_file() for part in parts):
        return add_parts(
            source,
            args.out,
            val_fraction=args.val_fraction,
            samples_per_shard=args.samples_per_shard,
            max_bad_fraction=args.max_bad_fraction,
            progress=progress,
        )
    if parts[0].out != args.out.absolute() and (args.out / MANIFEST).is_file():
        raise UsageError(
            f"--append to {args.out}, which is one dataset, would mix the parts of the archive "
            f"({', '.join(part.name for part in parts)}); give the folder that holds one for each"
        )
    return (
        add_archive(
            source,
            args.out,
            samples_per_shard=args.samples_per_shard,
            max_bad_fraction=args.max_bad_fraction,
            progress=progress,
        ),
    )


def _resized(args: argparse.Namespace) -> Resized | None:
    if args.resize is None:
        return None
    quality = QUALITY if args.quality is None else args.quality
    return Resized(short_side=args.resize, quality=quality)


def _progress(meter: Meter) -> Progress:
    def tell(stage: str, done: int, total: int) -> None:
        counts = f"{done / 2**30:.1f}/{total / 2**30:.1f} GiB" if stage == "spool" else ""
        meter.update(done, total, f"{stage} {counts or f'{done}/{total}'}")

    return tell


def _lines(report: ShardingReport) -> list[str]:
    manifest = report.manifest
    if report.did_nothing:
        known = f", {report.known} of them in this archive" if report.known else ""
        skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
        return [
            f"{report.folder} holds {manifest.samples} samples in {len(manifest.shards)} shards "
            f"already{known}{skipped}; nothing to do"
        ]
    known = f", {report.known} there already (same key)" if report.known else ""
    skipped = f", {len(report.skipped)} skipped (named in {MANIFEST})" if report.skipped else ""
    lines = [
        f"{report.samples} samples{known}{skipped}; version {manifest.version}: "
        f"{manifest.samples} in {len(manifest.shards)} shards of {len(manifest.classes)} classes "
        f"-> {report.folder}"
    ]
    reasons = Counter(skipped.reason.partition(":")[0] for skipped in report.skipped)
    lines += [f"  skipped {count}: {reason}" for reason, count in reasons.most_common()]
    lines += [f"  remark on {count}: {remark}" for remark, count in manifest.remarks.items()]
    if report.empty_classes:
        lines.append(f"  {report.empty_classes} classes have no samples here")
    if not manifest.labelled:
        lines.append("  the release withholds the labels: all are -1")
    return lines


def _throughput(reports: Sequence[ShardingReport], seconds: float) -> str:
    samples = sum(report.samples for report in reports)
    written = sum(
        shard.bytes
        for report in reports
        if not report.did_nothing
        for shard in report.manifest.shards
        if shard.version == report.manifest.version
    )
    return (
        f"{samples} samples, {written / 1e6:.1f} MB in {seconds:.1f} s: "
        f"{samples / seconds:.0f} samples/s, {written / 1e6 / seconds:.1f} MB/s"
    )
