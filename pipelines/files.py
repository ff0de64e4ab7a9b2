"""Small file habits that every hop shares: whole files or none, and JSON checked on the way in."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it into place.

    A reader sees the old content or the new one, never a part, also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass, or any value pydantic knows, as indented JSON, whole or not at all."""
    write_atomically(path, as_json(value))


def as_json(value: Any) -> bytes:
    """A dataclass, or any value pydantic knows, as indented JSON."""
    plain = TypeAdapter(type(value)).dump_python(value, mode="json")
    return (json.dumps(plain, indent=1) + "\n").encode()


def read_json(path: Path, kind: type[T], *, otherwise: Callable[[str], Exception]) -> T:
    """Read a JSON file as a dataclass, strictly.

    Args:
        path: The file.
        kind: The dataclass that the file holds.
        otherwise: Makes the error to raise from one sentence that names the file, the field
            and what is wrong with it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise otherwise(f"{path} does not exist") from error
    return parse_json(content, kind, name=str(path), otherwise=otherwise)


def parse_json(
    content: bytes, kind: type[T], *, name: str, otherwise: Callable[[str], Exception]
) -> T:
    """The same from a file's content; `name` is what messages call it."""
    try:
        return TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise otherwise(f"{name} cannot be read: {where}: {first['msg']}") from error
