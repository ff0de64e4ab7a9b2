"""The embedded clips: real scans that move, told apart by motion alone, always the same bytes."""

import io
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from pipelines.data.digits import load_scans, split_scans
from pipelines.data.motion import (
    CANVAS,
    FRAMES,
    TEMPLATES,
    VIDEOS,
    cast,
    draw_clips,
    encode_webm,
    write_motion_archive,
)
from pipelines.data.sources import find_source
from pipelines.errors import ArchiveError
from pipelines.storage import place

LISTS = ("train", "validation")
SMALL = {"clips_train": 40, "clips_val": 16}
Numbers = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "motion"
    write_motion_archive(out, **SMALL)
    return out


@pytest.fixture(scope="module")
def drawn() -> tuple[npt.NDArray[np.float32], Numbers]:
    """Grey clips [N, T, H, W], each direction equally often, and their directions."""
    scans, digit = load_scans()
    rng = np.random.default_rng(7)
    scan, direction = cast(960, rng, digit, 0)
    clips = np.stack(list(draw_clips(scans[scan], direction, rng)))
    return clips.mean(axis=-1, dtype=np.float32) / 255, direction


def rows(archive: Path, name: str) -> list[dict[str, object]]:
    return json.loads((archive / "labels" / f"{name}.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def probe(features: npt.NDArray[np.floating], direction: Numbers) -> float:
    """Accuracy of ridge regression on unseen clips; a quarter of them is held out."""
    x = features.reshape(len(features), -1).astype(np.float64)
    half = 3 * len(x) // 4
    x = (x - x[:half].mean(axis=0)) / (x[:half].std(axis=0) + 1e-3)
    target = np.eye(len(TEMPLATES))[direction[:half]] - 1 / len(TEMPLATES)
    kernel = x[:half] @ x[:half].T
    weights = np.linalg.solve(kernel + 0.3 * x.shape[1] * np.eye(half), target)
    return float(np.mean((x[half:] @ x[:half].T @ weights).argmax(axis=1) == direction[half:]))


def test_the_archive_is_recognised_as_something_something(archive: Path) -> None:
    source = find_source(place(archive))

    assert (source.layout, source.media, source.splits) == ("ssv2", "video", ("train", "val"))
    assert source.classes is not None
    assert set(source.classes) == {t.replace("[", "").replace("]", "") for t in TEMPLATES}
    assert source.listed is not None
    assert Counter(row.split for row in source.listed.values()) == {"train": 40, "val": 16}


def test_every_clip_is_listed_once_and_every_row_has_a_clip(archive: Path) -> None:
    listed = [row["id"] for name in LISTS for row in rows(archive, name)]

    assert len(listed) == len(set(listed)) == 56
    assert {f"{number}.webm" for number in listed} == {
        path.name for path in (archive / VIDEOS).iterdir()
    }


def test_a_row_says_what_the_release_says(archive: Path) -> None:
    for row in rows(archive, "train"):
        assert set(row) == {"id", "label", "template", "placeholders"}
        (something,) = row["placeholders"]
        assert row["template"] in TEMPLATES
        assert row["label"] == row["template"].replace("[something]", something).lower()


def test_a_number_tells_neither_part_nor_class(archive: Path) -> None:
    train = sorted(int(row["id"]) for row in rows(archive, "train"))
    assert train != list(range(train[0], train[0] + len(train)))
    assert min(train) < 20
    assert max(train) > 36


def test_clips_open_as_vp9_of_twelve_frames_a_second(archive: Path) -> None:
    for path in sorted((archive / VIDEOS).iterdir())[:5]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("vp9", 12)
            assert (stream.width, stream.height) == (CANVAS, CANVAS)
            assert sum(1 for _ in container.decode(stream)) == FRAMES


def test_what_is_encoded_is_what_was_drawn() -> None:
    scans, _ = load_scans()
    (clip,) = draw_clips(scans[:1], np.array([0]), np.random.default_rng(0))
    with av.open(io.BytesIO(encode_webm(clip))) as container:
        found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])

    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(found @ luma - clip @ luma).mean() < 4


def test_the_same_parameters_give_the_same_bytes(tmp_path: Path, archive: Path) -> None:
    write_motion_archive(tmp_path / "again", **SMALL)

    assert contents(tmp_path / "again") == contents(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_another_seed_brings_other_clips_under_other_numbers(tmp_path: Path, archive: Path) -> None:
    write_motion_archive(tmp_path / "more", **SMALL, seed=1)

    old, new = (contents(folder / VIDEOS) for folder in (archive, tmp_path / "more"))
    assert not set(old) & set(new)
    assert not set(old.values()) & set(new.values())


def test_a_second_call_does_nothing(archive: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in archive.rglob("*")}
    write_motion_archive(archive, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in archive.rglob("*")}


def test_other_parameters_are_refused(archive: Path) -> None:
    with pytest.raises(ArchiveError, match=r"holds moving digits drawn with seed 0, now 3; choose"):
        write_motion_archive(archive, **SMALL, seed=3)


def test_an_interrupted_call_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 56
        if done == 5:
            raise KeyboardInterrupt("by hand")

    with pytest.raises(KeyboardInterrupt, match="by hand"):
        write_motion_archive(tmp_path / "x", **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", [0, 1])
def test_every_digit_moves_equally_often_in_every_direction(split: int) -> None:
    _, digit = load_scans()
    scan, direction = cast(1600, np.random.default_rng(0), digit, split)

    assert set(Counter(zip(digit[scan], direction, strict=True)).values()) == {20}
    allowed = {s for d in range(10) for s in split_scans(np.flatnonzero(digit == d), d)[split]}
    assert set(scan) <= allowed


def test_training_scans_all_move() -> None:
    _, digit = load_scans()
    scan, _ = cast(1600, np.random.default_rng(0), digit, 0)

    assert len(set(scan)) == sum(
        len(split_scans(np.flatnonzero(digit == d), d)[0]) for d in range(10)
    )


@pytest.mark.parametrize("frame", [0, FRAMES // 2, FRAMES - 1, "mean"])
def test_no_frame_tells_the_direction(
    drawn: tuple[npt.NDArray[np.float32], Numbers], frame: int | str
) -> None:
    clips, direction = drawn
    frames = clips.mean(axis=1) if frame == "mean" else clips[:, int(frame)]

    assert probe(frames, direction) < 0.125 + 4 * np.sqrt(0.125 * 0.875 / 240)


def test_where_a_digit_is_seen_does_not_tell_the_direction(
    drawn: tuple[npt.NDArray[np.float32], Numbers],
) -> None:
    clips, direction = drawn
    ink = -clips[:, [0, -1]].reshape(len(clips), -1, CANVAS)
    dark = (ink == ink.max(axis=(1, 2), keepdims=True)).argmax(axis=2)

    assert probe(dark, direction) < 0.125 + 4 * np.sqrt(0.125 * 0.875 / 240)


def test_the_probe_would_see_a_place_that_tells_the_direction(
    drawn: tuple[npt.NDArray[np.float32], Numbers],
) -> None:
    clips, direction = drawn
    told = clips[:, 0].copy()
    for frame, turn in zip(told, direction, strict=True):
        frame[6 * turn : 6 * turn + 6] *= 0.9

    assert probe(told, direction) > 0.9


def test_motion_tells_the_direction(drawn: tuple[npt.NDArray[np.float32], Numbers]) -> None:
    """Which of the eight shifts takes a frame to a later one best."""
    clips, direction = drawn
    first, later = clips[:, 4], clips[:, 8]  # 3 to 6 pixels further
    errors = []
    for turn in range(len(TEMPLATES)):
        step = 4.5 * np.array([np.sin(turn * np.pi / 4), np.cos(turn * np.pi / 4)])
        moved = np.roll(first, np.rint(step).astype(int), axis=(1, 2))
        # Small errors count most where ink was: what moves is darker than what drifts.
        errors.append((np.abs(moved - later) * (1 - moved)).sum(axis=(1, 2)))

    assert np.mean(np.argmin(errors, axis=0) == direction) > 0.5
