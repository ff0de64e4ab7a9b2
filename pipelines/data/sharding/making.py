"""One sharding call from archive to manifest: which pass comes when, and what is told in the end.

How work is spread over machines is the caller's (`shards`): here it is a function that runs a task
on many items. What the passes do is in `spool`, `scanned`, `plan`, `pack` and `finish`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from pipelines.data.archives.spool import spool
from pipelines.data.manifest import Manifest, SkippedSample
from pipelines.data.sharding.finish import (
    claim,
    clear,
    clear_all_but,
    finish,
    is_left_over,
    left_out,
    skipped_samples,
)
from pipelines.data.sharding.pack import REPEATED, UNFINISHED, Packed, PackJob, write_shard
from pipelines.data.sharding.plan import (
    ALL,
    BINS,
    PartCount,
    ShardJob,
    ShardRange,
    check_classes,
    check_labels,
    check_quality,
    check_repeats,
    check_splits,
    cut,
    grouped,
    scan_digest,
)
from pipelines.data.sharding.scanned import (
    Scanned,
    UnitFound,
    first_problems,
    keys_of_shards,
    merge,
    scan_file,
    scan_unit,
)
from pipelines.data.sharding.versions import Settings, Version, check_part, unit_states
from pipelines.data.sources.base import Source
from pipelines.errors import UsageError
from pipelines.storage import Place

Progress = Callable[[str, int, int], None]

FOLDER_BYTES = 16 * 2**20  # a guess for folders, whose files are not looked at before the scan
MERGE_ROWS = 2**20  # samples that one task sorts in memory
MOST_OPENS = 20_000  # of scan files, by all shards together, before they are merged
TOLD_PROBLEMS = 3


class FanOut(Protocol):
    """Runs a task on many items, in parallel."""

    def __call__(
        self,
        task: Callable[[Any, Any], Any],
        job: ShardJob | PackJob,
        work: Sequence[Any],
        sizes: Sequence[int],
        kept: Place,
    ) -> Iterator[tuple[int, Any]]:
        """Position of an item and its answer, as they come.

        Args:
            task: Called with the job and an item; its answer is small, and JSON has it.
            job: The same for all items.
            work: Items that JSON has.
            sizes: Bytes that each is about.
            kept: Where what is finished lies, for the error.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingReport:
    """What a call made.

    Attributes:
        folder: The dataset folder.
        manifest: The dataset as it is now.
        samples: Samples that this call added.
        skipped: Members that this call left out, with reasons.
        known: Samples that it left out since the dataset has their keys; not named.
        kept_shards: Whole shards of an interrupted run that were kept.
        did_nothing: Everything was there already; nothing was written.
        empty_classes: Classes that have none of the samples that were added.
    """

    folder: Place
    manifest: Manifest
    samples: int
    skipped: tuple[SkippedSample, ...]
    kept_shards: int
    did_nothing: bool
    known: int = 0
    empty_classes: int = 0


def classes_of_units(source: Source) -> dict[str, int | None]:
    """Classes that an archive has by the names of its units alone; not counted yet."""
    return {unit.class_name: None for unit in source.units if unit.class_name is not None}


def folders_of(out: Place, versions: Sequence[Version]) -> list[Place]:
    """Every folder that a call writes into."""
    return [Place(where) for where in sorted({out.where, *(v.part.out.where for v in versions)})]


def left_over(out: Place, versions: Sequence[Version]) -> list[Place]:
    """Folders that a run of this call did not clear when it was killed at its end."""
    return [folder for folder in folders_of(out, versions) if is_left_over(folder, versions)]


class Making:
    """The passes of one call.

    Args:
        settings: Of the dataset.
        max_bad_fraction: Share of the archive's members that may be unusable.
        progress: See `shards.write_shards`.
        fan_out: How work is spread.

    Raises:
        UsageError: No such share can be.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        max_bad_fraction: float,
        progress: Progress | None,
        fan_out: FanOut,
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise UsageError(
                f"the share of bad files that is allowed is from 0 to 1, got {max_bad_fraction}"
            )
        self._settings = settings
        self._max_bad_fraction = max_bad_fraction
        self._progress = progress
        self._fan_out = fan_out

    def make(
        self, source: Source, out: Place, versions: tuple[Version, ...]
    ) -> tuple[ShardingReport, ...]:
        """Make the versions that are still to be made."""
        if all(version.done for version in versions):
            for folder in left_over(out, versions):
                clear(folder)
            return tuple(_nothing(version) for version in versions)
        if source.stream:
            source = spool(source, out / UNFINISHED / "spool", progress=self._progress)
            if len(versions) == 1:
                check_part(source, versions[0].part.name, self._settings)
            versions = tuple(version for version in versions if _is_there(source, version))
        job = self._job(source, out, versions)
        found = self._scan(job)
        job = self._checked(job, found, versions)
        shards = [self._ranges(found, version, part) for part, version in enumerate(versions)]
        for folder in folders_of(out, versions):
            claim(folder, versions)
        for version, ranges in zip(versions, shards, strict=True):
            if not version.done:
                clear_all_but(version, ranges)
        written = self._write(job, found, versions, [shard for each in shards for shard in each])
        self._check_repeats(job, found, shards, sum(each.repeated for each in written))
        packed = iter(written)
        reports = tuple(
            _report(job, version, ranges, [next(packed) for _ in ranges], part, found.bad_units)
            for part, (version, ranges) in enumerate(zip(versions, shards, strict=True))
        )
        for folder in folders_of(out, versions):
            clear(folder)
        return reports

    def _job(self, source: Source, out: Place, versions: tuple[Version, ...]) -> ShardJob:
        """What there is to scan: known units are left out."""
        settings, unfinished = self._settings, out / UNFINISHED
        states = unit_states(source)
        if source.listed is None:
            known = set.intersection(*(_known_units(version) for version in versions))
            kept = [n for n, (digest, _) in enumerate(states) if digest not in known]
            source = replace(source, units=tuple(source.units[n] for n in kept))
            states = tuple(states[n] for n in kept)
        names = tuple(version.part.name for version in versions)
        scan = scan_digest(
            source,
            seed=settings.seed,
            parts=names,
            val_fraction=settings.val_fraction,
            resized=settings.resized,
        )
        return ShardJob(
            source=source,
            units=tuple(state for _, state in states),
            parts=tuple(version.part for version in versions),
            scratch=unfinished / "scan" / scan,
            classes=settings.classes or source.classes,
            seed=settings.seed,
            val_fraction=settings.val_fraction,
            resized=settings.resized,
        )

    def _scan(self, job: ShardJob) -> "_Found":
        """Scan every unit that was not scanned before."""
        found = _Found(job)
        units = list(range(len(job.units)))
        sizes = [unit.size or FOLDER_BYTES for unit in job.source.units]
        answers = self._fan_out(_scan_unit, job, units, sizes, job.scratch)
        for done, (unit, answer) in enumerate(answers, start=1):
            found.add(unit, UnitFound.of(answer))
            self._tell("scan", done, len(units))
        return found

    def _checked(self, job: ShardJob, found: "_Found", versions: tuple[Version, ...]) -> ShardJob:
        """Refuse what the scan shows to be wrong; the job with its classes."""
        total = found.total
        if all(version.base for version in versions) and not (total.samples or total.problems):
            return job  # what is new in an archive that was added before is empty
        told = "; ".join(
            f"{row['name']} {row['reason']}"
            for row in first_problems(job, found.bad_units, TOLD_PROBLEMS)
        )
        check_quality(
            job.source,
            total,
            told,
            max_bad_fraction=self._max_bad_fraction,
            kept=str(job.scratch.parent.parent),
        )
        for version, count in zip(versions, found.counts, strict=True):
            check_labels(job.source, version.part.name, count, version.base)
        check_classes(job.source, total.classes, job.classes)
        check_splits(job.source, [part.name for part in job.parts], found.counts, job.classes)
        if job.classes is not None:
            return job
        return replace(job, classes=tuple(sorted({*total.classes, *classes_of_units(job.source)})))

    def _ranges(self, found: "_Found", version: Version, part: int) -> list[ShardRange]:
        if version.done:
            return []
        cuts = cut(
            found.histograms[part], found.counts[part].bytes, self._settings.samples_per_shard
        )
        return [
            ShardRange(number=version.first_shard + n, part=part, first=first, last=last)
            for n, (first, last) in enumerate(cuts)
        ]

    def _write(
        self,
        job: ShardJob,
        found: "_Found",
        versions: tuple[Version, ...],
        shards: list[ShardRange],
    ) -> list[Packed]:
        """Have every shard written, in parallel; what became of each."""
        pack = PackJob(
            job=replace(job, source=replace(job.source, listed=None, units=())),
            files=self._files(job, found, len(shards)),
            known=tuple(self._known_keys(job, version) for version in versions),
            versions=tuple(version.record.version for version in versions),
        )
        packed = [Packed(kept=False, samples=0)] * len(shards)
        work = [asdict(shard) for shard in shards]
        kept = versions[0].part.out if len(versions) == 1 else job.scratch.parent.parent
        answers = self._fan_out(_write_shard, pack, work, [1] * len(shards), kept)
        for done, (at, answer) in enumerate(answers, start=1):
            packed[at] = Packed(**answer)
            self._tell("write", done, len(shards))
        return packed

    def _check_repeats(
        self, job: ShardJob, found: "_Found", shards: list[list[ShardRange]], repeated: int
    ) -> None:
        """Refuse a loss that shows only where all samples of a range of hashes come together."""
        told = sorted(
            (repeat.unit, repeat.seq, repeat.name)
            for part, ranges in zip(job.parts, shards, strict=True)
            for repeat in (left_out(part.out, ranges)[0] if repeated else ())
            if repeat.reason == REPEATED
        )
        check_repeats(
            job.source,
            found.total,
            [name for _, _, name in told],
            max_bad_fraction=self._max_bad_fraction,
        )

    def _files(self, job: ShardJob, found: "_Found", shards: int) -> tuple[Scanned, ...]:
        """Where the samples lie: in the units' own files, or in few where shards open too many."""
        units = [unit for unit, samples in enumerate(found.samples) if samples]
        if len(units) * shards <= MOST_OPENS:
            return tuple(Scanned(name=scan_file(job, unit).name, unit=unit) for unit in units)
        groups = grouped([found.samples[unit] for unit in units], MERGE_ROWS)
        return self._sorted(_merge, job, [[units[at] for at in group] for group in groups])

    def _known_keys(self, job: ShardJob, version: Version) -> tuple[Scanned, ...]:
        """Where the keys of a version's base lie, sorted by order hash."""
        if version.done or not version.base:
            return ()
        groups = grouped([shard.samples for shard in version.base.shards], MERGE_ROWS)
        out = version.part.out.where
        return self._sorted(
            _keys_of_shards, job, [[out, group[0], group[-1] + 1] for group in groups]
        )

    def _sorted(
        self, task: Callable[[ShardJob, Any], Any], job: ShardJob, work: list[list[Any]]
    ) -> tuple[Scanned, ...]:
        answers = self._fan_out(task, job, work, [1] * len(work), job.scratch)
        return tuple(Scanned(name=name) for _, name in sorted(answers))

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self._progress:
            self._progress(stage, done, total)


class _Found:
    """What the scan found, as numbers.

    Attributes:
        counts: Of every part.
        histograms: Samples per bin of order hashes of every part [parts, BINS].
        samples, problems: Of every unit.
    """

    def __init__(self, job: ShardJob) -> None:
        self.counts = tuple(PartCount() for _ in job.parts)
        self.histograms = np.zeros((len(job.parts), BINS), np.int64)
        self.samples = [0] * len(job.units)
        self.problems = [0] * len(job.units)

    def add(self, unit: int, found: UnitFound) -> None:
        """Add a unit's numbers."""
        for count, of_unit in zip(self.counts, found.counts, strict=True):
            count.add(of_unit)
            self.samples[unit] += of_unit.samples
            self.problems[unit] += of_unit.problems
        self.histograms.reshape(-1)[found.bins] += found.samples

    @property
    def bad_units(self) -> list[int]:
        """Units that hold members with a problem."""
        return [unit for unit, number in enumerate(self.problems) if number]

    @property
    def total(self) -> PartCount:
        """All parts together."""
        total = PartCount()
        for count in self.counts:
            total.add(count)
        return total


def _is_there(source: Source, version: Version) -> bool:
    """Whether a part of a compressed archive, now that it was read, has samples, or a dataset."""
    names = (ALL, *source.splits) if source.splits else (version.part.name,)
    return version.part.name in names or version.base is not None


def _known_units(version: Version) -> set[str]:
    """Units whose samples of this part the dataset has, whatever came of them."""
    olds = version.base.sources if version.base else ()
    return {unit for old in olds if old.part == version.record.part for unit in old.units}


def _report(
    job: ShardJob,
    version: Version,
    shards: list[ShardRange],
    packed: list[Packed],
    part: int,
    bad_units: list[int],
) -> ShardingReport:
    """Finish a version, if there is anything to finish."""
    if version.done:
        return _nothing(version)
    samples = sum(each.samples for each in packed)
    if version.base and not samples:
        repeats, known = left_out(version.part.out, shards)
        return _nothing(version, skipped_samples(job, version, part, repeats, bad_units), known)
    finished = finish(job, version, shards, part, bad_units)
    return ShardingReport(
        folder=version.part.out,
        manifest=finished.manifest,
        samples=samples,
        skipped=finished.skipped,
        kept_shards=sum(each.kept and each.samples > 0 for each in packed),
        did_nothing=False,
        known=finished.known,
        empty_classes=finished.empty_classes,
    )


def _nothing(
    version: Version, skipped: tuple[SkippedSample, ...] = (), known: int = 0
) -> ShardingReport:
    assert version.base
    return ShardingReport(
        folder=version.part.out,
        manifest=version.base,
        samples=0,
        skipped=skipped,
        kept_shards=len(version.base.shards),
        did_nothing=True,
        known=known,
    )


# Tasks: an item of work and its answer are small enough for JSON.


def _scan_unit(job: ShardJob, unit: int) -> Any:
    return scan_unit(job, unit).told()


def _merge(job: ShardJob, units: list[int]) -> Any:
    return merge(job, units).name


def _keys_of_shards(job: ShardJob, work: tuple[str, int, int]) -> Any:
    folder, first, last = work
    return keys_of_shards(job, Place(folder), first, last).name


def _write_shard(pack: PackJob, shard: dict[str, Any]) -> Any:
    return asdict(write_shard(pack, ShardRange(**shard)))
