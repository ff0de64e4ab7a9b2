"""The proof that many processes train as one does, and that it would notice if they did not.

The grid takes a minute of CPU time for one and two processes, and more for four, which
run with the slow tests. `break_everything` makes one mistake after the other on two and on four
connected processes; for each it is written here which quantities must differ, all others being
equal.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cluster.backends.collectives import Collectives
from cluster.backends.gradients import PlacedModel
from cluster.backends.sharded import ShardedModel
from cluster.backends.torch_native import CpuBackend
from cluster.topology import Mesh, meshes
from mone_core.bank import ExpertBank
from mone_core.experts import SparseMlp
from mone_core.load import FIELDS
from pipelines import cli, parity
from pipelines.commands import verify_parallel
from pipelines.errors import RunFailedError
from pipelines.parity import CLIP_NORM, EXPERTS, STEPS, TOLERANCE, WORLDS, Case, Finding
from tests.pipelines import tiny

CASES = tuple(parity.cases())
MESHES = [mesh for world in WORLDS for mesh in meshes(world, EXPERTS)]
NESTED = Case("nested top-2", "skewed", drops=True)
NESTED_DROPLESS = Case("nested dropless", "skewed", drops=False)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """What one process alone computes of the whole grid."""
    folder = tmp_path_factory.mktemp("parity")
    parity.refer(folder, CASES)
    return folder


@pytest.fixture(scope="module")
def findings_of(scratch):
    """What so many processes find on all their meshes; computed when first asked for."""
    found = {}

    def of(world):
        if world not in found:
            found[world] = parity.compare(scratch, world, CASES)
        return found[world]

    return of


# Equal.


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=pytest.mark.slow if mesh.world == 4 else ()) for mesh in MESHES],
    ids=lambda mesh: f"{mesh.data}x{mesh.expert}",
)
def test_many_processes_train_as_one_does(mesh, findings_of):
    of_mesh = [found for found in findings_of(mesh.world) if found.mesh == mesh]

    assert [found.case for found in of_mesh] == list(CASES)
    kinds = {*ALL, "bytes"} | ({"gradient in parts"} if mesh.world < 4 else set())
    assert all(found.errors.keys() == kinds for found in of_mesh)
    wrong = {found.case.name: found.worst for found in of_mesh if found.worst[1] > 1e-10}
    assert not wrong


def test_the_grid_is_every_mesh_routing_load_and_capacity():
    """Where there is no capacity nothing can be dropped."""
    shapes = [(mesh.data, mesh.expert) for mesh in MESHES]

    assert shapes == [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
    assert len(CASES) == len({case.name for case in CASES}) == 5 * 4 * 2 + 2 * 4


@pytest.mark.parametrize(
    ("dropless", "capped"), [("dropless", "top-2"), ("nested dropless", "nested top-2")]
)
def test_without_a_capacity_all_is_as_with_one_that_drops_nothing(dropless, capped, scratch):
    for load in ("balanced", "skewed", "one empty", "all to one"):
        left, right = (
            load_file(parity.reference_of(scratch, CASES.index(Case(routing, load, drops=False))))
            for routing in (dropless, capped)
        )
        assert left.keys() == right.keys()
        for name in left.keys() - {"load", "bytes"}:
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12, msg=name)


def test_every_case_is_what_it_is_called(scratch):
    """Seen in what its routers did, summed over the batch: `FIELDS` by layer, width and expert."""
    for index, case in enumerate(CASES):
        whole = load_file(parity.reference_of(scratch, index))
        load = dict(zip(FIELDS, whole["load"].unbind(-1), strict=True))
        wanted_E = load["wanted"].sum(dim=(0, 1))
        chosen = case.routing != "expert choice"
        if chosen:
            assert bool((load["used"] < load["wanted"]).any()) is case.drops, case
        else:
            assert bool((load["unreached"] > 0).any()) is case.drops, case
        if case.load == "one empty" and chosen:
            assert wanted_E[0] == 0 < wanted_E[1:].min()
        if case.load == "all to one" and chosen:
            assert torch.equal(load["wanted"][..., 2], load["tokens"][..., 2])
        if case.load == "skewed" and chosen:
            assert wanted_E[0] > 2 * wanted_E[3] > 0
        if case.load == "balanced" and chosen:
            assert wanted_E.max() < 3 * wanted_E.min()
        for step in range(STEPS):  # or clipping would change nothing
            assert whole[f"gradient norm {step}"] > 2 * CLIP_NORM


# Mistakes.

ALL = ("output", "input gradient", "load", "gradient norm", "gradient", "parameter")
OF_GRADIENTS = ("gradient norm", "gradient", "parameter")
BACKWARD = ("input gradient", *OF_GRADIENTS)


def nothing(patch, backend):
    """No mistake."""


def dense_weights_split_over_ranks(patch, backend):
    """No mistake either: another way to hold them."""
    right = CpuBackend.place

    def in_blocks(self, model, experts):
        placed = right(self, model, experts, model.encoder.blocks)
        assert isinstance(placed, ShardedModel)
        return placed

    patch.setattr(CpuBackend, "place", in_blocks)


def expert_gradients_divided_by_replicas(patch, backend):
    finish = PlacedModel.finish_gradients

    def times_expert_ranks(self):
        finish(self)
        for name, parameter in self._model.named_parameters():
            if ".bank." in name:
                parameter.grad.mul_(backend.expert_ranks)

    patch.setattr(PlacedModel, "finish_gradients", times_expert_ranks)


def expert_gradients_stay_on_their_rank(patch, backend):
    start_sum = Collectives.start_sum

    def of_all_ranks_only(self, values, group, what):
        replicas = group.ranks == backend.mesh.column(backend.rank)
        return (lambda: None) if replicas else start_sum(self, values, group, what)

    patch.setattr(Collectives, "start_sum", of_all_ranks_only)


def dense_gradients_averaged_over_a_row(patch, backend):
    start_sum = Collectives.start_sum

    def over_the_row(self, values, group, what):
        if "gradients" not in what or len(group.ranks) < backend.world:
            return start_sum(self, values, group, what)
        values.mul_(backend.mesh.data)  # a mean over the row, not over all
        return start_sum(self, values, backend._row, what)

    patch.setattr(Collectives, "start_sum", over_the_row)


def norm_counts_an_expert_for_every_expert_rank(patch, backend):
    right = CpuBackend.sum_over_experts
    patch.setattr(CpuBackend, "sum_over_experts", lambda *args: right(*args) * backend.expert_ranks)


def norm_counts_every_replica_of_an_expert(patch, backend):
    patch.setattr(CpuBackend, "sum_over_experts", CpuBackend.sum_over_ranks)


def norm_counts_the_experts_of_this_rank(patch, backend):
    patch.setattr(CpuBackend, "sum_over_experts", lambda *given: given[1])


def norm_counts_no_expert(patch, backend):
    patch.setattr(CpuBackend, "sum_over_experts", lambda *given: 0 * given[1])


def noise_of_a_rank_of_its_own(patch, backend):
    def of_this_rank(self, logits_NBE):
        torch.manual_seed(backend.rank)
        return torch.randn_like(logits_NBE)

    patch.setattr(SparseMlp, "_noise", of_this_rank)


def routing_over_what_a_rank_computes_at_once(patch, backend):
    def as_one_group(self, residual_NBD, x_NBD, layout, gate_NB1):
        return self._groups(residual_NBD, x_NBD, layout, gate_NB1, x_NBD.shape[1])

    patch.setattr(SparseMlp, "forward", as_one_group)


def slots_received_in_another_order_of_ranks(patch, backend):
    right = CpuBackend.to_experts

    def backwards(self, x_EQd, where):
        arrive, (_, slots, dim) = right(self, x_EQd, where), x_EQd.shape
        sent = (-1, self.expert_ranks, slots, dim)
        return lambda: arrive().view(sent).flip(1).flatten(1, 2)

    patch.setattr(CpuBackend, "to_experts", backwards)


def no_exchange_in_the_backward_pass(patch, backend):
    right = CpuBackend.to_experts

    def in_the_forward_pass(self, x_EQd, where):
        if "gradients" not in where:
            return right(self, x_EQd, where)
        parts = x_EQd.unflatten(0, (self.expert_ranks, -1))
        return lambda: parts.transpose(0, 1).flatten(1, 2)

    patch.setattr(CpuBackend, "to_experts", in_the_forward_pass)


def two_experts_swapped_on_a_rank(patch, backend):
    right = ExpertBank.keep

    def swapped(self, experts):
        right(self, experts)
        if backend.rank == 1:
            for weight in self.parameters():
                weight.data = weight.data.flip(0)

    patch.setattr(ExpertBank, "keep", swapped)


def buffers_read_before_they_are_written(patch, backend):
    right = Collectives.start_all_to_all

    def read_at_once(self, sent, group, what, sizes=None):
        arrive = right(self, sent, group, what, sizes)
        if not sent.is_floating_point():  # numbers of rows, that all must know
            return arrive
        rows = sum(sizes[1]) if sizes else len(sent)
        early = sent.new_empty(rows, *sent.shape[1:])  # as the one on its way was
        return lambda: (arrive(), early)[1]

    patch.setattr(Collectives, "start_all_to_all", read_at_once)


def rows_received_in_another_order_of_ranks(patch, backend):
    right = CpuBackend.send_rows

    def backwards(self, rows, sent, come, where):
        arrive = right(self, rows, sent, come, where)
        if not rows.is_floating_point():
            return arrive
        return lambda: torch.cat(arrive().split(list(come))[::-1])

    patch.setattr(CpuBackend, "send_rows", backwards)


def every_width_travels_as_the_full_one(patch, backend):
    for name in ("to_experts", "to_tokens"):
        patch.setattr(CpuBackend, name, as_wide_as_the_model(getattr(CpuBackend, name)))


def as_wide_as_the_model(right):
    def wide(self, slots, where):
        dim = slots.shape[2]
        arrive = right(self, F.pad(slots, (0, NESTED.config.dim - dim)), where)
        return lambda: arrive()[..., :dim].contiguous()

    return wide


def parts_before_the_last_forgotten(patch, backend):
    right = PlacedModel.last_backward

    def afresh(self):
        self.zero_gradients()
        right(self)

    patch.setattr(PlacedModel, "last_backward", afresh)


# On 2 x 2 ranks a mistake, and what then differs.
ON_FOUR = {
    nothing: (),
    dense_weights_split_over_ranks: (),
    expert_gradients_divided_by_replicas: OF_GRADIENTS,
    expert_gradients_stay_on_their_rank: OF_GRADIENTS,
    dense_gradients_averaged_over_a_row: OF_GRADIENTS,
    norm_counts_an_expert_for_every_expert_rank: ("gradient norm", "parameter"),
    norm_counts_every_replica_of_an_expert: ("gradient norm", "parameter"),
    norm_counts_the_experts_of_this_rank: ("gradient norm", "parameter"),
    norm_counts_no_expert: ("gradient norm", "parameter"),
    noise_of_a_rank_of_its_own: ALL,
    slots_received_in_another_order_of_ranks: ALL,
    no_exchange_in_the_backward_pass: ("bytes", *BACKWARD),
    two_experts_swapped_on_a_rank: ALL,
    buffers_read_before_they_are_written: ALL,
    every_width_travels_as_the_full_one: ("bytes",),
}
# On 2 x 2 ranks without a capacity.
ON_FOUR_DROPLESS = {
    nothing: (),
    dense_weights_split_over_ranks: (),
    rows_received_in_another_order_of_ranks: ALL,
    buffers_read_before_they_are_written: ALL,
}
# On 1 x 2, where a rank has two groups; in parts it computes them one by one.
ON_TWO = {
    nothing: (),
    routing_over_what_a_rank_computes_at_once: ALL,
    parts_before_the_last_forgotten: ("gradient in parts",),
}
MISTAKES = [
    (world, case, mistake, kinds)
    for world, case, table in (
        (4, NESTED, ON_FOUR),
        (4, NESTED_DROPLESS, ON_FOUR_DROPLESS),
        (2, NESTED, ON_TWO),
    )
    for mistake, kinds in table.items()
]


def break_everything(backend, scratch, folder):
    """What each rank does: make each mistake and leave in `folder` what then differs."""
    backend = parity.poisoned_backend(backend.expert_ranks)
    for index, (world, case, mistake, _) in enumerate(MISTAKES):
        if world == backend.world:
            reference = parity.reference_of(scratch, CASES.index(case))
            with pytest.MonkeyPatch.context() as patch:
                mistake(patch, backend)
                errors = parity.differences(case, reference, backend)
            (folder / f"{index}-{backend.rank}.json").write_text(json.dumps(errors))


@pytest.fixture(scope="module")
def differing(scratch, tmp_path_factory):
    """For every mistake the quantities that differ on some rank."""
    folder = tmp_path_factory.mktemp("mistakes")
    for world in (2, 4):
        tiny.on_ranks(break_everything, folder, scratch, folder, world=world, expert=2)
    told = [
        [json.loads(file.read_text()) for file in folder.glob(f"{index}-*.json")]
        for index in range(len(MISTAKES))
    ]
    assert [len(of_ranks) for of_ranks in told] == [world for world, *_ in MISTAKES]
    return [
        {kind for errors in of_ranks for kind, error in errors.items() if error > TOLERANCE}
        for of_ranks in told
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "index",
    range(len(MISTAKES)),
    ids=[f"{world}-{case.routing}-{what.__name__}" for world, case, what, _ in MISTAKES],
)
def test_a_mistake_shows_in_the_quantities_that_it_spoils_and_in_no_other(index, differing):
    kinds = MISTAKES[index][-1]

    assert differing[index] == set(kinds)


def test_a_result_that_is_no_number_is_a_finding_like_others(scratch, tmp_path):
    whole = load_file(parity.reference_of(scratch, 0))
    whole["output"][3, 0] = math.nan
    save_file(whole, parity.reference_of(tmp_path, 0))

    (found,) = parity.compare(tmp_path, 1, CASES[:1])

    assert found.worst == ("output", math.inf)
    assert not found.equal


def test_a_process_that_fails_is_named(tmp_path):
    with pytest.raises(
        RunFailedError, match=r"^one of 1 processes failed: KeyError: 'full moon'; free"
    ):
        parity.refer(tmp_path, [Case("top-1", "full moon", drops=True)])


# The command.


@pytest.fixture
def mone(capsys, monkeypatch):
    """Runs `mone verify-parallel` on two cases of the grid."""
    monkeypatch.setattr(verify_parallel, "cases", lambda: CASES[:2])

    def run(*arguments):
        code = cli.run(["verify-parallel", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_user_proves_their_own_installation(mone):
    code, out, err = mone()

    assert code == 0
    rows = [line.split("│")[1:-1] for line in out.splitlines() if "top-1" in line]
    assert [[cell.strip() for cell in row][:2] for row in rows] == [
        ["1 x 1", "top-1"],
        ["2 x 1", "top-1"],
        ["1 x 2", "top-1"],
    ]
    assert out.splitlines()[-1].startswith(
        "parallel training equals one process: 6 comparisons, worst "
    )
    assert err.splitlines()[-1] == "2 processes 4/4 comparisons"


@pytest.mark.slow
def test_a_difference_is_told_and_ends_with_exit_code_1(mone, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", 0.0)  # sums over parts round otherwise

    code, out, _ = mone("--worlds", "1", "--json")

    told = json.loads(out)
    assert (code, told["equal"]) == (1, False)
    names = ("data", "expert", "routing", "load", "drops")
    assert [[of[name] for name in names] for of in told["comparisons"]] == [
        [1, 1, "top-1", "balanced", True],
        [1, 1, "top-1", "balanced", False],
    ]
    assert 0 < told["comparisons"][0]["differences"]["gradient in parts"] < 1e-10
    assert told["comparisons"][0]["differences"]["output"] == 0


def test_what_differs_most_is_named_in_one_line():
    right = Finding(mesh=Mesh(1, 1), case=CASES[0], errors={"output": 1e-16})
    wrong = Finding(mesh=Mesh(2, 1), case=CASES[1], errors={"output": 0.0, "load": math.inf})

    assert verify_parallel.verdict([right, wrong]) == (
        "parallel training differs from one process in 1 of 2 comparisons: load by inf on 2 x 1 "
        "ranks, top-1, balanced, no drops"
    )
    assert verify_parallel.as_plain([wrong])["comparisons"][0]["differences"]["load"] is None


def test_numbers_of_processes_that_the_grid_has_not_are_refused(mone):
    code, out, err = mone("--worlds", "2", "3")

    assert (code, out) == (2, "")
    assert "verify-parallel: argument --worlds: invalid choice: 3 (choose from" in err
