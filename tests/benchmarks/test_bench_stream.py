"""The loaders that are compared do what they are measured at. No timings."""

from pathlib import Path

import pytest

from tests.benchmarks.bench_stream import (
    BATCH,
    CEILING,
    NEEDS,
    REFERENCE,
    Bench,
    Scale,
    Side,
    is_installed,
    row_of,
    show,
)
from tests.benchmarks.harness import Setting

SETTING = Setting(device="cpu", threads=1, quick=True, command="python -m here")
SCALE = Scale(samples=6 * BATCH, skip=1, batches=2, rounds=1)
OURS = ("bare", "mone")
RESUMES = {"mone", "mone_ray", "streaming", "litdata"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OURS else pytest.mark.slow) for name in NEEDS]
)
def test_a_side_gives_whole_batches_and_comes_back_where_it_says_it_can(tmp_path: Path, name: str):
    if not is_installed(name):
        pytest.skip(f"{NEEDS[name]} is not installed; `make bench` installs it")
    bench = Bench(tmp_path, SETTING, SCALE, names=[name])
    side = Side(name=name, decoder="simplejpeg")

    told = bench.rate(side)  # the side itself checks shapes and types

    assert told["images_per_s"] > 0
    assert told["first_s"] > 0
    assert (bench.resume_s(side) is not None) == (name in RESUMES)


@pytest.mark.slow
def test_a_row_compares_rates_of_the_same_round(tmp_path: Path):
    if not is_installed("bare"):
        pytest.skip("simplejpeg is not installed; `make bench` installs it")
    bench = Bench(tmp_path, SETTING, SCALE, names=["bare"])
    told = {
        REFERENCE: [
            {"images_per_s": 100.0, "first_s": 1.0},
            {"images_per_s": 50.0, "first_s": 3.0},
        ],
        CEILING: [{"images_per_s": 200.0, "first_s": 1.0}, {"images_per_s": 100.0, "first_s": 1.0}],
    }

    rows = [row_of(side, told, bench, SETTING) for side in bench.sides]

    assert [row.measures["of_pillow"] for row in rows] == [1.0, 2.0]
    assert [row.measures["of_ceiling"] for row in rows] == [0.5, 1.0]
    assert [row.measures["first_batch_s"] for row in rows] == [2.0, 1.0]
    assert all(row.measures["peak_mib"] > 0 for row in rows)
    assert "cannot" in show(rows)
