"""A small dataset that the tests of sharding share, made once per file."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.sharding.shards import ShardingReport, write_shards
from tests.pipelines.data.sharding.sharded import folder, place, source


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, make_archive: Callable[..., Path]) -> Path:
    """Three classes of twenty images; no test changes it."""
    return make_archive(tmp_path_factory.mktemp("raw") / "archive")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, archive: Path, ray_session: None
) -> ShardingReport:
    """Its sixty images in shards of up to 25; no test changes it."""
    out = tmp_path_factory.mktemp("made") / "out"
    return write_shards(source(archive), place(out), samples_per_shard=25)


@pytest.fixture
def dataset(tmp_path: Path, made: ShardingReport) -> Path:
    """A copy of `made` that a test may change."""
    return Path(shutil.copytree(folder(made), tmp_path / "dataset"))
