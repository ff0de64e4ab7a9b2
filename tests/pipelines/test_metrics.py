"""The run's own record: rows as they came, cut back when training goes on from an earlier step."""

import math

from pipelines.metrics import METRICS, MetricRow, append_row, read_rows, rewind

ROWS = [
    MetricRow(step=2, values={"loss": 0.1 + 0.2, "learning_rate": 1e-300}),
    MetricRow(step=4, values={"loss": 1 / 3}),
    MetricRow(step=4, values={"val_accuracy/ec_0.50": 0.5}),
    MetricRow(step=6, values={"loss": 0.0}),
]


def record(folder, rows=ROWS):
    for row in rows:
        append_row(folder, row)


def test_rows_read_back_in_order_and_to_the_last_bit(tmp_path):
    record(tmp_path)

    assert read_rows(tmp_path) == ROWS
    assert (tmp_path / METRICS).read_text().count("\n") == len(ROWS)


def test_a_run_without_a_record_has_no_rows(tmp_path):
    assert read_rows(tmp_path) == []


def test_numbers_that_are_none_survive(tmp_path):
    record(tmp_path, [MetricRow(step=1, values={"loss": math.inf, "other": math.nan})])

    (row,) = read_rows(tmp_path)
    assert row.values["loss"] == math.inf
    assert math.isnan(row.values["other"])


def test_a_last_row_cut_off_by_a_kill_is_left_out_at_every_byte(tmp_path):
    record(tmp_path)
    path = tmp_path / METRICS
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1

    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert read_rows(tmp_path) == ROWS[:3]


def test_a_record_goes_on_from_the_step_that_training_goes_on_from(tmp_path):
    record(tmp_path)

    rewind(tmp_path, 4)
    assert read_rows(tmp_path) == ROWS[:3]
    append_row(tmp_path, ROWS[3])
    assert read_rows(tmp_path) == ROWS


def test_a_row_cut_off_by_a_kill_does_not_spoil_the_next_one(tmp_path):
    record(tmp_path)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 8, "lo')

    rewind(tmp_path, 6)
    append_row(tmp_path, MetricRow(step=8, values={"loss": 2.0}))

    assert read_rows(tmp_path) == [*ROWS, MetricRow(step=8, values={"loss": 2.0})]


def test_a_fresh_start_has_an_empty_record(tmp_path):
    record(tmp_path)

    rewind(tmp_path, 0)

    assert read_rows(tmp_path) == []
