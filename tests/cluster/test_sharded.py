"""Dense weights as parts on all ranks: sums of gradients, and who holds what when."""

import itertools
import traceback
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from cluster.backends import get_backend
from cluster.backends.gradients import PlacedModel
from cluster.errors import CollectiveError
from tests.pipelines.tiny import on_ranks

WIDTH = 3  # of which two ranks have no equal halves


class Block(nn.Module):
    """A dense layer, experts of which a rank has its own, and a scalar."""

    def __init__(self, seen):
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = nn.Parameter(torch.ones(1, WIDTH))
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = seen

    def forward(self, x):
        self.seen()
        return self.dense(x) * self.experts * self.scale


class Model(nn.Module):
    """Two blocks behind each other, and a layer that belongs to no forward pass."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(self.look) for _ in range(2))
        self.idle = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        nn.init.constant_(self.frozen.weight, 0.5)
        nn.init.zeros_(self.frozen.bias)
        self.looks, self.between = [], None

    def look(self):
        self.looks.append([isinstance(b.dense.weight, DTensor) for b in self.blocks])

    def forward(self, x):
        self.between = self.blocks[0](x)
        return self.frozen(self.blocks[1](self.between))


EXPERTS = {"blocks.0.experts", "blocks.1.experts"}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_twice(backend):
    """A model placed whole and placed in parts; ranks begin with weights of their own."""
    torch.manual_seed(backend.rank)
    known, split = Model(), Model()
    split.load_state_dict(known.state_dict())
    return (known, backend.place(known, EXPERTS)), (
        split,
        backend.place(split, EXPERTS, split.blocks),
    )


def step(placed, rank, passes=1):
    """Gradients of so many backward passes over numbers that no other rank has."""
    placed.zero_gradients()
    for index in range(passes):
        if index == passes - 1:
            placed.last_backward()
        placed(torch.full((2, WIDTH), float(1 + rank + index))).sum().backward()
    placed.finish_gradients()


def gradients_are_sums_over_ranks_and_passes(rank):
    """Torch averages by default, and divides float32 and float64 in different places."""
    for dtype, expert in itertools.product((torch.float32, torch.float64), (1, 2)):
        torch.set_default_dtype(dtype)
        (known, placed), (split, sharded) = placed_twice(get_backend("cpu", expert=expert))
        for passes in (3, 1):
            step(placed, rank, passes)
            step(sharded, rank, passes)
            for name, parameter in known.named_parameters():
                if parameter.requires_grad:
                    found = whole(split.get_parameter(name).grad)
                    torch.testing.assert_close(found, parameter.grad, msg=f"{name}, {passes}")
        x = sum(known.blocks[0](torch.full((2, WIDTH), 1.0 + each)).sum(0) for each in range(2))
        slope = 1.5 * known.blocks[1].experts[0] * known.blocks[1].scale
        by_hand = slope.outer(x).detach()
        found = whole(split.blocks[1].dense.weight.grad)
        if expert == 1:  # else each rank multiplies by experts of its own
            torch.testing.assert_close(found, by_hand)
        assert len(found) == WIDTH


def a_rank_holds_its_rows_and_a_block_is_whole_while_it_computes(rank):
    (known, _), (split, sharded) = placed_twice(get_backend("cpu"))
    mine = [name for name, p in split.named_parameters() if isinstance(p, DTensor)]
    assert mine == [
        *("blocks.0.dense.weight", "blocks.1.dense.weight"),
        *("idle.weight", "idle.bias", "frozen.weight", "frozen.bias"),
    ]
    for name in mine:
        part = split.get_parameter(name)
        assert part.placements == (Shard(0),)
        assert len(part.to_local()) == (2, 1)[rank]  # of three rows
        assert torch.equal(part.full_tensor(), known.get_parameter(name))
    with torch.no_grad():
        split(torch.ones(2, WIDTH))  # as an evaluation does: the bare model, no backward pass
    assert all(isinstance(split.get_parameter(name), DTensor) for name in mine)
    step(sharded, rank)
    assert all(isinstance(split.get_parameter(name), DTensor) for name in mine)
    assert split.looks == 2 * [[False, True], [True, False]]  # is a part: first block, second


def what_no_backward_pass_reached_is_zero_and_what_does_not_learn_has_none(rank):
    _, (split, sharded) = placed_twice(get_backend("cpu"))
    step(sharded, rank)
    for parameter in split.idle.parameters():
        assert not whole(parameter.grad).any()
    assert all(parameter.grad is None for parameter in split.frozen.parameters())
    sharded.zero_gradients()
    learned = [p for p in split.parameters() if p.requires_grad]
    assert not any(p.grad is not None and whole(p.grad).any() for p in learned)


def a_rank_that_is_gone_is_told_of_with_the_layer_and_what_was_done(rank):
    """The last scene: the other rank's process ends in the middle of its backward pass."""
    _, (split, sharded) = placed_twice(get_backend("cpu"))
    sharded.zero_gradients()
    sharded.last_backward()
    loss = sharded(torch.ones(2, WIDTH)).sum()
    if rank:
        split.between.register_hook(leave)
        with pytest.raises(EOFError, match="left"):
            loss.backward()
    else:
        with pytest.raises(
            CollectiveError,
            match=r"rank 0: adding up the gradients of blocks\.0 did not complete; another rank",
        ):
            loss.backward()


def leave(_gradient):
    raise EOFError("left")


SCENES = (
    gradients_are_sums_over_ranks_and_passes,
    a_rank_holds_its_rows_and_a_block_is_whole_while_it_computes,
    what_no_backward_pass_reached_is_zero_and_what_does_not_learn_has_none,
    a_rank_that_is_gone_is_told_of_with_the_layer_and_what_was_done,
)


def play(backend, folder):
    """Runs on both ranks: every scene, of which they leave what went wrong."""
    warnings.simplefilter("error")
    for scene in SCENES:
        wrong = ""
        try:
            scene(backend.rank)
        except (AssertionError, RuntimeError, CollectiveError):
            wrong = traceback.format_exc()
        (folder / f"{scene.__name__}-{backend.rank}").write_text(wrong)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The folder in which both ranks left what went wrong: starting them takes seconds."""
    folder = tmp_path_factory.mktemp("scenes")
    on_ranks(play, folder, folder)
    return folder


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_on_two_ranks(scene, rank, played):
    assert (played / f"{scene.__name__}-{rank}").read_text() == ""


def test_one_rank_alone_splits_nothing():
    model = Model()

    placed = get_backend("cpu").place(model, EXPERTS, model.blocks)

    assert isinstance(placed, PlacedModel)
