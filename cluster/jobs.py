"""Submitting a `mone` command to a cluster as a Ray job, and following it to its end.

The way in is the cluster's job server (its dashboard, port 8265), so this machine needs no Ray
of the cluster's kind and no route to its inner ports. Joining a cluster from one of its own
machines is `session`; jobs that recur are `schedules`.

A job belongs to the cluster once it is submitted: losing the connection or pressing Ctrl-C ends
the following, never the job, as users of `kubectl logs -f` and `ray job submit` expect.
Submitting again under the same id follows the job that is there, so a submission may be
repeated safely.
"""

import asyncio
import json
import logging
import os
import re
import secrets
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.errors import JobError

MONE_ENTRYPOINT = ("python", "-m", "pipelines")
ANSWER_SECONDS = 10.0  # a job server that needs longer than this for its version is not well
RETRIES = 5  # of a broken log stream in a row, before giving up
RETRY_SECONDS = 2.0
INTERRUPTED = 130  # what a shell reports for Ctrl-C
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOutcome:
    """How a job ended, or where it stood when following it was interrupted.

    Attributes:
        submission_id: Name of the job on its cluster.
        status: Ray's word for it: SUCCEEDED, FAILED or STOPPED; RUNNING only when following
            was interrupted.
        exit_code: The command's own exit code; 1 when the job died without one, 130 when
            following was interrupted.
        message: One sentence on how it ended, or how to go on.
    """

    submission_id: str
    status: str
    exit_code: int
    message: str


def submit(
    address: str,
    command: Sequence[str],
    *,
    submission_id: str | None = None,
    working_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    entrypoint: Sequence[str] = MONE_ENTRYPOINT,
    write: Callable[[str], None],
) -> JobOutcome:
    """Run `mone <command>` on a cluster and follow its output until it ends.

    The token comes from `RAY_AUTH_TOKEN`, from the file named by `RAY_AUTH_TOKEN_PATH`, or from
    Ray's own file in the home, in this order, unless `RAY_AUTH_MODE` is `disabled`.

    Args:
        address: URL of the job server, such as `http://127.0.0.1:8265`.
        command: Verb of `mone` and its arguments, unquoted.
        submission_id: Name of the job; made from verb and time when left out. A job of that
            name and the same command is followed instead of started twice.
        working_dir: Folder to send along and run in; without it the job runs what is installed
            on the cluster.
        env: Environment variables of the job. Whoever may ask the job server can read them, so
            they are no place for secrets.
        entrypoint: Program and first arguments that stand for `mone` on the cluster.
        write: Takes the job's output, piece by piece, as it comes.

    Returns:
        How it ended. A job that fails is an outcome with its exit code, not an exception.

    Raises:
        JobError: The address, the token, the id, the folder or the command is refused, or the
            cluster cannot be reached any more.
    """
    if not command:
        raise JobError("there is no command to submit; give one, e.g. `train --recipe digits`")
    submission_id = _checked_id(submission_id or new_submission_id(command[0]))
    address = _checked_address(address)
    line = shlex.join([*entrypoint, *command])
    runtime_env = _runtime_env(working_dir, env or {})
    client = _connect(address)
    _start(client, address, submission_id, line, runtime_env)
    try:
        details = asyncio.run(_follow(client, address, submission_id, write))
    except KeyboardInterrupt:
        return JobOutcome(
            submission_id=submission_id,
            status=str(JobStatus.RUNNING),
            exit_code=INTERRUPTED,
            message=f"stopped following; the job goes on. {_how_to_go_on(address, submission_id)}",
        )
    return _outcome(submission_id, details)


def new_submission_id(verb: str) -> str:
    """A name for a job that says what it is and when it began: `mone-train-20261122-101500-ab12cd`.

    Args:
        verb: What the job does; its first 24 letters, digits and dashes are kept.
    """
    word = re.sub(r"[^a-z0-9]+", "-", verb.lower())[:24].strip("-") or "job"
    return f"mone-{word}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _checked_id(submission_id: str) -> str:
    if not _ID.fullmatch(submission_id):
        raise JobError(
            f"submission id {submission_id!r} is not usable; take up to 128 letters, digits, "
            "'-', '_' and '.', beginning with a letter or digit"
        )
    return submission_id


def _checked_address(address: str) -> str:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise JobError(
            f"address {address!r} is not the URL of a job server; give http://HOST:PORT or "
            "https://HOST:PORT, such as http://127.0.0.1:8265"
        )
    return address.rstrip("/")


def _runtime_env(working_dir: Path | None, env: Mapping[str, str]) -> dict[str, Any]:
    runtime_env: dict[str, Any] = {"env_vars": dict(env)} if env else {}
    if working_dir is not None:
        if not working_dir.is_dir():
            raise JobError(f"working folder {str(working_dir)!r} is not a folder; give one or none")
        runtime_env |= {"working_dir": str(working_dir), "excludes": [".git"]}
    return runtime_env


def _connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`, which has been heard to answer."""
    headers = _token_header()
    _check_answers(address, headers)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _without_ray_address():
        return JobSubmissionClient(address, headers=headers)


def _check_answers(address: str, headers: Mapping[str, str]) -> None:
    """Refuse, within seconds, an address where no job server accepts us.

    Ray's client sets no time limit on its requests, so this comes before it.
    """
    request = urllib.request.Request(f"{address}/api/version", headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            version = json.loads(answer.read())["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _refused(address, bool(headers)) from error
        raise _no_job_server(address) from error
    except OSError as error:
        raise JobError(
            f"no answer from {address} ({getattr(error, 'reason', error)}); check the address, "
            "and that the cluster runs and is reachable from here, e.g. by "
            "`kubectl port-forward service/NAME-head-svc 8265:8265`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _no_job_server(address) from error
    if not isinstance(version, str):
        raise _no_job_server(address)


def _no_job_server(address: str) -> JobError:
    return JobError(
        f"{address} answers, but not as a Ray job server; give the URL of the cluster's dashboard, "
        "which is port 8265 of its head unless changed"
    )


def _refused(address: str, had_token: bool) -> JobError:
    problem = "the token is wrong" if had_token else "it asks for a token and none was found"
    return JobError(
        f"{address} refuses access: {problem}; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a "
        "file that holds the cluster's token"
    )


def _token_header() -> dict[str, str]:
    """The token to send. Ray's own look-up is not used: it reads the environment once only."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not token and (named or path.exists()):
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise JobError(
                f"token file {str(path)!r} cannot be read ({error.strerror}); "
                "mend RAY_AUTH_TOKEN_PATH or set RAY_AUTH_TOKEN"
            ) from error
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextmanager
def _without_ray_address() -> Iterator[None]:
    """Hide the variables that Ray's client obeys rather than the address it is given."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _start(
    client: JobSubmissionClient,
    address: str,
    submission_id: str,
    line: str,
    runtime_env: dict[str, Any],
) -> None:
    """Start the job, or find that it is there already under the same id."""
    try:
        client.submit_job(entrypoint=line, submission_id=submission_id, runtime_env=runtime_env)
    except AuthenticationError as error:
        raise _refused(address, bool(_token_header())) from error
    except (RuntimeError, ValueError, OSError) as error:
        if "already exists" not in str(error):
            raise JobError(
                f"{address} did not take the job: {_one_line(error)}; "
                "check the working folder and the cluster's health, then submit again"
            ) from error
        running = client.get_job_info(submission_id).entrypoint
        if running != line:
            raise JobError(
                f"submission id {submission_id!r} is taken by `{running}`; "
                "choose another id, or leave it out"
            ) from error


def _one_line(error: Exception) -> str:
    """What an error says in short; the job server answers with whole tracebacks or pages."""
    lines = str(error).rstrip(". \n").splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in str(error) else 0].strip()[:200]


async def _follow(
    client: JobSubmissionClient, address: str, submission_id: str, write: Callable[[str], None]
) -> Any:
    """Write the job's log until the job has ended; give Ray's details of it.

    A stream that breaks is taken up again. It then starts from the beginning of the log, so
    what was written already is skipped.
    """
    written = failures = 0
    while True:
        skip = written
        try:
            async for piece in client.tail_job_logs(submission_id):
                new = piece[skip:]
                skip = max(0, skip - len(piece))
                if new:
                    write(new)
                    written += len(new)
                    failures = 0
            details = client.get_job_info(submission_id)
            if details.status.is_terminal():
                return details
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            failures += 1
            if failures > RETRIES:
                raise JobError(
                    f"lost {address} while following {submission_id} ({_one_line(error)}); "
                    f"the job may go on. {_how_to_go_on(address, submission_id)}"
                ) from error
        await asyncio.sleep(RETRY_SECONDS if failures else 0.2)


def _how_to_go_on(address: str, submission_id: str) -> str:
    return (
        f"See it again: `ray job logs --follow --address {address} {submission_id}`; "
        f"end it: `ray job stop --address {address} {submission_id}`"
    )


def _outcome(submission_id: str, details: Any) -> JobOutcome:
    code = details.driver_exit_code
    if details.status == JobStatus.SUCCEEDED:
        code = 0
    elif not code:  # it never ran, or its supervisor died
        code = 1
    elif code < 0:  # ended by a signal: say it as a shell does
        code = 128 - code
    return JobOutcome(
        submission_id=submission_id,
        status=str(details.status),
        exit_code=code,
        # Ray appends the end of the log, which has been written already.
        message=str(details.message or details.status).partition(", last available logs")[0],
    )
