"""Jobs submitted to a real local cluster, with token auth on and its dashboard on loopback."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.job_submission import JobDetails

from cluster import jobs
from cluster.errors import JobError
from cluster.jobs import JobOutcome, new_submission_id, submit
from tests.ray_head import Head, running_head

REPOSITORY = Path(__file__).parents[2]
PYTHON = (sys.executable, "-c")

FOLLOWS = """
import dataclasses, json, signal, sys
from cluster.jobs import submit

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
outcome = submit(
    sys.argv[1], ["import time; print('working', flush=True); time.sleep(60)"],
    submission_id="patient", entrypoint=(sys.executable, "-c"),
    write=lambda text: print(text, end="", flush=True),
)
print(json.dumps(dataclasses.asdict(outcome)))
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("head"), cpus=1) as running:
        yield running


@pytest.fixture(autouse=True)
def no_token_of_the_user(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def cluster(head, monkeypatch) -> Head:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token))
    return head


def run(cluster: Head, code: str, **options) -> tuple[JobOutcome, str]:
    pieces: list[str] = []
    outcome = submit(
        options.pop("url", cluster.url), [code], entrypoint=PYTHON, write=pieces.append, **options
    )
    return outcome, "".join(pieces)


def test_a_job_is_followed_to_its_end(cluster):
    code = "import time; print('one', flush=True); time.sleep(1); print(\"two 'quoted' $HOME\")"

    outcome, log = run(cluster, code)

    assert log.endswith("one\ntwo 'quoted' $HOME\n")
    assert (outcome.status, outcome.exit_code) == ("SUCCEEDED", 0)
    assert outcome.message == "Job finished successfully."


def test_the_exit_code_of_the_command_comes_back_and_the_same_id_does_not_start_it_twice(
    cluster, tmp_path
):
    code = f"import sys; open({str(tmp_path / 'ran')!r}, 'a').write('x'); sys.exit(3)"

    first, log = run(cluster, code, submission_id="retrain-1")
    second, again = run(cluster, code, submission_id="retrain-1")

    assert (first.status, first.exit_code) == ("FAILED", 3)
    assert first.message == "Job entrypoint command failed with exit code 3"
    assert (second, again) == (first, log)
    assert (tmp_path / "ran").read_text() == "x"
    with pytest.raises(JobError, match=r"id 'retrain-1' is taken by `.*ran.*`; choose another"):
        run(cluster, "print('something else')", submission_id="retrain-1")


def test_a_job_gets_its_folder_and_its_environment(cluster, tmp_path):
    (tmp_path / "recipe.txt").write_text("from the folder")
    code = "import os; print(open('recipe.txt').read(), os.environ['COLOUR'])"

    outcome, log = run(cluster, code, working_dir=tmp_path, env={"COLOUR": "green"})

    assert outcome.exit_code == 0
    assert log.endswith("from the folder green\n")


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "exit_code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),  # by a signal: as a shell says it
        ("FAILED", None, 1),  # it never started
        ("STOPPED", None, 1),
        ("STOPPED", 0, 1),
    ],
)
def test_only_a_job_that_succeeded_counts_as_success(status, driver_exit_code, exit_code):
    details = JobDetails(
        type="SUBMISSION", entrypoint="mone", status=status, driver_exit_code=driver_exit_code
    )

    outcome = jobs._outcome("name", details)

    assert (outcome.status, outcome.exit_code, outcome.message) == (status, exit_code, status)


def test_an_address_of_the_environment_does_not_override_the_one_given(cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")

    assert isinstance(jobs._connect(cluster.url).list_jobs(), list)
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@contextmanager
def relay(url: str) -> Iterator[tuple[str, "Relay"]]:
    middle = Relay(int(url.rpartition(":")[2]))
    try:
        yield f"http://127.0.0.1:{middle.port}", middle
    finally:
        middle.close()


class Relay:
    """A network between client and cluster that can be cut, for a moment or for good."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def cut(self) -> None:
        for end in self._open:
            with end:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # its peer was faster
        self._open.clear()

    def close(self) -> None:
        if self._listener.fileno() != -1:
            # A thread blocked in accept keeps a closed listener alive; this wakes it.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self.cut()


@pytest.mark.slow
def test_a_log_stream_that_breaks_is_taken_up_again_without_repeating_a_line(cluster):
    code = "import time\nfor i in range(6): print('line', i, flush=True); time.sleep(1)"
    pieces: list[str] = []
    with relay(cluster.url) as (url, middle):

        def write(piece: str) -> None:
            if "line 1" in piece and "line 1" not in "".join(pieces):
                middle.cut()
            pieces.append(piece)

        outcome = submit(url, [code], entrypoint=PYTHON, write=write)

    log = "".join(pieces)
    assert outcome.exit_code == 0
    assert [log.count(f"line {i}\n") for i in range(6)] == [1] * 6


def test_losing_the_cluster_for_good_says_how_to_find_the_job_again(cluster, monkeypatch):
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0.1)
    code = "import time; print('begun', flush=True); time.sleep(4)"
    message = (
        r"lost http://127\.0\.0\.1:\d+ while following mone-lost .* See it again: `ray job logs"
    )
    with relay(cluster.url) as (url, middle):

        def write(piece: str) -> None:
            if "begun" in piece:
                middle.close()

        with pytest.raises(JobError, match=message):
            submit(url, [code], submission_id="mone-lost", entrypoint=PYTHON, write=write)


def test_ctrl_c_stops_following_and_leaves_the_job_running(cluster):
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWS, cluster.url],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        while process.stdout.readline() != "working\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        outcome = json.loads(process.stdout.read().splitlines()[-1])

    client = jobs._connect(cluster.url)
    assert client.get_job_status("patient") == "RUNNING"
    assert client.stop_job("patient")
    assert (outcome["status"], outcome["exit_code"]) == ("RUNNING", 130)
    assert f"`ray job logs --follow --address {cluster.url} patient`" in outcome["message"]
    assert f"`ray job stop --address {cluster.url} patient`" in outcome["message"]


def test_a_wrong_token_is_refused(head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)

    with pytest.raises(JobError, match=rf"{head.url} refuses access: the token is wrong; set RAY_"):
        run(head, "print()")


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_missing_token_is_asked_for(head, monkeypatch, mode):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)

    with pytest.raises(JobError, match="it asks for a token and none was found; set RAY_AUTH_TOK"):
        run(head, "print()")


def test_the_token_file_of_the_home_is_used(head, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(head.token.read_text())

    assert isinstance(jobs._connect(head.url).list_jobs(), list)


def test_a_token_file_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))

    with pytest.raises(JobError, match=r"token file '.*none' cannot be read \(No such file"):
        submit("http://127.0.0.1:1", ["train"], write=print)


def test_an_address_where_nobody_listens_is_refused_at_once():
    began = time.monotonic()

    with pytest.raises(
        JobError, match=r"no answer from http://127\.0\.0\.1:1 \(.*refused\); check"
    ):
        submit("http://127.0.0.1:1", ["train"], write=print)

    assert time.monotonic() - began < 5


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        with pytest.raises(JobError, match=rf"no answer from {url} \(timed out\)"):
            submit(url, ["train"], write=print)


class SomethingElse(http.server.BaseHTTPRequestHandler):
    """A web server that is not Ray's; below /proxied it lets Ray's version through, no more."""

    def do_GET(self) -> None:
        pages = {"/page/api/version": "<html>", "/proxied/api/version": '{"ray_version": "2.60.0"}'}
        body = pages.get(self.path, "").encode()
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def something_else() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SomethingElse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["", "/page"])
def test_another_web_server_is_told_apart_from_a_job_server(something_else, path):
    with pytest.raises(JobError, match="answers, but not as a Ray job server; give the URL"):
        submit(something_else + path, ["train"], write=print)


def test_a_server_that_does_not_take_the_job_is_quoted(something_else):
    with pytest.raises(
        JobError, match=r"did not take the job: .*code 501.*; check the working folder"
    ):
        submit(f"{something_else}/proxied", ["train"], write=print)


@pytest.mark.parametrize(
    "address",
    ["", "head:8265", "ray://head:10001", "http://", "http://head:port", "http://head:0", "auto"],
)
def test_an_address_that_is_no_url_is_refused(address):
    with pytest.raises(JobError, match=r"is not the URL of a job server; give http://HOST:PORT"):
        submit(address, ["train"], write=print)


def test_a_job_needs_a_command():
    with pytest.raises(JobError, match="no command to submit; give one"):
        submit("http://127.0.0.1:1", [], write=print)


@pytest.mark.parametrize("name", ["a b", "../up", "-x", "x" * 129])
def test_a_submission_id_that_does_not_fit_a_url_is_refused(name):
    with pytest.raises(JobError, match="is not usable; take up to 128 letters"):
        submit("http://127.0.0.1:1", ["train"], submission_id=name, write=print)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(JobError, match=r"working folder '.*gone' is not a folder"):
        submit("http://127.0.0.1:1", ["train"], working_dir=tmp_path / "gone", write=print)


def test_submission_ids_are_readable_and_differ():
    first, second = new_submission_id("Train!"), new_submission_id("Train!")

    assert first.startswith("mone-train-20")
    assert first != second
