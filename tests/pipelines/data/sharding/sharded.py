"""What the tests of sharding share: places, and what a dataset folder holds."""

import tarfile
from pathlib import Path

import webdataset

from pipelines.data.manifest import read_index
from pipelines.data.sharding.shards import ShardingReport
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Source
from pipelines.storage import Place


def place(path: Path) -> Place:
    return Place(str(path))


def source(path: Path) -> Source:
    return find_source(place(path))


def folder(report: ShardingReport) -> Path:
    assert report.folder.local
    return report.folder.local


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def members(archive: Path) -> dict[str, bytes]:
    """Key to bytes of every image of an archive."""
    found = {}
    for path in archive.glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file
                found[info.name.removesuffix(".JPEG")] = file.read()
    return found


def samples(report: ShardingReport) -> list[dict[str, bytes]]:
    urls = [str(folder(report) / shard.name) for shard in report.manifest.shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def keys(report: ShardingReport) -> list[str]:
    found: list[str] = read_index(report.folder)["key"].to_pylist()
    return found
