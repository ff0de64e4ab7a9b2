"""What every backend promises training, with one process and with two."""

from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from cluster.backends import get_backend, gradients
from cluster.backends.collectives import Collectives, Group, named_failure
from cluster.backends.gradients import PlacedModel
from cluster.backends.torch_native import CpuBackend
from cluster.errors import LaunchError
from cluster.topology import Mesh
from tests.pipelines import tiny

ALONE = Group((0,), None)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# One process.


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch_xla is installed here")
def test_xla_without_torch_xla_is_refused_with_what_to_install():
    with pytest.raises(
        LaunchError, match=r"device xla needs torch_xla, .* install 'mone\[tpu\]' in an environment"
    ):
        get_backend("xla")


def test_a_failure_of_this_ranks_own_device_is_not_blamed_on_others():
    with pytest.raises(torch.OutOfMemoryError, match="mine"), named_failure(0, "a sum"):
        raise torch.OutOfMemoryError("mine")


def test_without_a_process_group_there_is_one_rank():
    backend = get_backend("cpu")

    assert isinstance(backend, CpuBackend)
    assert (backend.rank, backend.world, backend.device) == (0, 1, torch.device("cpu"))
    assert (backend.mesh, backend.parts, backend.expert_ranks) == (Mesh(1, 1), 1, 1)
    assert backend.held(6) == range(6)
    assert backend.host_ranks == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_the_cpu_backend_fixes_torchs_threads(threads):
    get_backend("cpu", threads=threads)

    assert torch.get_num_threads() == threads


def test_experts_are_not_spread_over_ranks_that_do_not_exist():
    with pytest.raises(LaunchError, match=r"cannot be spread over 2 of 1 ranks; .* one of 1, or"):
        get_backend("cpu", expert=2)


def test_alone_sums_are_the_values_themselves_and_nothing_travels():
    backend = get_backend("cpu")
    values = torch.tensor([1.5, 2.5])
    slots = torch.rand(2, 3, 4)

    summed = [backend.sum_over_ranks(values, "a"), backend.sum_over_experts(values, "b")]
    backend.barrier("waiting")
    backend.synchronize()

    for each in summed:
        assert torch.equal(each, values)
        assert each.data_ptr() != values.data_ptr()  # the caller's tensor is left alone
    assert backend.to_experts(slots, "there")() is slots
    assert backend.to_tokens(slots, "back")() is slots
    assert backend.send_rows(slots, [2], [2], "there")() is slots
    assert backend.stacked(slots) is slots
    assert backend.sent_bytes == 0


def test_parts_of_a_batch_are_cut_in_their_order():
    backend = get_backend("cpu")
    whole = torch.arange(24).view(2, 12)
    cut = []

    for index in range(3):
        backend.take_part(index, 3)
        assert backend.parts == 3
        cut.append(backend.share(whole, axis=1))
    backend.take_part(0, 1)

    assert torch.equal(torch.cat(cut, dim=1), whole)
    assert torch.equal(backend.share(whole, axis=1), whole)


# Gradients in buckets.


@dataclass
class Heard(Collectives):
    """The collectives, and the sums that were begun."""

    sums: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__(0)

    def start_sum(self, values, group, what):
        self.sums.append((what, values.numel(), values.dtype))
        return super().start_sum(values, group, what)


class Chain(nn.Module):
    """Five layers, applied in any order; `idle` belongs to no forward pass."""

    def __init__(self, order=(0, 1, 2, 3)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
        self.idle = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.layers[1].double()
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x.to(self.layers[index].weight.dtype))
        return x


def placed(model, heard, experts=()):
    return PlacedModel(model, experts, heard, everyone=ALONE, replicas=ALONE)


def test_gradients_lie_in_buckets_of_one_dtype_and_limited_size(monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 2 * 16)  # two matrices of float32
    heard, model = Heard(), Chain()

    chain = placed(model, heard, experts={"layers.0.weight"})
    chain.finish_gradients()

    assert [(numel, dtype) for _, numel, dtype in heard.sums] == [
        (8, torch.float32),  # idle, 3
        (4, torch.float32),  # 2
        (4, torch.float64),  # 1
        (4, torch.float32),  # 0, an expert
    ]
    assert [what for what, *_ in heard.sums] == [
        f"adding up the gradients from {first}.weight to {last}.weight"
        for first, last in (
            ("idle", "layers.3"),
            ("layers.2", "layers.2"),
            ("layers.1", "layers.1"),
            ("layers.0", "layers.0"),
        )
    ]
    assert model.frozen.weight.grad is None
    storage = model.idle.weight.grad.untyped_storage().data_ptr()
    assert model.layers[3].weight.grad.untyped_storage().data_ptr() == storage


def test_weights_and_gradients_are_those_of_the_model_itself():
    torch.manual_seed(0)
    model, same = Chain(), Chain()
    same.load_state_dict(model.state_dict())
    chain, x = placed(model, Heard()), torch.rand(3, 2)

    for _ in range(2):  # a second step begins from nothing
        chain.zero_gradients()
        chain.last_backward()
        chain(x).square().sum().backward()
        chain.finish_gradients()
    same(x).square().sum().backward()

    for left, right in zip(model.layers, same.layers, strict=True):
        assert torch.equal(left.weight, right.weight)
        assert torch.equal(left.weight.grad, right.weight.grad)
    assert not model.idle.weight.grad.any()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 0)])
def test_buckets_leave_in_one_order_whatever_the_backward_pass_finishes_first(order, monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1)
    heard, model = Heard(), Chain(order)
    del model.idle
    chain = placed(model, heard)

    chain.zero_gradients()
    chain.last_backward()
    chain(torch.rand(3, 2)).sum().backward()
    chain.finish_gradients()

    assert [what for what, *_ in heard.sums] == [
        f"adding up the gradients from layers.{index}.weight to layers.{index}.weight"
        for index in (3, 2, 1, 0)
    ]


@pytest.mark.parametrize("experts", [(), ("layers.2.weight",), ("layers.0.weight",)])
def test_a_bucket_leaves_while_the_backward_pass_is_still_running(experts, monkeypatch):
    """Of an expert too, though other ranks add it up: it waits for no later layer."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1)
    heard, model = Heard(), Chain()
    del model.idle
    chain = placed(model, heard, experts)
    sent_before = []
    for layer in model.layers:
        layer.weight.register_hook(lambda _: sent_before.append(len(heard.sums)))

    chain.last_backward()
    chain(torch.rand(3, 2)).sum().backward()

    assert sent_before == [0, 1, 2, 3]
    assert len(heard.sums) == 4


def test_nothing_leaves_before_the_last_backward_pass_of_a_step():
    heard, model = Heard(), Chain()
    chain, x = placed(model, heard), torch.rand(4, 2)

    for _ in range(2):
        chain.zero_gradients()
        chain(x[:2]).sum().backward()
        chain(x[2:3]).sum().backward()
        assert heard.sums == []
        chain.last_backward()
        chain(x[3:]).sum().backward()
        chain.finish_gradients()
        assert len(heard.sums) == 3  # of two dtypes, the layers 2 and 3, 1, and 0
        heard.sums.clear()

    grads = [layer.weight.grad.clone() for layer in model.layers]
    chain.zero_gradients()
    chain(x).sum().backward()
    for layer, grad in zip(model.layers, grads, strict=True):
        torch.testing.assert_close(layer.weight.grad, grad)


# Two processes.


def promise(backend, folder):
    """Runs on each of two ranks; a broken promise fails the process."""
    assert (backend.world, backend.parts) == (2, 2)
    values_are_summed(backend)
    exchanges_are_avoided_or_made(backend)
    weights_are_shared_and_gradients_summed(backend)
    experts_are_those_of_their_replicas(backend)
    unreached_layers_differ_by_rank(backend)
    experts_are_stacked(backend)
    if backend.rank == 0:
        (folder / "first").touch()
    backend.barrier("the end")
    assert (folder / "first").exists()
    backend.synchronize()


def values_are_summed(backend):
    rank = backend.rank
    mine = torch.tensor([1.0 + rank, 0.1])
    assert torch.equal(backend.sum_over_ranks(mine, "a"), torch.tensor([3.0, 0.2]))
    assert torch.equal(mine, torch.tensor([1.0 + rank, 0.1]))
    assert backend.sum_over_ranks(torch.tensor(rank), "a").item() == 1
    assert backend.sum_over_ranks(torch.ones(2, 3, dtype=torch.float64), "a").sum().item() == 12
    spread = get_backend("cpu", expert=2)
    assert torch.equal(backend.sum_over_experts(mine, "b"), mine)  # a row of one
    assert torch.equal(spread.sum_over_experts(mine, "b"), torch.tensor([3.0, 0.2]))
    backend.take_part(1, 2)
    assert backend.parts == 4
    assert backend.share(torch.arange(8), axis=0).tolist() == [4 * rank + 2, 4 * rank + 3]
    backend.take_part(0, 1)


def exchanges_are_avoided_or_made(backend):
    """A slot's value names its rank, expert and place: 100 r + 10 e + q."""
    spread = get_backend("cpu", expert=2)
    r, e, q = backend.rank, torch.arange(4).view(4, 1, 1), torch.arange(3).view(1, 3, 1)
    slots = (100 * r + 10 * e + q).expand(4, 3, 5).float().contiguous()
    assert backend.to_experts(slots, "there")() is slots

    arrived = spread.to_experts(slots, "there")()
    assert spread.held(4) == range(2 * r, 2 * r + 2)
    assert arrived[:, :, 0].tolist() == [
        [100.0 * sender + 10 * expert + place for sender in (0, 1) for place in range(3)]
        for expert in spread.held(4)
    ]
    assert torch.equal(spread.to_tokens(arrived, "back")(), slots)
    assert spread.sent_bytes == 2 * slots.nbytes

    rows = torch.stack([torch.full((2,), 100.0 * r + row) for row in range((4, 2)[r])])
    sent, come = (([1, 3], [1, 2]), ([2, 0], [3, 0]))[r]
    assert backend.send_rows(rows, [len(rows)], [len(rows)], "there")() is rows
    arrived = spread.send_rows(rows, sent, come, "there")()
    assert arrived[:, 1].tolist() == ([0.0, 100.0, 101.0], [1.0, 2.0, 3.0])[r]
    assert torch.equal(spread.send_rows(arrived, come, sent, "back")(), rows)
    assert spread.sent_bytes == 2 * slots.nbytes + rows.nbytes + arrived.nbytes
    assert backend.sent_bytes == 0


def weights_are_shared_and_gradients_summed(backend):
    # Ranks begin with weights of their own; rank 0's are everyone's once placed.
    torch.manual_seed(backend.rank)
    core = nn.Linear(3, 1)
    torch.manual_seed(0)
    first = nn.Linear(3, 1)
    model = backend.place(core, ())
    assert torch.equal(core.weight, first.weight)
    assert torch.equal(core.bias, first.bias)
    model.zero_gradients()
    model.last_backward()
    model(torch.full((1, 3), 1.0 + backend.rank)).sum().backward()
    model.finish_gradients()
    assert torch.equal(core.weight.grad, torch.full((1, 3), 3.0))  # a sum and no mean
    assert core.bias.grad.item() == 2


def experts_are_those_of_their_replicas(backend):
    """On 1 x 2 ranks every rank has experts of its own, on 2 x 1 all have the same."""
    for expert in (1, 2):
        ranks = get_backend("cpu", expert=expert)
        core = nn.Linear(2, 1)
        nn.init.constant_(core.weight, backend.rank)
        nn.init.constant_(core.bias, backend.rank)
        model = ranks.place(core, {"weight"})
        assert core.weight[0, 0].item() == (0 if expert == 1 else backend.rank)
        assert core.bias.item() == 0
        model.last_backward()
        model(torch.full((1, 2), 1.0 + backend.rank)).sum().backward()
        model.finish_gradients()
        assert core.weight.grad[0, 0].item() == (3 if expert == 1 else 1 + backend.rank)
        assert core.bias.grad.item() == 2


def unreached_layers_differ_by_rank(backend):
    """Ranks go through layers in other orders and leave some out; what is sent still fits."""
    torch.manual_seed(1)
    model = Chain(order=(2, 0, 3) if backend.rank == 0 else (3, 1, 0, 0))
    whole = [Chain(order) for order in ((2, 0, 3), (3, 1, 0, 0))]
    gradients.BUCKET_BYTES = 1
    chain = backend.place(model, {"layers.3.weight"})
    for _ in range(2):
        chain.zero_gradients()
        chain(torch.ones(1, 2)).sum().backward()
        chain.last_backward()
        chain(torch.full((1, 2), 2.0)).sum().backward()
        chain.finish_gradients()

    for each in whole:
        each.load_state_dict(model.state_dict())
        (each(torch.ones(1, 2)).sum() + each(torch.full((1, 2), 2.0)).sum()).backward()
    for index, layer in enumerate(model.layers):
        grads = [each.layers[index].weight.grad for each in whole]
        right = sum(grad for grad in grads if grad is not None)
        torch.testing.assert_close(layer.weight.grad, right)
    assert not model.idle.weight.grad.any()


def experts_are_stacked(backend):
    """What a rank holds is its part of one tensor of all experts."""
    whole = torch.arange(24.0).view(4, 2, 3)
    for expert, shape in ((1, (2, 1)), (2, (1, 2))):
        ranks = get_backend("cpu", expert=expert)
        held = ranks.held(4)
        stacked = ranks.stacked(whole[held.start : held.stop])
        assert isinstance(stacked, DTensor)
        assert stacked.shape == whole.shape
        assert stacked.placements == (Replicate(), Shard(0))
        assert stacked.device_mesh.shape == shape
        assert stacked.device_mesh.mesh_dim_names == ("data", "expert")
        assert torch.equal(stacked.full_tensor(), whole)
        assert torch.equal(stacked.to_local(), whole[held.start : held.stop])


def test_two_processes_keep_every_promise(tmp_path):
    """What must hold is asserted in `promise`, on both; a process that fails raises here."""
    tiny.on_ranks(promise, tmp_path, tmp_path)
