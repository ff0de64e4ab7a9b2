"""A rank that hangs or fails: the others end in time and say who was at what.

Three processes are started once. In each scene rank 2 leaves the others alone at another moment;
they must not wait for longer than the timeout of their groups, and not at all once it is gone.
"""

import json
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cluster.backends import get_backend
from cluster.backends.collectives import Collectives, Group
from cluster.errors import CollectiveError
from mone_core.models import ExpertsConfig, ModelConfig, build_model
from mone_core.parallel import spread
from tests.pipelines import tiny

WORLD, MISSING = 3, 2
TIMEOUT_S = 4
PATIENCE_S = 120  # no test waits so long unless a rank never ends


def a_layer_forward(model, backend):
    """The missing rank never enters the model."""
    if backend.rank != MISSING:
        model(torch.rand(2, 3, 16, 16))


def a_layer_backward(model, backend):
    """The missing rank computes its loss, and no gradient."""
    logits_BK = model(torch.rand(2, 3, 16, 16)).logits_BK
    if backend.rank != MISSING:
        logits_BK.sum().backward()


def gradients(model, backend):
    """The missing rank computes its gradient, and does not add it to the others'."""
    layer = nn.Linear(2, 1)
    placed = get_backend("cpu", timeout_s=TIMEOUT_S).place(layer, {"weight", "bias"})
    if backend.rank != MISSING:
        placed.last_backward()
        placed(torch.ones(1, 2)).sum().backward()
        placed.finish_gradients()


def a_sum_over_experts(model, backend):
    if backend.rank != MISSING:
        backend.sum_over_experts(torch.ones(1), "the gradient norm of the experts")


def a_barrier(model, backend):
    handle = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    if backend.rank != MISSING:
        Collectives(backend.rank).barrier(Group((0, 1, 2), handle), "writing the first checkpoint")


def a_rank_that_is_gone(model, backend):
    """The missing rank's process ends, as one that raises does. This group's timeout is long."""
    if backend.rank != MISSING:
        Collectives(backend.rank).sum(
            torch.ones(1), Group((0, 1, 2), dist.group.WORLD), "adding up a metric row"
        )


SCENES = {
    a_layer_forward: r"all-to-all of encoder\.blocks\.0\.mlp, width 16, inputs",
    a_layer_backward: r"all-to-all of encoder\.blocks\.1\.mlp, width 16, gradients of outputs",
    gradients: r"adding up the gradients from \S+ to \S+",
    a_sum_over_experts: r"the gradient norm of the experts",
    a_barrier: r"writing the first checkpoint",
    a_rank_that_is_gone: r"adding up a metric row",
}


def play(_, folder):
    """What each rank does: every scene, of which it leaves what it saw; the last ends rank 2."""
    config = ModelConfig(
        image_size=16,
        patch_size=4,
        num_classes=2,
        dim=16,
        depth=2,
        heads=2,
        experts=ExpertsConfig(placement="every", spacing=1, num_experts=WORLD, group_images=2),
    )
    for scene in SCENES:
        torch.manual_seed(0)
        backend = get_backend("cpu", expert=WORLD, timeout_s=TIMEOUT_S)  # with groups of its own
        model = build_model(config)
        spread(model, backend)
        start = time.monotonic()
        try:
            scene(model, backend)
        except CollectiveError as error:
            seen = {"message": str(error), "seconds": time.monotonic() - start}
            (folder / f"{scene.__name__}-{backend.rank}.json").write_text(json.dumps(seen))
        if scene is not a_rank_that_is_gone:
            wait_for(folder / f"{scene.__name__}-{rank}.json" for rank in range(MISSING))


def wait_for(files):
    """All ranks go on to the next scene when those that are left alone have ended."""
    end = time.monotonic() + PATIENCE_S
    for file in files:
        while not file.exists():
            assert time.monotonic() < end, f"nobody wrote {file}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The folder in which ranks left what they saw."""
    folder = tmp_path_factory.mktemp("scenes")
    tiny.on_ranks(play, folder, folder, world=WORLD)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(MISSING))
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_the_others_end_in_time_and_name_rank_layer_width_and_pass(scene, rank, played):
    seen = json.loads((played / f"{scene.__name__}-{rank}.json").read_text())

    assert re.fullmatch(
        rf"rank {rank}: {SCENES[scene]} did not complete; another rank failed, hangs or is "
        r"slower than parallel\.collective_timeout_s allows \(.+\)",
        seen["message"],
    )
    if scene is not a_rank_that_is_gone:
        assert seen["seconds"] > 0.5 * TIMEOUT_S
    assert seen["seconds"] < TIMEOUT_S + 20  # of a machine with other work to do
