"""One measured process: `python -m tests.benchmarks.peers.side NAME TASK ARGUMENTS`.

A side is imported here and nowhere else, so its imports, threads, workers and memory are its
own. The answer is the last line that is printed, as JSON.
"""

import importlib
import json
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.peers.setup import Batch, Loader, Setup


def prepare(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Write the images in the side's format."""
    _module(name).prepare(Path(arguments["images"]), Path(arguments["to"]))
    return {}


def stream(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Read an epoch's first batches: seconds to the first one, then images a second.

    Batches of the warm-up are not timed: workers fill their queues while the first is waited
    for, and those batches would seem to cost nothing.
    """
    setup, skip, count = _setup(arguments), arguments["skip"], arguments["batches"]
    with _opened(name, setup) as (batches, _, start):
        _check(next(batches), setup)
        first = time.perf_counter() - start
        for _ in range(skip - 1):
            next(batches)
        begin = time.perf_counter()
        for _ in range(count):
            _check(next(batches), setup)
        seconds = time.perf_counter() - begin
    return {"first_s": first, "images_per_s": count * setup.batch / seconds}


def stop(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Read some batches, take the state, and tell which batch follows."""
    with _opened(name, _setup(arguments)) as (batches, loader, _):
        for _ in range(arguments["batches"]):
            next(batches)
        state = loader.state()
        return {"state": state, **_print_of(next(batches))}


def resume(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Open at a state: which batch comes first, and after how many seconds."""
    with _opened(name, _setup(arguments)) as (batches, _, start):
        batch = next(batches)
        seconds = time.perf_counter() - start
        return {"first_s": seconds, **_print_of(batch)}


TASKS = {task.__name__: task for task in (prepare, stream, stop, resume)}


def _setup(arguments: dict[str, Any]) -> Setup:
    setup = dict(arguments["setup"])
    return Setup(**{**setup, "data": Path(setup["data"])})


def _module(name: str) -> Any:
    return importlib.import_module(f"tests.benchmarks.peers.{name}")


@contextmanager
def _opened(name: str, setup: Setup) -> Iterator[tuple[Iterator[Batch], Loader, float]]:
    """Batches of a loader, itself, and when its making began.

    Imports, and machinery that serves many loaders, are before that.
    """
    module = _module(name)
    with getattr(module, "machinery", nullcontext)(setup):
        start = time.perf_counter()
        with closing(module.Loader(setup)) as loader, closing(iter(loader)) as batches:
            yield batches, loader, start


def _check(batch: Batch, setup: Setup) -> None:
    """Nobody is measured who does less than was asked."""
    pixels, labels = batch
    assert pixels.dtype == torch.uint8, pixels.dtype
    assert pixels.shape == (setup.batch, setup.size, setup.size, 3), pixels.shape
    assert labels.shape == (setup.batch,), labels.shape


def _print_of(batch: Batch) -> dict[str, Any]:
    pixels, labels = batch
    return {"labels": labels.tolist(), "pixels": zlib.crc32(pixels.contiguous().numpy())}


def main() -> None:
    """Do one task and print its answer."""
    name, task, arguments = sys.argv[1:]
    torch.set_num_threads(1)  # a loader's parallelism is its workers
    answer = TASKS[task](name, json.loads(arguments))
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
