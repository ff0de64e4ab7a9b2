"""What every backend promises training, with one process and with two."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.backends import get_backend
from cluster.backends.torch_native import CpuBackend


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_without_a_process_group_there_is_one_rank():
    backend = get_backend("cpu")

    assert isinstance(backend, CpuBackend)
    assert (backend.rank, backend.world, backend.device) == (0, 1, torch.device("cpu"))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_cpu_backend_fixes_torchs_threads(threads):
    get_backend("cpu", threads=threads)

    assert torch.get_num_threads() == threads


def test_alone_a_model_is_not_wrapped_and_sums_are_the_values_themselves():
    backend = get_backend("cpu")
    model = nn.Linear(2, 2)
    values = torch.tensor([1.5, 2.5])

    summed = backend.sum_over_ranks(values)
    backend.barrier()
    backend.synchronize()

    assert backend.place(model) is model
    assert torch.equal(summed, values)
    assert summed.data_ptr() != values.data_ptr()  # the caller's tensor is left alone


def promise(rank, meeting):
    """Runs on each of two ranks; a broken promise fails the process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    backend = get_backend("cpu")
    assert (backend.rank, backend.world) == (rank, 2)

    mine = torch.tensor([1.0 + rank, 0.1])
    assert torch.equal(backend.sum_over_ranks(mine), torch.tensor([3.0, 0.2]))
    assert torch.equal(mine, torch.tensor([1.0 + rank, 0.1]))
    assert backend.sum_over_ranks(torch.tensor(rank)).item() == 1
    assert backend.sum_over_ranks(torch.ones(2, 3, dtype=torch.float64)).sum().item() == 12

    # Ranks begin with weights of their own; rank 0's are everyone's once placed.
    torch.manual_seed(rank)
    core = nn.Linear(3, 1)
    torch.manual_seed(0)
    first = nn.Linear(3, 1)
    model = backend.place(core)
    assert isinstance(model, DistributedDataParallel)
    assert torch.equal(core.weight, first.weight)
    model(torch.full((1, 3), float(rank))).sum().backward()
    assert torch.equal(core.weight.grad, torch.full((1, 3), 0.5))  # the mean of 0 and 1

    if rank == 0:
        meeting.with_name("first").touch()
    backend.barrier()
    assert meeting.with_name("first").exists()
    backend.synchronize()
    del model  # its hooks hold on to the group
    dist.destroy_process_group()


def test_two_processes_share_sums_first_weights_and_mean_gradients(tmp_path):
    """What must hold is asserted in `promise`, on both; a process that fails raises here."""
    mp.spawn(promise, (tmp_path / "meeting",), nprocs=2)
