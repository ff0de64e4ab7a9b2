"""A run from the driver's side, up to where workers would start: its data and its folder."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mone_core.models import build_model
from pipelines.config import CONFIG, read_config
from pipelines.data.settings import AugmentConfig, OrderConfig, ReadConfig
from pipelines.errors import DatasetError, RunError
from pipelines.metrics import MetricRow, append_row
from pipelines.run_data import DATA
from pipelines.runner import open_run, resolve
from pipelines.weights import save_weights
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data, tmp_path):
    return tiny.tiny_config(data, tmp_path / "run")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of four steps, trained to its end."""
    config = tiny.tiny_config(data, tmp_path_factory.mktemp("trained") / "run", steps=4)
    tiny.train_here(config)
    return config


def part(config, name, **changes):
    """The configuration with fields of one part changed."""
    return replace(config, **{name: replace(getattr(config, name), **changes)})


# Data.


def test_paths_become_absolute_and_the_classes_are_counted_in_the_data(
    config, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(data.parent)
    config = replace(part(config, "data", root=data.name), out=Path("some/run"))
    config = part(config, "model", num_classes=1000)

    resolved = resolve(part(config, "train", start_from=Path("w")))

    assert resolved.data.root == str(data)
    assert resolved.out == data.parent / "some/run"
    assert resolved.train.start_from == data.parent / "w"
    assert resolved.model.num_classes == 4
    assert resolve(resolved) == resolved


def test_a_home_folder_is_spelt_out(config, data, monkeypatch):
    monkeypatch.setenv("HOME", str(data.parent))
    config = replace(part(config, "data", root=f"~/{data.name}"), out=Path("~/run"))

    config = part(config, "data", read=ReadConfig(cache=Path("~/cache")))

    resolved = resolve(part(config, "train", start_from=Path("~/w")))

    assert resolved.data.root == str(data)
    assert resolved.data.read.cache == data.parent / "cache"
    assert (resolved.out, resolved.train.start_from) == (data.parent / "run", data.parent / "w")


@pytest.mark.parametrize("missing", ["train", "val"])
def test_missing_data_are_named_with_the_command_that_makes_them(config, data, tmp_path, missing):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    shutil.rmtree(root / missing)

    with pytest.raises(
        DatasetError,
        match=rf"{root}/{missing} is not a finished dataset: .*ARCHIVE {root}/{missing}`",
    ):
        resolve(part(config, "data", root=str(root)))


def test_training_and_validation_of_other_classes_are_refused(config, tmp_path):
    tiny.write_folder(tmp_path / "data/train", range(32))
    tiny.write_folder(tmp_path / "data/val", range(9), classes=3)

    with pytest.raises(
        DatasetError,
        match=r"training has 4 classes and validation 3, which differ in n00000003; shard the "
        r"validation archive with `mone shard VAL .*/data/val --classes-of .*/data/train`",
    ):
        resolve(part(config, "data", root=str(tmp_path / "data")))


def test_data_of_less_than_a_batch_are_refused_before_a_worker_starts(config, tmp_path):
    tiny.write_data(tmp_path / "data", train=7)

    with pytest.raises(
        DatasetError, match=r"a global batch of 8 does not fit a dataset of 7 samples; use a batch"
    ):
        resolve(part(config, "data", root=str(tmp_path / "data")))


# Folders.


def test_a_new_run_gets_a_folder_with_its_configuration(config):
    assert open_run(config) == 0

    assert read_config(config.out) == config
    assert sorted(path.name for path in config.out.iterdir()) == [CONFIG, DATA]


def test_a_run_that_never_began_may_begin_with_other_values(config):
    open_run(config)
    other = replace(config, parallel=replace(config.parallel, num_workers=2))

    assert open_run(other) == 0

    assert read_config(config.out) == other


def test_a_run_does_not_go_on_with_other_data(config, tmp_path):
    open_run(config)
    append_row(config.out, MetricRow(step=2, values={"loss": 1.0}))
    data = shutil.copytree(config.data.root, tmp_path / "data")
    shutil.rmtree(data / "train")
    tiny.write_folder(data / "train", range(1, 33))
    moved = replace(config, data=replace(config.data, root=str(data)))

    with pytest.raises(RunError, match=r"data in .*train is not what .* began with .*--data.root"):
        open_run(moved)


def test_an_empty_folder_will_do(config):
    config.out.mkdir()

    assert open_run(config) == 0


def test_the_same_run_goes_on_from_its_newest_checkpoint(trained):
    assert open_run(trained) == 4


def test_a_run_without_a_checkpoint_goes_on_from_its_beginning(config):
    open_run(config)

    assert open_run(config) == 0


@pytest.mark.parametrize(("names", "told"), [(["notes.txt"], "notes.txt"), (["b", "a"], "a, ...")])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(config, names, told):
    config.out.mkdir()
    for name in names:
        (config.out / name).write_text("mine")

    with pytest.raises(
        RunError,
        match=rf"run holds something else \({told}\) and no run; name a new folder with --out",
    ):
        open_run(config)

    assert sorted(path.name for path in config.out.iterdir()) == sorted(names)


def test_a_file_in_place_of_the_folder_is_refused(config):
    config.out.write_text("mine")

    with pytest.raises(RunError, match=r"run is a file; name a new folder with --out"):
        open_run(config)

    assert config.out.read_text() == "mine"


def test_a_run_of_another_model_is_refused_with_the_fields(trained):
    with pytest.raises(
        RunError,
        match=r"run holds checkpoints of a run with another model: model\.dim was 16, now 32; "
        r"model\.depth was 2, now 3\. Give the same values to go on with it, or another --out",
    ):
        open_run(part(trained, "model", depth=3, dim=32))

    assert read_config(trained.out) == trained


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("train", {"steps": 8}, r"train\.steps was 4, now 8"),
        ("train", {"seed": 1}, r"train\.seed was 0, now 1"),
        ("optim", {"learning_rate": 1.0}, r"optim\.learning_rate was 0\.003, now 1\.0"),
        (
            "data",
            {"augment": AugmentConfig(crop_area=(0.5, 1.0), flip=0.0)},
            r"data\.augment\.flip was 0\.5, now 0\.0",
        ),
        ("data", {"order": OrderConfig(lanes=4)}, r"data\.order\.lanes was 0, now 4"),
        ("parallel", {"threads": 2}, r"parallel\.threads was 1, now 2"),
    ],
)
def test_a_run_with_other_values_that_change_losses_is_refused(trained, name, changes, told):
    with pytest.raises(RunError, match=rf"checkpoints of a run with other values: {told}\. Give"):
        open_run(part(trained, name, **changes))

    assert read_config(trained.out) == trained


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("train", {"keep_checkpoints": 5}),
        ("tracking", {"uri": "http://127.0.0.1:1", "experiment": "e", "model": "m"}),
        ("data", {"root": "/elsewhere", "embedded": "digits", "reader": "ray"}),
        ("data", {"read": ReadConfig(threads=7, prefetch=9, check="never", remote="ranges")}),
        ("parallel", {"num_workers": 2, "shard": True, "collective_timeout_s": 7}),
        ("train", {"microbatches": 2}),
    ],
)
def test_values_that_change_no_loss_but_by_rounding_may_be_others(trained, name, changes):
    assert open_run(part(trained, name, **changes)) == 4


def test_a_run_that_was_moved_goes_on(trained, tmp_path):
    shutil.copytree(trained.out, tmp_path / "moved")

    assert open_run(replace(trained, out=tmp_path / "moved")) == 4


# Weights to start from.


@pytest.fixture
def weights(config, tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "weights", build_model(config.model), step=1)
    return tmp_path / "weights"


def test_weights_of_the_same_model_may_be_started_from(config, weights):
    assert open_run(part(config, "train", start_from=weights)) == 0


def test_weights_of_another_model_are_refused_and_no_folder_is_made(config, weights):
    config = part(part(config, "model", depth=3), "train", start_from=weights)

    with pytest.raises(
        RunError,
        match=rf"train\.start_from {weights}: .*encoder\.blocks\.2\..*; set model\.\* as there, or "
        r"allow what is meant with train\.start_allow",
    ):
        open_run(config)

    assert not config.out.exists()


def test_missing_weights_are_refused_and_no_folder_is_made(config, tmp_path):
    with pytest.raises(RunError, match=r"train\.start_from .*/none does not exist; give a folder"):
        open_run(part(config, "train", start_from=tmp_path / "none"))

    assert not config.out.exists()
