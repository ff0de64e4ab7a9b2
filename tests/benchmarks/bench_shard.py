"""How fast shards are written, against webdataset's own writer, and on two Ray workers.

    python -m tests.benchmarks.bench_shard

One core first: tars of small photographs into one shard, by `webdataset.ShardWriter` as its users
loop over tars, and by the task that `mone shard` runs, which also looks up offsets, drops repeated
keys, hashes, writes index rows, flushes to disk and renames. Decoding is no part of either. Small
images are the hard case: headers, names and index rows cost the same for 2 kB as for 100 kB. Takes
`../shared/data/tiny-imagenet-synset-tars/train`, or makes tars of its own.

Then a whole `mone shard` from archive to manifest, decoding every image, on one and two Ray
workers: tars of photographs, some hundred MB, since Ray Data takes a second or two to begin a pass,
which an archive worth two machines does not see. Ray runs already and has done it twice.
"""

import io
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from cluster.session import ray_session
from pipelines.data.sharding.pack import PackJob, write_shard
from pipelines.data.sharding.plan import BINS, Part, ShardJob, ShardRange
from pipelines.data.sharding.scanned import Scanned, scan_file, scan_unit
from pipelines.data.sharding.shards import write_shards
from pipelines.data.sharding.versions import unit_digests
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Source
from pipelines.storage import Place
from tests.benchmarks.harness import BenchRow, Case, Setting, compare, interleave, main, row_of
from tests.benchmarks.peers.images import photographs

REAL = Path(__file__).parents[2] / "../shared/data/tiny-imagenet-synset-tars/train"
CLASSES, IMAGES, SIDE = 50, 150, 64
TARS, PHOTOGRAPHS = 40, 150  # in each


def measure(setting: Setting) -> list[BenchRow]:
    """All rows, one group per baseline."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        archive = (
            REAL.resolve() if REAL.is_dir() else in_tars(folder / "raw", CLASSES, IMAGES, small)
        )
        source = find_source(Place(str(archive)), "imagenet21k")
        rows = compare_writers(source, folder, setting)
        return rows + compare_workers(folder, replace(setting, quick=True))


def compare_writers(source: Source, folder: Path, setting: Setting) -> list[BenchRow]:
    """One shard of everything on one core, from tars that were scanned before."""
    pack = packing(source, folder / "ours")
    samples = sum(scan_unit(pack.job, unit).counts[0].samples for unit in range(len(source.units)))

    def theirs() -> None:
        out = fresh(folder / "theirs")
        with webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=10**6, mtime=0, verbose=0) as sink:
            for sample in loose(source):
                sink.write(sample)

    def ours() -> None:
        fresh(folder / "ours")
        write_shard(pack, ShardRange(number=0, part=0, first=0, last=BINS))

    shape = f"{samples} JPEGs of {SIDE}px"
    baseline = Case(case="shard/write", shape=f"{shape} webdataset.ShardWriter", run=theirs)
    return compare(baseline, [Case(case="shard/write", shape=f"{shape} ours", run=ours)], setting)


def compare_workers(folder: Path, setting: Setting) -> list[BenchRow]:
    """From archive to manifest on one Ray worker and on two; every image is decoded."""
    images, what = photographs()
    raw = folder / "photographs"
    archive = in_tars(raw, TARS, PHOTOGRAPHS, lambda number: images[number % len(images)])
    source = find_source(Place(str(archive)), "imagenet21k")
    shape = f"{TARS * PHOTOGRAPHS} of {what}"
    times = {}
    for cpus in (1, 2):
        with ray_session(num_cpus=cpus):

            def whole() -> None:
                out = fresh(folder / "whole")
                write_shards(source, Place(str(out)), samples_per_shard=500)

            runs = interleave({"": whole}, setting.rounds, lambda: None, time.perf_counter)
            times[cpus] = runs[""]
    cases = {
        cpus: Case(case="shard/archive", shape=f"{shape}, {cpus} workers", run=lambda: None)
        for cpus in times
    }
    name = f"{cases[1].case} {cases[1].shape}"
    return [
        row_of(case, "eager", times[cpus], name, times[1], setting) for cpus, case in cases.items()
    ]


def packing(source: Source, out: Path) -> PackJob:
    """A job of all units of a source, whose scans lie beside the output."""
    job = ShardJob(
        source=source,
        units=unit_digests(source),
        parts=(Part(name="all", out=Place(str(out))),),
        scratch=Place(f"{out}-scan"),
        classes=tuple(sorted(unit.class_name or "" for unit in source.units)),
        seed=0,
    )
    files = [
        Scanned(name=scan_file(job, unit).name, unit=unit) for unit in range(len(source.units))
    ]
    return PackJob(job=job, files=tuple(files), known=((),), versions=(1,))


def loose(source: Source) -> Iterator[dict[str, object]]:
    """The samples as the loop of a user of webdataset has them."""
    for label, unit in enumerate(source.units):
        with tarfile.open(f"{source.archive}/{unit.path}") as tar:
            for info in tar:
                file = tar.extractfile(info)
                if file is not None:
                    yield {
                        "__key__": info.name.rpartition(".")[0],
                        "jpg": file.read(),
                        "cls": label,
                        "json": {"class": unit.class_name, "member": f"{unit.name}/{info.name}"},
                    }


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def small(number: int) -> bytes:
    """A small picture, for where there are no real ones."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE)).save(file, "JPEG")
    return file.getvalue()


def in_tars(folder: Path, tars: int, each: int, image: Callable[[int], bytes]) -> Path:
    """A folder of synset tars with so many images each, which are numbered throughout."""
    folder.mkdir()
    for c in range(tars):
        wnid = f"n{c:08d}"
        with tarfile.open(folder / f"{wnid}.tar", "w") as tar:
            for n in range(each):
                data = image(c * each + n)
                info = tarfile.TarInfo(f"{wnid}_{n}.JPEG")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


if __name__ == "__main__":
    main("shard", measure)
