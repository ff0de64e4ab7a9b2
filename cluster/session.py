"""Starting or joining Ray: the one place of the house that does.

`ray_session` decides between three cases: Ray already runs in this process, a cluster is named
by `RAY_ADDRESS` (as inside every Ray job), or a private instance must be started here. What
runs on it is not known here; jobs for another cluster are in `jobs`.

A private instance is guarded by a token. Ray binds its control ports to every interface of the
machine, whatever the dashboard is bound to, so without a token anybody on the network could run
code as this user. The token lives in this process's environment only and dies with it; left
alone, Ray would write one into the user's home.

Ray is quiet unless asked otherwise. The output of workers then stays in Ray's log folder, and
an exception that leaves a session carries a note saying where that is.
"""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import ray
import ray.data
from ray._private import auto_init_hook
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from cluster.errors import LaunchError

OBJECT_STORE_BYTES = 512 << 20  # of a private instance: a laptop keeps its memory
CONNECT_SECONDS = 5.0
# Longest socket path Linux takes, less what Ray appends to its temporary folder:
# /ray/session_<26 characters of time>_<pid>/sockets/plasma_store
LONGEST_TEMP_DIR = 107 - 65
LOCAL = "local"
DATA_THREADS = ("iter_threaded", "StreamingExecutor")  # of Ray Data, by their names
DATA_THREADS_SECONDS = 10.0


@contextmanager
def ray_session(*, num_cpus: int | None = None, verbose: bool = False) -> Iterator[None]:
    """Have Ray running inside the block, and leave nothing behind that was started for it.

    Ray that already runs in this process is used and left running. Otherwise the cluster named
    by `RAY_ADDRESS` is joined, or, without one, a private instance is started with its
    dashboard on loopback (Ray Train needs it to free the workers of stopped trials).
    From then on this process has Ray in such a block or by `ray.init` only: a call of Ray's no
    longer starts it.

    Args:
        num_cpus: CPUs a private instance offers, at least 1; all of this machine by default.
            A cluster that is joined offers what it has.
        verbose: Let Ray, Ray Data, Ray Train, Ray Tune and the workers write to the terminal.

    Raises:
        LaunchError: `num_cpus` is not positive, or the cluster cannot be joined.
    """
    if num_cpus is not None and num_cpus < 1:
        raise LaunchError(f"num_cpus is {num_cpus}; give 1 or more, or leave it out for all CPUs")
    if ray.is_initialized():
        yield
        return
    # A thread of Ray Data's may outlive the session; its next call would start another Ray.
    auto_init_hook.enable_auto_connect = False
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    with ExitStack() as stack:
        stack.enter_context(_sigterm_kept())
        if not verbose:
            stack.enter_context(_quiet_libraries())
        if address == LOCAL:
            stack.enter_context(_short_temp_dir())
            stack.enter_context(_private_token())
            stack.enter_context(_own_address())
        stack.callback(ray.shutdown)
        stack.callback(_wait_for_ray_data)
        log_folder = _start_or_join(address, num_cpus, verbose)
        try:
            yield
        except Exception as error:
            error.add_note(f"Ray's logs, with the output of every worker: {log_folder}")
            raise


def _wait_for_ray_data() -> None:
    """Let threads end that read what Ray Data has made.

    They are told to when an iterator is closed, but not waited for; one that calls Ray while or
    after it shuts down takes the process with it.
    """
    deadline = time.monotonic() + DATA_THREADS_SECONDS
    for thread in threading.enumerate():
        if thread.name.startswith(DATA_THREADS):
            thread.join(timeout=max(0.0, deadline - time.monotonic()))


def cluster_cpus() -> int:
    """Number of CPUs that the running Ray cluster offers in all, busy or not."""
    return int(ray.cluster_resources().get("CPU", 0))


def _start_or_join(address: str, num_cpus: int | None, verbose: bool) -> Path:
    """Connect this process to Ray; give the folder that Ray logs to."""
    output = {
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
    }
    if address == LOCAL:
        context = ray.init(
            address=LOCAL,
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            **output,
        )
    else:
        _check_reachable(address)
        try:
            context = ray.init(address=address, **output)
        except (ConnectionError, ValueError, AuthenticationError) as error:
            raise LaunchError(_cannot_join(address, _first_line(error))) from error
    return Path(context.address_info["session_dir"]) / "logs"


def _check_reachable(address: str) -> None:
    """Refuse an address nobody listens at: Ray itself would try for minutes.

    `auto` is looked up by Ray, which answers at once.
    """
    if address == "auto":
        return
    if "://" in address:
        raise LaunchError(
            f"RAY_ADDRESS {address!r} is a URL, but a cluster is joined at host:port; set that, "
            "or leave RAY_ADDRESS unset and use `mone submit --address http://HOST:8265 -- ...`"
        )
    try:
        parts = urlsplit(f"//{address}")
        if not parts.hostname or not parts.port:
            raise ValueError("it must be host:port")
        socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise LaunchError(_cannot_join(address, _first_line(error))) from error


def _cannot_join(address: str, reason: str) -> str:
    return (
        f"cannot join the Ray cluster at RAY_ADDRESS {address!r} ({reason}); "
        "start it, mend the address or the token in RAY_AUTH_TOKEN, or unset RAY_ADDRESS to use "
        "this machine alone"
    )


def _first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0].rstrip(".")


@contextmanager
def _short_temp_dir() -> Iterator[None]:
    """Move what starts in this block to /tmp when `TMPDIR` is too long for a socket path."""
    before = {"TMPDIR": os.environ.get("TMPDIR")}
    if len((before["TMPDIR"] or "").encode()) > LONGEST_TEMP_DIR:
        os.environ["TMPDIR"] = "/tmp"
    try:
        yield
    finally:
        _restore_environment(before)


@contextmanager
def _private_token() -> Iterator[None]:
    """Guard Ray started in this block by a token that no file holds.

    A mode or token that the user chose stays.
    """
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    try:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        _reload_auth()
        if os.environ["RAY_AUTH_MODE"].lower() == "token" and not _user_has_token():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            _reload_auth()
        yield
    finally:
        _restore_environment(before)
        _reload_auth()


@contextmanager
def _own_address() -> Iterator[None]:
    """Tell every process started in this block which Ray instance is its own.

    Left alone, Ray's State API takes whatever instance it finds on the machine and gives up
    when there are two; Ray Train's workers then never learn that a trial has stopped.
    """
    before = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_GCS_SERVER_PORT")}
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    host = ray.util.get_node_ip_address()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ["RAY_ADDRESS"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        yield
    finally:
        _restore_environment(before)


def _user_has_token() -> bool:
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise LaunchError(
            f"RAY_AUTH_TOKEN_PATH {os.environ.get('RAY_AUTH_TOKEN_PATH')!r} cannot be read or is "
            "empty; write the token there or unset RAY_AUTH_TOKEN_PATH"
        ) from error


def _reload_auth() -> None:
    """Make Ray read its authentication variables again: it reads each once per process.

    The mode goes first. A thread of Ray's that still drains would otherwise look for a token
    in token mode after the token is gone, and end the process.
    """
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep Ray Data and Ray Tune off the terminal; Ray Data's log file stays complete."""
    before = {"RAY_AIR_NEW_OUTPUT": os.environ.get("RAY_AIR_NEW_OUTPUT")}
    data = ray.data.DataContext.get_current()
    bars = data.enable_progress_bars
    consoles = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    levels = [handler.level for handler in consoles]
    try:
        # Tune's older output obeys verbose=0; the newer prints a table all the same.
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        data.enable_progress_bars = False
        for handler in consoles:
            handler.setLevel(logging.ERROR)
        yield
    finally:
        _restore_environment(before)
        data.enable_progress_bars = bars
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Give SIGTERM back to its former handler afterwards; Ray takes it and never returns it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _restore_environment(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
