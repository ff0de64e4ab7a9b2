"""Where files lie: on this machine's file systems, or in an object store (`s3://`, `gs://`).

A `Place` is a file or folder and answers the same questions wherever it is. Writing is whole or
not at all in both: a temporary name, a flush to disk and a rename here, an object store's own
rule there. What users and networks do wrong becomes a `StorageError` of one line.

Credentials and endpoints of object stores come from the environment alone, never from a
configuration:

* S3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, or the profile
  `AWS_PROFILE` of `~/.aws`, or the role of the machine. `AWS_ENDPOINT_URL_S3` or
  `AWS_ENDPOINT_URL` for stores that are not Amazon's (`http://` and `https://`);
  `AWS_REGION` or `AWS_DEFAULT_REGION`, without which the bucket's own region is asked for;
  `AWS_CA_BUNDLE` for certificates.
* Google Cloud Storage: `GOOGLE_APPLICATION_CREDENTIALS`, or the machine's service account;
  `STORAGE_EMULATOR_HOST` for an emulator.

An upload that is killed or fails leaves no object, but may leave its parts on the store's bill:
give the bucket a rule that ends incomplete multipart uploads after a day.
"""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipelines.errors import PipelineError
from pipelines.files import write_atomically

SCHEMES = ("s3://", "gs://")
# What an object store's client is made from; another value of any makes another client.
ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "STORAGE_EMULATOR_HOST",
)
CONNECT_S = 5.0
SILENCE_S = 60.0  # of a server that has a request; Amazon's own 3 repeat what is under way
ATTEMPTS = 5  # of a request to S3
RETRY_S = 20.0  # of a request to Google
UPLOAD_BYTES = 64 << 20  # that wait in memory to be sent


class StorageError(PipelineError):
    """A file or folder is missing, may not be touched, or its store cannot be reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What lies in a folder under a name.

    Attributes:
        name: Last part of its path.
        is_folder: Whether it is a folder.
        size: Bytes of a file; 0 for a folder.
        changed: When a file was changed last, see `Place.changed`; 0 for a folder.
    """

    name: str
    is_folder: bool
    size: int
    changed: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder: a path of this machine, or a URI of an object store.

    Every method that looks or writes raises `StorageError` where that cannot be done.

    Attributes:
        where: The path or URI, as messages name it.
    """

    where: str

    def __post_init__(self) -> None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", self.where)
        if scheme is None:
            return
        if not self.where.startswith(SCHEMES):
            raise StorageError(
                f"{self.where} is neither a path nor in a store that mone knows; "
                f"give a path, or a URI that starts with {' or '.join(SCHEMES)}"
            )
        if not self.where[len("s3://") :].strip("/"):
            raise StorageError(f"{self.where} names no bucket; give {self.where}BUCKET/NAME")

    def __str__(self) -> str:
        return self.where

    def __truediv__(self, name: str) -> "Place":
        """What lies in this folder under a name or relative path; "": the place itself."""
        if not name or not self.where:
            return self if not name else Place(name)
        return Place(f"{self.where.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.where.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Place":
        """The folder that it lies in; a bucket's is itself."""
        if self.local is not None:
            return Place(str(self.local.parent))
        above, _, _ = self.where.rstrip("/").rpartition("/")
        return self if above.endswith("/") else Place(above)

    @property
    def local(self) -> Path | None:
        """The path on this machine; None in an object store."""
        return None if self.where.startswith(SCHEMES) else Path(self.where)

    def absolute(self) -> "Place":
        """The same place, whatever the working folder of the process that asks; `~` is a home."""
        if self.local is None:
            return Place(self.where.rstrip("/"))
        return Place(str(self.local.expanduser().absolute()))

    def is_file(self) -> bool:
        """Whether there is a file."""
        with plain_errors(self):
            if self.local is not None:
                return self.local.is_file()
            return self._info().type is fs.FileType.File

    def is_folder(self) -> bool:
        """Whether there is a folder; in an object store, anything below this prefix."""
        with plain_errors(self):
            if self.local is not None:
                return self.local.is_dir()
            return self._info().type is fs.FileType.Directory

    def size(self) -> int:
        """Bytes of the file."""
        with plain_errors(self):
            if self.local is not None:
                return self.local.stat().st_size
            return int(self._file_info().size)

    def changed(self) -> int:
        """When the file was changed last, in nanoseconds.

        On this machine that is the time which no program sets: copying and fetching again often
        keep the other one (`wget`, `rsync -t`, `tar`), though the bytes differ. In an object store
        it is that of the upload.
        """
        with plain_errors(self):
            if self.local is not None:
                return self.local.stat().st_ctime_ns
            return self._file_info().mtime_ns or 0

    def entries(self) -> Iterator[Entry]:
        """What lies directly in the folder, sorted by name."""
        with plain_errors(self):
            found = self._remote_entries() if self.local is None else _local_entries(self.local)
        return iter(sorted(found, key=lambda entry: entry.name))

    def _remote_entries(self) -> list[Entry]:
        store, path = self._store()
        if isinstance(store, fs.GcsFileSystem):
            return _google_entries(store, path)
        return [
            Entry(
                name=info.base_name,
                is_folder=info.type is fs.FileType.Directory,
                size=info.size or 0,
                changed=info.mtime_ns or 0,
            )
            for info in store.get_file_info(fs.FileSelector(path))
        ]

    def open(self) -> pa.NativeFile:
        """The file for reading anywhere in it; `read_at` is safe from several threads.

        Reading from it later is the caller's to wrap in `plain_errors`.
        """
        with plain_errors(self):
            if self.local is not None:
                return pa.OSFile(os.fsencode(self.local), "rb")  # names may be any bytes
            store, path = self._store()
            return store.open_input_file(path)

    def read_bytes(self) -> bytes:
        """The whole file."""
        with plain_errors(self):
            if self.local is not None:
                return self.local.read_bytes()
            with self.open() as file:
                return bytes(file.read())

    def write_bytes(self, content: bytes) -> None:
        """Write a small file, whole or not at all; folders on the way are made."""
        with plain_errors(self):
            if self.local is not None:
                self.local.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.local, content)
                return
            self._upload(content)

    def put(self, finished: Path) -> None:
        """Move a finished local file here, whole or not at all; folders on the way are made."""
        with plain_errors(self):
            if self.local is None:
                with pa.memory_map(str(finished)) as file:
                    self._upload(file.read_buffer())
                finished.unlink()
            else:
                self.local.parent.mkdir(parents=True, exist_ok=True)
                _move(finished, self.local)

    def remove(self) -> None:
        """Remove a file or a whole folder; fine if it is not there."""
        with plain_errors(self):
            if self.local is not None:
                _remove(self.local)
                return
            store, path = self._store()
            kind = self._info().type
            if kind is fs.FileType.File:
                store.delete_file(path)
            elif kind is fs.FileType.Directory and isinstance(store, fs.GcsFileSystem):
                store.delete_dir_contents(path)  # of a folder without a marker, too
            elif kind is fs.FileType.Directory:
                store.delete_dir(path)

    def _store(self) -> tuple[fs.FileSystem, str]:
        """The client of an object store, and the path that it calls this place."""
        scheme, path = self.where[: len("s3://")], self.where[len("s3://") :].strip("/")
        settings = tuple((name, os.environ.get(name, "")) for name in ENVIRONMENT)
        return _client(scheme, path.split("/", 1)[0], settings), path

    def _file_info(self) -> fs.FileInfo:
        info = self._info()
        if info.type is not fs.FileType.File:
            raise FileNotFoundError(self.where)
        return info

    def _info(self) -> fs.FileInfo:
        store, path = self._store()
        return store.get_file_info(path)

    def _upload(self, content: bytes | pa.Buffer) -> None:
        """Send a whole file to an object store; until all of it is there, the old object is."""
        store, path = self._store()
        streams: list[pa.NativeFile] = []
        try:
            # In one call, so that no interrupt finds a stream that is open and in no list.
            streams.extend(map(partial(store.open_output_stream, compression=None), [path]))
            for start in range(0, len(content), UPLOAD_BYTES):
                streams[0].write(content[start : start + UPLOAD_BYTES])
                streams[0].flush()  # Arrow keeps what it has not sent, without a limit
            streams[0].close()
        except BaseException:
            for stream in streams:
                _give_up(stream)
            raise


def _give_up(stream: pa.NativeFile) -> None:
    """Leave an upload unfinished: never close it.

    Arrow cannot end an upload in another way than by closing it, which puts what was sent so far in
    place of the old object, and it closes a stream that nobody refers to, as late as when Python
    ends. So one reference stays for ever.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))


def place(where: str | Path | Place) -> Place:
    """A place from however it was given."""
    return where if isinstance(where, Place) else Place(str(where))


@contextmanager
def plain_errors(place: Place) -> Iterator[None]:
    """Turn what the system or Arrow says of a place into one line and a next step.

    Raises:
        StorageError: For every `OSError`, and error of Arrow, within the block.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(_explain(place, error)) from error


def _explain(place: Place, error: Exception) -> str:
    """One line for an error of the file system or of an object store."""
    said = (str(error).splitlines() or [""])[0]
    if place.local is None:
        for pattern, meaning in _MEANINGS.items():
            if re.search(pattern, said):
                return f"{place} {meaning}"
    if isinstance(error, FileNotFoundError):
        return f"{place} does not exist; check its name"
    if place.local is None:
        return f"{place} cannot be read or written: {said[:200]}; run the same command again"
    reason = getattr(error, "strerror", None) or said
    return f"{place} cannot be read or written: {reason}; mend that and run the command again"


_DENIED = (
    r"ACCESS_DENIED|Access ?Denied|HTTP status 40[13]|INVALID_ACCESS_KEY|SIGNATURE|UNAUTHENTICATED"
    r"|PERMISSION_DENIED|[Cc]redentials"
)
_MEANINGS = {
    _DENIED: "may not be touched with the credentials in use; set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY (s3://) or GOOGLE_APPLICATION_CREDENTIALS (gs://), or ask the "
    "bucket's owner",
    r"access token": "needs credentials; set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    r"^No such file or directory": "does not exist; check its name",
    r"NO_SUCH_BUCKET|[Bb]ucket '[^']*' not found": "is in a bucket that does not exist; check its "
    "name, or make the bucket first",
    r"NETWORK_CONNECTION|UNAVAILABLE|resolve host|connect to": "cannot be reached; check the "
    "network and AWS_ENDPOINT_URL (s3://) or STORAGE_EMULATOR_HOST (gs://)",
    r"HTTP status 30[17]|PermanentRedirect": "is in another region; set AWS_REGION to that of the "
    "bucket, or unset it",
}


@lru_cache(maxsize=64)
def _client(scheme: str, bucket: str, settings: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    """The client of a bucket; made once per process, since making one asks the network."""
    given = dict(settings)
    store = _google(given) if scheme == "gs://" else _amazon(bucket, given)
    try:
        known = store.get_file_info(bucket).type is fs.FileType.Directory
    except OSError as error:
        # Who may read objects need not be allowed to ask for their bucket.
        known = re.search(_DENIED, str(error)) is not None
        if not known:
            raise
    if not known:
        raise FileNotFoundError(f"NO_SUCH_BUCKET {bucket}")
    return store


def _google(given: Mapping[str, str]) -> fs.GcsFileSystem:
    scheme, _, host = given["STORAGE_EMULATOR_HOST"].rpartition("://")
    return fs.GcsFileSystem(
        endpoint_override=host or None,
        scheme=(scheme or "http") if host else "https",
        anonymous=bool(host),
        retry_time_limit=timedelta(seconds=RETRY_S),
    )


def _amazon(bucket: str, given: Mapping[str, str]) -> fs.S3FileSystem:
    endpoint = given["AWS_ENDPOINT_URL_S3"] or given["AWS_ENDPOINT_URL"]
    region = given["AWS_REGION"] or given["AWS_DEFAULT_REGION"]
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        endpoint_override=endpoint or None,
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        tls_ca_file_path=given["AWS_CA_BUNDLE"] or None,
        allow_delayed_open=True,  # a small file takes one request, not three
    )


def _google_entries(store: fs.FileSystem, path: str) -> list[Entry]:
    """Entries of a folder, found from all that lies below it.

    Arrow lists folders of Google's store only if they were marked as such, which few programs do.
    """
    found: dict[str, Entry] = {}
    for info in store.get_file_info(fs.FileSelector(path, recursive=True)):
        name, below, _ = info.path[len(path) + 1 :].partition("/")
        is_folder = bool(below) or info.type is fs.FileType.Directory
        size, changed = (0, 0) if is_folder else (info.size, info.mtime_ns or 0)
        found[name] = Entry(name=name, is_folder=is_folder, size=size, changed=changed)
    return list(found.values())


def _local_entries(folder: Path) -> list[Entry]:
    """Entries of a folder on this machine; links are what they point to."""
    with os.scandir(folder) as found:
        return [_local_entry(entry) for entry in found]


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    """A link that points nowhere is a file of 0 bytes."""
    if entry.is_dir():
        return Entry(name=entry.name, is_folder=True, size=0)
    try:
        found = entry.stat()
    except FileNotFoundError:
        return Entry(name=entry.name, is_folder=False, size=0)
    size, changed = found.st_size, found.st_ctime_ns
    return Entry(name=entry.name, is_folder=False, size=size, changed=changed)


def _move(finished: Path, target: Path) -> None:
    """Move a file, across file systems if need be; the target is the old file or the new one."""
    with finished.open("rb") as file:
        os.fsync(file.fileno())
    try:
        finished.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(finished, target)
        finished.unlink()


def _copy(finished: Path, target: Path) -> None:
    """Copy to a temporary name beside the target, flush to disk, rename."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with finished.open("rb") as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder of this machine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
