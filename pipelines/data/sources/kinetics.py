"""Kinetics (400, 600, 700): lists of YouTube clips, and the clips that somebody could still get.

Lists are `train.csv`, `val.csv` or `validate.csv`, `test.csv`, perhaps with a prefix such as
`kinetics-400_`, or json twins keyed by `youtube_id`; they lie in the archive or in a folder of
annotations or lists in it. Columns are found by their names: `label` (absent where it is withheld),
`youtube_id`, `time_start`, `time_end`, `split`, and others that are not looked at.

Clips are `<youtube_id>_<start>_<end>.mp4`, six digits each, or `<youtube_id>.mp4`, in any folders.
An id may begin with `-` and hold `_`, so that names are made from rows and compared, never taken
apart. A row without a file, and a file without a row, is normal: `scan` and the manifest name them.

The same id may stand in several rows with other times. A file that has no times in its name then
belongs to all of them: it is left out of the lists unless they agree on the class. Of the same clip
in two splits, the one in the first split counts.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipelines.data.sources.base import Listed, Source, Unit
from pipelines.errors import ArchiveError
from pipelines.files import parse_json
from pipelines.storage import Place

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
MAX_DEPTH = 8  # folders below each other; links to a folder above would never end
_LIST = re.compile(
    r"(?:(?:kinetics|k)[-_]?\d*(?:[-_]2020)?[-_])?(train|validate|validation|val|test)\.(csv|json)"
)
_NEXT = "mend or remove it and run the command again"


@dataclass(frozen=True, slots=True)
class Row:
    """One clip of a list: `times` are its start and end in seconds, None where not told."""

    youtube_id: str
    times: tuple[int, int] | None
    listed: Listed

    @property
    def timed_stem(self) -> str | None:
        """What its file is called, without suffix, if the name tells the times."""
        if self.times is None:
            return None
        return f"{self.youtube_id}_{self.times[0]:06d}_{self.times[1]:06d}"


def recognise(archive: Place) -> Source | None:
    """Describe a folder with lists of Kinetics; None: it has none.

    Raises:
        ArchiveError: A list is broken; names the file and the line.
    """
    if not archive.is_folder():
        return None
    rows = [row for split, place in _lists(archive) for row in _read(place, split)]
    if not rows:
        return None
    units, stems = _clips(archive)
    classes = {row.listed.class_name for row in rows if row.listed.class_name is not None}
    found = {row.listed.split for row in rows}
    return Source(
        layout="kinetics",
        archive=archive.absolute(),
        media="video",
        units=tuple(units),
        splits=tuple(split for split in ("train", "val", "test") if split in found),
        classes=tuple(sorted(classes)),
        listed=_by_stem(rows, stems),
    )


def _lists(archive: Place) -> list[tuple[str, Place]]:
    """Lists by split, in the order train, val, test; a csv goes before its json twin."""
    found: dict[str, dict[str, Place]] = {}
    entries = list(archive.entries())
    folders = [archive / entry.name for entry in entries if entry.is_folder]
    for folder in (
        archive,
        *(each for each in folders if "annot" in each.name or "list" in each.name),
    ):
        for entry in entries if folder is archive else folder.entries():
            match = _LIST.fullmatch(entry.name.lower())
            if match and not entry.is_folder and _is_list(folder / entry.name, match[2]):
                found.setdefault(SPLITS[match[1]], {}).setdefault(match[2], folder / entry.name)
    order = [split for split in ("train", "val", "test") if split in found]
    return [(split, found[split].get("csv") or found[split]["json"]) for split in order]


def _is_list(place: Place, kind: str) -> bool:
    """Whether a file with the right name is one of Kinetics, by its first line or bytes."""
    with place.open() as file:
        head = bytes(file.read(4096)).decode("utf-8-sig", "replace")
    if kind == "json":
        return head.lstrip().startswith("{") and '"annotations"' in head
    names = re.split(r"[,;|\t]", head.splitlines()[0]) if head.strip() else []
    return any(name.strip(' "') == "youtube_id" for name in names)


def _read(place: Place, split: str) -> Iterator[Row]:
    yield from _read_json(place, split) if place.name.endswith(".json") else _read_csv(place, split)


def _read_csv(place: Place, split: str) -> Iterator[Row]:
    try:
        text = place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArchiveError(f"{place} is not UTF-8 at byte {error.start}; {_NEXT}") from error
    lines = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        lines.fieldnames = [name.strip() for name in lines.fieldnames or ()]
        if "youtube_id" not in lines.fieldnames:
            raise ArchiveError(
                f"{place} line 1 has no column youtube_id between commas, but "
                f"{', '.join(map(repr, lines.fieldnames))}; write the list with commas between its "
                "columns and run the command again"
            )
        for line in lines:
            where = f"{place} line {lines.line_num}"
            if None in line or None in line.values():
                raise ArchiveError(
                    f"{where} has other columns than the first line, which names "
                    f"{', '.join(lines.fieldnames or ())}; {_NEXT}"
                )
            named_split = SPLITS.get((line.get("split") or "").strip().lower(), split)
            yield _row(where, line["youtube_id"], line, line.get("label"), named_split)
    except csv.Error as error:
        where = f"{place} line {lines.reader.line_num}"
        raise ArchiveError(f"{where} is no csv: {error}; {_NEXT}") from error


def _read_json(place: Place, split: str) -> Iterator[Row]:
    """The json twins: id -> annotations (label, segment: start and end), subset."""
    clips = parse_json(
        place.read_bytes(),
        dict[str, dict[str, Any]],
        name=str(place),
        otherwise=lambda why: ArchiveError(f"{why}; {_NEXT}"),
    )
    for youtube_id, clip in clips.items():
        where = f"{place} entry {youtube_id!r}"
        told = clip.get("annotations")
        segment = told.get("segment") if isinstance(told, dict) else None
        if not isinstance(told, dict) or not isinstance(segment, list | None):
            raise ArchiveError(f"{where} has no annotations with a segment; {_NEXT}")
        if segment is not None and len(segment) != 2:
            raise ArchiveError(f"{where} has a segment of {len(segment)} times, not 2; {_NEXT}")
        times = dict(zip(("time_start", "time_end"), map(str, segment or ()), strict=False))
        named_split = SPLITS.get(str(clip.get("subset", "")).lower(), split)
        yield _row(where, youtube_id, times, told.get("label"), named_split)


def _row(
    where: str, youtube_id: str, times: Mapping[str, str], label: str | None, split: str
) -> Row:
    youtube_id = youtube_id.strip()
    if not youtube_id or "/" in youtube_id:
        raise ArchiveError(f"{where} has the youtube_id {youtube_id!r}; {_NEXT}")
    if not label and split != "test":
        raise ArchiveError(f"{where} has no label, and {split} is no test split; {_NEXT}")
    name = label.strip() if label else None
    return Row(youtube_id, _seconds(where, times), Listed(class_name=name, split=split))


def _seconds(where: str, times: Mapping[str, str]) -> tuple[int, int] | None:
    """Start and end in whole seconds, as file names have them; None: the list has none."""
    told = [times.get(column, "").strip() for column in ("time_start", "time_end")]
    if not all(told):
        return None
    try:
        start, end = (float(text) for text in told)
    except ValueError as error:
        raise ArchiveError(f"{where} has the times {' and '.join(told)}; {_NEXT}") from error
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end):
        raise ArchiveError(f"{where} has the times {' and '.join(told)}; {_NEXT}")
    return int(start), int(end)


def _clips(archive: Place) -> tuple[list[Unit], set[str]]:
    """Folders that can be scanned apart from each other, and the stems of all video files."""
    units: list[Unit] = []
    stems: set[str] = set()
    _look_into(archive, "", units, stems)
    return units, stems


def _look_into(archive: Place, path: str, units: list[Unit], stems: set[str]) -> None:
    """A folder with videos is one unit, whatever lies below it; one without is its folders."""
    entries = list((archive / path).entries())
    here = _video_stems(entry.name for entry in entries if not entry.is_folder)
    below: list[Unit] = []
    for entry in entries:
        if entry.is_folder and not entry.name.startswith(".") and path.count("/") < MAX_DEPTH:
            _look_into(archive, f"{path}/{entry.name}" if path else entry.name, below, stems)
    stems |= here
    if here:
        units.append(Unit(kind="folder", path=path, name=path or archive.name))
    else:
        units += below


def _video_stems(names: Iterable[str]) -> set[str]:
    paths = map(PurePosixPath, names)
    return {path.stem for path in paths if path.suffix.lower() in SUFFIXES}


def _by_stem(rows: Iterable[Row], stems: set[str]) -> dict[str, Listed]:
    """File stem -> what the lists say; without a file, under the name that it should have."""
    claims: dict[str, list[Listed]] = {}
    for row in rows:
        timed = row.timed_stem
        plain = row.youtube_id in stems or timed is None
        stem = row.youtube_id if timed is None or (plain and timed not in stems) else timed
        claims.setdefault(stem, []).append(row.listed)
    return {
        stem: told[0]
        for stem, told in claims.items()
        if len({each.class_name for each in told if each.class_name is not None}) <= 1
    }
