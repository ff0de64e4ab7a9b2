"""Real object stores on loopback, in processes of their own: one that speaks S3, one as Google's.

Import `s3_server` and `bucket` into a test module: the server starts once per module, each test
gets a bucket of its own, and the environment that names them is the test's alone. Processes that
the test starts inherit it. `google_server` and `google_bucket` do the same where the program
`fake-gcs-server` is installed, and skip elsewhere.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
from pyarrow import fs

from pipelines.storage import ENVIRONMENT, Place

# Ends with its standard input, so with the test process, however that ends.
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Server:
    """A running server: its URL, and the environment with which clients find it."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextmanager
    def checks_credentials(self) -> Iterator[None]:
        """Within the block the server refuses everybody, since it knows no user."""
        self._let_pass("0")
        try:
            yield
        finally:
            self._let_pass("inf")

    def _let_pass(self, requests: str) -> None:
        request = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth",
            data=requests.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request).close()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    """The server; killed with its process if it does not end by itself."""
    clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield S3Server(url=f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=20)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty bucket; this test's environment points to its server."""
    return make_bucket(s3_server, monkeypatch)


def make_bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Point the environment to a server and make an empty bucket there."""
    name = new_name(monkeypatch, server.environment)
    store = fs.S3FileSystem(endpoint_override=server.url, allow_bucket_creation=True)
    store.create_dir(name)
    return Place(f"s3://{name}")


@pytest.fixture(scope="module")
def google_server() -> Iterator[str]:
    """URL of a server that speaks as Google Cloud Storage does."""
    program = shutil.which("fake-gcs-server")
    if program is None:
        pytest.skip("needs the program fake-gcs-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", url.rpartition(":")[2]]
    where += ["-backend", "memory", "-public-host", url.removeprefix("http://")]
    process = subprocess.Popen(
        [program, *where, "-external-url", url, "-log-level", "error"], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/storage/v1/b?project=test").close()
                break
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def google_bucket(google_server: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty bucket of it; this test's environment points there."""
    name = new_name(monkeypatch, {"STORAGE_EMULATOR_HOST": google_server})
    request = urllib.request.Request(
        f"{google_server}/storage/v1/b?project=test",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()
    return Place(f"gs://{name}")


def new_name(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> str:
    """Set the environment of object stores to this alone; returns a name for a new bucket."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return f"test-{uuid.uuid4().hex[:12]}"
