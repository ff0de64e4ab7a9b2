"""Ray started by `ray_session`: real Ray, each session in a process of its own."""

import os
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.errors import LaunchError
from cluster.session import ray_session

REPOSITORY = Path(__file__).parents[2]
MARK = "MONE_TEST_MARK"

USES_EVERYTHING = """
    import os, threading, urllib.error, urllib.request
    import ray, ray.data, ray.tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.state import list_nodes
    from cluster.session import cluster_cpus, ray_session

    def noisy(config):
        print("a worker talks")
        ray.train.report({"loss": 1.0})

    with ray_session(num_cpus=3):
        with ray_session(num_cpus=1):
            assert cluster_cpus() == 3
        assert ray.is_initialized()
        assert len(list_nodes()) == 1
        dashboard = ray._private.worker.get_dashboard_url()
        assert dashboard.startswith("127.0.0.1:")
        try:
            urllib.request.urlopen(f"http://{dashboard}/api/jobs/")
        except urllib.error.HTTPError as error:
            assert error.code == 401
        else:
            raise AssertionError("the job server asks for no token")

        assert ray.data.range(10).map_batches(lambda batch: batch).count() == 10
        batches = iter(ray.data.range(100).iter_batches(batch_size=1))
        next(batches)
        batches.close()
        TorchTrainer(
            noisy,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="run", storage_path=STORE),
        ).fit()
        ray.tune.Tuner(
            lambda config: {"score": 1.0},
            run_config=ray.tune.RunConfig(storage_path=STORE, verbose=0),
        ).fit()
    assert not ray.is_initialized()
    assert not [thread for thread in threading.enumerate() if thread.name == "iter_threaded"]
    assert not [name for name in os.environ if name.startswith(("RAY_AUTH", "RAY_ADDRESS"))]
    try:
        ray.put("by a thread that outlives the session")
    except ray.exceptions.RaySystemError:
        pass
    else:
        raise AssertionError("a late call started another Ray")
"""

TALKS_THEN_FAILS = """
    import sys, ray
    from cluster.session import ray_session

    @ray.remote
    def talk():
        print("a worker talks")

    @ray.remote
    def fail():
        print("last words", file=sys.stderr)
        raise ValueError("lost")

    with ray_session(num_cpus=1, verbose=True):
        ray.get(talk.remote())
        ray.data.range(10).map_batches(lambda batch: batch).count()
    with ray_session(num_cpus=1):
        ray.get(fail.remote())
"""


TWO_INNER_SESSIONS = """
    import os, subprocess, sys
    import ray
    from cluster.session import ray_session

    JOINS = (
        "from cluster.session import *\\n"
        "with ray_session(): print('joined', cluster_cpus())"
    )
    STARTS = (
        "from cluster.session import *\\n"
        "from ray.util.state import list_nodes\\n"
        "with ray_session(num_cpus=1):\\n"
        "    seen = ray.get(ray.remote(lambda: len(list_nodes())).remote())\\n"
        "    print(f'own {cluster_cpus()}, nodes seen: {seen}')"
    )

    with ray_session(num_cpus=3):
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        subprocess.run([sys.executable, "-c", JOINS], check=True)
        print(ray.is_initialized(), flush=True)
        os.environ["RAY_ADDRESS"] = "local"
        subprocess.run([sys.executable, "-c", STARTS], check=True)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a process left: its exit code, its output, its home and who still runs."""

    code: int
    stdout: str
    stderr: str
    home: Path
    still_running: list[str]


def marked_processes(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended while we looked
    return [command for command in found if command]  # an empty one is a zombie: already dead


def run_python(code: str, folder: Path, **extra: str) -> Finished:
    """Run `code` under a home of its own, then wait up to 15 s for its processes to end."""
    home, mark = folder / "home", uuid.uuid4().hex
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), MARK: mark, "PYTHONPATH": str(REPOSITORY)} | extra
    code = f"STORE = {str(folder / 'store')!r}\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    deadline = time.monotonic() + 15
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return Finished(
        code=done.returncode,
        stdout=done.stdout,
        stderr=done.stderr,
        home=home,
        still_running=left,
    )


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory):
    return run_python(USES_EVERYTHING, tmp_path_factory.mktemp("quiet"))


@pytest.fixture(scope="module")
def loud_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loud")
    long = folder / ("x" * 100)
    long.mkdir()
    return run_python(TALKS_THEN_FAILS, folder, TMPDIR=str(long))


def test_ray_and_its_libraries_work_and_print_nothing_by_default(quiet_run):
    assert (quiet_run.stdout, quiet_run.stderr, quiet_run.code) == ("", "", 0)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see other processes")
@pytest.mark.parametrize("run", ["quiet_run", pytest.param("loud_run", marks=pytest.mark.slow)])
def test_a_session_ends_with_no_process_left(run, request):
    assert request.getfixturevalue(run).still_running == []


def test_a_private_instance_writes_no_token_into_the_home(quiet_run):
    assert not (quiet_run.home / ".ray").exists()


@pytest.mark.slow
def test_verbose_brings_back_what_ray_and_its_workers_say(loud_run):
    said = loud_run.stdout + loud_run.stderr

    assert "a worker talks" in said
    assert "Started a local Ray instance" in said
    assert "Starting execution of Dataset" in said


@pytest.mark.slow
def test_a_failure_says_where_the_output_of_the_workers_is(loud_run):
    assert "ValueError: lost" in loud_run.stderr
    note = "Ray's logs, with the output of every worker: "
    logs = Path(loud_run.stderr.splitlines()[-1].removeprefix(note))
    assert any("last words" in path.read_text() for path in logs.glob("worker-*.err"))


@pytest.mark.slow
def test_a_long_temporary_folder_is_no_obstacle(loud_run):
    note = loud_run.stderr.splitlines()[-1]

    assert ": /tmp/ray/session_" in note


@pytest.fixture(scope="module")
def two_clusters(tmp_path_factory):
    return run_python(TWO_INNER_SESSIONS, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_a_session_joins_the_cluster_that_ray_address_names(two_clusters):
    assert two_clusters.stdout.splitlines()[:2] == ["joined 3", "True"], two_clusters.stderr


@pytest.mark.slow
def test_two_instances_on_one_machine_do_not_confuse_the_state_api(two_clusters):
    assert two_clusters.stdout.splitlines()[2:] == ["own 1, nodes seen: 1"], two_clusters.stderr
    assert two_clusters.stderr == ""


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"cannot join .* '127\.0\.0\.1:1' \(Connection refused\); start it, mend"),
        ("head", r"cannot join .* 'head' \(it must be host:port\)"),
        ("http://127.0.0.1:8265", r"is a URL, .* use `mone submit --address"),
        ("ray://127.0.0.1:10001", r"is a URL, but a cluster is joined at host:port"),
    ],
)
def test_an_address_that_cannot_be_joined_is_refused_at_once(address, message, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()

    with pytest.raises(LaunchError, match=message), ray_session():
        pass

    assert time.monotonic() - began < 10


def test_a_session_needs_at_least_one_cpu():
    with pytest.raises(LaunchError, match="num_cpus is 0; give 1 or more"), ray_session(num_cpus=0):
        pass


def test_a_token_file_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))

    with pytest.raises(LaunchError, match=r"RAY_AUTH_TOKEN_PATH '.*none' cannot be read"):  # noqa: SIM117
        with ray_session():
            pass
