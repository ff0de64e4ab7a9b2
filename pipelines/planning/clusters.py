"""Descriptions of clusters: data files in which every number names its source.

`clusters/` beside this package holds some; a path to a file of one's own is as good. What the
numbers mean for a run is in `estimate`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mone_core.roofline import Accelerator
from pipelines.errors import UsageError, unknown_name

FOLDER = Path(__file__).parents[1] / "clusters"
Dtype = Literal["float32", "bfloat16"]

_FACTS = ("what", "devices", "island", "dtype", "overlap")
_FAST = {
    "slow_bytes_per_second": "fast_bytes_per_second",
    "slow_latency_seconds": "fast_latency_seconds",
}
_MAY_BE_ZERO = ("call_seconds", "fast_latency_seconds", "slow_latency_seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """What one device of a cluster can do.

    Links are counted one way. Whatever ends in "_share" is the part, up to 1, of the number that
    it belongs to which a training reaches.

    Attributes:
        flops_per_second: Peak of products in the cluster's dtype.
        product_share: Of `flops_per_second`; attention's core is taken to reach half of it.
        memory_bytes: Memory of a device.
        memory_share: Of `memory_bytes`: what allocator and libraries leave.
        memory_bytes_per_second: Peak traffic of that memory, reads and writes together.
        traffic_share: Of `memory_bytes_per_second`, in norms, GELU and the like.
        call_seconds: What every call of torch costs, however small; 0 where a step is captured or
            compiled as a whole.
        fast_bytes_per_second: Between devices of one island.
        fast_latency_seconds: Of one collective within an island, however small.
        slow_bytes_per_second: Between devices of different islands.
        slow_latency_seconds: Of one collective that leaves an island.
        exchange_share: Of a link, in an all-to-all.
        reduction_share: Of a link, in an all-reduce.
    """

    flops_per_second: float
    product_share: float
    memory_bytes: float
    memory_share: float
    memory_bytes_per_second: float
    traffic_share: float
    call_seconds: float
    fast_bytes_per_second: float
    fast_latency_seconds: float
    slow_bytes_per_second: float
    slow_latency_seconds: float
    exchange_share: float
    reduction_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A described cluster.

    Attributes:
        name: What it was asked for by.
        what: One line for people.
        devices: How many there are; one rank each.
        island: Neighbouring ranks that the fast link joins (a host's NVLink, a slice's ICI).
        dtype: Of products, activations and what travels in an all-to-all. Weights, gradients and
            moments are float32.
        overlap: Whether communication runs beside products.
        numbers: What a device can do.
        sources: Where each number comes from.
    """

    name: str
    what: str
    devices: int
    island: int
    dtype: Dtype
    overlap: bool
    numbers: Numbers
    sources: Mapping[str, str]

    @property
    def item(self) -> int:
        """Bytes of an element of `dtype`."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]

    @property
    def room(self) -> float:
        """Bytes of a device that a training may fill."""
        return self.numbers.memory_share * self.numbers.memory_bytes

    @property
    def device(self) -> Accelerator:
        """What a device reaches of its peaks."""
        n = self.numbers
        return Accelerator(
            flops=n.product_share * n.flops_per_second,
            bandwidth=n.traffic_share * n.memory_bytes_per_second,
        )

    def product_seconds(self, flops: float) -> float:
        """Time of products that memory does not hold up."""
        return self.device.seconds(flops, 0)

    def traffic_seconds(self, num_bytes: float) -> float:
        """Time of reading and writing a device's memory."""
        return self.device.seconds(0, num_bytes)


def cluster_names() -> tuple[str, ...]:
    """The clusters that are described here."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_cluster(name: str) -> Cluster:
    """Read a description.

    Args:
        name: One of `cluster_names()`, with or without `.yaml`, or the path of a file.

    Raises:
        UsageError: No such description or file, or one with a field that is missing, unknown or
            out of range; one line that names file, field, value, what is allowed and an example.
    """
    path = Path(name)
    if not path.is_file():
        path = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise UsageError(
            unknown_name(
                "cluster",
                name,
                cluster_names(),
                next_step=f"Name one of {', '.join(cluster_names())}, or the path of a file like "
                f"{FOLDER / 'h100x64.yaml'}.",
            )
        )
    return _File(path).cluster()


class _File:
    """One description on its way in; every refusal names the file and shows where to look."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cluster(self) -> Cluster:
        tree = self._mapping("the file", self._parsed(), (*_FACTS, "numbers"))
        devices = self._whole(tree, "devices")
        island = self._whole(tree, "island")
        if devices % island:
            raise self._wrong("island", f"divide the {devices} devices", island)
        if tree["dtype"] not in get_args(Dtype):
            raise self._wrong("dtype", f"be one of {', '.join(get_args(Dtype))}", tree["dtype"])
        if not isinstance(tree["overlap"], bool):
            raise self._wrong("overlap", "be true or false", tree["overlap"])
        if not isinstance(tree["what"], str) or not tree["what"]:
            raise self._wrong("what", "be a line of text", tree["what"])
        numbers, sources = self._numbers(tree["numbers"], alone=devices == island)
        return Cluster(
            name=self.path.stem,
            what=tree["what"],
            devices=devices,
            island=island,
            dtype=tree["dtype"],
            overlap=tree["overlap"],
            numbers=numbers,
            sources=sources,
        )

    def _parsed(self) -> Any:
        try:
            return yaml.safe_load(self.path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} is not YAML: {' '.join(str(error).split())}") from error

    def _numbers(self, given: Any, *, alone: bool) -> tuple[Numbers, dict[str, str]]:
        """Values and sources; in a single island no link is slow, and none need be described."""
        names = tuple(each.name for each in fields(Numbers))
        entries = self._mapping("numbers", given, names, optional=tuple(_FAST) if alone else ())
        entries |= {slow: entries[fast] for slow, fast in _FAST.items() if slow not in entries}
        values, sources = {}, {}
        for name in names:
            entry = self._mapping(f"numbers.{name}", entries[name], ("value", "source"))
            values[name] = self._number(name, entry["value"])
            if not isinstance(entry["source"], str) or not entry["source"].strip():
                allowed = "say where the value comes from (a data sheet, or who measured it)"
                raise self._wrong(f"numbers.{name}.source", allowed, entry["source"])
            sources[name] = entry["source"]
        return Numbers(**values), sources

    def _number(self, name: str, value: Any) -> float:
        try:  # YAML 1.1 reads `1e-3` as text; people mean a number
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        most = 1.0 if name.endswith("_share") else math.inf
        above = number >= 0 if name in _MAY_BE_ZERO else number > 0
        if not (above and number <= most and math.isfinite(number)):
            low = "0 or more" if name in _MAY_BE_ZERO else "above 0"
            high = " and at most 1" if most == 1 else ""
            raise self._wrong(f"numbers.{name}.value", f"be a number {low}{high}", value)
        return number

    def _whole(self, tree: dict[str, Any], name: str) -> int:
        value = tree[name]
        if type(value) is not int or value < 1:
            raise self._wrong(name, "be a whole number of 1 or more", value)
        return value

    def _mapping(
        self, where: str, given: Any, names: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise self._wrong(where, f"be a mapping of {', '.join(names)}", given)
        for name in given:
            if name not in names:
                step = f"{where} takes {', '.join(names)}."
                raise UsageError(
                    f"{self.path}: " + unknown_name("field", str(name), names, next_step=step)
                )
        for name in names:
            if name not in given and name not in optional:
                raise UsageError(
                    f"{self.path}: {where} lacks {name}; {FOLDER / 'h100x64.yaml'} shows a whole "
                    f"file"
                )
        return dict(given)

    def _wrong(self, field: str, allowed: str, value: Any) -> UsageError:
        return UsageError(
            f"{self.path}: {field} must {allowed}, got {value!r}; {FOLDER / 'h100x64.yaml'} shows "
            f"a whole file"
        )
