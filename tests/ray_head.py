"""A Ray head with a job server on loopback and token auth on, for the tests that need one."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# `Cluster` and not `ray.init`, which gives every instance of a machine the same agent port: a
# second one there takes no jobs.
_HEAD = """
import sys
from ray.cluster_utils import Cluster

cpus, dashboard, agent = map(int, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": cpus, "include_dashboard": True, "dashboard_host": "127.0.0.1",
    "dashboard_port": dashboard, "dashboard_agent_listen_port": agent,
    "object_store_memory": 100 << 20,
})
print(f"http://{cluster.webui_url}", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A running cluster: the URL of its job server and the file that holds its token."""

    url: str
    token: Path


@contextmanager
def running_head(folder: Path, *, cpus: int) -> Iterator[Head]:
    """Start a head in a process of its own, with its home in `folder`; stop it afterwards."""
    token = folder / "token"
    token.write_text("right" * 8 + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "HOME": str(folder),
        # Jobs run `python`: the one that has mone, as in an image made for the cluster.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD, str(cpus), str(free_port()), str(free_port())],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Head(url=process.stdout.readline().strip(), token=token)
    finally:
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        process.stdout.close()


def free_port() -> int:
    """A port that nobody on loopback listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
