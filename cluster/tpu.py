"""TPU hosts for torch-xla in SPMD mode: one training process a host, whole slices only.

Ray reserves the slices and starts the processes; what torch-xla needs of its surroundings comes
from here. A rank is a host's place in the TPU's own order (slice by slice, then `TPU_WORKER_ID`),
never Ray's, which follows the order in which processes happened to be placed.

Nothing here knows torch-xla: the process that runs the function may import it afterwards.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray._private.accelerators.tpu import VALID_TPU_TOPOLOGY, infer_tpu_pod_type_from_topology
from ray._private.state import available_resources_per_node
from ray.train import BackendConfig, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend
from ray.train.torch.config import _setup_torch_process_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.tpu import get_tpu_coordinator_env_vars, get_tpu_worker_resources

from cluster.errors import LaunchError

# Labels that Ray gives a TPU host, from its environment (GKE) or the metadata server (GCE).
SLICE_LABEL = "ray.io/tpu-slice-name"
WORKER_LABEL = "ray.io/tpu-worker-id"
KIND_LABEL = "ray.io/tpu-pod-type"

_Node = dict[str, Any]  # as `ray.nodes()` describes it

_FREE_SECONDS = 10.0  # that a slice may take to be free after the run that held it
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class TpuSlices:
    """Whole TPU slices of one kind; made only if they can exist.

    Attributes:
        kind: What Google calls the accelerator type or pod type, such as "v4-16".
        topology: Chips along each axis of one slice, such as "2x2x2".
        hosts: Hosts of all slices together, one training process each.
        cpus: CPU cores for each process.

    Raises:
        LaunchError: No such kind, no such topology of it, or hosts that do not fill slices.
    """

    kind: str
    topology: str
    hosts: int
    cpus: int = 1

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.topology)
        if self.hosts < 1 or self.hosts % self.hosts_each:
            raise LaunchError(
                f"{self.hosts} workers do not fill {self.kind} slices of {self.hosts_each} hosts, "
                f"one worker each; set parallel.num_workers to a multiple of {self.hosts_each}"
            )

    @property
    def accelerator(self) -> str:
        """Ray's name for the generation, such as "TPU-V4"."""
        return f"TPU-{_generation(self.kind).upper()}"

    @property
    def hosts_each(self) -> int:
        """Hosts of one slice."""
        return int(get_tpu_worker_resources(self.topology, self.accelerator)[0])

    @property
    def slices(self) -> int:
        """How many slices."""
        return self.hosts // self.hosts_each

    @property
    def host_resources(self) -> dict[str, float]:
        """What one process takes: all chips of its host, and its CPU cores."""
        given = {"CPU": self.cpus}
        return dict(get_tpu_worker_resources(self.topology, self.accelerator, given)[1])


def check_slices(wanted: TpuSlices) -> None:
    """Refuse slices that the running cluster does not hold whole and free.

    Ray would wait for them, and a run that Ray gives up late leaves placement groups behind.

    Raises:
        LaunchError: Says what is needed and what there is.
    """
    present = _slices_by_kind()
    if wanted.kind not in present:
        there = ", ".join(sorted(present)) or "no TPU"
        raise LaunchError(
            f"the cluster has no TPU slice of kind {wanted.kind}, it has {there}; set "
            "parallel.accelerator_type to what it has, or add a slice to it"
        )
    flaws = {
        name: flaw
        for name, hosts in sorted(present[wanted.kind].items())
        if (flaw := _flaw(hosts, wanted))
    }
    whole = [hosts for name, hosts in present[wanted.kind].items() if name not in flaws]
    if len(whole) < wanted.slices:
        broken = "".join(f" ({name} has {flaw})" for name, flaw in flaws.items())
        raise LaunchError(
            f"{wanted.hosts} workers need {wanted.slices} whole {wanted.kind} slices of "
            f"{wanted.hosts_each} hosts, but the cluster has {len(whole)}{broken}; mend or add "
            f"slices, or set parallel.num_workers to what there is"
        )
    _wait_until_free(whole, wanted)


def xla_trainer(
    function: Callable[[dict[str, Any]], None],
    argument: dict[str, Any],
    slices: TpuSlices,
    *,
    timeout_s: int,
    run_config: RunConfig,
) -> DataParallelTrainer:
    """A trainer that calls `function(argument)` on every host of slices that it reserves.

    Args:
        function: What each process runs, inside a gloo process group of all hosts.
        argument: Given to every process.
        slices: Where; `check_slices` comes first.
        timeout_s: Seconds after which a collective between hosts that does not complete fails.
        run_config: Ray Train's own.
    """
    return DataParallelTrainer(
        function,
        train_loop_config=argument,
        backend_config=XlaTpuConfig(timeout_s=timeout_s),
        scaling_config=ScalingConfig(
            num_workers=slices.hosts,
            use_tpu=True,
            topology=slices.topology,
            accelerator_type=slices.accelerator,
            resources_per_worker=slices.host_resources,
        ),
        run_config=run_config,
    )


class XlaTpuConfig(BackendConfig):  # type: ignore[misc]
    """How Ray Train prepares TPU hosts for torch-xla.

    The function runs inside a gloo process group of all hosts, whose ranks are the TPU's: for
    what the hosts tell each other outside of the compiled program.

    Args:
        timeout_s: Seconds after which a collective between hosts that does not complete fails.
    """

    def __init__(self, *, timeout_s: int) -> None:
        self.timeout_s = timeout_s

    @property
    def backend_cls(self) -> type[Backend]:
        """What acts on the processes."""
        return XlaTpuBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """What surrounds the function on every process."""
        return partial(_process_group, self.timeout_s)


class XlaTpuBackend(Backend):  # type: ignore[misc]
    """Gives every process the environment of its place before it loads the function."""

    def on_start(self, worker_group: Any, backend_config: XlaTpuConfig) -> None:  # noqa: ARG002
        """Ask every process where it stands, and tell it what follows from that.

        Raises:
            LaunchError: The hosts do not form whole slices.
        """
        try:
            told = environments(worker_group.execute(_introduce))
            ray.get(
                [worker_group.execute_single_async(i, _take, told[i]) for i in range(len(told))]
            )
        except Exception:
            # Ray forgets a group that fails here, and its placement groups with it.
            worker_group.get_worker_group_state().shutdown()
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one process stands.

    Attributes:
        slice_name: The slice of its host.
        worker_id: The host's number in the slice, from 0.
        address: The host's address inside the cluster.
        port: A port free on the host.
    """

    slice_name: str
    worker_id: int
    address: str
    port: int


def environments(places: Sequence[Place]) -> list[dict[str, str]]:
    """The variables that each process needs, in the order given.

    Slices are numbered by name and ranks run through them one after another. The TPU's own
    variables (`TPU_WORKER_ID`, `TPU_WORKER_HOSTNAMES`, ...) belong to the host and stay as
    they are.

    Raises:
        LaunchError: The places do not form slices of equal size, hosts numbered from 0.
    """
    names = sorted({place.slice_name for place in places})
    each = len(places) // len(names)
    ordered = sorted(places, key=lambda place: (place.slice_name, place.worker_id))
    found = [(place.slice_name, place.worker_id) for place in ordered]
    if found != [(name, worker_id) for name in names for worker_id in range(each)]:
        standing = ", ".join(f"{name}/{worker_id}" for name, worker_id in found)
        raise LaunchError(
            f"TPU hosts (slice/TPU_WORKER_ID) are {standing}, but every slice needs the same "
            "number of hosts, numbered from 0; mend TPU_WORKER_ID and TPU_NAME on the hosts"
        )
    first = ordered[0]
    shared = {
        "PJRT_DEVICE": "TPU",
        "WORLD_SIZE": str(len(places)),
        "MASTER_ADDR": first.address,
        "MASTER_PORT": str(first.port),
    }
    return [
        shared
        | {"RANK": str(ordered.index(place))}
        | _between_slices(first.address, len(names), names.index(place.slice_name))
        for place in places
    ]


def _between_slices(coordinator: str, slices: int, index: int) -> dict[str, str]:
    """The MEGASCALE_* variables of a slice; none for a slice alone."""
    if slices == 1:
        return {}
    return dict(get_tpu_coordinator_env_vars(coordinator, slices, index))


def _introduce() -> Place:
    """Runs in the process: where it stands, by the variables that libtpu goes by."""
    labels = ray.get_runtime_context().get_node_labels()
    address, port = get_address_and_port()
    return Place(
        slice_name=labels.get(SLICE_LABEL) or ray.get_runtime_context().get_node_id(),
        worker_id=int(os.environ.get("TPU_WORKER_ID") or labels.get(WORKER_LABEL) or 0),
        address=address,
        port=port,
    )


def _take(environment: dict[str, str]) -> None:
    """Runs in the process: what the host held of an earlier set of slices goes."""
    for name in get_tpu_coordinator_env_vars("", 1, 0):
        os.environ.pop(name, None)
    os.environ.update(environment)


@contextmanager
def _process_group(timeout_s: int) -> Iterator[None]:
    """Runs in the process, which ends with the run and the group with it."""
    _setup_torch_process_group(
        backend="gloo",
        world_rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        init_method="env://",
        timeout_s=timeout_s,
    )
    yield


def _generation(kind: str) -> str:
    return kind.partition("-")[0]


def _check_kind(kind: str, topology: str) -> None:
    """Refuse a kind that Ray does not know, or a topology that is not of that kind."""
    generation = _generation(kind)
    if generation not in VALID_TPU_TOPOLOGY:
        raise LaunchError(
            f"accelerator type {kind!r} is of no known TPU generation "
            f"({', '.join(VALID_TPU_TOPOLOGY)}); set parallel.accelerator_type to one such as v4-16"
        )
    topologies: dict[str, list[str]] = defaultdict(list)
    for known in sorted(VALID_TPU_TOPOLOGY[generation]):
        topologies[infer_tpu_pod_type_from_topology(known, generation)].append(known)
    if kind not in topologies:
        sizes = sorted(topologies, key=lambda name: int(name.partition("-")[2]))
        raise LaunchError(
            f"accelerator type {kind!r} is no size of {generation}; set parallel.accelerator_type "
            f"to one of {', '.join(sizes)}"
        )
    if topology not in topologies[kind]:
        raise LaunchError(
            f"topology {topology!r} is none of {kind}; set parallel.topology to "
            f"{' or '.join(topologies[kind])}"
        )


def _slices_by_kind() -> dict[str, dict[str, list[_Node]]]:
    """The living TPU hosts of the cluster, by kind and by slice."""
    kinds: dict[str, dict[str, list[_Node]]] = defaultdict(lambda: defaultdict(list))
    for node in ray.nodes():
        labels = node["Labels"]
        if node["Alive"] and KIND_LABEL in labels:
            kinds[labels[KIND_LABEL]][labels.get(SLICE_LABEL) or node["NodeID"]].append(node)
    return kinds


def _flaw(hosts: list[_Node], wanted: TpuSlices) -> str | None:
    """What a slice lacks to run the processes; None when nothing."""
    numbers = sorted(int(host["Labels"].get(WORKER_LABEL) or 0) for host in hosts)
    if numbers != list(range(wanted.hosts_each)):
        return f"hosts {', '.join(map(str, numbers))} of 0 to {wanted.hosts_each - 1}"
    for name, amount in wanted.host_resources.items():
        least = min(host["Resources"].get(name, 0) for host in hosts)
        if least < amount:
            return f"a host of {least:g} {name}, {amount:g} needed"
    return None


def _wait_until_free(slices: list[list[_Node]], wanted: TpuSlices) -> None:
    """Give slices a moment: Ray frees those of a run that just ended a little later."""
    deadline = time.monotonic() + _FREE_SECONDS
    while (free := _count_free(slices, wanted)) < wanted.slices:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{wanted.hosts} workers need {wanted.slices} free {wanted.kind} slices, but the "
                f"cluster has {free}; wait for the run that holds the others, or end it"
            )
        time.sleep(_POLL_SECONDS)


def _count_free(slices: list[list[_Node]], wanted: TpuSlices) -> int:
    """How many slices could start the processes now.

    Ray's own `get_num_ready_tpu_slices` takes a host for free whose chips are all in use: what
    is used up is absent from what Ray calls available.
    """
    left = available_resources_per_node()
    return sum(
        all(
            left.get(host["NodeID"], {}).get(name, 0) >= amount
            for host in hosts
            for name, amount in wanted.host_resources.items()
        )
        for hosts in slices
    )
