"""A dataset folder against its manifest: every byte of every shard, every row of the index.

Finds change; it does not mend it. Writing is `shards`' work.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    ShardRecord,
    read_index,
    read_manifest,
)
from pipelines.errors import DatasetError


def verify(folder: Path) -> list[str]:
    """Compare shards and index with the manifest: counts, sizes, hashes.

    Returns:
        One sentence per problem; empty if the dataset is whole.

    Raises:
        DatasetError: There is no manifest to compare with, or it cannot be read.
    """
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(partial(_shard_problem, folder), manifest.shards)
        problems = [problem for problem in found if problem]
    return problems + _index_problems(folder, manifest)


def _shard_problem(folder: Path, shard: ShardRecord) -> str | None:
    path = folder / shard.name
    if not path.is_file():
        return f"{shard.name} is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"{shard.name} has {size} bytes, {MANIFEST} says {shard.bytes}"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return None if sha256 == shard.sha256 else f"{shard.name} was changed: its sha256 differs"


def _index_problems(folder: Path, manifest: Manifest) -> list[str]:
    """As many rows per shard as samples, and no row of a shard that is not there."""
    try:
        index = read_index(folder)
    except (DatasetError, OSError, pa.ArrowException) as error:
        return [f"{INDEX} cannot be read: {error}"]
    numbers, counts = pc.value_counts(index["shard"]).flatten()
    rows = dict(zip(numbers.to_pylist(), counts.to_pylist(), strict=True))
    problems = [
        f"{INDEX} has {rows.get(number, 0)} rows for {shard.name}, {MANIFEST} says {shard.samples}"
        for number, shard in enumerate(manifest.shards)
        if rows.get(number, 0) != shard.samples
    ]
    if index.num_rows != manifest.samples:
        problems.append(f"{INDEX} has {index.num_rows} rows, {MANIFEST} says {manifest.samples}")
    return problems
