"""TPU hosts that are none: Ray nodes with the resources, labels and environment of TPU slices.

Ray reserves, places and starts for real; the functions that run speak gloo instead of XLA.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray._raylet import AuthenticationTokenLoader, Config
from ray.train import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util import placement_group, placement_group_table, remove_placement_group

from cluster.errors import LaunchError
from cluster.mailbox import Mailbox
from cluster.session import ray_session
from cluster.tpu import (
    Place,
    TpuSlices,
    XlaTpuBackend,
    XlaTpuConfig,
    check_slices,
    environments,
    xla_trainer,
)
from tests.ray_head import free_port

# The processes cannot import a test file: they get its functions by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

# `Cluster` starts nodes with the environment of its process, so that has one of its own.
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

dashboard, agent = map(int, sys.argv[1:3])
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "include_dashboard": True, "dashboard_host": "127.0.0.1",
    "dashboard_port": dashboard, "dashboard_agent_listen_port": agent,
    "object_store_memory": 100 << 20,
})
for node in json.loads(sys.argv[3]):
    cluster.add_node(wait=False, num_cpus=1, object_store_memory=80 << 20, **node)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

ONE = TpuSlices(kind="v4-16", topology="2x2x2", hosts=2)
TWO = TpuSlices(kind="v4-16", topology="2x2x2", hosts=4)


def host(slice_name, worker_id):
    """Arguments of a node that looks like a host of a v4-16 slice."""
    resources = {"TPU": 4, "accelerator_type:TPU-V4": 1}
    return {
        "resources": resources | ({"TPU-v4-16-head": 1} if worker_id == 0 else {}),
        "labels": {
            "ray.io/tpu-slice-name": slice_name,
            "ray.io/tpu-worker-id": str(worker_id),
            "ray.io/tpu-pod-type": "v4-16",
        },
        "env_vars": {
            "TPU_NAME": slice_name,
            "TPU_WORKER_ID": str(worker_id),
            "TPU_ACCELERATOR_TYPE": "v4-16",
            "TPU_TOPOLOGY": "2x2x2",
            "MEGASCALE_NUM_SLICES": "7",  # of an earlier set of slices
        },
    }


@contextmanager
def running_cluster(hosts) -> Iterator[None]:
    """Join a cluster of such hosts; it is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        patch.delenv("RAY_ADDRESS", raising=False)
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(free_port()), str(free_port()), json.dumps(hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            patch.setenv("RAY_ADDRESS", process.stdout.readline().strip())
            read_auth_again()
            with ray_session():
                yield
        finally:
            process.stdin.close()
            assert process.wait(timeout=60) == 0
            process.stdout.close()
    read_auth_again()


def read_auth_again():
    """Ray reads its authentication variables once per process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="module")
def slices():
    """Two slices of two hosts, and one that lost its first."""
    hosts = [host(name, worker_id) for name in ("left", "right") for worker_id in (1, 0)]
    with running_cluster([*hosts, host("torn", 1)]):
        yield


def run(function, slices, tmp_path):
    """What the processes put in their mailbox, by rank."""
    mailbox = Mailbox()
    trainer = xla_trainer(
        function,
        {"mailbox": mailbox},
        slices,
        timeout_s=60,
        run_config=RunConfig(
            name="run",
            storage_path=str(tmp_path),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    trainer.fit()
    return sorted(mailbox.take(), key=lambda said: said["rank"])


def introduce(argument):
    total = torch.tensor([1.0])
    dist.all_reduce(total)
    argument["mailbox"].put(
        {
            "rank": dist.get_rank(),
            "ray_rank": ray.train.get_context().get_world_rank(),
            "sum": total.item(),
            "node": ray.get_runtime_context().get_node_id(),
            "environment": dict(os.environ),
        }
    )


def fail_on_rank_one(argument):
    if dist.get_rank() == 1:
        raise ArithmeticError("host 1 cannot go on")
    dist.barrier()


def number_host(worker_id):
    os.environ["TPU_WORKER_ID"] = str(worker_id)


class NumberedAgainstRay(XlaTpuBackend):
    """As if the hosts were numbered against the order in which Ray has them."""

    def on_start(self, worker_group, backend_config):
        for ray_rank in range(len(worker_group)):
            worker_group.execute_single(ray_rank, number_host, len(worker_group) - 1 - ray_rank)
        super().on_start(worker_group, backend_config)


class NumberedZero(XlaTpuBackend):
    """As if all hosts were given the same number."""

    def on_start(self, worker_group, backend_config):
        worker_group.execute(number_host, 0)
        super().on_start(worker_group, backend_config)


def number_hosts_by(backend, monkeypatch):
    class Numbered(XlaTpuConfig):
        backend_cls = backend

    monkeypatch.setattr("cluster.tpu.XlaTpuConfig", Numbered)


def variables(said, *names):
    return {name: said["environment"].get(name) for name in names}


def wait_until(happened):
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_nothing_is_reserved():
    """Ray removes placement groups a little after it was told to."""
    wait_until(lambda: {each["state"] for each in placement_group_table().values()} == {"REMOVED"})


@pytest.mark.slow
def test_a_slice_gets_one_process_a_host_with_the_ranks_of_the_tpu(slices, tmp_path, monkeypatch):
    number_hosts_by(NumberedAgainstRay, monkeypatch)
    check_slices(ONE)

    first, second = run(introduce, ONE, tmp_path)

    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["ray_rank"], second["ray_rank"]) == (1, 0)
    assert (first["sum"], second["sum"]) == (2.0, 2.0)
    assert first["node"] != second["node"]
    assert first["environment"]["TPU_NAME"] == second["environment"]["TPU_NAME"] != "torn"
    for rank, said in enumerate([first, second]):
        assert variables(said, "PJRT_DEVICE", "TPU_WORKER_ID", "RANK", "WORLD_SIZE") == {
            "PJRT_DEVICE": "TPU",
            "TPU_WORKER_ID": str(rank),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
        }
        assert not [name for name in said["environment"] if name.startswith("MEGASCALE_")]
    assert_nothing_is_reserved()


@pytest.mark.slow
def test_two_slices_are_numbered_by_name_and_know_their_coordinator(slices, tmp_path):
    check_slices(TWO)

    said = run(introduce, TWO, tmp_path)

    places = [variables(each, "TPU_NAME", "TPU_WORKER_ID") for each in said]
    assert [tuple(place.values()) for place in places] == [
        ("left", "0"),
        ("left", "1"),
        ("right", "0"),
        ("right", "1"),
    ]
    assert len({each["node"] for each in said}) == 4
    for rank, each in enumerate(said):
        found = {k: v for k, v in each["environment"].items() if k.startswith("MEGASCALE_")}
        assert found == {
            "MEGASCALE_COORDINATOR_ADDRESS": each["environment"]["MASTER_ADDR"],
            "MEGASCALE_PORT": "8081",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": str(rank // 2),
        }
    assert_nothing_is_reserved()


@pytest.mark.slow
def test_a_failing_host_is_named_and_leaves_no_slice_reserved(slices, tmp_path):
    with pytest.raises(WorkerGroupError, match="host 1 cannot go on"):
        run(fail_on_rank_one, ONE, tmp_path)

    assert_nothing_is_reserved()


@pytest.mark.slow
def test_hosts_that_do_not_form_a_slice_leave_none_reserved(slices, tmp_path, monkeypatch):
    number_hosts_by(NumberedZero, monkeypatch)

    with pytest.raises(
        ControllerError, match=r"\(slice/TPU_WORKER_ID\) are (left/0, left/0|right/0, right/0), but"
    ) as caught:
        run(introduce, ONE, tmp_path)

    assert isinstance(caught.value.controller_failure, LaunchError)
    assert_nothing_is_reserved()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            TpuSlices(kind="v6e-16", topology="4x4", hosts=4),
            "the cluster has no TPU slice of kind v6e-16, it has v4-16; set "
            "parallel.accelerator_type to what it has, or add a slice to it",
        ),
        (
            TpuSlices(kind="v4-16", topology="2x2x2", hosts=6),
            "6 workers need 3 whole v4-16 slices of 2 hosts, but the cluster has 2 (torn has "
            "hosts 1 of 0 to 1); mend or add slices, or set parallel.num_workers to what there is",
        ),
        (
            TpuSlices(kind="v4-16", topology="2x2x2", hosts=2, cpus=3),
            "2 workers need 1 whole v4-16 slices of 2 hosts, but the cluster has 0 (left has "
            "a host of 1 CPU, 3 needed) (right has a host of 1 CPU, 3 needed) (torn has hosts 1 "
            "of 0 to 1); mend or add slices, or set parallel.num_workers to what there is",
        ),
    ],
)
def test_slices_that_the_cluster_lacks_are_refused_before_anything_starts(slices, wanted, message):
    before = placement_group_table()

    with pytest.raises(LaunchError, match=f"^{re.escape(message)}$"):
        check_slices(wanted)

    assert placement_group_table().keys() == before.keys()


def test_slices_that_another_run_holds_are_refused(slices, monkeypatch):
    monkeypatch.setattr("cluster.tpu._FREE_SECONDS", 0.5)
    held = placement_group([{"TPU": 4}], bundle_label_selector=[{"ray.io/tpu-slice-name": "left"}])
    try:
        assert held.wait(10)
        wait_until(lambda: ray.available_resources()["TPU"] == 16)
        check_slices(ONE)
        with pytest.raises(
            LaunchError,
            match=r"^4 workers need 2 free v4-16 slices, but the cluster has 1; wait for the run",
        ):
            check_slices(TWO)
    finally:
        remove_placement_group(held)


@pytest.mark.parametrize(
    ("kind", "topology", "hosts", "message"),
    [
        (
            "",
            "",
            2,
            "accelerator type '' is of no known TPU generation (v2, v3, v4, v5p, v5litepod, v6e, "
            "v7x); set parallel.accelerator_type to one such as v4-16",
        ),
        (
            "v6e-17",
            "4x4",
            4,
            "accelerator type 'v6e-17' is no size of v6e; set parallel.accelerator_type to one of "
            "v6e-1, v6e-4, v6e-8, v6e-16, v6e-32, v6e-64, v6e-128, v6e-256",
        ),
        (
            "v6e-16",
            "2x2x2",
            4,
            "topology '2x2x2' is none of v6e-16; set parallel.topology to 2x8 or 4x4",
        ),
        (
            "v6e-16",
            "4x4",
            6,
            "6 workers do not fill v6e-16 slices of 4 hosts, one worker each; set "
            "parallel.num_workers to a multiple of 4",
        ),
        (
            "v6e-16",
            "4x4",
            0,
            "0 workers do not fill v6e-16 slices of 4 hosts, one worker each; set "
            "parallel.num_workers to a multiple of 4",
        ),
    ],
)
def test_slices_that_cannot_exist_are_refused(kind, topology, hosts, message):
    with pytest.raises(LaunchError, match=f"^{re.escape(message)}$"):
        TpuSlices(kind=kind, topology=topology, hosts=hosts)


@pytest.mark.parametrize(
    ("kind", "topology", "hosts_each", "chips"),
    [
        ("v4-8", "2x2x1", 1, 4),
        ("v4-16", "2x2x2", 2, 4),
        ("v5litepod-8", "2x4", 1, 8),
        ("v5litepod-16", "4x4", 4, 4),
        ("v6e-256", "16x16", 64, 4),
    ],
)
def test_the_kind_and_topology_say_how_many_hosts_and_chips_a_slice_has(
    kind, topology, hosts_each, chips
):
    wanted = TpuSlices(kind=kind, topology=topology, hosts=3 * hosts_each, cpus=5)

    assert (wanted.hosts_each, wanted.slices) == (hosts_each, 3)
    assert wanted.host_resources == {"CPU": 5, "TPU": chips}


def at(slice_name, worker_id):
    return Place(
        slice_name=slice_name, worker_id=worker_id, address=f"{slice_name}{worker_id}", port=7000
    )


def test_ranks_run_through_the_slices_whatever_the_order_of_the_processes():
    told = environments([at("b", 1), at("a", 1), at("b", 0), at("a", 0)])

    assert [each["RANK"] for each in told] == ["3", "1", "2", "0"]
    assert [each["MEGASCALE_SLICE_ID"] for each in told] == ["1", "0", "1", "0"]
    assert {each["MASTER_ADDR"] for each in told} == {"a0"}
    assert {each["MEGASCALE_COORDINATOR_ADDRESS"] for each in told} == {"a0"}


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ([at("a", 0), at("a", 0)], "a/0, a/0"),
        ([at("a", 0), at("a", 2)], "a/0, a/2"),
        ([at("a", 0), at("a", 1), at("a", 2), at("b", 0)], "a/0, a/1, a/2, b/0"),
        ([at("a", 0), at("a", 1), at("b", 0)], "a/0, a/1, b/0"),
    ],
)
def test_places_that_do_not_form_equal_slices_are_refused(places, found):
    message = (
        f"TPU hosts (slice/TPU_WORKER_ID) are {found}, but every slice needs the same number of "
        "hosts, numbered from 0; mend TPU_WORKER_ID and TPU_NAME on the hosts"
    )
    with pytest.raises(LaunchError, match=f"^{re.escape(message)}$"):
        environments(places)
