"""Walks through tars: every entry before a damage is told, then the damage, and nothing else."""

import io
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.archives.tars import (
    BLOCK,
    DIRECTORY,
    LOST_RECORD,
    MAX_HEADER_BYTES,
    PROBLEM_RECORD,
    Damage,
    TarEntry,
    Window,
    walk,
)
from tests.raw_archives import tar_bytes

FILES = {f"n01_{n}.JPEG": bytes([n]) * (300 * n + 1) for n in range(6)}


def steps(
    content: bytes, *, start: int = 0, size: int | None = None, ahead: int = 1 << 20
) -> list[TarEntry | Damage]:
    file = pa.BufferReader(content)
    window = Window(file, start, len(content) - start if size is None else size, ahead=ahead)
    return list(walk(window, start))


def entries(content: bytes, **where: int) -> list[TarEntry]:
    return [step for step in steps(content, **where) if isinstance(step, TarEntry)]


def damage(content: bytes, **where: int) -> Damage:
    *before, last = steps(content, **where)
    assert isinstance(last, Damage)
    assert not any(isinstance(step, Damage) for step in before)
    return last


def found(content: bytes, **where: int) -> dict[str, bytes]:
    return {e.name: content[e.offset : e.offset + e.size] for e in entries(content, **where)}


def typed(name: str, kind: bytes, *, size: int = 0, link: str = "") -> bytes:
    """A lone header of any type."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("ahead", [BLOCK, 4096, 1 << 20])
def test_offsets_lead_to_the_bytes_of_every_member(form: int, ahead: int) -> None:
    content = tar_bytes(FILES, form=form)
    assert found(content, ahead=ahead) == FILES
    assert not [step for step in steps(content) if isinstance(step, Damage)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_not_utf_8_come_whole(form: int) -> None:
    files = {"d/" + "x" * 300 + ".jpg": b"1", "n01_\udcff.jpg": b"2", "ü" * 90 + ".jpg": b"3"}
    assert found(tar_bytes(files, form=form)) == files


def test_a_tar_is_walked_where_it_lies_in_another() -> None:
    inner = tar_bytes(FILES)
    outer = tar_bytes({"n00.tar": b"x" * 700, "n01.tar": inner, "n02.tar": inner})
    (_, second, third) = entries(outer, ahead=BLOCK)
    for entry in (second, third):
        assert found(outer, start=entry.offset, size=entry.size) == FILES


def test_a_pax_header_may_tell_a_size_above_8_gib() -> None:
    size = 9 << 30
    info = tarfile.TarInfo("n01_0.JPEG")
    info.size = size
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        head = info.tobuf(form)
        stop = damage(head + b"x" * 100, size=size + len(head))
        assert stop.entry is not None
        assert (stop.entry.size, stop.entry.offset) == (size, len(head))
        assert stop.lost == size + len(head)


def test_kinds_that_are_no_plain_files_are_told_with_reasons() -> None:
    content = b"".join(
        [
            typed("sub", tarfile.DIRTYPE),
            typed("a.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
            typed("b.jpg", tarfile.LNKTYPE, link="a.jpg", size=700),
            typed("c.jpg", tarfile.FIFOTYPE),
            typed("d.jpg", tarfile.CHRTYPE),
            typed("/etc/e.jpg", tarfile.REGTYPE),
            typed("x/../../f.jpg", tarfile.REGTYPE),
            typed("g.jpg", b"Z"),
            typed("h/", tarfile.AREGTYPE),
            typed("fine..jpg", tarfile.REGTYPE),
            bytes(2 * BLOCK),
        ]
    )
    assert [(entry.name, entry.problem) for entry in entries(content)] == [
        ("sub", DIRECTORY),
        ("a.jpg", "is a link"),
        ("b.jpg", "is a link"),
        ("c.jpg", "is not a plain file"),
        ("d.jpg", "is not a plain file"),
        ("/etc/e.jpg", "has an absolute path as its name"),
        ("x/../../f.jpg", "has a name that leads outside, with '..'"),
        ("g.jpg", "is not a plain file"),
        ("h", DIRECTORY),
        ("fine..jpg", None),
    ]


def test_sparse_files_of_both_kinds_are_told_and_skipped() -> None:
    old = bytearray(typed("s.jpg", tarfile.GNUTYPE_SPARSE, size=BLOCK))
    old[482] = 1  # another block of the map follows
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + sum(old[156:]) + 8 * 32)
    pax = tar_bytes({"p.jpg": b"data"}, form=tarfile.PAX_FORMAT, pax={"GNU.sparse.major": "1"})
    content = bytes(old) + bytes(BLOCK) + b"d" * BLOCK + pax
    assert [(entry.name, entry.problem) for entry in entries(content)] == [
        ("s.jpg", "is a sparse file"),
        ("p.jpg", "is a sparse file"),
    ]


def test_a_note_of_the_spool_is_a_problem() -> None:
    pax = {PROBLEM_RECORD: "is cut off", LOST_RECORD: "77"}
    (entry,) = entries(tar_bytes({"n01": b""}, form=tarfile.PAX_FORMAT, pax=pax))
    assert (entry.problem, entry.lost) == ("is cut off", 77)


def test_global_pax_headers_change_no_member() -> None:
    head = tarfile.TarInfo.create_pax_global_header({"path": "evil", "comment": "x"})
    assert found(head + tar_bytes(FILES)) == FILES


def test_members_of_one_name_are_told_twice() -> None:
    content = tar_bytes([("a.jpg", b"1"), ("a.jpg", b"22")])
    assert [entry.size for entry in entries(content)] == [1, 2]


def test_an_empty_tar_has_no_members() -> None:
    assert steps(tar_bytes({})) == []
    assert steps(bytes(BLOCK)) == []


@pytest.mark.parametrize("kept", [0, 100, 700, 1024, 3000])
def test_a_truncated_tar_is_told_up_to_the_cut(kept: int) -> None:
    content = tar_bytes(FILES)
    stop = damage(content[:kept], size=len(content))
    assert stop.problem == f"is cut off: it ends at byte {kept}; what followed is lost"
    assert stop.lost == len(content) - stop.position
    whole = [e for e in entries(content) if e.offset + e.size <= kept]
    assert entries(content[:kept], size=len(content))[: len(whole)] == whole


def test_a_tar_without_its_end_blocks_is_cut_off() -> None:
    content = tar_bytes(FILES)
    last = entries(content)[-1]
    end = last.offset + last.size + -last.size % BLOCK
    stop = damage(content[:end])
    assert stop.problem == f"is cut off: it ends at byte {end}; what followed is lost"
    assert len(entries(content[:end])) == len(FILES)


def test_a_member_that_is_cut_off_is_named_by_the_damage() -> None:
    content = tar_bytes(FILES)
    third = entries(content)[3]
    stop = damage(content[: third.offset + 10])
    assert stop.entry == third
    assert stop.position == third.offset - BLOCK


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_damaged_header_is_told_with_its_byte(number: int) -> None:
    content = bytearray(tar_bytes(FILES))
    header = entries(bytes(content))[number].offset - BLOCK
    content[header : header + 200] = b"\xff" * 200
    stop = damage(bytes(content))
    assert stop.problem == (
        f"is damaged: no tar header at byte {header} of {len(content)}; what follows is lost"
    )
    assert stop.lost == len(content) - header
    assert list(found(bytes(content))) == list(FILES)[:number]


def test_joined_tars_and_garbage_behind_the_end_are_told() -> None:
    content = tar_bytes(FILES)
    for more in (content, b"garbage"):
        stop = damage(content + more)
        assert stop.problem.startswith("goes on after its end-of-archive blocks at byte ")
        assert stop.problem.endswith("what follows is lost: pack it again as one tar")
        assert found(content + more) == FILES
        assert stop.lost == len(content + more) - stop.position


def test_a_header_of_negative_size_does_not_go_round_in_circles() -> None:
    head = typed("n01_1.JPEG", tarfile.REGTYPE, size=-1024)
    stop = damage(tar_bytes({})[:0] + tar_bytes(FILES)[:1024] + head + tar_bytes(FILES))
    assert "is damaged: a negative size at byte 1024 of" in stop.problem


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"99 path=x\n", "a damaged PAX header"),
        (b"7 path=x\n", "a damaged PAX header"),
        (b"path=x\n", "a PAX record without its number"),
        (b"11 size=77\n", "two sizes for one member"),
        (b"14 size=-9999\n", "a PAX record without its number"),
    ],
)
def test_pax_headers_that_make_no_sense_end_the_walk(record: bytes, why: str) -> None:
    head = typed("x", b"x", size=len(record)) + record + bytes(-len(record) % BLOCK)
    content = head + tar_bytes({"a.jpg": b"1"})
    assert damage(content).problem.startswith(f"is damaged: {why} at byte 0 of")


def test_a_long_name_of_gigabytes_is_not_read() -> None:
    head = typed("././@LongLink", b"L", size=3 << 30)
    stop = damage(head + bytes(2 * BLOCK), size=4 << 30)
    assert f"a header of {3 << 30} bytes" in stop.problem
    assert MAX_HEADER_BYTES < 3 << 30


def test_an_extended_header_without_its_member_is_damage() -> None:
    record = b"10 path=x\n"
    head = typed("x", b"x", size=len(record)) + record + bytes(BLOCK - len(record))
    assert damage(head + bytes(2 * BLOCK)).problem.startswith("is damaged: no tar header at byte 0")
    assert damage(head).problem.startswith("is cut off")


def test_checksums_of_old_tars_with_signed_bytes_are_understood() -> None:
    block = bytearray(typed("ü.jpg", tarfile.REGTYPE))
    signed = sum(struct.unpack("<512b", block)) - sum(block[148:156]) + 8 * 32
    block[148:156] = b"%06o\0 " % signed
    assert [e.name for e in entries(bytes(block) + bytes(2 * BLOCK))] == ["ü.jpg"]


def test_a_file_is_read_in_large_pieces(tmp_path: Path) -> None:
    """An object store answers each read with a request of its own."""
    reads = []

    class Counted(io.BytesIO):
        def size(self) -> int:
            return len(self.getvalue())

        def read_at(self, size: int, offset: int) -> bytes:
            reads.append(size)
            return self.getvalue()[offset : offset + size]

    content = tar_bytes({f"{n}.jpg": bytes(900) for n in range(500)})
    window = Window(Counted(content), 0, len(content))
    for entry in walk(window, 0):
        assert isinstance(entry, TarEntry)
        assert len(window.read(entry.offset, entry.size)) == 900
    assert len(reads) <= 4


members = st.dictionaries(
    st.from_regex(r"n01_[0-9]{1,3}(x{80,120})?\.JPEG", fullmatch=True),
    st.binary(max_size=1500),
    max_size=5,
)
forms = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(deadline=None, max_examples=100)
@given(files=members, form=forms, data=st.data())
def test_any_truncation_is_told_and_loses_nothing_before_it(
    files: Mapping[str, bytes], form: int, data: st.DataObject
) -> None:
    content = tar_bytes(files, form=form)
    kept = data.draw(st.integers(0, len(content)))
    cut = content[:kept]
    whole = entries(content)
    end = next((at for at in range(0, len(content), BLOCK) if not any(content[at:])), 0)

    assert entries(cut) == [e for e in whole if e.offset + e.size <= kept]
    damaged = any(isinstance(step, Damage) for step in steps(cut))
    assert damaged == (kept < end + BLOCK)


@settings(deadline=None, max_examples=150)
@given(files=members, form=forms, data=st.data())
def test_any_changed_byte_invents_no_member_and_loses_none_before_it(
    files: Mapping[str, bytes], form: int, data: st.DataObject
) -> None:
    content = tar_bytes(files, form=form)
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= data.draw(st.integers(1, 255))
    whole, got = entries(content), steps(bytes(changed))

    told = [(step.offset, step.size) for step in got if isinstance(step, TarEntry)]
    assert told == [(e.offset, e.size) for e in whole][: len(told)]
    before = [e for e in whole if e.offset + e.size <= at]
    assert len(told) >= len(before)
    assert len(told) == len(whole) or isinstance(got[-1], Damage)


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=3000), start=st.integers(0, 3000))
def test_any_bytes_at_all_give_an_answer(content: bytes, start: int) -> None:
    for step in steps(content, start=min(start, len(content))):
        assert isinstance(step, TarEntry | Damage)
