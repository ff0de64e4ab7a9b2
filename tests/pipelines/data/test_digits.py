"""The embedded data: real scans on clutter, divided cleanly, the same bytes every time."""

import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from pipelines.data.archives.scan import scan
from pipelines.data.digits import LUMA_C, WNIDS, draw_canvases, write_digit_archives
from pipelines.data.sources import find_source
from pipelines.errors import ArchiveError
from pipelines.storage import place


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "digits"
    write_digit_archives(out, copies_train=2, copies_val=1)
    return out


@pytest.fixture(scope="module")
def drawn() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]:
    """Every scan once, at the largest size that the demo uses."""
    scans = load_digits().images.astype(np.float32) / 16
    rng = np.random.default_rng(1)
    return draw_canvases(scans, rng, canvas=28, digit_sizes=(21, 21), clutter=0.4)


def numbers(tar: Path) -> list[int]:
    with tarfile.open(tar) as file:
        return [int(name.removesuffix(".JPEG").split("_")[1]) for name in file.getnames()]


def tars_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_layout_is_that_of_a_release(archives: Path) -> None:
    for split in ("train", "val"):
        source = find_source(place(archives / split))
        assert source.layout == "imagenet21k"
        assert [unit.class_name for unit in source.units] == list(WNIDS)
        assert all(
            member.problem is None and member.key.startswith(f"{unit.class_name}_")
            for unit in source.units[:2]
            for member in scan(source, unit)
        )
    words = (archives / "words.txt").read_text().splitlines()
    assert words[0] == "n90000000\tzero"
    assert words[9] == "n90000009\tnine"


def test_train_and_val_share_no_scan_and_leave_none_out(archives: Path) -> None:
    train = {n // 2 for tar in tars_of(archives / "train") for n in numbers(tar)}
    val = {n for tar in tars_of(archives / "val") for n in numbers(tar)}
    assert not train & val
    assert train | val == set(range(1797))
    assert len(val) / 1797 == pytest.approx(0.2, abs=0.002)


def test_numbers_name_the_scan_of_their_digit(archives: Path) -> None:
    digits = load_digits().target
    for digit, tar in enumerate(tars_of(archives / "train")):
        found = numbers(tar)
        assert len(found) == len(set(found))
        assert {digits[n // 2] for n in found} == {digit}


def test_labels_are_balanced(archives: Path) -> None:
    for split in ("train", "val"):
        counts = [len(numbers(tar)) for tar in tars_of(archives / split)]
        assert max(counts) / min(counts) < 1.08


def test_another_seed_brings_other_images_under_other_numbers_of_the_same_scans(
    tmp_path: Path, archives: Path
) -> None:
    write_digit_archives(tmp_path / "more", copies_train=2, copies_val=1, seed=1)
    for split, copies in (("train", 2), ("val", 1)):
        old, new = (tars_of(folder / split)[3] for folder in (archives, tmp_path / "more"))
        assert not set(numbers(old)) & set(numbers(new))
        assert {n // copies for n in numbers(old)} == {
            (n - 1_000_000) // copies for n in numbers(new)
        }
        assert old.read_bytes() != new.read_bytes()


def test_the_same_parameters_give_the_same_bytes(tmp_path: Path, archives: Path) -> None:
    write_digit_archives(tmp_path / "again", copies_train=2, copies_val=1)
    assert contents(tmp_path / "again") == contents(archives)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_second_call_does_nothing(archives: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in archives.rglob("*")}
    write_digit_archives(archives, copies_train=2, copies_val=1)
    assert before == {path: path.stat().st_mtime_ns for path in archives.rglob("*")}


def test_other_parameters_are_refused(archives: Path) -> None:
    with pytest.raises(ArchiveError, match=r"holds digits drawn with clutter 0\.4, now 0\.5; cho"):
        write_digit_archives(archives, copies_train=2, copies_val=1, clutter=0.5)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ArchiveError, match=r"holds something else \(first letter\.txt\); choose"):
        write_digit_archives(tmp_path, copies_train=1, copies_val=1)
    with pytest.raises(ArchiveError, match=r"something else \(first a file of that name\)"):
        write_digit_archives(tmp_path / "letter.txt", copies_train=1, copies_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("sizes", [(20, 40), (26, 18), (0, 18)])
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, sizes: tuple[int, int]) -> None:
    with pytest.raises(ArchiveError, match=r"do not fit a canvas of 28 pixels; give a smallest"):
        write_digit_archives(tmp_path / "x", copies_train=1, copies_val=1, digit_sizes=sizes)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_call_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pipelines.data.digits.write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        write_digit_archives(tmp_path / "x", copies_train=1, copies_val=1)
    assert list(tmp_path.iterdir()) == []


def test_a_digit_covers_well_under_two_thirds_of_its_canvas(
    drawn: tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]],
) -> None:
    share = (drawn[1] > 0.1).mean(axis=(1, 2))
    assert share.mean() < 0.4
    assert share.max() < 0.6


def test_ink_is_darker_than_its_paper(
    drawn: tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]],
) -> None:
    luma = drawn[0] / 255 @ LUMA_C
    for i in range(len(luma)):
        assert luma[i][drawn[1][i] == 0].mean() - luma[i][drawn[1][i] > 0.9].mean() > 0.2


def test_digits_stand_anywhere_on_the_canvas_and_never_leave_it() -> None:
    scans = np.ones((400, 8, 8), np.float32)
    rng = np.random.default_rng(0)
    _, ink = draw_canvases(scans, rng, canvas=32, digit_sizes=(18, 26), clutter=1.0)
    sides = ink.max(axis=2).round().sum(axis=1)
    assert (sides.min(), sides.max()) == (18, 26)
    assert len(set(ink.max(axis=2).argmax(axis=1))) > 10
    assert np.allclose(ink.sum(axis=(1, 2)), sides**2)
