"""`mone demo` leaves everything it promises, says so, and does nothing twice."""

import json
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest
import webdataset
from mlflow import MlflowClient

from pipelines.data.embedded import COPIES_TRAIN, COPIES_VAL
from pipelines.data.verify import verify
from pipelines.storage import place
from tests.journey.commands import SHORT


@pytest.fixture(scope="module")
def out(demo):
    return demo[0]


def test_the_results_hold_every_budget_and_where_they_were_measured(out):
    results = json.loads((out / "results.json").read_text())

    settings = results["settings"]
    assert [s["effective_capacity"] for s in settings] == [0.2, 0.3, 0.4, 0.5, 0.7, 1.0]
    assert all(s["samples"] == 1077 and s["latency_ms"] > 0 for s in settings)
    assert all(0 <= s["accuracy"] <= 1 for s in settings)
    macs = [s["macs"] for s in settings]
    assert macs == sorted(macs)
    assert macs[0] < macs[-1] / 2
    assert results["machine"]
    assert results["torch"]
    assert results["commit"]


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_shards_are_whole_and_read_with_plain_webdataset(out, part):
    folder = out / "shards" / part
    manifest = json.loads((folder / "manifest.json").read_text())

    assert verify(place(folder)) == []
    names = [str(folder / shard["name"]) for shard in manifest["shards"]]
    samples = list(webdataset.WebDataset(names, shardshuffle=False).decode("rgb8"))
    assert len(samples) == manifest["samples"]
    assert len({sample["__key__"] for sample in samples}) == manifest["samples"]
    assert {sample["cls"] for sample in samples} == set(range(10))


def test_every_scan_stands_in_one_part_as_often_as_the_others(out):
    def scans(part, copies):
        keys = pq.read_table(out / "shards" / part / "index.parquet")["key"].to_pylist()
        counted = Counter(int(key.split("_")[1]) // copies for key in keys)
        assert set(counted.values()) == {copies}
        return set(counted)

    train, val = scans("train", COPIES_TRAIN), scans("val", COPIES_VAL)
    assert len(train) + len(val) == 1797
    assert not train & val


def test_the_run_and_its_report_are_in_mlflow(out):
    client = MlflowClient(f"sqlite:///{out / 'mlruns' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("mone").experiment_id])

    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == list(range(5, 45, 5))
    assert run.data.params["train.steps"] == "40"
    assert run.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "results.json", "figures", "model"} <= files
    figures = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
    assert "figures/routing.png" in figures
    assert int(client.get_model_version_by_alias("mone", "champion").version) == 1


def test_the_terminal_speaks_to_a_person(demo):
    out, done = demo

    for stage in ("1/5 archive", "2/5 shards", "3/5 train", "4/5 evaluate", "5/5 report"):
        assert stage in done.stdout
    assert "effective capacity" in done.stdout
    assert f"report   {out / 'report.html'}" in done.stdout
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stdout
    noise = re.compile(r"INFO|WARNING|\(pid=|\bray\.|Traceback", re.IGNORECASE)
    assert not noise.search(done.stderr), done.stderr
    assert "training 40/40 steps" in done.stderr


def test_the_driver_stays_below_one_and_a_half_gigabytes(demo):
    peak = int(re.search(r"used at most (\d+) MB", demo[1].stdout)[1])

    assert 100 < peak < 1500


@pytest.mark.slow
def test_a_second_run_makes_nothing_again(out, mone):
    kept = [*(out / "shards").rglob("*.tar"), *(out / "run" / "checkpoints").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}

    again = mone("demo", "--out", out, *SHORT)

    assert again.returncode == 0, again.stderr
    assert "there already" in again.stdout
    assert "is trained to its 40 steps already; nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path, mone):
    (tmp_path / "diary.txt").write_text("mine")

    done = mone("demo", "--out", tmp_path)

    assert done.returncode == 2
    assert done.stderr == (
        f"mone: --out {tmp_path} holds something else (diary.txt); name a new folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
