"""Functions really run on several processes, and their words and failures reach the driver."""

import os
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ray import cloudpickle

from cluster.backends import get_backend
from cluster.errors import CollectiveError, LaunchError
from cluster.launch import Workers, run_on_workers
from cluster.mailbox import Mailbox
from cluster.session import ray_session

# The processes cannot import a test file: they get its functions by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

TWO = Workers(count=2, device="cpu", collective_timeout_s=60)


@pytest.fixture(scope="module", autouse=True)
def ray():
    with ray_session(num_cpus=2):
        yield


def introduce(argument):
    backend = get_backend("cpu")
    ranks = backend.sum_over_ranks(torch.tensor([1.0, float(backend.rank)]), "ranks")
    counts = (backend.world, backend.host_ranks)
    argument["mailbox"].put((backend.rank, counts, ranks.tolist(), os.getpid()))


def fail_on_rank_one(argument):
    if dist.get_rank() == 1:
        raise ArithmeticError("rank 1 cannot go on")


def fail_on_rank_one_while_rank_zero_waits(argument):
    fail_on_rank_one(argument)
    get_backend("cpu").sum_over_ranks(torch.ones(1), "waiting for rank 1")


def hang_on_rank_one(argument):
    backend = get_backend("cpu")
    if backend.rank == 1:
        time.sleep(600)
    backend.sum_over_ranks(torch.ones(1), "waiting for rank 1")


def count_until_stopped(argument):
    counted = 0
    while dist.get_rank() == 0 and not argument["mailbox"].put(counted):
        counted += 1


def run(function, tmp_path, *, workers=TWO, on_message=None):
    mailbox, messages = Mailbox(), []
    run_on_workers(
        function,
        {"mailbox": mailbox},
        workers,
        storage=tmp_path / "ray",
        mailbox=mailbox,
        on_message=on_message(mailbox, messages) if on_message else messages.append,
    )
    return messages


def test_each_process_knows_its_rank_sums_reach_all_and_nothing_stays_behind(tmp_path):
    messages = sorted(run(introduce, tmp_path))

    assert [(rank, counts, sums) for rank, counts, sums, _ in messages] == [
        (0, (2, 2), [2.0, 1.0]),
        (1, (2, 2), [2.0, 1.0]),
    ]
    assert os.getpid() not in {process for *_, process in messages}
    assert not (tmp_path / "ray").exists()


@pytest.mark.slow
def test_what_a_process_raises_is_raised_here(tmp_path):
    with pytest.raises(ArithmeticError, match="rank 1 cannot go on"):
        run(fail_on_rank_one, tmp_path)


@pytest.mark.slow
def test_of_two_that_fail_the_one_that_failed_by_itself_is_raised(tmp_path):
    with pytest.raises(ArithmeticError, match="rank 1 cannot go on"):
        run(fail_on_rank_one_while_rank_zero_waits, tmp_path)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_after_the_timeout_and_is_named(tmp_path):
    with pytest.raises(CollectiveError, match=r"rank 0: waiting for rank 1 did not complete"):
        run(hang_on_rank_one, tmp_path, workers=replace(TWO, collective_timeout_s=3))


@pytest.mark.slow
def test_messages_arrive_in_order_while_the_function_runs_and_can_stop_it(tmp_path):
    def stop_at_the_third(mailbox, messages):
        def take(message):
            messages.append(message)
            if message == 3:
                mailbox.ask_to_stop()

        return take

    messages = run(count_until_stopped, tmp_path, on_message=stop_at_the_third)

    assert messages == list(range(len(messages)))
    assert len(messages) >= 4


def test_more_workers_than_the_cluster_has_cpus_are_refused_at_once(tmp_path):
    with pytest.raises(
        LaunchError, match=r"3 workers of 1 CPU need 3 CPUs, but the cluster has 2; set parallel"
    ):
        run(introduce, tmp_path, workers=Workers(count=3, device="cpu", collective_timeout_s=60))


def test_tpu_workers_without_a_slice_are_refused_at_once(tmp_path):
    host = Workers(
        count=2, device="xla", collective_timeout_s=60, accelerator_type="v4-16", topology="2x2x2"
    )

    with pytest.raises(LaunchError, match=r"has no TPU slice of kind v4-16, it has no TPU"):
        run(introduce, tmp_path, workers=host)


def test_cuda_workers_without_gpus_are_refused_at_once(tmp_path):
    with pytest.raises(LaunchError, match=r"2 cuda workers need 2 GPUs, but the cluster has 0"):
        run(introduce, tmp_path, workers=Workers(count=2, device="cuda", collective_timeout_s=60))
