"""What names tell: the kind of a file, the split a folder is named after, the key of a sample.

A key is `<class>_<stem>`. It is the stem alone of a file that ImageNet has named after its class
(`n01440764_18.JPEG`), or that the release's own lists name. What readers of WebDataset shards
cannot stand in a key (dots, slashes, bytes that are not UTF-8) becomes `_`. A key ends in a hash of
class and path where another class or path could give the same text: where something was changed so,
or where a `_` in the class hides where the class ends. So `a.b.jpg` and `a_b.jpg`, and `1.jpg` of
`dog_small` and `small_1.jpg` of `dog`, stay two samples each. `a.jpg` and `a.png` of one folder
share a key: the later one is a repeated key, which is told when shards are written.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Literal

IMAGE_KINDS = {
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp")
SUFFIXES: dict[Literal["image", "video"], tuple[str, ...]] = {
    "image": tuple(IMAGE_KINDS),
    "video": VIDEO_SUFFIXES,
}
MAX_KEY_BYTES = 150
SMALL_CLASSES = "small_classes"  # of ImageNet-21K-P: what its authors left out

_WNID = re.compile(r"n\d+")
_UNSAFE = re.compile(r"[./\\\x00-\x1f\x7f]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    SMALL_CLASSES: SMALL_CLASSES,
}
_SPLIT = re.compile(r"(?:imagenet21k_)?(" + "|".join(_SPLITS) + ")")


def media_of(name: str) -> Literal["image", "video"] | None:
    """What a file is by its suffix; hidden files are nothing."""
    path = PurePosixPath(name)
    if path.name.startswith("."):
        return None
    return next((media for media, of in SUFFIXES.items() if path.suffix.lower() in of), None)


def is_hidden(folders: Iterable[str]) -> bool:
    """Whether one of the folders is one that people do not see, or that a Mac adds."""
    return any(folder.startswith(".") or folder == "__MACOSX" for folder in folders)


def is_tar(name: str) -> bool:
    """Whether a file is a plain tar by its name."""
    return name.lower().endswith(".tar")


def split_of(folder: str) -> str | None:
    """The split that a folder or tar is named after, "val" for `imagenet21k_val`; or None."""
    match = _SPLIT.fullmatch(folder.lower())
    return _SPLITS[match.group(1)] if match else None


def sample_key(class_name: str | None, name: str) -> str:
    """The key of a sample, from these two alone; see the module docstring.

    Args:
        class_name: Its class; None: the name alone is unique.
        name: Its path below the class.
    """
    path = PurePosixPath(name)
    stem = str(path.with_suffix("")) if path.name.strip(".") else name
    wnid = class_name is not None and _WNID.fullmatch(class_name) is not None
    is_named_after = wnid and path.name.startswith(f"{class_name}_")
    whole = stem if class_name is None or is_named_after else f"{class_name}_{stem}"
    key = _UNSAFE.sub("_", printable(whole))
    is_plain = is_named_after or not (wnid or "_" in (class_name or ""))
    if key == whole and is_plain and len(key.encode()) <= MAX_KEY_BYTES:
        return key
    told = stem if class_name is None else f"{class_name}/{stem}"
    digest = hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    short = key.encode()[: MAX_KEY_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    return f"{short}-{digest}"


def printable(name: str) -> str:
    """A name as one line of text: bytes that are not UTF-8 and control characters as `\\xNN`."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
