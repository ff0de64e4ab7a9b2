"""What data a run began with: `data.json`, beside its configuration.

The order of samples is a function of the manifest, so data with another one is another run: the
driver compares before it starts workers, and every process that reads compares once more.
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines.data.manifest import classes_sha256, read_manifest
from pipelines.errors import RunError
from pipelines.files import read_json
from pipelines.storage import Place

DATA = "data.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The data of a run.

    Attributes:
        train, val: Digest of the manifest of either part.
        classes: Hash of the class names in label order, which both parts share.
    """

    train: str
    val: str
    classes: str


def data_of(root: Place) -> RunData:
    """The data that lie there now."""
    train, val = read_manifest(root / "train"), read_manifest(root / "val")
    classes = classes_sha256(train.classes)
    return RunData(train=train.digest, val=val.digest, classes=classes)


def read_data(run: Path) -> RunData:
    """The data that a run began with."""
    return read_json(run / DATA, RunData, otherwise=RunError)
