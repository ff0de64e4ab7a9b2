"""What tells archives apart, without Ray."""

from collections.abc import Callable
from pathlib import Path

from pipelines.data.sharding.versions import unit_digests
from tests.pipelines.data.sharding.sharded import source


def test_a_link_in_a_circle_below_a_class_ends_where_a_scan_does(
    tmp_path: Path, jpeg: Callable[[int], bytes]
) -> None:
    for n, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(n))
    raw = source(tmp_path)
    before = unit_digests(raw)
    (tmp_path / "dog/again").symlink_to(".")
    after = unit_digests(raw)
    assert after[0] == before[0]
    assert after[1] != before[1]
