"""One set of weights at many budgets: counted as a plain loop counts, padding left out."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cluster.backends import get_backend
from mone_core.errors import CapacityError
from mone_core.models import ModelConfig, VideoConfig, build_model
from pipelines.config import read_config
from pipelines.data.batch import Batch, model_input
from pipelines.data.manifest import read_manifest, write_manifest
from pipelines.data.settings import ReadConfig
from pipelines.errors import DatasetError
from pipelines.evaluate import evaluate, latencies, latency_batch, score, validation_stream
from pipelines.results import RESULTS, read_results
from pipelines.run_report import evaluate_run, report_run
from pipelines.runner import open_run
from pipelines.storage import place
from tests.dataset_folder import write_dataset
from tests.pipelines import tiny

BUDGETS = (0.125, 0.2, 0.5, 1.0)
SMALL = {"image_size": 8, "patch_size": 4, "num_classes": 4, "dim": 16, "depth": 2, "heads": 2}
SAMPLES = 11  # a batch of 8 and one of 3 with 5 rows of padding


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    return tiny.tiny_config(tiny.write_data(folder / "data", val=SAMPLES), folder / "run", steps=4)


@pytest.fixture
def model(config):
    torch.manual_seed(3)
    model = build_model(config.model)
    torch.nn.init.normal_(model.head.classify.weight)
    return model.eval()


@torch.no_grad()
def plain_loop(model, config, budget):
    """Accuracy and loss of one image after the other."""
    model.set_effective_capacity(budget)
    right, losses = 0, []
    for batch in validation_stream(config):
        for pixels, label, valid in zip(
            batch.pixels_RTHWC, batch.labels_R, batch.valid_B, strict=True
        ):
            if valid:
                logits = model(model_input(pixels.unsqueeze(0))).logits_BK[0]
                right += int(logits.argmax()) == int(label)
                losses.append(F.cross_entropy(logits, label).item())
    assert len(losses) == SAMPLES
    return right / SAMPLES, sum(losses) / SAMPLES


def test_accuracy_and_loss_are_those_of_a_plain_loop_at_every_budget(model, config):
    found = score(model, model, validation_stream(config), BUDGETS, get_backend("cpu"))

    assert tuple(found) == BUDGETS
    for budget, score_ in found.items():
        accuracy, loss = plain_loop(model, config, budget)
        assert score_.accuracy == accuracy
        assert score_.loss == pytest.approx(loss, rel=1e-5)
        assert score_.samples == SAMPLES
    assert len({score_.loss for score_ in found.values()}) == len(BUDGETS)


def test_a_validation_set_of_which_all_is_skipped_is_refused(model, config, tmp_path):
    write_dataset(
        tmp_path / "val", {n: (b"no image", n) for n in range(4)}, num_classes=4, per_shard=4
    )
    read = ReadConfig(on_corrupt="skip", corrupt_share=1.0)
    config = replace(config, data=replace(config.data, root=str(tmp_path), read=read))

    with pytest.raises(
        DatasetError,
        match=r"none of the 4 validation samples could be used, all were skipped; set "
        r"data\.read\.on_corrupt to raise to see why",
    ):
        score(model, model, validation_stream(config), BUDGETS, get_backend("cpu"))


@pytest.mark.parametrize("always", range(4))
def test_rows_of_padding_never_count(model, config, always):
    with torch.no_grad():
        model.head.classify.weight.zero_()
        model.head.classify.bias.copy_(100 * F.one_hot(torch.tensor(always), 4))
    labels = [(1000 + i) % 4 for i in range(SAMPLES)]  # padding has label 0

    found = score(model, model, validation_stream(config), (0.5,), get_backend("cpu"))[0.5]

    assert found.samples == SAMPLES
    assert found.accuracy == labels.count(always) / SAMPLES
    assert found.loss == pytest.approx(100 * (1 - labels.count(always) / SAMPLES))


def test_scoring_needs_no_gradient_and_changes_no_weight(model, config):
    before = {name: value.clone() for name, value in model.state_dict().items()}

    score(model, model, validation_stream(config), (0.5,), get_backend("cpu"))

    assert tiny.same_bits(before, dict(model.state_dict()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_budget_has_its_own_cost(model, config):
    found = evaluate("it", 4, model, validation_stream(config), BUDGETS, get_backend("cpu"))

    assert (found.name, found.step, found.num_classes) == ("it", 4, 4)
    assert found.torch == torch.__version__
    assert [setting.effective_capacity for setting in found.settings] == list(BUDGETS)
    for setting in found.settings:
        model.set_effective_capacity(setting.effective_capacity)
        assert setting.macs == model.macs()
        assert setting.realised_effective_capacity == model.realised_effective_capacity
        assert setting.latency_batch == latency_batch(config.model)
        assert setting.images_per_second == pytest.approx(
            1000 * setting.latency_batch / setting.latency_ms
        )
    macs = [setting.macs for setting in found.settings]
    assert macs == sorted(set(macs))
    assert found.settings[0].realised_effective_capacity == 0.125
    assert found.settings[-1].realised_effective_capacity == 1.0


@pytest.mark.parametrize(("pixels", "images"), [(16, 64), (64, 64), (224, 8), (448, 2), (2000, 1)])
def test_small_images_are_timed_together_and_large_ones_alone(pixels, images):
    assert latency_batch(ModelConfig(image_size=pixels, patch_size=1)) == images


def test_a_clip_is_timed_as_all_its_frames():
    clip = ModelConfig(image_size=224, patch_size=16, video=VideoConfig(frames=4, tubelet=2))

    assert latency_batch(clip) == 2


def test_the_views_of_a_clip_are_averaged_as_probabilities():
    torch.manual_seed(5)
    video = VideoConfig(frames=4, tubelet=2, temporal_depth=1)
    model = build_model(ModelConfig(**SMALL, video=video)).eval()
    torch.nn.init.normal_(model.head.classify.weight)
    pixels = torch.randint(0, 256, (6, 4, 8, 8, 3), dtype=torch.uint8)  # 2 clips, 3 views each
    labels = torch.tensor([1, 1, 1, 2, 2, 2])
    views = Batch(pixels_RTHWC=pixels, labels_R=labels, valid_B=torch.ones(2, dtype=torch.bool))

    found = score(model, model, [views], (0.5,), get_backend("cpu"))[0.5]

    model.set_effective_capacity(0.5)
    with torch.no_grad():
        probs = torch.stack(
            [
                torch.stack(
                    [model(model_input(row[None])).logits_BK[0].softmax(0) for row in rows]
                ).mean(0)
                for rows in pixels.split(3)
            ]
        )
    right = sum(int(p.argmax()) == label for p, label in zip(probs, (1, 2), strict=True))
    assert found.samples == 2
    assert found.accuracy == right / 2
    assert found.loss == pytest.approx(-(probs[0, 1].log() + probs[1, 2].log()).item() / 2)


def test_probabilities_too_small_for_a_float_leave_the_loss_finite():
    def certain(rows):
        logits_RK = torch.zeros(len(rows), 4)
        logits_RK[:, 3] = 500.0
        return SimpleNamespace(logits_BK=logits_RK)

    model = build_model(ModelConfig(**SMALL))
    pixels = torch.zeros(4, 1, 8, 8, 3, dtype=torch.uint8)
    labels, valid = torch.tensor([1, 1, 0, 0]), torch.tensor([True, False])
    views = Batch(pixels_RTHWC=pixels, labels_R=labels, valid_B=valid)

    found = score(model, certain, [views], (0.5,), get_backend("cpu"))[0.5]

    assert found.loss == pytest.approx(500.0)
    assert found.samples == 1


def test_a_run_is_evaluated_in_batches_of_what_one_rank_trains_on(config):
    shared = replace(config, parallel=replace(config.parallel, num_workers=4))

    assert len(next(iter(validation_stream(config))).labels_R) == 8
    assert len(next(iter(validation_stream(shared))).labels_R) == 2


def test_latency_is_measured_in_milliseconds_for_every_budget(model):
    taken = latencies(model, (0.2, 1.0), get_backend("cpu"))

    assert taken.keys() == {0.2, 1.0}
    assert all(0.05 < milliseconds < 2000 for milliseconds in taken.values())


@pytest.fixture(scope="module")
def trained(config):
    tiny.train_here(config)
    return config


def test_a_run_is_evaluated_from_its_newest_checkpoint_and_keeps_the_results(trained):
    found = evaluate_run(trained.out, (0.2, 1.0))

    assert read_results(trained.out) == found
    assert (found.name, found.step) == ("run", 4)
    plain = json.loads((trained.out / RESULTS).read_text())
    assert [setting["samples"] for setting in plain["settings"]] == [SAMPLES] * 2


def test_one_checkpoint_is_evaluated_as_such(trained, tmp_path):
    checkpoint = trained.out / "checkpoints" / "step_4"

    found = evaluate_run(checkpoint, (0.5,), out=tmp_path, name="champion")

    assert found.name == "champion"
    assert read_results(tmp_path) == found
    assert not (checkpoint / RESULTS).exists()
    assert read_config(checkpoint) == trained


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ("abcde", r"val has 5 classes, and .*step_4 was trained on 4; shard the validation arch"),
        ("abcd", r"val has other classes than .*/run was trained on, or these in another order; "),
    ],
)
def test_a_validation_set_of_other_classes_is_refused(config, tmp_path, classes, told):
    config = replace(config, out=tmp_path / "run")
    root = tiny.write_data(tmp_path / "data")
    config = replace(config, data=replace(config.data, root=str(root)))
    open_run(config)
    tiny.train_here(config)
    evaluate_run(config.out, (0.5,))
    shutil.rmtree(root / "val")
    tiny.write_folder(root / "val", range(SAMPLES), classes=len(classes))
    val = place(root / "val")
    write_manifest(val, replace(read_manifest(val), classes=tuple(classes)))

    for use in (evaluate_run, report_run):
        with pytest.raises(DatasetError, match=told):
            use(config.out)


def test_a_budget_out_of_reach_ends_an_evaluation_before_it_starts(trained, tmp_path):
    with pytest.raises(CapacityError, match=r"0\.1 is out of reach: .* between 0\.125"):
        evaluate_run(trained.out, (0.5, 0.1), out=tmp_path)

    assert not (tmp_path / RESULTS).exists()
