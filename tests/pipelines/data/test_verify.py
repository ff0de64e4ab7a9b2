"""Any change to a dataset is found and named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.manifest import read_index, write_index
from pipelines.data.verify import verify
from pipelines.errors import DatasetError


@pytest.fixture
def dataset(make_dataset: Callable[..., Path], jpeg: Callable[[int], bytes]) -> Path:
    """Twelve samples in shards of five."""
    return make_dataset([jpeg(n) for n in range(12)])


def test_a_whole_dataset_has_no_problems(dataset: Path) -> None:
    assert verify(dataset) == []


@pytest.mark.parametrize("byte", [0, 700, -1])
def test_a_flipped_byte_is_found(dataset: Path, byte: int) -> None:
    path = dataset / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    assert verify(dataset) == ["shard-000001.tar was changed: its sha256 differs"]


def test_missing_and_shortened_shards_are_all_named(dataset: Path) -> None:
    (dataset / "shard-000000.tar").unlink()
    path = dataset / "shard-000002.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    assert verify(dataset) == [
        "shard-000000.tar is missing",
        f"shard-000002.tar has {size - 512} bytes, manifest.json says {size}",
    ]


def test_rows_that_the_index_lacks_or_has_too_many_are_counted(dataset: Path) -> None:
    index = read_index(dataset)
    write_index(dataset, index.slice(0, 9))
    assert verify(dataset) == [
        "index.parquet has 4 rows for shard-000001.tar, manifest.json says 5",
        "index.parquet has 0 rows for shard-000002.tar, manifest.json says 2",
        "index.parquet has 9 rows, manifest.json says 12",
    ]


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_an_index_that_cannot_be_read_is_a_problem(dataset: Path, content: bytes | None) -> None:
    if content is None:
        (dataset / "index.parquet").unlink()
    else:
        (dataset / "index.parquet").write_bytes(content)
    (problem,) = verify(dataset)
    assert problem.startswith("index.parquet cannot be read: ")


def test_a_folder_without_manifest_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a finished dataset"):
        verify(tmp_path)
