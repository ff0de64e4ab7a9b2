"""The command line as a user meets it: verbs, help, one line for a mistake, exit codes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import LaunchError
from pipelines import cli
from pipelines.commands import recipes as recipes_command
from pipelines.commands import train as train_command
from pipelines.config import merge_yaml
from pipelines.errors import RunFailedError
from pipelines.recipes import RECIPES, get_recipe
from tests.dataset_folder import write_dataset
from tests.pipelines import tiny

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def mone(capsys):
    """Runs one command; gives exit code, standard output and standard error."""

    def run(*arguments):
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run([verb, "--help"])

    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    assert out.startswith(f"usage: mone {verb} ")
    assert f"Example: mone {verb}" in out


def test_no_command_lists_all_commands(mone):
    for arguments in ((), ("--help",), ("-h",)):
        code, out, err = mone(*arguments)
        assert (code, err) == (0, "")
        for verb in cli.VERBS:
            assert f"\n  {verb} " in out


def test_every_command_file_is_a_verb():
    files = {path.stem for path in (REPOSITORY / "pipelines" / "commands").glob("[!_]*.py")}

    assert files == {verb.replace("-", "_") for verb in cli.VERBS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "no command called 'trian'; did you mean 'train' or 'retrain'?"),
        ("train", "train: the following arguments are required: --recipe; see `mone train --help`"),
        ("train --recipe digitz", "no recipe called 'digitz'; did you mean 'digits'?"),
        ("train --recipe digits --train.stepz 5", "no config field called 'train.stepz'; did you"),
        ("train --recipe digits --config no.yaml", "--config no.yaml does not exist; name a YAML"),
        ("train --recipe digits --train.budgets 0.05", "0.05 is out of reach: with widths (0.125"),
        ("train --recipe photos --data.root none", "none/train is not a finished dataset: it has"),
        ("demo --train.seed x", "--train.seed: invalid literal for int() with base 10: 'x'"),
        (
            "demo --out README",
            "--out README holds something else (a file of that name); name a new",
        ),
        ("evaluate", "evaluate: the following arguments are required: run; see `mone evaluate"),
        ("evaluate none", "none is not a run: it has no config.json; runs are made by `mone train"),
        (
            "evaluate none --effective-capacity half",
            "evaluate: argument --effective-capacity: inva",
        ),
        ("report none", "none is not a run: it has no config.json"),
        ("verify none", "none is not a finished dataset: it has no manifest.json; make it with"),
        ("shard none out", "none does not exist; expected is"),
        ("shard none out --append --resize 64", "--append keeps the dataset's classes and size"),
        ("shard none out --quality 80", "--quality 80 is that of --resize; give both or neither"),
        ("recipes --all", "recipes: unrecognized arguments: --all; see `mone recipes --help`"),
        ("submit --address http://127.0.0.1:1 -- trian", "no command called 'trian'; did you mean"),
        ("submit --address x --env A -- train", "--env takes NAME=VALUE, got 'A'"),
        ("retrain --recipe digits --archive a", "a does not exist; expected is"),
        ("sweep --recipe digits", "sweep: the following arguments are required: --effective-capa"),
    ],
)
def test_a_mistake_is_answered_in_one_line_with_exit_code_2_and_leaves_nothing(
    arguments, message, mone, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").write_text("not ours")

    code, out, err = mone(*arguments.split())

    assert (code, out) == (2, "")
    assert err.startswith("mone: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["README"]


def test_a_budget_out_of_reach_ends_an_evaluation_before_it_writes(mone, tmp_path):
    config = tiny.tiny_config(
        tiny.write_data(tmp_path / "data"),
        tmp_path / "run",
        steps=1,
        log_every=1,
        checkpoint_every=1,
    )
    tiny.train_here(config)

    code, _, err = mone("evaluate", str(config.out), "--effective-capacity", "0.5", "0.05")

    assert code == 2
    assert "effective capacity 0.05 is out of reach" in err
    assert err.count("\n") == 1
    assert not (config.out / "results.json").exists()


def test_an_evaluation_prints_a_table_or_json_and_says_what_it_wrote(mone, tmp_path):
    config = tiny.tiny_config(
        tiny.write_data(tmp_path / "data"),
        tmp_path / "run",
        steps=1,
        log_every=1,
        checkpoint_every=1,
    )
    tiny.train_here(config)

    code, out, _ = mone("evaluate", str(config.out), "--effective-capacity", "0.2", "1.0", "0.2")
    assert code == 0
    assert out.endswith(f"2 budgets -> {config.out / 'results.json'}\n")
    assert "0.20" in out
    code, out, _ = mone("evaluate", str(config.out), "--effective-capacity", "0.2", "--json")
    assert code == 0
    assert out.startswith('{"name": "run", "step": 1, "num_classes": 4, "settings": [')


def test_an_evaluation_goes_on_past_bad_samples_where_it_is_told_to(mone, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    config = tiny.tiny_config(data, tmp_path / "run", steps=1, log_every=1, checkpoint_every=1)
    tiny.train_here(config)
    shutil.rmtree(data / "val")
    bad = {1009: (b"not an image", 1)}
    write_dataset(data / "val", tiny.squares(range(9)) | bad, num_classes=4, per_shard=10)

    evaluate = ("evaluate", str(config.out), "--effective-capacity", "0.2")
    code, _, err = mone(*evaluate)
    assert code == 2
    assert "set data.read.on_corrupt to skip" in err
    code, _, err = mone(*evaluate, "--data.read.on-corrupt", "skip")
    assert code == 2
    assert "more than data.read.corrupt_share (0.001) allows" in err
    skip = ("--data.read.on_corrupt", "skip", "--data.read.corrupt_share", "0.1")
    code, out, _ = mone(*evaluate, *skip)
    assert code == 0
    assert "9 validation samples, 1 skipped" in out.replace("\n", " ")
    assert f"warning: 1 skipped, named in {config.out / 'skipped.jsonl'}" in out


def test_what_print_config_prints_is_what_runs_when_it_is_given_back(mone, tmp_path):
    code, printed, _ = mone("train", "--recipe", "digits", "--train.steps", "9", "--print-config")
    assert code == 0
    (tmp_path / "my.yaml").write_text(printed)

    code, again, _ = mone(
        *("train", "--recipe", "photos", "--config", str(tmp_path / "my.yaml"), "--print-config")
    )

    assert (code, again) == (0, printed)
    assert merge_yaml(get_recipe("photos"), printed, source="x").train.steps == 9


def test_demo_puts_everything_below_its_folder(mone, tmp_path):
    code, printed, _ = mone("demo", "--out", str(tmp_path / "d"), "--print-config")

    config = merge_yaml(get_recipe("photos"), printed, source="printed")
    assert code == 0
    assert config.recipe == "digits"
    assert (config.out, config.data.root) == (tmp_path / "d/run", str(tmp_path / "d/shards"))
    assert config.tracking.uri == f"sqlite:///{tmp_path}/d/mlruns/mlflow.db"


def test_recipes_are_listed_with_a_line_each(mone):
    code, out, _ = mone("recipes")

    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    assert all(len(line.split()) > 5 for line in out.splitlines())
    assert recipes_command.RECIPES is RECIPES


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (LaunchError("no cluster there; start one"), 2, "mone: no cluster there; start one\n"),
        (RunFailedError("a worker died"), 1, "mone: a worker died\n"),
    ],
)
def test_our_errors_become_a_line_and_their_exit_code(error, code, printed, mone, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(train_command, "main", fails)

    assert mone("train") == (code, "", printed)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(train_command, "main", fails)

    with pytest.raises(type(error), match="a bug"):
        cli.run(["train"])


def test_the_module_is_the_command_and_a_mistake_of_its_user_has_no_traceback():
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines", "trian"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("mone: no command called 'trian'")
    assert ended.stderr.count("\n") == 1
