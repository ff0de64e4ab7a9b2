"""Small files: whole or not at all, and checked on the way in."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.errors import RunError
from pipelines.files import read_json, write_atomically, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something to keep."""

    name: str
    sizes: tuple[int, ...]
    where: Path = Path("here")


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "note"
    path.write_bytes(b"old and longer")

    write_atomically(path, b"new")

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "note"
    path.write_bytes(b"old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    path, seen = tmp_path / "note", []
    flush = os.fsync

    def watched(descriptor):
        flush(descriptor)
        seen.append((path.exists(), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(path, b"new")

    assert seen == [(False, 3)]


def test_a_dataclass_survives_json(tmp_path):
    note = Note(name="ä", sizes=(1, 2), where=Path("a b/c"))

    write_json(tmp_path / "note.json", note)

    assert read_json(tmp_path / "note.json", Note, otherwise=RunError) == note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "a"}', r"note\.json cannot be read: sizes: .*required"),
        ('{"name": "a", "sizes": ["1"]}', r"note\.json cannot be read: sizes\.0: .*valid integer"),
        ('{"name": "a", "si', r"note\.json cannot be read: the file: Invalid JSON"),
        ("", r"note\.json cannot be read: the file: Invalid JSON"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_field_and_reason(tmp_path, text, message):
    (tmp_path / "note.json").write_text(text)

    with pytest.raises(RunError, match=message):
        read_json(tmp_path / "note.json", Note, otherwise=RunError)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=rf"^{tmp_path}/note\.json does not exist$"):
        read_json(tmp_path / "note.json", Note, otherwise=RunError)
