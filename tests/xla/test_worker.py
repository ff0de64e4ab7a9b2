"""A training step inside a Ray worker that owns four XLA devices, and the programs it compiled."""

import os
import re
import sys

import pytest
import ray
import torch
from ray import cloudpickle

from cluster.backends.xla import XlaBackend
from cluster.session import ray_session
from tests.xla.small import CONFIGS, OneDevice, alone, far, images_and_labels, spread_out

# The worker cannot import a test file: it gets its functions by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

NAME = "nested sparse"
CLASSES = 2  # widths, in the one sparse layer


def train_in_worker():
    """Evaluate once, update twice; where it ran and what came out."""
    backend = XlaBackend(2)
    training = spread_out(CONFIGS[NAME], backend)
    pixels = backend.put(images_and_labels(0)[0])
    with torch.no_grad():
        logits = training.model(pixels).logits_BK
    backend.submit()
    losses = []
    for number in range(2):
        _, loss, *_ = training.step(number)
        losses.append(loss.item())
    weights = {name: p.detach().cpu() for name, p in training.core.named_parameters()}
    return os.getpid(), logits.cpu(), losses, weights


@pytest.fixture(scope="module")
def worker(tmp_path_factory, xla_environment):
    """What the worker returned, and the folder with its compiled programs."""
    programs = tmp_path_factory.mktemp("programs")
    dump = f"--xla_dump_to={programs} --xla_dump_hlo_as_text"
    dump += " --xla_dump_hlo_module_re=SyncTensorsGraph"
    environment = xla_environment | {"XLA_FLAGS": f"{xla_environment['XLA_FLAGS']} {dump}"}
    with ray_session(num_cpus=1):
        run = ray.remote(num_cpus=1, runtime_env={"env_vars": environment})(train_in_worker)
        yield ray.get(run.remote()), programs


def test_a_ray_worker_trains_on_its_devices_as_one_process_does(worker):
    (process, logits, losses, weights), _ = worker
    one = alone(CONFIGS[NAME], OneDevice(torch.device("cpu")))
    with torch.no_grad():
        expected_logits = one.model(images_and_labels(0)[0]).logits_BK
    expected_losses = [one.step(number)[1].item() for number in range(2)]

    assert process != os.getpid()
    assert far(logits, expected_logits) < 1e-6
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    for name, expected in one.core.named_parameters():
        assert far(weights[name], expected) < 1e-6, name


def test_programs_exchange_slots_by_all_to_all_there_and_back_in_both_passes(worker):
    forward, *steps = _programs(worker[1])

    exchanges = [_exchanges(program) for program in (forward, steps[0])]

    # There and back for every width class; a step does it in the backward pass once more.
    assert [len(each) for each in exchanges] == [2 * CLASSES, 4 * CLASSES]
    assert {groups for each in exchanges for groups in each} == {"{{0,1},{2,3}}"}
    assert "all-gather" not in forward + steps[0]


def _programs(folder):
    """Optimised programs in the order of their compilation."""
    found = sorted(folder.glob("module_*.SyncTensorsGraph.*after_optimizations.txt"))
    return [path.read_text() for path in found]


def _exchanges(program):
    """The groups of every all-to-all."""
    return re.findall(r" all-to-all\(.*replica_groups=(\{\{.*?\}\})", program)
