"""The house seen from the street: real commands in real processes, on one small demo."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.journey.commands import SHORT, command_line, environment

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def mone(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs `mone ...` in a process of its own, in an empty folder."""
    folder = tmp_path_factory.mktemp("journey")

    def call(*arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(arguments),
            cwd=folder,
            env=environment() | extra,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def demo(
    mone: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A short demo that ran to its end: its folder and what it said."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    done = mone("demo", "--out", out, *SHORT)
    assert done.returncode == 0, done.stderr
    return out, done
