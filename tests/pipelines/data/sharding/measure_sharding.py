"""How much memory sharding takes: a made-up archive of a size of choice, and peaks by process.

    python -m tests.pipelines.data.sharding.measure_sharding --mib 2048 [--gz]

Makes synset tars of 500x375 JPEGs of about 100 kB in one outer tar, plain or compressed, shards it
on two Ray workers, and prints the peak resident memory of the driver and of the largest worker.
"""

import argparse
import io
import os
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cluster.session import ray_session
from pipelines.data.sharding.shards import write_parts
from pipelines.data.sources import find_source
from pipelines.data.verify import verify
from pipelines.storage import Place

PER_TAR = 200
DISTINCT = 20


def main() -> None:
    """Make the archive, shard it, print the peaks."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.pipelines.data.sharding.measure_sharding"
    )
    parser.add_argument("--mib", type=int, default=2048, help="size of the archive (default 2048)")
    parser.add_argument("--gz", action="store_true", help="compress it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        archive = made_up(Path(scratch), args.mib * 2**20, compressed=args.gz)
        out = Place(f"{scratch}/out")
        with ray_session(num_cpus=2), Peak() as workers:
            before, began = _own_peak_mib(), time.monotonic()
            (report,) = write_parts(find_source(Place(str(archive))), out)
            seconds = time.monotonic() - began
        assert verify(report.folder) == []
        print(
            f"{archive.stat().st_size / 2**20:.0f} MiB, {report.samples} samples in "
            f"{len(report.manifest.shards)} shards, {seconds:.0f} s; peak of the driver "
            f"{_own_peak_mib():.0f} MiB ({before:.0f} before), of the largest worker "
            f"{workers.mib:.0f} MiB"
        )


def made_up(folder: Path, size: int, *, compressed: bool) -> Path:
    """An outer tar of synset tars; the same few pictures under ever new names."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(DISTINCT):
        file = io.BytesIO()
        coarse = rng.integers(0, 256, (188, 250, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    path = folder / ("whole.tar.gz" if compressed else "whole.tar")
    with tarfile.open(path, "w:gz" if compressed else "w", **_fast(compressed)) as outer:
        written = number = 0
        while written < size:
            inner = io.BytesIO()
            wnid = f"n{number:08d}"
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for n in range(PER_TAR):
                    _add(tar, f"{wnid}_{n}.JPEG", pictures[n % DISTINCT])
            _add(outer, f"{wnid}.tar", inner.getvalue())
            written += inner.tell()
            number += 1
    return path


def _fast(compressed: bool) -> dict[str, int]:
    return {"compresslevel": 1} if compressed else {}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _own_peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Peak:
    """The largest peak of memory of any Ray worker while the block runs."""

    mib = 0.0

    def __enter__(self) -> "Peak":
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            told = dict(_processes())
            for process in told:
                if told[process]["Name"].startswith("ray::") and _is_ours(process, told):
                    peak = told[process].get("VmHWM", "0 kB")
                    self.mib = max(self.mib, int(peak.split()[0]) / 1024)


def _processes() -> Iterator[tuple[str, dict[str, str]]]:
    """What the kernel says of every process, by number."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = [line.split(":", 1) for line in status.read_text().splitlines()]
        except OSError:
            continue  # it ended meanwhile
        yield status.parent.name, {name: value.strip() for name, value in lines}


def _is_ours(process: str, told: dict[str, dict[str, str]]) -> bool:
    """Whether this process, or one that it started, started it: others may run Ray as well."""
    while process in told and process != str(os.getpid()):
        process = told[process]["PPid"]
    return process == str(os.getpid())


if __name__ == "__main__":
    main()
