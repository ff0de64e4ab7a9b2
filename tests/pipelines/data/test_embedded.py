"""Making the embedded data: once, however many ask for it at the same time."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from pipelines.config import DataConfig
from pipelines.data import embedded
from pipelines.data.embedded import MAKING_LOCK, draw, ensure_data
from pipelines.errors import RunError
from pipelines.locks import alone
from pipelines.storage import StorageError
from pipelines.terminal import Terminal

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def others() -> Iterator[ThreadPoolExecutor]:
    """Locks do not care whether their holders are threads or processes."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Heard(Terminal):
    """A terminal that keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_of_two_that_draw_at_once_one_draws_and_the_other_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: ThreadPoolExecutor
) -> None:
    begun, go = [], Event()

    def slowly(out: Path, **_: int) -> None:
        begun.append(out)
        assert go.wait(20)

    monkeypatch.setattr(embedded, "write_digit_archives", slowly)
    archive, terminal = tmp_path / "data/archive", Heard()
    drawing = [others.submit(draw, "digits", archive, terminal) for _ in range(2)]
    try:
        until(lambda: terminal.lines)
        assert terminal.lines == [f"waiting for another drawing of {archive}"]
        assert len(begun) == 1
    finally:
        go.set()
    for each in drawing:
        each.result(20)
    assert begun == [archive, archive]  # the second finds it drawn


def test_whoever_waited_for_the_dataset_uses_it_and_makes_none(
    tmp_path: Path, make_dataset: Callable[..., Path], noise, encode, others: ThreadPoolExecutor
) -> None:
    root, terminal = tmp_path / "root", Heard()
    root.mkdir()
    config = DataConfig(root=str(root), embedded="digits")
    with alone(root / MAKING_LOCK, "a test"):
        waiting: Future[None] = others.submit(ensure_data, config, terminal)
        until(lambda: terminal.lines)
        make_dataset([encode(noise(20, 20))], name="root/val")
    waiting.result(20)

    assert terminal.lines == [f"waiting for another making of {root}"]
    assert sorted(path.name for path in root.iterdir()) == [MAKING_LOCK, "val"]


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_WAIT_SECONDS", 0.1)
    config = DataConfig(root=str(tmp_path), embedded="motion")
    with (
        alone(tmp_path / MAKING_LOCK, "a test"),
        pytest.raises(RunError, match=r"another making of .* is under way .*; wait for it to end"),
    ):
        ensure_data(config, Heard())


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    config = DataConfig(root=str(tmp_path / "file/root"), embedded="digits")
    with pytest.raises(StorageError, match=r"file/root cannot .*: Not a directory; mend that"):
        ensure_data(config, Heard())


@pytest.mark.slow
def test_two_processes_draw_one_archive(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipelines.data import embedded\n"
        "from pipelines.terminal import Terminal\n"
        "input()\n"
        "embedded.draw('digits', Path(sys.argv[1]), Terminal())\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "archive")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(argv, cwd=REPOSITORY, text=True, **pipes) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=200) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], ended
    assert {path.name for path in tmp_path.iterdir()} == {"archive", ".archive.lock"}
    assert len(list((tmp_path / "archive").glob("*/*.tar"))) == 20
