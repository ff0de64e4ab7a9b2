"""The list of what a run went without: every sample once, whoever names it and how often."""

import json

from pipelines.metrics import MetricRow, append_row
from pipelines.skipped import SKIPPED, SkipList, read_skipped, skipped_until

A, B, C = "sample 'a' in x", "sample 'b' in x", "sample 'ä' in y"


def test_ranks_name_each_sample_once_over_all_starts(tmp_path):
    SkipList(tmp_path).add({B: "cut off"})
    for _ in range(2):
        one, two = SkipList(tmp_path), SkipList(tmp_path)
        one.add({A: "bad"})
        two.add({A: "bad", C: "worse"})
        one.add({A: "bad", B: "another reason"})

    assert read_skipped(tmp_path) == {B: "cut off", A: "bad", C: "worse"}
    lines = (tmp_path / SKIPPED).read_text().splitlines()
    assert sorted(json.loads(line)["sample"] for line in lines) == sorted([A, B, C])


def test_a_run_that_went_without_nothing_has_no_list(tmp_path):
    SkipList(tmp_path).add({})

    assert read_skipped(tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_the_count_goes_on_from_the_last_row_up_to_the_checkpoint(tmp_path):
    for step, count in ((2, 1.0), (4, 3.0), (6, 7.0)):
        append_row(tmp_path, MetricRow(step=step, values={"data/skipped": count}))
        append_row(tmp_path, MetricRow(step=step, values={"val_loss/ec_1.00": 9.0}))

    assert [skipped_until(tmp_path, step) for step in (0, 3, 4, 5, 9)] == [0, 1, 3, 3, 7]
    assert skipped_until(tmp_path / "none", 4) == 0
