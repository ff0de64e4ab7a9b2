"""Recipe, then file, then flags."""

import io
import sys
from pathlib import Path

import pytest

from mone_core.errors import ConfigError
from pipelines.config import to_yaml
from pipelines.errors import UsageError
from pipelines.flags import run_config
from pipelines.recipes import RECIPES, get_recipe


def resolved(*flags, recipe="digits", file=None):
    return run_config(recipe, file, flags, command="train")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_alone_is_that_recipe(recipe):
    assert resolved(recipe=recipe) == get_recipe(recipe)
    assert get_recipe(recipe).recipe == recipe


def test_a_flag_wins_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train: {steps: 70, seed: 9}\noptim: {warmup_steps: 3}\n")

    config = resolved("--train.steps", "50", file=file)

    assert (config.train.steps, config.train.seed, config.optim.warmup_steps) == (50, 9, 3)
    assert config.model == get_recipe("digits").model


def test_flags_take_numbers_lists_paths_choices_and_none():
    config = resolved(
        *("--train.budgets", "0.2", "0.7", "--out", "there", "--data.embedded", "None"),
        *("--optim.learning-rate", "1e-4", "--train.start_from=w", "--parallel.device", "cuda"),
    )

    assert config.train.budgets == (0.2, 0.7)
    assert config.out == Path("there")
    assert config.data.embedded is None
    assert config.optim.learning_rate == 1e-4
    assert config.train.start_from == Path("w")
    assert config.parallel.device == "cuda"


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_printed_reads_back_to_the_same_tree(recipe, tmp_path):
    config = resolved("--train.steps", "999", "--train.seed", "5", recipe=recipe)
    file = tmp_path / "printed.yaml"
    file.write_text(to_yaml(config))

    assert resolved(recipe=recipe, file=file) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train.step", "5"), r"^no config field called 'train\.step'; did you mean 'train\.st"),
        (("--train.log-evry=5",), r"called 'train\.log-evry'; did you mean 'train\.log_every'"),
        (("stray",), r"called 'stray'; nothing similar exists\. `mone train .* --print-config`"),
        (("--train.steps", "abc"), r"^--train\.steps: invalid literal for int\(\) .*'abc'$"),
        (
            ("--train.steps",),
            r"^Missing value for argument '--train\.steps'\. Expected 1 values\.$",
        ),
        (("--optim.betas", "0.9"), r"argument '--optim\.betas'\. Expected 2 values\.$"),
        (
            ("--parallel.device", "tpu"),
            r"^invalid choice 'tpu' for argument '--parallel\.device'\. "
            r".*\('cpu', 'cuda', 'xla'\)\.$",
        ),
    ],
)
def test_a_flag_that_does_not_fit_is_refused_in_one_line(flags, message, capsys):
    with pytest.raises(UsageError, match=message) as caught:
        resolved(*flags)

    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--train.steps", "0", "--train.batch-size", "0"),
            r"train: steps must be 1 or more, got 0; batch_size must be 1 or more, got 0$",
        ),
        (
            ("--train.budgets", "0.05"),
            r"train\.budgets: .* 0\.05 is out of reach: .* 0\.125 .* 1\.0",
        ),
        (
            ("--train.batch-size", "63"),
            r"num_workers times train\.microbatches must divide train\.batch_size, got 2 times 1 "
            r"and 63$",
        ),
        (("--train.checkpoint-every", "30"), r"checkpoint_every must be a multiple of log_every"),
    ],
)
def test_values_that_cannot_be_are_named_without_a_frame(flags, message, capsys):
    with pytest.raises((ConfigError, UsageError), match=message) as caught:
        resolved(*flags)

    assert "\n" not in str(caught.value)
    assert "─" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_an_unknown_recipe_is_answered_with_near_ones():
    with pytest.raises(
        UsageError,
        match=r"no recipe called 'mone_vit_b'; did you mean 'mone_vit_b16' or .*\? "
        r"`mone recipes` lists them all\.",
    ):
        resolved(recipe="mone_vit_b")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=rf"--config {tmp_path}/no\.yaml does not exist; name a"):
        resolved(file=tmp_path / "no.yaml")


def test_every_field_has_a_flag_in_the_long_help(capsys):
    with pytest.raises(SystemExit) as caught:
        run_config("digits", None, (), command="train", help_config=True)

    out = capsys.readouterr().out
    assert caught.value.code == 0
    for flag in (
        "--train.budgets",
        "--model.nesting.widths",
        "--data.augment.crop-area",
        "--tracking.uri",
        "--out",
    ):
        assert flag in out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_refusal_reads_the_same_on_every_kind_of_output(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    with pytest.raises(UsageError, match=r"^--train\.steps: invalid literal for int\(\) .*'abc'$"):
        resolved("--train.steps", "abc")
