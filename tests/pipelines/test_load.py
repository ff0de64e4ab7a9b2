"""The run's record of its experts' load: lines as they came, cut back on a restart, and alerts."""

import json

import pytest
import torch

from mone_core.load import FIELDS
from pipelines.errors import RunError
from pipelines.load import (
    LOAD,
    LoadTable,
    alerts,
    append_load,
    read_loads,
    rewind_load,
    window,
)

EXPERTS = 4


def table(step, used=(30, 20, 30, 20), wanted=(30, 20, 30, 20)):
    """Two sparse layers of one width: the second always in balance."""
    sums = torch.zeros(2, 1, EXPERTS, len(FIELDS), dtype=torch.float64)
    sums[..., FIELDS.index("tokens")] = 100
    sums[..., FIELDS.index("slots")] = 40
    sums[..., FIELDS.index("used")] = 25
    sums[..., FIELDS.index("wanted")] = 25
    sums[..., FIELDS.index("importance")] = 100 / 3
    sums[0, 0, :, FIELDS.index("used")] = torch.tensor(used).double()
    sums[0, 0, :, FIELDS.index("wanted")] = torch.tensor(wanted).double()
    return LoadTable(step=step, layers=(1, 3), dims=(16,), sums_LWEF=sums)


def record(folder, steps=(2, 4, 6)):
    for step in steps:
        append_load(folder, table(step))


def steps_in(folder):
    return [each.step for each in read_loads(folder)]


def test_tables_read_back_in_order_counts_exactly_and_the_rest_to_nine_digits(tmp_path):
    record(tmp_path)

    first, *_ = read_loads(tmp_path)

    assert steps_in(tmp_path) == [2, 4, 6]
    assert (first.layers, first.dims) == ((1, 3), (16,))
    assert first.sums_LWEF.dtype == torch.float64
    torch.testing.assert_close(first.sums_LWEF, table(2).sums_LWEF, rtol=5e-9, atol=0)
    whole = [at for at, name in enumerate(FIELDS) if name != "importance"]
    assert first.sums_LWEF[..., whole].equal(table(2).sums_LWEF[..., whole])


def test_a_line_says_what_its_numbers_are(tmp_path):
    record(tmp_path)

    line = json.loads((tmp_path / LOAD).read_text().splitlines()[0])

    assert list(line) == ["step", "layers", "widths", "fields", "sums"]
    assert dict(zip(line["fields"], line["sums"][0][0][1], strict=True))["used"] == 20


def test_a_run_without_a_record_has_no_tables(tmp_path):
    rewind_load(tmp_path, 4)

    assert read_loads(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_last_line_cut_off_by_a_kill_is_left_out_at_every_byte(tmp_path):
    record(tmp_path)
    path = tmp_path / LOAD
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1

    for end in range(last, len(whole), 7):
        path.write_bytes(whole[:end])
        assert steps_in(tmp_path) == [2, 4]


def test_a_record_goes_on_from_the_step_that_training_goes_on_from(tmp_path):
    record(tmp_path)
    with (tmp_path / LOAD).open("a") as file:
        file.write('{"step":8,"lay')

    rewind_load(tmp_path, 4)
    append_load(tmp_path, table(6))

    assert steps_in(tmp_path) == [2, 4, 6]


def test_a_fresh_start_has_an_empty_record(tmp_path):
    record(tmp_path)

    rewind_load(tmp_path, 0)

    assert read_loads(tmp_path) == []


def test_a_record_of_other_fields_is_refused_by_name(tmp_path):
    record(tmp_path)
    path = tmp_path / LOAD
    path.write_text(path.read_text().replace('"unreached"', '"missed"'))

    with pytest.raises(
        RunError, match=r"load\.jsonl holds the fields tokens, missed, .* wrote it$"
    ):
        read_loads(tmp_path)


def test_a_window_is_the_sum_of_its_tables():
    both = window([table(2, used=(1, 2, 3, 4)), table(4, used=(10, 20, 30, 40))])

    assert both.step == 4
    assert both.sums_LWEF[0, 0, :, FIELDS.index("used")].tolist() == [11, 22, 33, 44]


def test_a_balanced_table_raises_no_alert():
    assert alerts(table(2), drop_rate=0.05) == []


def test_an_alert_names_the_layers_that_drop_more_than_they_may():
    full = table(8, used=(40, 20, 0, 20), wanted=(80, 20, 1, 20))

    first, *_ = alerts(full, drop_rate=0.3)

    assert first == (
        "step 8: experts are too full and drop choices, 34% in block 1 (more than 30%); raise "
        "model.experts.capacity_ratio or model.experts.load_weight"
    )
    assert not any("drop" in line for line in alerts(full, drop_rate=0.35))


def test_an_alert_names_every_dead_expert_by_block():
    (line,) = alerts(table(8, used=(0, 40, 0, 40), wanted=(0, 40, 0, 40)), drop_rate=0.5)

    assert line == (
        "step 8: experts that get hardly any token: block 1: 0, 2; raise "
        "model.experts.importance_weight and model.experts.load_weight"
    )
