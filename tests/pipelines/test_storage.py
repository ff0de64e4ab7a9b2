"""Places: the same answers on this machine and in an object store, and whole files or none."""

import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage import Entry, Place, StorageError, place, plain_errors
from tests.object_store import S3Server, bucket, google_bucket, google_server, s3_server

__all__ = ["bucket", "google_bucket", "google_server", "s3_server"]


@pytest.fixture(params=["tmp_path", "bucket", "google_bucket"])
def folder(request: pytest.FixtureRequest) -> Place:
    """An empty folder of any kind."""
    return place(request.getfixturevalue(request.param))


def files(folder: Place) -> set[str]:
    return {entry.name for entry in folder.entries() if not entry.is_folder}


class TestPlacesHaveNames:
    def test_names_join_to_paths_and_uris(self) -> None:
        assert Place("/data") / "a/b.tar" == Place("/data/a/b.tar")
        assert Place("/data/") / "a" == Place("/data/a")
        assert Place("/") / "a" == Place("/a")
        assert Place("") / "a" == Place("a")
        assert Place("s3://bucket") / "a/b" == Place("s3://bucket/a/b")
        assert Place("s3://bucket/a/") / "b" == Place("s3://bucket/a/b")

    def test_no_name_is_the_place_itself(self) -> None:
        assert Place("/data/x.tar") / "" == Place("/data/x.tar")
        assert Place("s3://bucket/x.tar") / "" == Place("s3://bucket/x.tar")

    def test_parents_end_at_the_root_and_at_the_bucket(self) -> None:
        assert Place("/data/a").parent == Place("/data")
        assert Place("/").parent == Place("/")
        assert Place("s3://bucket/a/b").parent == Place("s3://bucket/a")
        assert Place("s3://bucket/a").parent == Place("s3://bucket")
        assert Place("s3://bucket").parent == Place("s3://bucket")

    def test_the_last_part_is_the_name(self) -> None:
        assert Place("/data/a b.tar").name == "a b.tar"
        assert Place("gs://bucket/é/").name == "é"

    def test_only_paths_are_local(self) -> None:
        assert Place("/data/a").local == Path("/data/a")
        assert Place("s3://bucket/a").local is None

    def test_absolute_paths_hold_in_any_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "mine"))
        assert Place("a/b").absolute() == Place(f"{tmp_path}/a/b")
        assert Place("~/a").absolute() == Place(f"{tmp_path}/mine/a")
        assert Place("s3://bucket/a/").absolute() == Place("s3://bucket/a")

    def test_places_are_values(self) -> None:
        there = place(Path("/data")) / "a"
        assert there == place("/data/a")
        assert len({there, place("/data/a"), place(there)}) == 1
        assert pickle.loads(pickle.dumps(there)) == there  # noqa: S301
        assert str(there) == "/data/a"

    @pytest.mark.parametrize(
        "where", ["http://host/a", "hdfs://host/a", "s3:/bucket/a", "S3://b/a"]
    )
    def test_unknown_stores_are_refused(self, where: str) -> None:
        with pytest.raises(StorageError, match=r"neither a path nor in a store.*s3:// or gs://"):
            Place(where)

    def test_a_store_needs_a_bucket(self) -> None:
        with pytest.raises(StorageError, match=r"s3:// names no bucket; give s3://BUCKET/NAME"):
            Place("s3://")


class TestFiles:
    @pytest.mark.parametrize(
        "name", ["plain", "with space", "ünïcödé-猫", "a#b?c%20d+e", "x/y/z.tar"]
    )
    def test_what_was_written_is_read(self, folder: Place, name: str) -> None:
        there = folder / name
        assert not there.is_file()
        there.write_bytes(b"content")
        assert there.is_file()
        assert not there.is_folder()
        assert there.size() == 7
        assert there.read_bytes() == b"content"
        with there.open() as file:
            assert file.read_at(3, 2) == b"nte"

    def test_writing_again_replaces(self, folder: Place) -> None:
        (folder / "a").write_bytes(b"long content")
        (folder / "a").write_bytes(b"short")
        assert (folder / "a").read_bytes() == b"short"
        assert files(folder) == {"a"}

    def test_files_may_be_empty(self, folder: Place, tmp_path: Path) -> None:
        (folder / "a").write_bytes(b"")
        (tmp_path / "nothing").touch()
        (folder / "b").put(tmp_path / "nothing")
        assert [(folder / name).size() for name in "ab"] == [0, 0]
        assert (folder / "a").read_bytes() == b""

    def test_a_finished_file_is_moved(self, folder: Place, tmp_path: Path) -> None:
        finished = tmp_path / "scratch" / "part"
        finished.parent.mkdir()
        content = os.urandom(23 << 20)  # more than one part of an upload
        finished.write_bytes(content)
        (folder / "below/shard.tar").put(finished)
        assert not finished.exists()
        assert (folder / "below/shard.tar").read_bytes() == content
        assert files(folder / "below") == {"shard.tar"}

    def test_names_on_this_machine_may_be_any_bytes(self, tmp_path: Path) -> None:
        there = place(tmp_path / "n01\udcff.tar")
        there.write_bytes(b"content")
        with there.open() as file:
            assert file.read_at(3, 2) == b"nte"
        with pytest.raises(StorageError, match="does not exist; check its name"):
            place(tmp_path / "n02\udcff.tar").open()

    def test_several_threads_read_one_open_file(self, folder: Place) -> None:
        content = os.urandom(1 << 20)
        (folder / "a").write_bytes(content)
        with (folder / "a").open() as file, ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda at: file.read_at(1000, at), range(0, 1 << 20, 20_000)))
        assert found == [content[at : at + 1000] for at in range(0, 1 << 20, 20_000)]

    def test_missing_files_are_named(self, folder: Place) -> None:
        missing = folder / "missing"
        for ask in (missing.size, missing.read_bytes, missing.open, missing.entries):
            with pytest.raises(StorageError, match=r"missing does not exist; check its name"):
                ask()
        assert not missing.is_folder()

    def test_when_a_file_was_changed_is_told_in_nanoseconds(self, folder: Place) -> None:
        before = time.time_ns() - 10**10
        (folder / "in/a").write_bytes(b"old")
        (entry,) = (folder / "in").entries()
        for changed in (entry.changed, (folder / "in/a").changed()):
            assert before < changed < time.time_ns() + 10**10
        with pytest.raises(StorageError, match="missing does not exist; check its name"):
            (folder / "missing").changed()

    def test_a_time_that_was_set_back_does_not_hide_a_change(self, tmp_path: Path) -> None:
        there = place(tmp_path / "a")
        there.write_bytes(b"old")
        (entry,), times = place(tmp_path).entries(), (tmp_path / "a").stat()
        time.sleep(0.02)
        there.write_bytes(b"new")
        os.utime(tmp_path / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
        (again,) = place(tmp_path).entries()
        assert again.changed == there.changed() > entry.changed

    def test_removing_what_is_not_there_is_fine(self, folder: Place) -> None:
        (folder / "a/b").write_bytes(b"1")
        (folder / "missing").remove()
        (folder / "a/b").remove()
        assert not (folder / "a/b").is_file()


class TestFolders:
    def test_entries_are_sorted_and_lie_directly_in_the_folder(self, folder: Place) -> None:
        for name in ("b", "a/deep/er", "c d", "Z", "ä"):
            (folder / "in" / name).write_bytes(b"12")
        assert list((folder / "in").entries()) == [
            Entry(name="Z", is_folder=False, size=2),
            Entry(name="a", is_folder=True, size=0),
            Entry(name="b", is_folder=False, size=2),
            Entry(name="c d", is_folder=False, size=2),
            Entry(name="ä", is_folder=False, size=2),
        ]
        assert (folder / "in/a").is_folder()
        assert (folder / "in/a/deep").is_folder()
        assert not (folder / "in/a").is_file()

    def test_a_folder_is_removed_with_all_below(self, folder: Place) -> None:
        for name in ("a/b/c", "a/d", "e"):
            (folder / name).write_bytes(b"1")
        (folder / "a").remove()
        assert [entry.name for entry in folder.entries()] == ["e"]
        assert not (folder / "a").is_folder()

    def test_more_entries_than_one_answer_holds(self, bucket: Place) -> None:
        names = [f"{number:04}" for number in range(1005)]  # S3 answers with 1000 at most
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: (bucket / "many" / name).write_bytes(b""), names))
        assert [entry.name for entry in (bucket / "many").entries()] == names

    def test_links_are_what_they_point_to(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "kept").write_bytes(b"1")
        (tmp_path / "in/link").symlink_to(tmp_path / "folder")
        (tmp_path / "in/nowhere").symlink_to(tmp_path / "missing")
        assert list(place(tmp_path / "in").entries()) == [
            Entry(name="link", is_folder=True, size=0),
            Entry(name="nowhere", is_folder=False, size=0),
        ]
        (place(tmp_path / "in") / "link").remove()
        assert (tmp_path / "folder" / "kept").is_file()


# Writes two contents in turn until it is killed.
WRITER = """
import sys
from pathlib import Path
from pipelines.storage import Place
folder, how = Place(sys.argv[1]), sys.argv[2]
contents = [letter * (8 << 20) for letter in (b"a", b"b")]
print("ready", flush=True)
for turn in range(10**9):
    if how == "write":
        (folder / "file").write_bytes(contents[turn % 2])
    else:
        finished = Path(sys.argv[3]) / "finished"
        finished.write_bytes(contents[turn % 2])
        (folder / "file").put(finished)
"""


def killed_writer(folder: Place, how: str, scratch: Path, after_s: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), how, str(scratch)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system at /dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared))
    yield folder
    shutil.rmtree(folder)


class TestWholeOrAbsent:
    @pytest.mark.parametrize("how", ["write", "put"])
    @pytest.mark.parametrize("after_s", [0.011, 0.037, 0.113])
    def test_a_killed_writer_leaves_no_part(self, tmp_path: Path, how: str, after_s: float) -> None:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        killed_writer(place(tmp_path / "out"), how, scratch, after_s)
        found = tmp_path / "out" / "file"
        if found.exists():
            content = found.read_bytes()
            assert len(content) == 8 << 20
            assert set(content) in ({ord("a")}, {ord("b")})

    def test_a_file_of_another_disk_is_moved_whole(self, tmp_path: Path, other_disk: Path) -> None:
        finished = other_disk / "finished"
        content = os.urandom(3 << 20)
        finished.write_bytes(content)
        (place(tmp_path) / "in/file").put(finished)
        assert not finished.exists()
        assert (tmp_path / "in/file").read_bytes() == content
        assert files(place(tmp_path / "in")) == {"file"}

    def test_a_killed_move_between_disks_leaves_no_part(
        self, tmp_path: Path, other_disk: Path
    ) -> None:
        killed_writer(place(tmp_path / "out"), "put", other_disk, 0.05)
        found = tmp_path / "out" / "file"
        assert not found.exists() or found.stat().st_size == 8 << 20

    def test_a_killed_upload_leaves_no_object(
        self, bucket: Place, s3_server: S3Server, tmp_path: Path
    ) -> None:
        finished = tmp_path / "finished"
        finished.write_bytes(os.urandom(300 << 20))
        process = subprocess.Popen(
            [sys.executable, "-c", UPLOAD, str(bucket / "file"), str(finished)]
        )
        under_way = f"{s3_server.url}/{bucket.name}?uploads"
        while b"<UploadId>" not in urllib.request.urlopen(under_way).read():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (bucket / "file").is_file()
        assert finished.stat().st_size == 300 << 20

    def test_an_interrupted_upload_leaves_the_old_object(
        self, bucket: Place, s3_server: S3Server, tmp_path: Path
    ) -> None:
        (bucket / "file").write_bytes(b"old")
        finished = tmp_path / "finished"
        finished.write_bytes(os.urandom(200 << 20))
        process = subprocess.Popen(
            [sys.executable, "-c", UPLOAD, str(bucket / "file"), str(finished)],
            stderr=subprocess.PIPE,
            text=True,
        )
        under_way = f"{s3_server.url}/{bucket.name}?uploads"
        while b"<UploadId>" not in urllib.request.urlopen(under_way).read():
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
        assert told.splitlines()[-1] == "KeyboardInterrupt"
        assert (bucket / "file").read_bytes() == b"old"
        assert files(bucket) == {"file"}
        assert finished.stat().st_size == 200 << 20

    @pytest.mark.parametrize("parts", [0, 1, 3])
    def test_an_upload_that_is_given_up_leaves_the_old_object_whenever_it_is(
        self, bucket: Place, monkeypatch: pytest.MonkeyPatch, parts: int
    ) -> None:
        monkeypatch.setattr("pipelines.storage.UPLOAD_BYTES", 6 << 20)
        (bucket / "file").write_bytes(b"old")
        with pytest.raises(KeyboardInterrupt, match=f"after {parts} parts"):
            (bucket / "file").write_bytes(Interrupted(bytes(24 << 20), parts))
        gc.collect()
        assert (bucket / "file").read_bytes() == b"old"
        (bucket / "file").write_bytes(b"new")
        assert (bucket / "file").read_bytes() == b"new"

    def test_a_write_that_fails_leaves_no_file(self, folder: Place) -> None:
        with pytest.raises(TypeError, match="NoneType"):
            (folder / "file").write_bytes(None)  # type: ignore[arg-type]
        assert not (folder / "file").is_file()


class Interrupted(bytes):
    """Bytes whose reader is interrupted after some parts."""

    def __new__(cls, content: bytes, parts: int) -> "Interrupted":
        made = super().__new__(cls, content)
        made.parts, made.left = parts, parts
        return made

    parts: int
    left: int

    def __getitem__(self, key: Any) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt(f"after {self.parts} parts")
        self.left -= 1
        return super().__getitem__(key)


UPLOAD = """
import sys
from pathlib import Path
from pipelines.storage import Place
Place(sys.argv[1]).put(Path(sys.argv[2]))
"""


class TestMistakes:
    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"cannot be read or written: Is a directory; mend"):
            place(tmp_path).read_bytes()

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match=r"cannot be read or written: Not a directory; mend"):
            place(tmp_path / "file").entries()
        with pytest.raises(StorageError, match=r"x cannot be read or written: .*; mend"):
            place(tmp_path / "file/x").write_bytes(b"")

    @pytest.mark.usefixtures("bucket")
    def test_buckets_that_do_not_exist_are_named(self) -> None:
        nowhere = Place("s3://no-such-bucket-at-all/a")
        for ask in (nowhere.is_file, nowhere.is_folder, nowhere.open, nowhere.entries):
            with pytest.raises(StorageError, match=r"s3://no-such-bucket-at-all/a is in a bucket"):
                ask()
        with pytest.raises(StorageError, match=r"does not exist; check its name, or make the buck"):
            nowhere.write_bytes(b"1")

    def test_wrong_credentials_are_told(self, bucket: Place, s3_server: S3Server) -> None:
        there = bucket / "a"
        there.write_bytes(b"old")
        with s3_server.checks_credentials():
            for ask in (there.is_file, there.read_bytes, there.open, there.remove):
                with pytest.raises(StorageError, match=r"may not be touched.*AWS_ACCESS_KEY_ID"):
                    ask()
            with pytest.raises(StorageError, match=r"may not be touched.*AWS_ACCESS_KEY_ID"):
                there.write_bytes(b"new")
        assert there.read_bytes() == b"old"

    def test_a_server_that_is_not_there_is_told(
        self, bucket: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StorageError, match=r"cannot be reached.*AWS_ENDPOINT_URL"):
            (bucket / "a").is_file()

    def test_google_without_credentials_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
        with pytest.raises(StorageError, match=r"gs://bucket/a .*GOOGLE_APPLICATION_CREDENTIALS"):
            Place("gs://bucket/a").is_file()

    def test_the_endpoint_of_s3_alone_comes_first(
        self, bucket: Place, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        assert bucket.is_folder()

    def test_what_goes_wrong_while_reading_is_one_line(self, bucket: Place) -> None:
        (bucket / "a").write_bytes(b"content")
        with (bucket / "a").open() as file:
            (bucket / "a").remove()
            with (
                pytest.raises(
                    StorageError, match=r"/a cannot be read or written: .*; run the same"
                ),
                plain_errors(bucket / "a"),
            ):
                file.read_at(3, 2)
