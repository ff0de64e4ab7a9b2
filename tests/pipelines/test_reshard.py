"""A checkpoint of experts spread over ranks is one of all experts, whatever ranks read it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mone_core.experts import ExpertsConfig
from mone_core.models import build_model
from pipelines.checkpoint import checkpoint_of, load_weights
from pipelines.config import ParallelConfig
from tests.pipelines import tiny
from tests.pipelines.tiny import MemoryReporter, losses, on_ranks, train_here

pytestmark = pytest.mark.slow  # four processes train

SAVED, STEPS = 4, 6  # steps behind the checkpoint, and in all
EXPERTS = 4


def config_of(data, out, *, rows=1, columns=1):
    base = tiny.tiny_config(
        data, out, steps=STEPS, log_every=1, checkpoint_every=SAVED, eval_every=100
    )
    experts = ExpertsConfig(
        placement="every", spacing=1, num_experts=EXPERTS, group_images=1, rounding="ceil"
    )
    return replace(
        base,
        model=replace(base.model, experts=experts),
        parallel=ParallelConfig(num_workers=rows * columns, expert=columns),
    )


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def train_on(backend, config, told):
    """Runs on every rank, in float64; rank 0 writes the losses."""
    torch.set_default_dtype(torch.float64)
    reporter = MemoryReporter()
    train_here(config, reporter, backend)
    if backend.rank == 0:
        told.write_text(json.dumps(losses(reporter.rows)))


def go_on(backend, config, whole, told):
    """Runs on every rank: what it restores is its part of the whole; then it trains on."""
    torch.set_default_dtype(torch.float64)
    run = tiny.build_here(config, MemoryReporter(), backend)
    step, _ = run.checkpoints.restore_newest(run.core, run.optimizer)
    assert step == SAVED
    assert_is_part_of(load_file(whole), run)
    train_on(backend, config, told)


def assert_is_part_of(whole, run):
    """Weights and both moments are, to the last bit, those of this rank's experts, or all."""
    held = run.backend.held(EXPERTS)
    for name, parameter in run.core.named_parameters():
        state = run.optimizer.state[parameter]
        of_name = {
            f"model.{name}": parameter,
            f"optimizer.{name}.exp_avg": state["exp_avg"],
            f"optimizer.{name}.exp_avg_sq": state["exp_avg_sq"],
        }
        for key, tensor in of_name.items():
            expected = whole[key]
            if ".bank." in name:
                assert expected.shape[0] == EXPERTS
                expected = expected[held.start : held.stop]
            assert torch.equal(tensor.detach(), expected), key


def put_together(checkpoint):
    """All tensors of a checkpoint by hand: files in rank order, experts stacked in that order."""
    parts = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            parts.setdefault(name, []).append(tensor)
    return {n: torch.cat(each) if ".bank." in n else each[0] for n, each in parts.items()}


def without_last(run, out):
    """A copy of a run as it was when its first checkpoint was the newest."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / f"step_{STEPS}")
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run on four ranks with an expert each: its folder, all its tensors, its losses."""
    root = tmp_path_factory.mktemp("reshard")
    data = tiny.write_data(root / "data")
    config = config_of(data, root / "run", columns=4)
    on_ranks(train_on, root, config, root / "losses", world=4, expert=4)
    checkpoint = config.out / "checkpoints" / f"step_{SAVED}"
    save_file(put_together(checkpoint), root / "whole.safetensors")
    return config, checkpoint, root / "whole.safetensors", json.loads((root / "losses").read_text())


def test_every_rank_writes_its_own_expert_and_nothing_twice(saved):
    _, checkpoint, _, _ = saved
    names = []
    for rank, file in enumerate(sorted(checkpoint.glob("*.safetensors"))):
        with safe_open(file, "pt") as opened:
            stacked = [name for name in opened.keys() if ".bank." in name]  # noqa: SIM118
            assert all(opened.get_slice(name).get_shape()[0] == 1 for name in stacked)
            assert len(stacked) == 2 * 4 * 3  # layers, tensors, weights and moments
            offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            assert all(offsets[name]["saved_offsets"][0] == rank for name in stacked)
            names += [name for name in opened.keys() if name not in stacked]  # noqa: SIM118
    assert len(names) == len(set(names))


@pytest.mark.usefixtures("float64")
def test_one_process_without_ranks_reads_all_experts(saved):
    config, checkpoint, whole, _ = saved
    model = build_model(config.model)

    load_weights(checkpoint, model)

    expected = load_file(whole)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"model.{name}"]), name


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (1, 1),
        (2, 1),
        (2, 2),
        (4, 2),
    ],
)
def test_any_mesh_goes_on_from_the_same_bits_with_the_same_losses(saved, tmp_path, rows, columns):
    config, _, whole, unbroken = saved
    out = without_last(config.out, tmp_path / "run")
    config = config_of(config.data.root, out, rows=rows, columns=columns)

    on_ranks(go_on, tmp_path, config, whole, tmp_path / "l", world=rows * columns, expert=columns)

    assert json.loads((tmp_path / "l").read_text()) == pytest.approx(unbroken[SAVED:], rel=1e-10)
    assert checkpoint_of(out).name == f"step_{STEPS}"
