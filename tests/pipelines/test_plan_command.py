"""`mone plan` as a user meets it: tables, JSON, own clusters, one line for a mistake."""

import json

import pytest
import yaml

from pipelines import cli
from pipelines.planning.clusters import FOLDER, cluster_names, load_cluster

SPARSE = ("--model.experts.placement", "every", "--train.batch-size", "128")


@pytest.fixture
def plan(capsys):
    """Runs `mone plan`; gives exit code, standard output and standard error."""

    def run(*arguments):
        code = cli.run(["plan", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def described(tmp_path):
    """Writes a described cluster with some of its fields changed, and gives its path."""

    def write(**changes):
        tree = yaml.safe_load((FOLDER / "h100x64.yaml").read_text())
        for path, value in changes.items():
            *above, name = path.split("__")
            part = tree
            for each in above:
                part = part[each]
            if value is None:
                del part[name]
            else:
                part[name] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write


def test_every_mesh_is_listed_best_first_with_its_assumptions(plan):
    code, out, err = plan("digits", "--cluster", "h100x64.yaml", "--workers", "16", *SPARSE)

    assert (code, err) == (0, "")
    assert out.startswith("16 of 64 devices: 8 hosts of 8 NVIDIA H100 SXM 80 GB")
    titles = ("a training step, in ms", "what leaves a rank in a step", "memory of a device, in MB")
    for title in titles:
        table = out.split(title)[1]
        assert all(f"│ {name} │" in table for name in ("16 x 1", " 8 x 2", " 4 x 4", " 2 x 8"))
    assert "experts not divisible: 8 over 16 ranks" in out
    assumed = [line for line in out.splitlines() if line.startswith("assumed: ")]
    assert len(assumed) == 8
    assert "10 effective capacities from 0.15 to 1, one a step" in assumed[0]
    assert "60 % of 989 TFLOP/s in bfloat16" in assumed[2]
    assert "width classes travel while others are computed" in assumed[5]
    assert out.splitlines()[-1].startswith("4 of 5 meshes; best: ")


def test_tables_fit_a_terminal_of_80_columns(plan):
    _, out, _ = plan("mone_vit_b16", "--cluster", "a100x16", "--model.experts.placement", "every")

    assert max(len(line) for line in out.splitlines() if line[0] in "│┃└") <= 80


def test_the_recipes_own_mesh_is_marked(plan):
    own = ("--parallel.num-workers", "4", "--parallel.expert", "2")

    _, out, _ = plan("digits", "--cluster", "h200x8", "--workers", "4", *SPARSE, *own)
    _, of_eight, _ = plan("digits", "--cluster", "h200x8", *SPARSE, *own)

    assert "│ 2 x 2 * │" in out
    assert "│   4 x 1 │" in out
    assert " * │" not in of_eight


def test_json_holds_bytes_and_seconds(plan):
    code, out, _ = plan("digits", "--cluster", "local", "--json", *SPARSE)

    told = json.loads(out)
    assert code == 0
    assert (told["recipe"], told["workers"], told["cluster"]["name"]) == ("digits", 2, "local")
    assert {"data": 1, "expert": 2} in [each["mesh"] for each in told["meshes"]]
    assert told["refused"] == []
    best, other = told["meshes"]
    assert best["step_seconds"] <= other["step_seconds"]
    parts = ("gemm_seconds", "other_seconds", "exposed_seconds")
    assert best["step_seconds"] == pytest.approx(sum(best[each] for each in parts))
    assert best["memory"]["total"] > best["memory"]["activations"] > 0
    assert told["cluster"]["sources"]["fast_bytes_per_second"].startswith("measured by")


def test_nothing_fitting_is_an_answer_with_reasons(plan, described):
    tiny = described(numbers__memory_bytes={"value": 1e6, "source": "a joke"})

    code, out, err = plan("digits", "--cluster", tiny, "--workers", "2", *SPARSE)

    assert (code, err) == (0, "")
    assert "does not fit memory: 0.1 GB of 0.0 GB a device" in out
    assert out.splitlines()[-1] == "0 of 2 meshes; no mesh fits"


def test_a_cluster_of_ones_own_is_as_good(plan, described):
    mine = described(
        devices=8,
        what="my machine",
        numbers__flops_per_second={"value": "5e14", "source": "measured by me"},
        numbers__slow_bytes_per_second=None,
        numbers__slow_latency_seconds=None,
    )

    code, out, _ = plan("digits", "--cluster", mine)

    assert code == 0
    assert out.startswith("8 of 8 devices: my machine")
    assert load_cluster(mine).numbers.flops_per_second == 5e14
    assert load_cluster(mine).numbers.slow_bytes_per_second == 450e9


def test_the_clusters_that_come_along_are_these():
    assert cluster_names() == ("a100x16", "h100x64", "h200x8", "local", "v4-16", "v5e-64")
    assert load_cluster("h100x64") == load_cluster("h100x64.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices must be a whole number of 1 or more, got 0"),
        ({"devices": 6.5}, "devices must be a whole number of 1 or more, got 6.5"),
        ({"island": 24}, "island must divide the 64 devices, got 24"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"overlap": "yes, please"}, "overlap must be true or false, got 'yes, please'"),
        ({"what": ["a"]}, "what must be a line of text, got ['a']"),
        ({"what": None}, "the file lacks what"),
        ({"flops": 1}, "no field called 'flops'; nothing similar exists. the file takes what, dev"),
        ({"numbers": 7}, "numbers must be a mapping of flops_per_second, product_share, memory_b"),
        ({"numbers__slow_latency_seconds": None}, "numbers lacks slow_latency_seconds"),
        ({"numbers__memory_share__value": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"numbers__memory_bytes__value": "a lot"}, "value must be a number above 0, got 'a lot'"),
        ({"numbers__memory_bytes__value": True}, "value must be a number above 0, got True"),
        ({"numbers__memory_bytes__value": "inf"}, "value must be a number above 0, got 'inf'"),
        ({"numbers__memory_bytes__value": 0}, "memory_bytes.value must be a number above 0, got 0"),
        ({"numbers__slow_latency_seconds__value": -1}, "must be a number 0 or more, got -1"),
        ({"numbers__memory_bytes__source": " "}, "numbers.memory_bytes.source must say where the"),
        ({"numbers__memory_bytes__source": None}, "numbers.memory_bytes lacks source"),
        ({"numbers__memory_bytes": 80e9}, "numbers.memory_bytes must be a mapping of value, sour"),
    ],
)
def test_a_bad_description_is_refused_in_one_line(changes, message, plan, described):
    path = described(**changes)

    code, out, err = plan("digits", "--cluster", path)

    assert (code, out) == (2, "")
    assert err.startswith(f"mone: {path}: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"a: b: c", b"\xff\xfe\x00"])
def test_what_is_no_yaml_is_refused_in_one_line(content, plan, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)

    code, _, err = plan("digits", "--cluster", str(tmp_path / "mine.yaml"))

    assert code == 2
    assert "mine.yaml is not YAML: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "plan: the following arguments are required: recipe, --cluster; see `mone plan --he"),
        ("digits --cluster h100x46", "no cluster called 'h100x46'; did you mean 'h100x64'"),
        ("digits --cluster no/file.yaml", "no cluster called 'no/file.yaml'; nothing similar"),
        ("digits --cluster no/h100x64.yaml", "no cluster called 'no/h100x64.yaml'; did you mean"),
        ("digitz --cluster local", "no recipe called 'digitz'; did you mean 'digits'"),
        ("digits --cluster local --train.stepz 5", "no config field called 'train.stepz'; did you"),
        ("digits --cluster local --workers 3", "--workers must be 1 to 2, the devices of local, g"),
        ("digits --cluster local --workers x", "plan: argument --workers: invalid int value: 'x'"),
        ("digits --cluster local --config no.yaml", "--config no.yaml does not exist; name a YAML"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments, message, plan):
    code, out, err = plan(*arguments.split())

    assert (code, out) == (2, "")
    assert err.startswith("mone: ")
    assert message in err
    assert err.count("\n") == 1
