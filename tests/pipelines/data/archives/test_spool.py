"""Spooling: a compressed archive becomes the same segments whatever happens on the way."""

import gzip
import hashlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.archives.inflate import Inflated
from pipelines.data.archives.scan import scan
from pipelines.data.archives.spool import spool
from pipelines.data.sources import find_source
from pipelines.data.sources.base import Listed, Member, Source, Stream
from pipelines.errors import ArchiveError
from pipelines.storage import Place, StorageError
from tests.raw_archives import jpeg, jpegs, tar_bytes, write_tar

ROOT = Path(__file__).parents[4]
WNIDS = ("n01440764", "n01443537", "n02119789")


def images(wnid: str, count: int = 4) -> dict[str, bytes]:
    """Images that no other class has, so that gzip finds little to save."""
    return jpegs(wnid, count, first=1000 * WNIDS.index(wnid))


def classes(count: int = 4) -> dict[str, bytes]:
    return {f"{wnid}.tar": tar_bytes(images(wnid, count)) for wnid in WNIDS}


def packed(path: Path, members: dict[str, bytes] | None = None) -> Source:
    write_tar(path, classes() if members is None else members)
    return find_source(Place(str(path)))


def spooled(source: Source, to: Path, segment_bytes: int = 5000) -> Source:
    return spool(source, Place(str(to)), segment_bytes=segment_bytes)


def members(source: Source) -> list[Member]:
    return [member for unit in source.units for member in scan(source, unit)]


def ends(packed: bytes) -> list[int]:
    """Where the data of every member of every inner tar end, in decompressed bytes."""
    content = gzip.decompress(packed)
    found = []
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        for inner in outer:
            file = outer.extractfile(inner)
            assert file is not None
            with tarfile.open(fileobj=file) as tar:
                found += [inner.offset_data + each.offset_data + each.size for each in tar]
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_segments_hold_every_member_with_its_bytes(tmp_path: Path) -> None:
    source = spooled(packed(tmp_path / "winter21.tar.gz"), tmp_path / "spool")
    assert source.stream is None
    assert source.archive == Place(str(tmp_path / "spool"))
    assert len(source.units) > 2
    found = members(source)
    assert [member.problem for member in found] == [None] * 12
    for member in found:
        data = (tmp_path / "spool" / member.path).read_bytes()
        wnid = member.class_name or ""
        assert (
            data[member.offset : member.offset + member.size] == images(wnid)[f"{member.key}.JPEG"]
        )
    assert found[0].name == "winter21.tar.gz/n01440764/n01440764_0.JPEG"


def test_keys_are_those_of_the_plain_archive(tmp_path: Path) -> None:
    inner = jpegs("n01", 2) | {"n01/n01_5.JPEG": jpeg(), "a.b.JPEG": jpeg(), "sub/7.JPEG": jpeg()}
    files = {"n01.tar": tar_bytes(inner)}
    plain = find_source(Place(str(write_tar(tmp_path / "plain.tar", files))))
    source = spooled(packed(tmp_path / "packed.tar.gz", files), tmp_path / "spool")
    assert [m.key for m in members(source)] == [m.key for m in members(plain)]


def test_segments_are_plain_tars_of_about_the_wanted_size(tmp_path: Path) -> None:
    source = spooled(packed(tmp_path / "winter21.tar.gz"), tmp_path / "spool")
    names = []
    for unit in source.units:
        path = tmp_path / "spool" / unit.path
        assert path.stat().st_size == unit.size
        assert unit.size < 5000 + 4096
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(names) == 12


def test_a_second_run_reads_nothing(tmp_path: Path) -> None:
    source = packed(tmp_path / "winter21.tar.gz")
    first = spooled(source, tmp_path / "spool")
    before = hashes(tmp_path / "spool")
    told: list[tuple[str, int, int]] = []
    to = Place(str(tmp_path / "spool"))
    again = spool(source, to, progress=lambda *what: told.append(what), segment_bytes=5000)
    assert again == first
    assert told == []
    assert hashes(tmp_path / "spool") == before


def test_an_archive_that_was_mended_is_read_again(tmp_path: Path) -> None:
    source = packed(tmp_path / "a.tar.gz")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[:4000] + bytes(50) + whole[4050:])
    assert any(member.problem for member in members(spooled(source, tmp_path / "spool")))
    (tmp_path / "a.tar.gz").write_bytes(whole)
    found = members(spooled(source, tmp_path / "spool"))
    assert [member.problem for member in found] == [None] * 12


def test_the_same_archive_gives_the_same_bytes_from_any_number_of_finished_segments(
    tmp_path: Path,
) -> None:
    source = packed(tmp_path / "winter21.tar.gz")
    spooled(source, tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    segments = [name for name in expected if name.startswith("segment")]
    for kept in range(len(segments) + 1):
        to = tmp_path / f"kept-{kept}"
        shutil.copytree(tmp_path / "whole", to)
        state = (to / "spool.json").read_text()
        at = state.index('"sizes"')
        (to / "spool.json").write_text(state[:at] + '"sizes": null}')
        for name in segments[kept:]:
            (to / name).unlink()
        (to / ".segment-000009.tar.tmp").write_bytes(b"half")
        times = {name: (to / name).stat().st_mtime_ns for name in segments[:kept]}
        spooled(source, to)
        (to / ".segment-000009.tar.tmp").unlink()
        assert hashes(to) == expected
        assert times == {name: (to / name).stat().st_mtime_ns for name in times}


def test_a_run_killed_at_any_moment_ends_with_the_same_segments(tmp_path: Path) -> None:
    write_tar(tmp_path / "winter21.tar.gz", classes(400))
    spooled(find_source(Place(str(tmp_path / "winter21.tar.gz"))), tmp_path / "whole", 50_000)
    expected = hashes(tmp_path / "whole")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipelines.data.sources import find_source
from pipelines.data.archives.spool import spool
from pipelines.storage import Place
source = find_source(Place({str(tmp_path / "winter21.tar.gz")!r}))
print("ready", flush=True)
spool(source, Place({str(tmp_path / "spool")!r}), segment_bytes=50_000)
print("done", flush=True)
"""
    for delay in (0.0, 0.03, 0.1):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    source = find_source(Place(str(tmp_path / "winter21.tar.gz")))
    spooled(source, tmp_path / "spool", 50_000)
    assert hashes(tmp_path / "spool") == expected


def test_what_another_archive_left_is_removed(tmp_path: Path) -> None:
    spooled(packed(tmp_path / "a.tar.gz"), tmp_path / "spool")
    source = packed(tmp_path / "b.tar.gz", {"n09.tar": tar_bytes(jpegs("n09", 1))})
    assert [member.key for member in members(spooled(source, tmp_path / "spool"))] == ["n09_0"]
    assert len(hashes(tmp_path / "spool")) == 2


@pytest.mark.parametrize(
    "left",
    [
        (".spool.json.4711.tmp",),
        ("segment-000001.tar",),
        (".spool.json.4711.tmp", ".segment-000001.tar.tmp", "segment-000000.tar"),
    ],
)
def test_what_a_run_left_that_was_killed_at_its_first_or_last_file_is_cleared(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    source = packed(tmp_path / "a.tar.gz")
    spooled(source, tmp_path / "whole")
    (tmp_path / "spool").mkdir()
    for name in left:
        (tmp_path / "spool" / name).write_bytes(b"of another archive")
    spooled(source, tmp_path / "spool")
    assert hashes(tmp_path / "spool") == hashes(tmp_path / "whole")


def test_a_disk_that_fills_up_is_told_once(tmp_path: Path) -> None:
    source = packed(tmp_path / "a.tar.gz", {"n01.tar": tar_bytes(jpegs("n01", 30))})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="spool cannot be read or written: File too large"):
            spooled(source, tmp_path / "spool", 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(members(spooled(source, tmp_path / "spool", 1 << 20))) == 30


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(
        ArchiveError, match=r"mine holds files that are no part .*first thesis.txt\)"
    ):
        spooled(packed(tmp_path / "a.tar.gz"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_changed_segment_or_state_is_refused(tmp_path: Path) -> None:
    source = packed(tmp_path / "a.tar.gz")
    spooled(source, tmp_path / "spool")
    state = tmp_path / "spool" / "spool.json"
    at = state.read_text().index('"sizes"')
    state.write_text(state.read_text()[:at] + '"sizes": null}')
    with (tmp_path / "spool" / "segment-000001.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArchiveError, match=r"segment-000001\.tar has \d+ bytes where \d+ were wr"):
        spooled(source, tmp_path / "spool")
    state.write_text("{")
    with pytest.raises(ArchiveError, match=r"spool\.json cannot be read: .*remove the folder and"):
        spooled(source, tmp_path / "spool")


def test_too_small_a_disk_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = packed(tmp_path / "a.tar.gz")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 5, 5))
    with pytest.raises(ArchiveError, match=r"has 0\.0 GiB free, and archive .*a\.tar\.gz takes"):
        spooled(source, tmp_path / "spool")
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["spool.json"]


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    stream = Stream(paths=("00", "01"), size=9, nested=False)
    place = Place(str(tmp_path))
    source = Source(layout="ssv2", archive=place, media="video", units=(), stream=stream)
    with pytest.raises(StorageError, match="00 does not exist"):
        spooled(source, tmp_path / "spool")


def test_progress_is_told_in_compressed_bytes(tmp_path: Path) -> None:
    source = packed(tmp_path / "a.tar.gz")
    told: list[tuple[str, int, int]] = []
    spool(source, Place(str(tmp_path / "s")), progress=lambda *what: told.append(what))
    size = (tmp_path / "a.tar.gz").stat().st_size
    assert told[-1] == ("spool", size, size)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_what_is_no_sample_is_told_as_in_the_archive(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (
            ("sub", tarfile.DIRTYPE),
            ("n01_1.JPEG", tarfile.SYMTYPE),
            ("README.txt", tarfile.REGTYPE),
            ("../n01_2.JPEG", tarfile.REGTYPE),
            ("/n01_3.JPEG", tarfile.REGTYPE),
            ("n01_\udcff.JPEG", tarfile.FIFOTYPE),
            ("n01_5.JPEG", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x"
            tar.addfile(info)
    source = spooled(packed(tmp_path / "a.tar.gz", {"n01.tar": file.getvalue()}), tmp_path / "s")
    assert [(member.name, member.problem) for member in members(source)] == [
        ("a.tar.gz/n01/n01_1.JPEG", "is a link"),
        ("a.tar.gz/n01/README.txt", "is not an image by its name (suffix '.txt')"),
        (
            "a.tar.gz/n01/../n01_2.JPEG",
            "has a name that leads outside, with '..'",
        ),
        ("a.tar.gz/n01//n01_3.JPEG", "has an absolute path as its name"),
        ("a.tar.gz/n01/n01_\\xff.JPEG", "is not a plain file"),
        ("a.tar.gz/n01/n01_5.JPEG", "is empty"),
    ]


def test_long_and_odd_names_survive(tmp_path: Path) -> None:
    inner = {
        "n01_" + "x" * 200 + ".JPEG": jpeg(1),
        "n01_\udcff.JPEG": jpeg(2),
        "n01_é.JPEG": jpeg(),
    }
    source = spooled(packed(tmp_path / "a.tar.gz", {"n01.tar": tar_bytes(inner)}), tmp_path / "s")
    names = [member.name.removeprefix("a.tar.gz/n01/") for member in members(source)]
    assert names == ["n01_" + "x" * 200 + ".JPEG", "n01_\\xff.JPEG", "n01_é.JPEG"]


def test_a_damaged_inner_tar_costs_its_own_class_alone(tmp_path: Path) -> None:
    files = classes()
    second = bytearray(files["n01443537.tar"])
    second[0:100] = b"\xff" * 100
    files["n01443537.tar"] = bytes(second)
    found = members(spooled(packed(tmp_path / "a.tar.gz", files), tmp_path / "s"))
    assert {m.class_name for m in found if m.problem is None} == {"n01440764", "n02119789"}
    (lost,) = [member for member in found if member.problem]
    assert lost.name == "a.tar.gz/n01443537.tar"
    assert "is damaged: no tar header at byte" in (lost.problem or "")
    assert lost.lost == len(second)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_stream_keeps_the_members_before_the_cut(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.tar.gz"
    source = packed(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    *kept, lost = members(spooled(source, tmp_path / "s"))
    good = [member.key for member in kept if member.problem is None]
    assert good == [name[:-5] for wnid in WNIDS for name in images(wnid)][: len(good)]
    there = len(zlib.decompressobj(31).decompress(path.read_bytes()))
    assert len(good) == sum(end <= there for end in ends(whole))
    assert lost.problem == ("is cut off: its compressed data end too early; what followed is lost")
    assert (lost.name, lost.lost) == ("a.tar.gz/a.tar.gz", None)


def test_a_damaged_stream_keeps_the_members_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    source = packed(path)
    content = bytearray(path.read_bytes())
    whole, half = bytes(content), len(content) // 2
    content[half : half + 64] = b"\xff" * 64
    path.write_bytes(bytes(content))
    *kept, lost = members(spooled(source, tmp_path / "s"))
    good = [member for member in kept if member.problem is None]
    there = len(zlib.decompressobj(31).decompress(whole[:half]))
    assert len(good) >= sum(end <= there for end in ends(whole)) > 1
    assert (lost.problem or "").startswith("is damaged: its compressed data break off at byte ")
    assert lost.lost is not None
    assert 0 < lost.lost <= half


def test_a_wrong_checksum_is_told_though_all_members_came(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    source = packed(path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(bytes(content))
    *kept, lost = members(spooled(source, tmp_path / "s"))
    assert len(kept) == 12
    assert "(incorrect data check)" in (lost.problem or "")


def test_a_tar_that_ends_early_in_a_whole_stream_is_told(tmp_path: Path) -> None:
    content = tar_bytes(classes())
    path = tmp_path / "a.tar.gz"
    for name, cut in (("short", content[: len(content) // 2]), ("joined", content * 2)):
        path.write_bytes(gzip.compress(cut, mtime=0))
        *kept, lost = members(spooled(find_source(Place(str(path))), tmp_path / name))
        assert any(member.problem is None for member in kept)
        assert "is cut off" in (lost.problem or "") or "goes on after" in (lost.problem or "")
        assert (lost.lost is None) == (name == "short")


def test_parts_and_gzip_members_are_one_stream(tmp_path: Path) -> None:
    names = [f"20bn-something-something-v2/{k}.webm" for k in range(8)]
    content = tar_bytes({name: os.urandom(3000) for name in names})
    stream = gzip.compress(content[:9000]) + gzip.compress(content[9000:]) + bytes(300)
    third = len(stream) // 3
    for k in range(4):
        (tmp_path / f"{k:02d}").write_bytes(stream[k * third : (k + 1) * third])
    paths = tuple(f"{k:02d}" for k in range(4))
    source = Source(
        layout="ssv2",
        archive=Place(str(tmp_path)),
        media="video",
        units=(),
        listed={str(k): Listed(class_name="x", split="train") for k in range(7)},
        stream=Stream(paths=paths, size=len(stream), nested=False),
    )
    result = spooled(source, tmp_path / "spool", 1 << 20)
    (unit,) = result.units
    with tarfile.open(tmp_path / "spool" / unit.path) as tar:
        assert tar.getnames() == names
        for name in names[:7]:
            file = tar.extractfile(name)
            assert file is not None
            assert file.read() in content


@settings(deadline=None, max_examples=60)
@given(
    content=st.binary(max_size=5000),
    cuts=st.lists(st.integers(0, 5000), max_size=3),
    steps=st.lists(st.integers(1, 2000), min_size=1, max_size=20),
)
def test_a_stream_is_read_forward_in_any_steps(
    content: bytes, cuts: list[int], steps: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    ends = sorted({min(cut, len(content)) for cut in cuts} | {0, len(content)})
    places = []
    for number, (start, end) in enumerate(zip(ends, [*ends[1:], len(content)], strict=True)):
        path = folder / str(number)
        path.write_bytes(gzip.compress(content[start:end]))
        places.append(Place(str(path)))
    with Inflated(places) as stream:
        at = 0
        for number, step in enumerate(steps):
            if number % 2:
                assert stream.read(at, step) == content[at : at + step]
            at += step
        assert stream.read(at, 10_000) == content[at:]
        assert stream.read(len(content) + 1, 1) == b""
        assert stream.problem is None
        assert stream.stop == len(content)


def test_a_stream_is_not_read_backward(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"abcdef"))
    with Inflated([Place(str(tmp_path / "a.gz"))]) as stream:
        assert stream.read(2, 2) == b"cd"
        with pytest.raises(ValueError, match="a stream is not read backward, from 4 to 0"):
            stream.read(0, 1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_a_stream(tmp_path: Path) -> None:
    code = f"""
import gzip, io, os, resource, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.raw_archives import *
from pipelines.data.sources import find_source
from pipelines.data.archives.spool import spool
from pipelines.storage import Place
path = Path({str(tmp_path)!r}) / "winter21.tar.gz"
size = 3 << 20
inner = 100 * (512 + size) + 1024
with gzip.open(path, "wb", compresslevel=0) as file:
    head = tarfile.TarInfo("n00000001.tar")
    head.size = inner
    file.write(head.tobuf())
    for n in range(100):
        one = tarfile.TarInfo(f"n00000001_{{n}}.JPEG")
        one.size = size
        file.write(one.tobuf() + os.urandom(size))
    file.write(bytes(1024 + -inner % 512 + 1024))
source = find_source(Place(str(path)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = spool(source, Place({str(tmp_path)!r} + "/spool"), segment_bytes=100 << 20)
assert len(result.units) == 3, result.units
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40  # MiB, for a stream of 300
