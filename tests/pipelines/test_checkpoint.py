"""Checkpoints: whole or not there, found newest first, read by any number of processes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from cluster.backends import get_backend
from mone_core.models import build_model
from pipelines import checkpoint
from pipelines.checkpoint import (
    COMMITTED,
    POSITION,
    Checkpoints,
    checkpoint_of,
    committed,
    damage,
    load_weights,
    newest_checkpoint,
    step_of,
)
from pipelines.config import CONFIG, read_config, write_config
from pipelines.data.order import Position
from pipelines.errors import RunError
from pipelines.files import write_json
from pipelines.optim import build_optimizer
from tests.pipelines import tiny
from tests.pipelines.tiny import same_bits

SEED = 5


def position(step):
    return Position(seed=0, epoch=0, step=step)


def trained_model(config, seed=SEED):
    """A model with moments: two updates on made-up gradients."""
    torch.manual_seed(seed)
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


@pytest.fixture
def config(tmp_path):
    config = tiny.tiny_config(tmp_path / "data", tmp_path / "run")
    config.out.mkdir()
    write_config(config.out, config)
    return config


def save(config, *steps, seed=SEED):
    """Checkpoints of an untouched model at some steps."""
    checkpoints = Checkpoints(config.out, config, get_backend("cpu"))
    for step in steps:
        checkpoints.save(step, *trained_model(config, seed + step), position(step))
    return checkpoints


def folder(config, step):
    return config.out / "checkpoints" / f"step_{step}"


def shard(config, step):
    (file,) = folder(config, step).glob("*.safetensors")
    return file


def flip_a_byte(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_everything_that_training_goes_on_with_comes_back_to_the_bit(config):
    model, optimizer = trained_model(config)
    checkpoints = Checkpoints(config.out, config, get_backend("cpu"))
    checkpoints.save(2, model, optimizer, position(2))
    torch.manual_seed(99)
    other = build_model(config.model)
    other_optimizer = build_optimizer(other, config.optim)

    assert checkpoints.restore_newest(other, other_optimizer) == (2, position(2))

    assert same_bits(dict(other.state_dict()), dict(model.state_dict()))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        left, right = optimizer.state[mine], other_optimizer.state[theirs]
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert left["step"] == 2
        assert left["step"].dtype == right["step"].dtype
        assert left["step"].device == right["step"].device


def test_without_a_checkpoint_there_is_nothing_to_restore(config):
    checkpoints = Checkpoints(config.out, config, get_backend("cpu"))

    assert checkpoints.restore_newest(*trained_model(config)) is None


def test_a_checkpoint_holds_tensors_json_and_a_marker_and_no_pickle(config):
    save(config, 2)

    names = sorted(path.name for path in folder(config, 2).iterdir())
    tensors = [name for name in names if name.endswith(".safetensors")]
    assert tensors
    assert sorted(set(names) - set(tensors)) == [COMMITTED, CONFIG, POSITION]
    for path in folder(config, 2).iterdir():
        start = path.read_bytes()[:9]
        if path.suffix == ".safetensors":
            assert int.from_bytes(start[:8], "little") < path.stat().st_size
            assert start[8:] == b"{"
        else:
            json.loads(path.read_text())
        assert not start.startswith((b"PK", b"\x80"))


def test_the_marker_is_written_last_and_vouches_for_every_other_file(config, monkeypatch):
    from_here = {}

    def watched(path, value):
        from_here[path.name] = sorted(p.name for p in path.parent.iterdir())
        return write_json(path, value)

    monkeypatch.setattr(checkpoint, "write_json", watched)
    save(config, 2)

    records = json.loads((folder(config, 2) / COMMITTED).read_text())
    others = sorted(p.name for p in folder(config, 2).iterdir() if p.name != COMMITTED)
    assert list(from_here)[-1] == COMMITTED
    assert from_here[COMMITTED] == others == sorted(records)
    assert damage(folder(config, 2)) == ""


def test_only_the_newest_checkpoints_stay(config):
    save(config, 2, 4, 10, 12)

    assert [step_of(found) for found in committed(config.out)] == [12, 10]
    assert sorted(p.name for p in (config.out / "checkpoints").iterdir()) == ["step_10", "step_12"]


def test_more_are_kept_where_more_are_asked_for(config):
    save(replace(config, train=replace(config.train, keep_checkpoints=3)), 2, 4, 10, 12)

    assert [step_of(found) for found in committed(config.out)] == [12, 10, 4]


def test_what_a_kill_left_behind_is_ignored_replaced_and_cleared_away(config):
    checkpoints = save(config, 2, 4)
    killed = folder(config, 6)
    shutil.copytree(folder(config, 4), killed)
    (killed / COMMITTED).unlink()
    (killed / "left-over.safetensors").write_bytes(b"half")

    assert newest_checkpoint(config.out) == folder(config, 4)
    model, optimizer = trained_model(config, seed=1)
    assert checkpoints.restore_newest(model, optimizer) == (4, position(4))

    checkpoints.save(6, model, optimizer, position(6))
    assert newest_checkpoint(config.out) == killed
    assert not (killed / "left-over.safetensors").exists()

    shutil.copytree(killed, folder(config, 7))
    (folder(config, 7) / COMMITTED).unlink()
    checkpoints.save(8, model, optimizer, position(8))
    assert sorted(p.name for p in (config.out / "checkpoints").iterdir()) == ["step_6", "step_8"]


def test_folders_of_other_names_are_left_alone(config):
    save(config, 2)
    other = config.out / "checkpoints" / "step_2.kept"
    shutil.copytree(folder(config, 2), other)

    assert [step_of(found) for found in committed(config.out)] == [2]
    save(config, 4, 6)
    assert other.is_dir()


DAMAGES = {
    "a flipped byte": (lambda c: flip_a_byte(shard(c, 4)), r"safetensors was changed after it was"),
    "a missing file": (lambda c: shard(c, 4).unlink(), r"safetensors is missing"),
    "a cut file": (
        lambda c: shard(c, 4).write_bytes(shard(c, 4).read_bytes()[:-1]),
        r"safetensors was changed after it was written",
    ),
    "a changed position": (
        lambda c: flip_a_byte(folder(c, 4) / POSITION),
        r"position\.json was changed after it was written",
    ),
    "an empty marker": (
        lambda c: (folder(c, 4) / COMMITTED).write_bytes(b""),
        r"COMMITTED cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one_with_a_warning(config, kind):
    checkpoints = save(config, 2, 4)
    harm, message = DAMAGES[kind]
    harm(config)

    with pytest.warns(UserWarning, match=rf"passing over .*step_4: .*{message}"):
        found = checkpoints.restore_newest(*trained_model(config, seed=1))

    assert found == (2, position(2))


def test_when_every_checkpoint_is_damaged_training_begins_anew(config):
    checkpoints = save(config, 2)
    flip_a_byte(shard(config, 2))

    with pytest.warns(UserWarning, match=r"passing over .*step_2"):
        assert checkpoints.restore_newest(*trained_model(config)) is None


# What commands are given: a run, a checkpoint, or neither.


def test_a_run_stands_for_its_newest_checkpoint_and_a_checkpoint_for_itself(config):
    save(config, 2, 4)

    assert checkpoint_of(config.out) == folder(config, 4)
    assert checkpoint_of(folder(config, 2)) == folder(config, 2)
    assert read_config(folder(config, 2)) == config


def test_a_damaged_checkpoint_named_by_its_user_is_refused(config):
    save(config, 2)
    flip_a_byte(shard(config, 2))

    with pytest.raises(RunError, match=r"checkpoint .*step_2 is damaged: .* name another one of"):
        checkpoint_of(folder(config, 2))


def test_a_run_without_a_finished_checkpoint_says_what_to_do(config):
    with pytest.raises(RunError, match=r"run has no finished checkpoint yet; run `mone train` on"):
        checkpoint_of(config.out)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it has no config\.json"):
        checkpoint_of(tmp_path)


# Weights alone.


def test_weights_load_without_the_optimizer(config):
    save(config, 2)
    expected, _ = trained_model(config, SEED + 2)
    model = build_model(config.model)

    load_weights(folder(config, 2), model)

    assert same_bits(dict(model.state_dict()), dict(expected.state_dict()))


def test_weights_of_another_model_are_refused_with_the_fields_that_differ(config):
    save(config, 2)
    model = build_model(replace(config.model, depth=3, dim=32))

    with pytest.raises(
        RunError, match=r"step_2 is of another model: model\.dim 16 -> 32, model\.depth 2 -> 3; "
    ):
        load_weights(folder(config, 2), model)
