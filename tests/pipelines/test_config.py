"""The configuration tree: what it refuses, how it says so, and that it survives being written."""

from dataclasses import replace
from pathlib import Path

import pytest

from mone_core.errors import ConfigError
from mone_core.models import DENSE, ExpertsConfig, ModelConfig, NestingConfig
from pipelines.config import (
    CONFIG,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    as_plain,
    differences,
    flatten,
    merge_yaml,
    read_config,
    to_yaml,
    write_config,
)
from pipelines.data.settings import AugmentConfig, OrderConfig, ReadConfig
from pipelines.errors import RunError, UsageError
from pipelines.recipes import RECIPES

EVERY_RECIPE = pytest.mark.parametrize("recipe", RECIPES)


def base(**changes):
    return RunConfig(recipe="digits", out=Path("runs/x"), **changes)


def merged(text):
    return merge_yaml(base(), text, source="my.yaml")


# There and back.


@EVERY_RECIPE
def test_the_yaml_of_a_recipe_laid_over_any_other_run_is_that_recipe(recipe):
    config = RECIPES[recipe]()

    assert merge_yaml(base(), to_yaml(config), source="file") == config


@EVERY_RECIPE
def test_a_saved_configuration_reads_back_to_the_same_tree(recipe, tmp_path):
    config = RECIPES[recipe]()

    write_config(tmp_path, config)

    assert read_config(tmp_path) == config


def test_every_kind_of_value_survives_yaml_and_json(tmp_path):
    config = base(
        data=DataConfig(
            root="with space/ä: b",
            read=ReadConfig(cache=Path("null"), cache_gib=1 / 3),
            augment=AugmentConfig(crop_ratio=(1 / 3, 3.0)),
        ),
        optim=OptimConfig(learning_rate=1e-5, weight_decay=0.1 + 0.2),
        train=TrainConfig(budgets=(0.5, 1.0), eval_budgets=(1.0,), start_from=Path("null")),
        model=ModelConfig(
            nesting=NestingConfig(widths=(0.5, 1.0), effective_capacity=0.75, alpha="model")
        ),
    )

    write_config(tmp_path, config)

    assert merge_yaml(base(), to_yaml(config), source="file") == config
    assert read_config(tmp_path) == config


def test_a_flat_tree_names_every_field_once():
    flat = flatten(base())

    assert flat["recipe"] == "digits"
    assert flat["train.steps"] == 1000
    assert flat["model.nesting.effective_capacity"] == 0.5
    assert not [name for name, value in flat.items() if isinstance(value, dict)]
    assert len(flat) == len(leaves(as_plain(base())))


def leaves(tree):
    if not isinstance(tree, dict):
        return [tree]
    return [leaf for value in tree.values() for leaf in leaves(value)]


def test_differences_name_the_field_and_both_values():
    other = base(train=TrainConfig(steps=5), model=ModelConfig(depth=3))

    assert differences(base(), other) == ["model.depth 12 -> 3", "train.steps 1000 -> 5"]
    assert differences(base(), base()) == []


# YAML.


def test_a_yaml_file_changes_what_it_mentions_and_nothing_else():
    config = merged("train: {steps: 7}\noptim:\n  learning_rate: 1e-4\nout: elsewhere\n")

    assert config == replace(
        base(train=TrainConfig(steps=7), optim=OptimConfig(learning_rate=1e-4)),
        out=Path("elsewhere"),
    )


def test_a_whole_number_is_a_number():
    assert merged("optim: {weight_decay: 1}").optim.weight_decay == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 1}", r"my\.yaml: no config field called 'trian'; did you mean 'train'"),
        ("train: {step: 1}", r"no config field called 'train\.step'; did you mean 'train\.steps'"),
        ("zzz: 1", r"called 'zzz'; nothing similar exists\. `mone train --recipe NAME --print-con"),
        ("train: {steps: abc}", r"my\.yaml: train\.steps: .*valid integer, got 'abc'"),
        ('train: {steps: "5"}', r"train\.steps: .*valid integer, got '5'"),
        ("train: {budgets: 0.5}", r"train\.budgets: .*valid array, got 0\.5"),
        ("train: 5", r"my\.yaml: train: .*, got 5"),
        (
            "data: {embedded: digitz}",
            r"data\.embedded: Input should be 'digits' or 'motion', got 'digitz'",
        ),
        (
            "parallel: {device: tpu}",
            r"parallel\.device: Input should be 'cpu', 'cuda' or 'xla', got 'tpu'",
        ),
        ("a: [", r"my\.yaml is not YAML: "),
        ("[1, 2]", r"my\.yaml must be a mapping such as `train: \{steps: 100\}`"),
        ("", r"my\.yaml must be a mapping"),
    ],
)
def test_a_yaml_file_that_does_not_fit_is_refused_in_one_line(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        merged(text)

    assert "\n" not in str(caught.value)


def test_values_that_cannot_be_are_refused_from_a_file_as_from_code():
    with pytest.raises(ConfigError, match=r"^train: steps must be 1 or more, got 0$"):
        merged("train: {steps: 0}")


# Values that cannot be.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(eval_resize=0), r"^data: eval_resize must be 1 or more, got 0$"),
        (
            lambda: base(data=DataConfig(order=OrderConfig(lanes=7))),
            r"run: data\.order\.lanes must divide train\.batch_size, got 7 and 64",
        ),
        (
            lambda: base(
                data=DataConfig(order=OrderConfig(lanes=2)), parallel=ParallelConfig(num_workers=4)
            ),
            r"run: data\.order\.lanes must be a multiple of parallel\.num_workers, got 2 and 4; "
            r"set it to a multiple of 4 that divides train\.batch_size \(64\)",
        ),
        (lambda: OptimConfig(learning_rate=0.0), r"learning_rate must be above 0, got 0\.0"),
        (
            lambda: OptimConfig(learning_rate=float("nan")),
            r"learning_rate must be above 0, got nan",
        ),
        (lambda: OptimConfig(weight_decay=-1.0), r"weight_decay must be 0 or more, got -1\.0"),
        (
            lambda: OptimConfig(weight_decay=float("nan")),
            r"weight_decay must be 0 or more, got nan",
        ),
        (lambda: OptimConfig(betas=(0.9, 1.0)), r"betas must lie in \[0, 1\), got \(0\.9, 1\.0\)"),
        (lambda: OptimConfig(warmup_steps=-1), r"warmup_steps must be 0 or more, got -1"),
        (lambda: OptimConfig(clip_norm=0.0), r"clip_norm must be above 0, got 0\.0"),
        (lambda: OptimConfig(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\)"),
        (lambda: TrainConfig(budgets=()), r"budgets must name at least one effective capacity"),
        (
            lambda: TrainConfig(log_every=20, checkpoint_every=50),
            r"train: checkpoint_every must be a multiple of log_every, .* got 50 and 20",
        ),
        (lambda: ParallelConfig(num_workers=0), r"parallel: num_workers must be 1 or more, got 0"),
        (
            lambda: base(train=TrainConfig(batch_size=63), parallel=ParallelConfig(num_workers=2)),
            r"run: parallel\.num_workers times train\.microbatches must divide train\.batch_size, "
            r"got 2 times 1 and 63",
        ),
        (
            lambda: base(train=TrainConfig(batch_size=4, microbatches=3)),
            r"train\.microbatches must divide train\.batch_size, got 1 times 3 and 4",
        ),
        (lambda: TrainConfig(microbatches=0), r"train: microbatches must be 1 or more, got 0"),
        (lambda: ParallelConfig(expert=0), r"parallel: expert must be 1 or more, got 0"),
        (
            lambda: ParallelConfig(num_workers=4, expert=3),
            r"parallel: expert must divide num_workers, got 3 and 4",
        ),
        (
            lambda: ParallelConfig(shard=True),
            r"parallel: shard must be false for num_workers 1: there is nobody to split weights",
        ),
        (
            lambda: ParallelConfig(device="xla", topology="2x2x2"),
            r"parallel: accelerator_type and topology must be set for device xla and for no other, "
            r"got '' and '2x2x2' for xla",
        ),
        (
            lambda: ParallelConfig(accelerator_type="v4-16", topology="2x2x2"),
            r"for no other, got 'v4-16' and '2x2x2' for cpu",
        ),
        (
            lambda: ParallelConfig(collective_timeout_s=0),
            r"parallel: collective_timeout_s must be 1 or more, got 0",
        ),
        (
            lambda: base(data=DataConfig(eval_resize=100)),
            r"run: data\.eval_resize must be at least model\.image_size, got 100 and 224",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_field_value_and_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_several_problems_stand_in_one_message():
    with pytest.raises(ConfigError, match="optim: ") as caught:
        OptimConfig(learning_rate=-1.0, clip_norm=0.0, warmup_steps=-3)

    assert str(caught.value) == (
        "optim: learning_rate must be above 0, got -1.0; warmup_steps must be 0 or more, got -3; "
        "clip_norm must be above 0, got 0.0"
    )


@pytest.mark.parametrize("name", ["budgets", "eval_budgets"])
@pytest.mark.parametrize("budget", [0.1, 1.01])
def test_a_budget_out_of_range_names_its_field_and_what_is_reachable(name, budget):
    with pytest.raises(
        ConfigError,
        match=rf"run: train\.{name}: effective capacity {budget} is out of reach: .*"
        r"between 0\.125 .* and 1\.0",
    ):
        base(train=replace(TrainConfig(), **{name: (0.5, budget)}))


def test_a_list_of_budgets_out_of_reach_is_told_by_its_first():
    with pytest.raises(
        ConfigError, match=r"^run: train\.budgets: [^;]*; train\.eval_budgets: [^;]*$"
    ):
        base(model=ModelConfig(nesting=DENSE))


@pytest.mark.parametrize(("workers", "microbatches"), [(4, 1), (1, 4), (2, 2)])
def test_images_routed_together_must_not_depend_on_the_number_of_workers_and_parts(
    workers, microbatches
):
    model = ModelConfig(experts=ExpertsConfig(placement="every", group_images=8))

    with pytest.raises(
        ConfigError,
        match=r"run: model\.experts\.group_images must divide the 4 images that a worker computes "
        rf"at once \(train\.batch_size 16 over parallel\.num_workers {workers} and "
        rf"train\.microbatches {microbatches}\), got 8",
    ):
        base(
            model=model,
            train=TrainConfig(batch_size=16, microbatches=microbatches),
            parallel=ParallelConfig(num_workers=workers),
        )


def test_experts_are_spread_evenly():
    model = ModelConfig(experts=ExpertsConfig(placement="every", num_experts=6))

    with pytest.raises(
        ConfigError,
        match=r"^run: parallel\.expert must divide model\.experts\.num_experts, got 4 and 6$",
    ):
        base(model=model, parallel=ParallelConfig(num_workers=4, expert=4))


def test_a_model_without_sparse_experts_has_nothing_to_spread():
    with pytest.raises(
        ConfigError,
        match=r"run: parallel\.expert must be 1 for a model without sparse experts "
        r"\(model\.experts\.placement none\), got 2: nested experts are parts of one set of",
    ):
        base(parallel=ParallelConfig(num_workers=2, expert=2))


def test_the_reachable_range_is_that_of_the_models_own_widths():
    wide = ModelConfig(nesting=NestingConfig(widths=(0.25, 1.0)))

    with pytest.raises(ConfigError, match=r"train\.budgets: .* 0\.2 .* between 0\.25 .* and 1\.0"):
        base(model=wide, train=TrainConfig(budgets=(0.2,)))


# Configurations of a run on disk.


def test_a_folder_without_a_configuration_is_not_a_run(tmp_path):
    with pytest.raises(
        RunError, match=rf"{tmp_path} is not a run: it has no config\.json; .* --out {tmp_path}`"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"steps": 1000', '"steps": "many"', r"train\.steps: .*valid integer"),
        ('"steps": 1000', '"steps": 0', r"train: .*steps must be 1 or more"),
        ('"recipe": "digits",', '"recipe": "digits", "colour": 1,', r"colour: .*"),
        ('"steps": 1000', '"steps": 1000, "speed": 1', r"train\.speed: .*"),
        ("}\n", "", r"the file: Invalid JSON"),
    ],
)
def test_a_damaged_saved_configuration_is_refused_by_file_and_field(
    tmp_path, before, after, message
):
    write_config(tmp_path, base())
    path = tmp_path / CONFIG
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))

    with pytest.raises(RunError, match=rf"{path} cannot be read: {message}"):
        read_config(tmp_path)
