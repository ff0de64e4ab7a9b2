"""What recognisers of raw archives give, a `Source`, and what scanning it gives, `Member`s.

A source is a description, small whatever the archive's size: which pieces of it can be scanned
apart from each other (`Unit`), how a member's class is found, and which splits and class names
the release itself brings. Recognisers read names and lists, never sample bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pipelines.storage import Place

Media = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A piece of an archive that one task scans.

    Attributes:
        kind: "tar": a tar, or one inside a plain outer tar; "folder": all files below a folder.
        path: Relative to the archive; empty: the archive itself.
        size: Bytes of the tar; 0 for a folder, whose files are not looked at yet.
        start: Byte in the file where the tar begins; above 0 only for one inside an outer tar.
        name: What messages call it, such as `n01440764.tar`.
        class_name: Class of all its members; None: a folder they lie in, or `Source.listed`.
        split: The release's own split that its members belong to; None: none, or `listed` says.
        above: Of a tar of class folders: how many folders are above those of the classes.
    """

    kind: Literal["tar", "folder"]
    path: str
    name: str
    size: int = 0
    start: int = 0
    class_name: str | None = None
    split: str | None = None
    above: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """What a release's list says of one file: its class (None: withheld) and split."""

    class_name: str | None
    split: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """A compressed archive, to be read once from front to back.

    Attributes:
        paths: Files that make it up one after the other, relative to the archive; empty string:
            the archive itself.
        size: Compressed bytes of all of them.
        nested: Its members are themselves tars, one per class.
    """

    paths: tuple[str, ...]
    size: int
    nested: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A raw archive that was recognised.

    Attributes:
        layout: Name of the layout, a key of `pipelines.data.sources.LAYOUTS`.
        archive: The archive as the user named it, made absolute.
        media: What its samples are.
        units: Pieces to scan, in the order that decides between repeated keys. Empty while
            `stream` has not been spooled.
        splits: The release's own splits, in order, such as ("train", "val"); empty: it has none.
        classes: Class names in label order where the release itself lists them; None: those
            found by scanning, sorted.
        names: What people call a class, where the release tells.
        listed: For releases whose lists give classes: file stem -> what the list says. A file that
            is not listed is skipped and named; so is a row without a file.
        stream: Set if the archive is compressed: `spool` makes units of it first. Which of `splits`
            a tree of class folders has is known then.
        packed: The compressed archive that this one was spooled from; None: it was not.
    """

    layout: str
    archive: Place
    media: Media
    units: tuple[Unit, ...]
    splits: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    listed: Mapping[str, Listed] | None = None
    stream: Stream | None = None
    packed: Place | None = None

    @property
    def told(self) -> Place:
        """The archive as messages name it: the one the user gave."""
        return self.packed or self.archive


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file of an archive, as a scan found it.

    Attributes:
        key: Name of the sample; no dots, the class in front where a file name alone is not unique.
        name: What messages and the manifest call it: unit, slash, name inside. Bytes that are not
            UTF-8 are written `\\xNN`.
        path: File that holds the bytes, relative to the archive; empty: the archive itself.
        offset, size: Where in that file the bytes lie.
        class_name: Its class; None: unknown (a test split), or no sample.
        split: The release's own split, if it has any.
        problem: Why this is no sample, or None.
        remark: What is unusual about a sample that is kept, such as "is CMYK"; None: nothing.
        lost: Bytes of the archive that a damaged piece makes unreadable; None: it is cut off, and
            nobody knows what should follow; 0 for everything else.
        crc32: Of the bytes of a sample.
    """

    key: str
    name: str
    path: str
    offset: int
    size: int
    class_name: str | None
    split: str | None = None
    problem: str | None = None
    remark: str | None = None
    lost: int | None = 0
    crc32: int = 0


class Found(NamedTuple):
    """What looking at the bytes of a file gave.

    Attributes:
        problem: Why it is no sample, or None.
        remark: What is unusual about a sample, one or more of few texts joined by "; "; or None.
    """

    problem: str | None
    remark: str | None
