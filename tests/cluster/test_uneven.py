"""Rows between ranks, as many as each side says, and a layer without capacity over processes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils import deterministic

from cluster.backends import get_backend
from cluster.errors import CollectiveError
from tests.mone_core.rank_steps import (
    BATCH,
    NESTED,
    assert_close,
    favouring,
    images_of_all,
    step,
    step_of_one,
)
from tests.mone_core.sparse_reference import FLAT, LOSSES
from tests.pipelines import tiny

# Rows from each rank (outer) to each rank.
SIZES = [
    [(2, 3), (4, 1)],
    [(0, 3), (4, 0)],
    [(5, 0), (0, 2)],
    [(0, 0), (3, 2)],  # the first sends nothing
    [(0, 2), (0, 3)],  # and here nothing comes to it
    [(0, 0), (0, 0)],
]


def test_alone_rows_stay_where_they_are():
    backend, rows = get_backend("cpu"), torch.rand(3, 2)

    assert backend.send_rows(rows, [3], [3], "there")() is rows
    assert backend.sent_bytes == 0


def promise(backend):
    """Runs on each of two ranks; a broken promise fails the process."""
    torch.use_deterministic_algorithms(True)  # under which unwritten memory is filled
    deterministic.fill_uninitialized_memory = True
    for sizes in SIZES:
        rows_come_in_the_order_of_ranks(backend, sizes, torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        rows_come_in_the_order_of_ranks(backend, SIZES[1], dtype)
    several_travel_at_once(backend)
    what_does_not_add_up_is_told(backend)
    for skew, k, layout in (("skewed", 1, NESTED), ("one empty", 2, FLAT), ("all to one", 1, FLAT)):
        a_layer_is_a_static_one_with_room_for_all(backend, skew, k, layout)


def rows_of(rank, sizes, dtype):
    """Rows that name who sends them, and which of all they are: 100 r + n."""
    n = torch.arange(sum(sizes[rank])).view(-1, 1, 1)
    return (100 * rank + n).expand(-1, 2, 3).to(dtype).contiguous()


def rows_come_in_the_order_of_ranks(backend, sizes, dtype):
    me, before = backend.rank, backend.sent_bytes
    rows, come = rows_of(me, sizes, dtype), [of_rank[me] for of_rank in sizes]

    arrived = backend.send_rows(rows, sizes[me], come, "there")()

    expected = [rows_of(sender, sizes, dtype).split(sizes[sender])[me] for sender in (0, 1)]
    assert torch.equal(arrived, torch.cat(expected))
    assert arrived.dtype == dtype
    assert backend.sent_bytes - before == rows.nbytes
    assert torch.equal(backend.send_rows(arrived, come, sizes[me], "back")(), rows)


def several_travel_at_once(backend):
    """And may be asked for in any order; whoever has nothing to send takes part."""
    me = backend.rank
    rows = [rows_of(me, sizes, torch.float64) for sizes in SIZES]
    come = [[of_rank[me] for of_rank in sizes] for sizes in SIZES]
    arriving = [
        backend.send_rows(each, sizes[me], comes, "there")
        for each, sizes, comes in zip(rows, SIZES, come, strict=True)
    ]
    for arrive, sizes in reversed(list(zip(arriving, SIZES, strict=True))):
        expected = [
            rows_of(sender, sizes, torch.float64).split(sizes[sender])[me] for sender in (0, 1)
        ]
        assert torch.equal(arrive(), torch.cat(expected))


def what_does_not_add_up_is_told(backend):
    with pytest.raises(
        CollectiveError, match=rf"rank {backend.rank}: all-to-all of layer 3, inputs did not comp"
    ):
        backend.send_rows(torch.ones(3, 2), [1, 1], [1, 1], "layer 3, inputs")()


def a_layer_is_a_static_one_with_room_for_all(backend, skew, k, layout):
    """Each rank has the whole static layer to compare its part with."""
    torch.manual_seed(5)
    layer = favouring(skew, k=k, capacity_ratio=4.0, noise=1.0, **LOSSES).train()
    batch = images_of_all(layout)
    without = copy.deepcopy(layer)
    without.config = replace(layer.config, dropless=True)
    torch.manual_seed(7)
    whole, told, expected = step(layer, *batch, layout)
    assert all(each.assignment.kept_GSK.all() for each in told.classes)

    before = backend.sent_bytes
    torch.manual_seed(7)
    out, _, grads = step_of_one(without, backend, batch, layout)
    sent = backend.sent_bytes - before

    me, held = backend.rank, backend.held(4)
    assert_close(out, whole.chunk(2, dim=1)[me], "output")
    for name, grad in grads.items():
        if name in ("residual", "x", "gate"):
            assert_close(grad, expected[name].chunk(2, dim=1)[me], name)
        elif name.startswith("bank."):
            assert_close(grad, expected[name][held.start : held.stop], name)
        else:
            assert_close(backend.sum_over_ranks(grad, name), expected[name], name)
    features = sum(each.dim * (each.stop - each.start) for each in layout.segments)
    counted = 2 * len(layout.segments) * 4  # of both ranks, four experts
    assert backend.sum_over_ranks(torch.tensor(sent), "bytes").item() == 8 * (
        4 * k * BATCH * features + counted
    )


def test_two_processes_keep_every_promise(tmp_path):
    """What must hold is asserted in `promise`, on both; a process that fails raises here."""
    tiny.on_ranks(promise, tmp_path, expert=2)
