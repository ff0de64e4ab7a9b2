"""Training on whatever the data path offers: clips, varied and mixed samples, damaged ones."""

import json
import shutil
from dataclasses import replace

import pytest

from cluster.backends import get_backend
from mone_core.models import VideoConfig
from pipelines.build import build_run
from pipelines.checkpoint import checkpoint_of
from pipelines.config import read_config
from pipelines.data.settings import AugmentConfig, ClipConfig, OrderConfig, ReadConfig
from pipelines.errors import DatasetError
from pipelines.metrics import append_row
from pipelines.run_data import data_of
from pipelines.run_report import evaluate_run, report_run
from pipelines.runner import open_run
from pipelines.skipped import read_skipped
from pipelines.storage import place
from pipelines.train import Outcome
from tests.dataset_folder import write_dataset
from tests.pipelines import tiny
from tests.pipelines.tiny import MemoryReporter, losses, same_bits, state_of, without_clock

SKIP = {"on_corrupt": "skip", "corrupt_share": 0.2}
MIXED = AugmentConfig(crop_area=(0.5, 1.0), randaugment_layers=2, mixup=0.5, mixup_images=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny.write_clips(tmp_path_factory.mktemp("clips"))


def with_data(config, **changes):
    return replace(config, data=replace(config.data, **changes))


def clip_config(clips, out, **changes):
    """A ViViT of four frames."""
    config = tiny.tiny_config(clips, out, **changes)
    video = VideoConfig(frames=4, tubelet=2, temporal_depth=1)
    config = replace(config, model=replace(config.model, video=video))
    return with_data(
        config,
        augment=AugmentConfig(flip=0.0, color_jitter=0.5),
        clip=ClipConfig(stride=2, views=2, crops=3),
    )


def test_a_run_on_clips_goes_on_to_the_bit(clips, tmp_path):
    outcome, rows = tiny.train_here(clip_config(clips, tmp_path / "whole"))
    broken = clip_config(clips, tmp_path / "broken")

    first, before = tiny.train_here(broken, MemoryReporter(stop_at=4))
    second, after = tiny.train_here(broken)

    assert (outcome, first, second) == (Outcome.FINISHED, Outcome.STOPPED, Outcome.FINISHED)
    assert without_clock(before + after) == without_clock(rows)
    assert same_bits(state_of(broken.out), state_of(tmp_path / "whole"))
    assert "val_accuracy/ec_1.00" in rows[-1].values


def test_mixed_samples_give_the_same_run_in_parts(images, tmp_path):
    whole = with_data(tiny.tiny_config(images, tmp_path / "whole", steps=4), augment=MIXED)
    parts = replace(whole, out=tmp_path / "parts", train=replace(whole.train, microbatches=4))

    _, at_once = tiny.train_here(whole)
    _, in_parts = tiny.train_here(parts)

    assert losses(in_parts) == pytest.approx(losses(at_once), rel=1e-5)
    plain = tiny.tiny_config(images, tmp_path / "plain", steps=4)
    assert losses(tiny.train_here(plain)[1]) != pytest.approx(losses(at_once), rel=1e-3)


def rows_of_rank(backend, config, file):
    """What each rank does; rank 0 leaves its losses."""
    _, rows = tiny.train_here(config, backend=backend)
    if backend.rank == 0:
        file.write_text(json.dumps(losses(rows)))


@pytest.mark.parametrize("kind", ["images", pytest.param("clips", marks=pytest.mark.slow)])
def test_two_workers_train_on_mixed_samples_as_one_does(kind, images, clips, tmp_path):
    if kind == "images":
        config = with_data(tiny.tiny_config(images, tmp_path / "one", steps=4), augment=MIXED)
    else:
        config = clip_config(clips, tmp_path / "one", steps=4)
        config = with_data(config, augment=replace(MIXED, flip=0.0))
    config = with_data(config, order=OrderConfig(lanes=4, window=3))

    tiny.on_ranks(
        rows_of_rank, tmp_path, replace(config, out=tmp_path / "two"), tmp_path / "losses"
    )
    _, rows = tiny.train_here(config)

    assert json.loads((tmp_path / "losses").read_text()) == pytest.approx(losses(rows), rel=1e-5)


def test_the_sigmoid_loss_is_trained_too(images, tmp_path):
    config = tiny.tiny_config(images, tmp_path / "run", loss="sigmoid")
    config = with_data(config, augment=MIXED)

    _, rows = tiny.train_here(config)

    assert losses(rows)[-1] < losses(rows)[0]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Data with two training files that are no images."""
    root = tiny.write_data(tmp_path_factory.mktemp("damaged") / "data")
    shutil.rmtree(root / "train")
    good = tiny.squares(range(30))
    bad = {30: (b"not an image", 2), 31: (b"nor this", 3)}
    write_dataset(root / "train", good | bad, num_classes=4, per_shard=16)
    return root


def test_a_damaged_sample_ends_the_run_by_name(damaged, tmp_path):
    config = tiny.tiny_config(damaged, tmp_path / "run")

    with pytest.raises(DatasetError, match=r"'key_3[01]' .*shard-000001.*on_corrupt to skip"):
        tiny.train_here(config)


class Recorded(MemoryReporter):
    """Writes the run's own record too, as a worker does."""

    def __init__(self, config, stop_at=float("inf")):
        super().__init__(stop_at)
        self._run = config.out

    def report(self, row):
        append_row(self._run, row)
        return super().report(row)


def test_a_run_that_stopped_at_a_bad_sample_goes_on_once_it_may_be_skipped(damaged, tmp_path):
    config = tiny.tiny_config(
        damaged, tmp_path / "run", steps=8, seed=1, log_every=1, checkpoint_every=1
    )
    open_run(config)
    with pytest.raises(DatasetError, match=r"or set data\.read\.on_corrupt to skip"):
        tiny.train_here(config, Recorded(config))

    skipping = with_data(config, read=replace(config.data.read, **SKIP))
    assert 0 < open_run(skipping) < 8
    outcome, _ = tiny.train_here(skipping, Recorded(config))

    assert outcome is Outcome.FINISHED
    assert read_config(checkpoint_of(config.out)).data.read.on_corrupt == "skip"


def test_skipped_samples_are_counted_in_the_metrics(damaged, tmp_path):
    skipping = ReadConfig(threads=1, on_corrupt="skip", corrupt_share=0.2)
    config = with_data(tiny.tiny_config(damaged, tmp_path / "run", steps=8), read=skipping)

    outcome, rows = tiny.train_here(config)

    assert outcome is Outcome.FINISHED
    counted = [row.values["data/skipped"] for row in rows if "loss" in row.values]
    assert counted == [1, 2, 3, 4]  # both in each of two epochs
    assert [name.split("'")[1] for name in read_skipped(config.out)] == ["key_30", "key_31"]


def test_the_count_of_skipped_samples_survives_a_stop(damaged, tmp_path):
    broken = tiny.tiny_config(damaged, tmp_path / "broken")
    broken = with_data(broken, read=replace(broken.data.read, **SKIP))
    whole = replace(broken, out=tmp_path / "whole")

    _, rows = tiny.train_here(whole, Recorded(whole))
    _, before = tiny.train_here(broken, Recorded(broken, stop_at=4))
    _, after = tiny.train_here(broken, Recorded(broken))

    assert without_clock(before + after) == without_clock(rows)
    assert rows[-2].values["data/skipped"] == 6
    assert len(read_skipped(broken.out)) == 2


def test_samples_that_an_evaluation_leaves_out_are_counted_and_named(tmp_path):
    data = tiny.write_data(tmp_path / "data")
    shutil.rmtree(data / "val")
    bad = {1009: (b"not an image", 1)}
    write_dataset(data / "val", tiny.squares(range(9)) | bad, num_classes=4, per_shard=10)
    config = tiny.tiny_config(data, tmp_path / "run")
    config = with_data(config, read=replace(config.data.read, **SKIP))

    _, rows = tiny.train_here(config)

    assert [r.values["data/val_skipped"] for r in rows if "loss" not in r.values] == [1, 1]
    ((name, why),) = read_skipped(config.out).items()
    assert "key_1009" in name
    assert why.startswith("does not decode")
    assert evaluate_run(config.out, (0.5,)).skipped == 1
    assert ("Skipped samples", "1, named in skipped.jsonl") in report_run(config.out).summary


def test_more_damage_than_allowed_ends_the_run(damaged, tmp_path):
    skipping = ReadConfig(threads=1, on_corrupt="skip", corrupt_share=0.01)
    config = with_data(tiny.tiny_config(damaged, tmp_path / "run", steps=40), read=skipping)

    with pytest.raises(DatasetError, match=r"corrupt_share"):
        tiny.train_here(config)


@pytest.mark.parametrize("part", ["train", "val"])
def test_workers_refuse_data_that_changed_after_the_driver_looked(tmp_path, part):
    config = tiny.tiny_config(tiny.write_data(tmp_path / "data"), tmp_path / "run")
    began = data_of(place(config.data.root))
    shutil.rmtree(tmp_path / "data" / part)
    tiny.write_folder(tmp_path / "data" / part, range(1, 33))

    with pytest.raises(DatasetError, match=rf"{part} was changed since the run began"):
        build_run(config, get_backend("cpu"), MemoryReporter(), began)


def test_clips_of_another_kind_of_model_or_data_are_refused(images, clips, tmp_path):
    with pytest.raises(DatasetError, match=r"holds videos, but model\.video\.frames is 1"):
        tiny.train_here(tiny.tiny_config(clips, tmp_path / "run"))
    with pytest.raises(DatasetError, match=r"holds images, but model\.video\.frames is 4"):
        tiny.train_here(clip_config(images, tmp_path / "run"))
