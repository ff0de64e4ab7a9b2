"""The training loop with every kind of model: routing noise resumes, joint budgets add up."""

import json
import math
from dataclasses import replace

import pytest
import torch

from cluster.backends.torch_native import CpuBackend
from cluster.topology import Mesh
from mone_core.gemm import chosen_gemm, has_onednn, use_gemm
from mone_core.losses import softmax_loss
from mone_core.models import DENSE, ExpertsConfig, NestingConfig, SkippingConfig
from pipelines.errors import RunError
from pipelines.run_report import evaluate_run
from pipelines.train import Outcome, noise_seed
from tests.pipelines import tiny
from tests.pipelines.tiny import MemoryReporter, losses, same_bits, state_of, without_clock

EXPERTS = ExpertsConfig(placement="every", num_experts=4, group_images=4)
CONSTANT = NestingConfig(assignment="constant", effective_capacity=1.0)
FAMILIES = {
    "V-MoE": {"nesting": DENSE, "experts": EXPERTS, "pool": "cls"},
    "dropless": {"nesting": DENSE, "experts": replace(EXPERTS, dropless=True)},
    "nested sparse": {"experts": EXPERTS},
    "random router": {"nesting": NestingConfig(assignment="random")},
    "Mixture-of-Depths": {"nesting": DENSE, "skipping": SkippingConfig(every=2, capacity=0.25)},
    "MatViT": {"nesting": CONSTANT},
    "MatFormer": {"nesting": replace(CONSTANT, slices="hidden")},
}
JOINT = {"budgets": (0.125, 0.25, 0.5, 1.0), "budgets_per_step": "all", "eval_budgets": (1.0,)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def config_of(name, data, out, **changes):
    values = FAMILIES[name]
    if name in ("MatViT", "MatFormer"):
        changes = JOINT | changes
    elif values.get("nesting") == DENSE:
        changes = {"budgets": (1.0,), "eval_budgets": (1.0,)} | changes
    config = tiny.tiny_config(data, out)
    # In one step, since a budget that fits one model may be out of another one's reach.
    return replace(
        config, model=replace(config.model, **values), train=replace(config.train, **changes)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_any_family_trains_and_goes_on_after_a_stop_to_the_bit(name, data, tmp_path):
    whole = config_of(name, data, tmp_path / "whole", steps=8)
    broken = replace(whole, out=tmp_path / "broken")

    outcome, rows = tiny.train_here(whole)
    first, before = tiny.train_here(broken, MemoryReporter(stop_at=4))
    torch.rand(7)  # whatever else has drawn numbers in between
    second, after = tiny.train_here(broken)

    assert (outcome, first, second) == (Outcome.FINISHED, Outcome.STOPPED, Outcome.FINISHED)
    assert without_clock(before + after) == without_clock(rows)
    assert same_bits(state_of(broken.out), state_of(whole.out))
    assert all(math.isfinite(loss) for loss in losses(rows))


def test_all_budgets_of_a_step_add_their_losses(data, tmp_path):
    """The gradient is that of the sum, and the loss told is the mean."""
    config = config_of("MatViT", data, tmp_path / "run", steps=1, log_every=1, checkpoint_every=1)
    run = tiny.build_here(config, MemoryReporter())
    torch.nn.init.normal_(run.core.head.classify.weight)
    batch, _ = next(run.stream.batches(run.start))
    sums = []
    for budget in JOINT["budgets"]:
        run.core.set_effective_capacity(budget)
        logits = run.core(batch.inputs()).logits_BK
        sums.append(softmax_loss(logits, batch.labels_R, label_smoothing=0.1).mean())
    sum(sums).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.core.parameters()])

    from_start = tiny.build_here(config, reporter := MemoryReporter())
    from_start.core.load_state_dict(run.core.state_dict())
    tiny.train(from_start)

    assert reporter.rows[0].values["loss"] == pytest.approx(sum(sums).item() / 4, rel=1e-5)
    assert reporter.rows[0].values["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def rows_of_rank(backend, config, folder):
    """What each rank does; rank 0 leaves its losses."""
    _, rows = tiny.train_here(config, backend=backend)
    if backend.rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses(rows)))


def test_two_processes_train_all_budgets_as_one_does(data, tmp_path):
    alone = config_of("MatViT", data, tmp_path / "alone", steps=4)
    _, rows = tiny.train_here(alone)
    two = replace(alone, out=tmp_path / "two", parallel=replace(alone.parallel, num_workers=2))

    tiny.on_ranks(rows_of_rank, tmp_path, two, tmp_path)

    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(
        losses(rows), abs=1e-5
    )


@pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")
def test_a_run_computes_with_the_products_that_it_names(data, tmp_path):
    config = config_of("nested sparse", data, tmp_path / "run", steps=2)
    config = replace(config, parallel=replace(config.parallel, gemm="onednn"))
    try:
        run = tiny.build_here(config, MemoryReporter())
        assert chosen_gemm() == "onednn"
        tiny.train(run)
    finally:
        use_gemm("torch")


def test_steps_and_seeds_draw_different_noise():
    seeds = {noise_seed(seed, step) for seed in (0, -1) for step in range(9)}

    assert len(seeds) == 18
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_sparse_run_is_evaluated_with_fewer_choices_and_slots(data, tmp_path):
    config = config_of("V-MoE", data, tmp_path / "run", steps=4)
    tiny.train_here(config)

    usual = evaluate_run(config.out)
    fewer = evaluate_run(
        config.out, out=tmp_path, sparse={"k": 1, "capacity_ratio": 0.5, "batch_priority": True}
    )

    assert [each.effective_capacity for each in usual.settings] == [1.0]  # all that it can meet
    assert (usual.name, fewer.name) == ("run", "run, k 1, capacity_ratio 0.5, batch_priority True")
    assert fewer.settings[0].macs < usual.settings[0].macs
    assert fewer.settings[0].loss != usual.settings[0].loss
    assert evaluate_run(config.out).settings[0].loss == usual.settings[0].loss


def test_a_random_router_is_evaluated_the_same_twice(data, tmp_path):
    config = config_of("random router", data, tmp_path / "run", steps=4)
    tiny.train_here(config)

    first, second = (evaluate_run(config.out, (0.3,)) for _ in range(2))

    assert first.settings[0].loss == second.settings[0].loss


class CountingBackend(CpuBackend):
    """One process that counts what a model gives to exchanges, though nothing has to travel."""

    def __init__(self):
        super().__init__(1, 1, 60)
        self.counted = 0

    @property
    def sent_bytes(self):
        return self.counted

    def to_experts(self, x_EQd, where):
        self.counted += x_EQd.nbytes
        return super().to_experts(x_EQd, where)


def test_bytes_of_a_row_are_those_of_its_training_steps_wherever_evaluations_fall(data, tmp_path):
    config = config_of("V-MoE", data, tmp_path / "run", steps=12)
    plan = replace(config.train, log_every=4, eval_every=3, checkpoint_every=4)
    reporter = MemoryReporter()

    tiny.train_here(replace(config, train=plan), reporter, CountingBackend())

    sent = [row.values["moe/all_to_all_bytes"] for row in reporter.rows if "loss" in row.values]
    assert len(sent) == 3
    assert sent[0] > 0
    assert len(set(sent)) == 1


def test_images_routed_together_must_lie_on_one_device(data, tmp_path):
    """A worker of XLA drives several: their number is known only where it runs."""
    config = config_of("V-MoE", data, tmp_path / "run", steps=4)
    backend = CountingBackend()
    backend.mesh = Mesh(data=8, expert=1)

    with pytest.raises(
        RunError,
        match=r"group_images must divide the 1 images that each of 8 devices computes at once, "
        r"got 4; set it to a divisor, or train\.batch_size to a multiple of 32$",
    ):
        tiny.build_here(config, MemoryReporter(), backend)
