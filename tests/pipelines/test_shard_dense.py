"""Dense weights split over workers: the same training, half of everything on each of two."""

import traceback
import warnings
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from cluster.backends import get_backend
from cluster.errors import CollectiveError
from mone_core.errors import ConfigError
from mone_core.experts import ExpertsConfig
from mone_core.models import build_model
from pipelines.checkpoint import load_weights
from pipelines.config import ParallelConfig
from pipelines.train import train_step
from tests.pipelines import tiny
from tests.pipelines.tiny import MemoryReporter, on_ranks, train_here

STEPS, RATE = 3, 0.1
TOLERANCE = 1e-10
SPARSE = ExpertsConfig(
    placement="every", spacing=2, num_experts=4, group_images=1, rounding="ceil"
)  # one layer of two, so that a dense block is there as well

pytestmark = pytest.mark.slow


def config_of(data, out, *, expert=1, experts=None, shard=False, **changes):
    """Nested, nested and sparse with `experts`; clipping is at work in every step."""
    base = tiny.tiny_config(data, out, steps=4, log_every=1, eval_every=2, **changes)
    # Five classes and three widths of one image's tokens: not everything has equal halves.
    model = replace(base.model, num_classes=5, experts=experts or base.model.experts)
    return replace(
        base,
        model=model,
        optim=replace(base.optim, clip_norm=0.01, weight_decay=0.1),
        parallel=ParallelConfig(num_workers=2, expert=expert, shard=shard),
    )


def split(config):
    return replace(config, parallel=replace(config.parallel, shard=True))


CASES = {
    "nested": {},
    "nested, in parts": {"microbatches": 2},
    "nested, all budgets in every step": {"budgets_per_step": "all"},
    "sparse, experts on every rank, in parts": {"experts": SPARSE, "microbatches": 2},
    "sparse, experts spread, in parts": {"experts": SPARSE, "expert": 2, "microbatches": 2},
    "sparse, experts spread": {"experts": SPARSE, "expert": 2},
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_of(run):
    """Weights, gradients and what AdamW keeps, dense ones whole."""
    state = {}
    for name, parameter in run.core.named_parameters():
        state[f"weight {name}"] = whole(parameter.detach())
        if parameter.grad is not None:
            state[f"gradient {name}"] = whole(parameter.grad)
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind in run.optimizer.state[parameter]:
                state[f"{kind} {name}"] = whole(run.optimizer.state[parameter][kind])
    return {name: tensor.clone() for name, tensor in state.items()}


def steps_of(run):
    """The state after three steps, and every step's loss and gradient norm."""
    with closing(run.stream.batches(run.start)) as batches:
        told = [train_step(run, i, next(batches)[0]).loss_and_norm for i in range(STEPS)]
    return state_of(run) | {
        f"step {step} {what}": value
        for step, each in enumerate(told)
        for what, value in zip(("loss", "norm"), each, strict=True)
    }


def build(config, backend, *, plain_sgd=False):
    run = tiny.build_here(config, MemoryReporter(), backend)
    return replace(run, optimizer=SGD(run.core.parameters(), lr=RATE)) if plain_sgd else run


def assert_equal(found, expected, case):
    """Relative to the largest value of the tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max()
        assert error <= TOLERANCE * tensor.abs().max(), f"{case}: {name} is off by {error}"


def three_steps_are_those_of_whole_weights(data, scratch):
    for name, case in CASES.items():
        config = config_of(data, scratch / "run", **case)
        backend = get_backend("cpu", expert=config.parallel.expert)
        for plain_sgd in (True, False):
            expected = steps_of(build(config, backend, plain_sgd=plain_sgd))
            found = steps_of(build(split(config), backend, plain_sgd=plain_sgd))
            assert expected["step 0 norm"] > config.optim.clip_norm  # it was clipped
            assert_equal(found, expected, f"{name}, {'SGD' if plain_sgd else 'AdamW'}")


def each_of_two_ranks_holds_half_of_dense_weights_gradients_and_moments(data, scratch):
    kept = {}
    for shard in (False, True):
        config = config_of(data, scratch / f"run_{shard}", shard=shard, experts=SPARSE)
        run = build(config, get_backend("cpu"))
        steps_of(run)
        kept[shard] = bytes_of_dense(run)
    for kind, size in kept[True].items():
        assert abs(size / kept[False][kind] - 0.5) < 0.01, (kind, kept)


def bytes_of_dense(run):
    """What a rank stores of dense weights, gradients and each moment."""
    kinds = {"weight": [], "gradient": [], "exp_avg": [], "exp_avg_sq": []}
    for name, parameter in run.core.named_parameters():
        if name not in run.experts:
            kept = run.optimizer.state[parameter]
            kinds["weight"].append(parameter)
            kinds["gradient"].append(parameter.grad)
            kinds["exp_avg"].append(kept["exp_avg"])
            kinds["exp_avg_sq"].append(kept["exp_avg_sq"])
    return {kind: stored(tensors) for kind, tensors in kinds.items()}


def stored(tensors):
    here = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in here}
    return sum(storages.values())


def a_training_with_evaluations_tells_the_same(data, scratch):
    """Alphas and what sparse routers did among it."""
    rows = {}
    for shard in (False, True):
        config = config_of(data, scratch / f"rows_{shard}", shard=shard, experts=SPARSE, expert=2)
        _, rows[shard] = train_here(config, backend=get_backend("cpu", expert=2))
    assert len(rows[True]) == len(rows[False])
    for found, expected in zip(*map(tiny.without_clock, (rows[True], rows[False])), strict=True):
        assert found.step == expected.step
        assert found.values == pytest.approx(expected.values, rel=TOLERANCE, abs=1e-12)


def checkpoints_of_split_weights_and_of_whole_ones_are_one_kind(data, scratch):
    """Split, whole and split again; the next step works."""
    config = config_of(data, scratch / "round", experts=SPARSE, expert=2)
    backend = get_backend("cpu", expert=2)
    run = build(split(config), backend)
    steps_of(run)
    saved = lasting(run)
    if backend.rank == 0:
        save_file(saved, scratch / "saved.safetensors")
    for step, now in enumerate((config, split(config)), start=STEPS):
        run.checkpoints.save(step, run.core, run.optimizer, run.start)
        run = build(now, backend)
        assert run.checkpoints.restore_newest(run.core, run.optimizer) == (step, run.start)
        assert tiny.same_bits(lasting(run), saved)
    train_step(run, STEPS, next(run.stream.batches(run.start))[0])


def lasting(run):
    """Weights and moments: gradients are of no checkpoint."""
    return {name: value for name, value in state_of(run).items() if "gradient" not in name}


SCENES = (
    three_steps_are_those_of_whole_weights,
    each_of_two_ranks_holds_half_of_dense_weights_gradients_and_moments,
    a_training_with_evaluations_tells_the_same,
    checkpoints_of_split_weights_and_of_whole_ones_are_one_kind,
)


def play(backend, data, scratch):
    """Runs on both ranks: every scene, of which they leave what went wrong."""
    warnings.simplefilter("error")
    torch.set_default_dtype(torch.float64)
    for scene in SCENES:
        wrong = ""
        try:
            scene(data, scratch)
        except (AssertionError, RuntimeError, CollectiveError):
            wrong = traceback.format_exc()
        (scratch / f"{scene.__name__}-{backend.rank}").write_text(wrong)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The folder in which both ranks left what went wrong: starting them takes seconds."""
    scratch = tmp_path_factory.mktemp("scenes")
    on_ranks(play, scratch, tiny.write_data(scratch / "data"), scratch)
    return scratch


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_on_two_ranks(scene, rank, played):
    assert (played / f"{scene.__name__}-{rank}").read_text() == ""


def test_one_process_without_ranks_reads_a_checkpoint_of_split_weights(played):
    config = config_of(played / "data", played / "round", experts=SPARSE, expert=2)
    model = build_model(config.model).double()

    load_weights(config.out / "checkpoints" / f"step_{STEPS}", model)

    saved = load_file(played / "saved.safetensors")  # of rank 0: dense weights whole
    for name, tensor in model.state_dict().items():
        expected = saved[f"weight {name}"]
        assert torch.equal(tensor[: len(expected)] if ".bank." in name else tensor, expected), name


def test_one_worker_has_nobody_to_split_weights_with():
    with pytest.raises(ConfigError, match=r"shard must be false for num_workers 1: there is no"):
        ParallelConfig(shard=True)
