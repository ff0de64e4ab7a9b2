"""The real training loop on four XLA devices in a Ray worker: trains, evaluates, resumes."""

import sys
from dataclasses import replace

import pytest
import ray
import torch_xla.debug.metrics as xla_metrics
from ray import cloudpickle

from cluster.backends import get_backend
from cluster.session import ray_session
from mone_core.models import ExpertsConfig, NestingConfig
from pipelines.checkpoint import committed
from tests.pipelines import tiny

# The worker cannot import test files: it gets their functions by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(tiny)

NESTING = NestingConfig(widths=(0.5, 1.0), effective_capacity=0.75)
EXPERTS = ExpertsConfig(placement="every", num_experts=4, k=1, group_images=2)


def config_of(data, out):
    """Eight steps at one budget, a checkpoint at the fourth and the last."""
    budgets = {"budgets": (0.75,), "eval_budgets": (0.75,)}
    config = tiny.tiny_config(data, out, steps=8, checkpoint_every=4, eval_every=4, **budgets)
    return replace(config, model=replace(config.model, nesting=NESTING, experts=EXPERTS))


class CountingReporter(tiny.MemoryReporter):
    """Also notes how many programs were compiled by each row."""

    def __init__(self, stop_at=float("inf")):
        super().__init__(stop_at)
        self.compiled = []

    def report(self, row):
        self.compiled.append(xla_metrics.counter_value("UncachedCompile"))
        return super().report(row)


def train_in_worker(config, stop_at):
    reporter = CountingReporter(stop_at)
    tiny.train_here(config, reporter, get_backend("xla", expert=2))
    return reporter.rows, reporter.compiled


@pytest.fixture(scope="module")
def in_worker(xla_environment):
    with ray_session(num_cpus=1):
        worker = ray.remote(num_cpus=1, runtime_env={"env_vars": xla_environment})
        yield lambda *arguments: ray.get(worker(train_in_worker).remote(*arguments))


def test_a_worker_trains_saves_and_resumes_on_its_devices(tmp_path, in_worker):
    data = tiny.write_data(tmp_path / "data", train=32, val=12)
    whole, stopped = config_of(data, tmp_path / "whole"), config_of(data, tmp_path / "stopped")

    rows, compiled = in_worker(whole, float("inf"))
    first, _ = in_worker(stopped, 4)
    second, _ = in_worker(stopped, float("inf"))

    assert [row.step for row in rows] == [2, 4, 4, 6, 8, 8]
    assert tiny.without_clock(first + second) == tiny.without_clock(rows)
    assert committed(whole.out)[0].name == "step_8"
    assert compiled[-1] == compiled[2], "no program is new after the first evaluation"
