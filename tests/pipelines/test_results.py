"""results.json: there and back, and where the numbers come from."""

import json
import os
import platform
import re
from dataclasses import replace

import pytest

from pipelines.errors import RunError
from pipelines.results import (
    RESULTS,
    Results,
    Setting,
    commit_name,
    machine_name,
    read_results,
    write_results,
)

SETTING = Setting(
    effective_capacity=0.2,
    realised_effective_capacity=0.19921875,
    accuracy=2 / 3,
    loss=0.1 + 0.2,
    samples=12,
    macs=123_456_789_012,
    latency_ms=1.5,
    latency_batch=8,
    images_per_second=5333.3,
)
FOUND = Results(
    name="runs/x",
    step=7,
    num_classes=3,
    settings=(SETTING, replace(SETTING, effective_capacity=1.0)),
    machine="m",
    torch="2",
    commit="c",
)


def test_results_read_back_as_they_were_written(tmp_path):
    write_results(tmp_path, FOUND)

    assert read_results(tmp_path) == FOUND


def test_the_file_names_everything_that_others_rely_on(tmp_path):
    write_results(tmp_path, FOUND)

    plain = json.loads((tmp_path / RESULTS).read_text())
    assert {"settings", "machine", "torch", "commit"} <= plain.keys()
    assert {"effective_capacity", "accuracy", "samples", "macs", "latency_ms", "loss"} <= plain[
        "settings"
    ][0].keys()


def test_missing_results_say_which_command_makes_them(tmp_path):
    with pytest.raises(
        RunError, match=rf"results\.json does not exist; make it with `mone evaluate {tmp_path}`"
    ):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"step": 7', '"step": "7"', r"results\.json cannot be read: step: .*valid integer"),
        ('"step": 7', '"stop": 7', r"results\.json cannot be read: step: .*required"),
        ('"samples": 12', '"samples": 12.5', r"settings\.0\.samples: .*valid integer"),
    ],
)
def test_results_of_another_shape_are_refused_by_field(tmp_path, before, after, message):
    write_results(tmp_path, FOUND)
    path = tmp_path / RESULTS
    path.write_text(path.read_text().replace(before, after, 1))

    with pytest.raises(RunError, match=message):
        read_results(tmp_path)


def test_the_machine_is_told_without_its_network_name():
    assert machine_name().startswith(f"{platform.machine()}, {os.cpu_count()} cores, ")
    assert platform.node() not in machine_name()


def test_the_commit_is_a_hash_or_unknown():
    assert re.fullmatch(r"[0-9a-f]{12,}(-dirty)?|unknown", commit_name())
