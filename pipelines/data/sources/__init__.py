"""Layouts of raw archives: what lies at a place, told by names and lists alone.

Every layout has a recogniser in a module of its own, which gives a `Source` (`base`) or None. How
samples are read from a source is the subject of `pipelines.data.archives.scan`.
"""

from collections.abc import Callable
from pathlib import PurePosixPath

from pipelines.data.sources import folders, imagenet, kinetics, ssv2
from pipelines.data.sources.base import Source
from pipelines.data.sources.peek import describe, visible
from pipelines.errors import ArchiveError, unknown_name
from pipelines.storage import Place

AUTO = "auto"

# In the order in which they are tried: the first that knows the archive wins.
LAYOUTS: dict[str, Callable[[Place], Source | None]] = {
    "kinetics": kinetics.recognise,
    "ssv2": ssv2.recognise,
    "imagenet1k": imagenet.recognise_1k,
    "imagenet21k-p": imagenet.recognise_21k_p,
    "imagenet21k": imagenet.recognise_21k,
    "named": imagenet.recognise_named,
    "folders": folders.recognise,
}
EXPECTED = {
    "kinetics": "train.csv or val.csv with a column youtube_id, and the clips below",
    "ssv2": "something-something-v2-train.json or labels/train.json, and the folder or the parts "
    "20bn-something-something-v2",
    "imagenet1k": "ILSVRC2012_img_train.tar, or folders train and val with ILSVRC2012_val_*.JPEG",
    "imagenet21k-p": "folders imagenet21k_train, imagenet21k_val and imagenet21k_small_classes of "
    "class folders, or a tar or .tar.gz of these",
    "imagenet21k": "a folder with one tar of images per class, such as n01440764.tar, or one tar "
    "or .tar.gz of such tars",
    "named": "a folder of images named <wnid>_*.JPEG",
    "folders": "a folder per class with images or videos, perhaps below train and val, or a tar or "
    ".tar.gz of these",
}


def find_source(archive: Place, layout: str = AUTO) -> Source:
    """Recognise a raw archive.

    Args:
        archive: A folder or file, of this machine or of an object store.
        layout: Name of the only layout to try; "auto": all of `LAYOUTS`, in their order.

    Raises:
        ArchiveError: There is no such archive or layout, the archive does not have the layout, or
            a list in it is broken. Names what lies there and what is expected.
    """
    if layout != AUTO and layout not in LAYOUTS:
        next_step = f"Take {AUTO} or one of {', '.join(LAYOUTS)}."
        raise ArchiveError(unknown_name("layout", layout, LAYOUTS, next_step=next_step))
    if not archive.is_folder() and not archive.is_file():
        raise ArchiveError(
            f"archive {archive} does not exist; expected is a folder, a tar or a .tar.gz: check "
            "the name"
        )
    for name, recognise in LAYOUTS.items():
        if layout in (AUTO, name) and (source := recognise(archive)) is not None:
            return source
    raise ArchiveError(
        f"archive {archive} {describe(archive)}; expected is {_expected(archive, layout)}"
        + ("" if layout == AUTO else f"; without --layout {layout} every layout is tried")
    )


def _expected(archive: Place, layout: str) -> str:
    """What the layout looks like, or those that come nearest to what lies there."""
    names = (layout,) if layout != AUTO else _nearest(archive)
    return ", or ".join(f"{EXPECTED[name]} ({name})" for name in names)


def _nearest(archive: Place) -> tuple[str, ...]:
    if not archive.is_folder():
        return ("folders", "imagenet21k")
    suffixes = {PurePosixPath(entry.name.lower()).suffix for entry in visible(archive)}
    if suffixes & {".csv", ".json"}:
        return ("kinetics", "ssv2")
    return ("folders", "imagenet21k") if ".tar" in suffixes else ("folders",)
