"""Running one function on every training process, by Ray Train V2.

Ray Train places the processes and connects them; checkpoints, resume and metrics are ours
(`pipelines`), so its own storage holds nothing that anybody would miss.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.errors import CollectiveError, LaunchError
from cluster.mailbox import Mailbox
from cluster.session import cluster_cpus
from cluster.tpu import TpuSlices, check_slices, xla_trainer

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How many training processes, and what each needs.

    Attributes:
        count: Training processes: one device each, on TPU one host each.
        device: "cpu", "cuda" or "xla".
        cpus: CPU cores for each process.
        collective_timeout_s: Seconds after which a collective that does not complete fails.
        accelerator_type: Kind of TPU slice for "xla", such as "v4-16".
        topology: Chips along each axis of such a slice, such as "2x2x2".
    """

    count: int
    device: Literal["cpu", "cuda", "xla"]
    collective_timeout_s: int
    cpus: int = 1
    accelerator_type: str = ""
    topology: str = ""


def run_on_workers(
    function: Callable[[dict[str, Any]], None],
    argument: dict[str, Any],
    workers: Workers,
    *,
    storage: Path,
    mailbox: Mailbox,
    on_message: Callable[[Any], None],
) -> None:
    """Call `function(argument)` on every training process and wait for all of them.

    Args:
        function: What each process runs, inside an initialised torch process group.
        argument: Given to every process.
        workers: How many processes and their resources.
        storage: Folder that all hosts share, for Ray Train's own files; removed afterwards.
        mailbox: The box that the processes put messages in.
        on_message: Called in this thread for every message, in order.

    Raises:
        LaunchError: The cluster lacks what the workers need.
        Exception: What the function raised, when it failed on a process.
    """
    check_resources(workers)
    trainer = _trainer(function, argument, workers, storage)
    shutil.rmtree(storage, ignore_errors=True)  # of a killed run: Ray would resume from it
    try:
        _fit(trainer, mailbox, on_message)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _trainer(
    function: Callable[[dict[str, Any]], None],
    argument: dict[str, Any],
    workers: Workers,
    storage: Path,
) -> DataParallelTrainer:
    run_config = RunConfig(
        name="run",
        storage_path=str(storage),
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
    )
    if workers.device == "xla":
        return xla_trainer(
            function,
            argument,
            _slices(workers),
            timeout_s=workers.collective_timeout_s,
            run_config=run_config,
        )
    return TorchTrainer(
        function,
        train_loop_config=argument,
        torch_config=TorchConfig(timeout_s=workers.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.device == "cuda",
            resources_per_worker={"CPU": workers.cpus} | _gpu(workers),
        ),
        run_config=run_config,
    )


def _slices(workers: Workers) -> TpuSlices:
    return TpuSlices(
        kind=workers.accelerator_type,
        topology=workers.topology,
        hosts=workers.count,
        cpus=workers.cpus,
    )


def _fit(trainer: DataParallelTrainer, mailbox: Mailbox, on_message: Callable[[Any], None]) -> None:
    """Fit in a thread of its own: this one hands on messages and stays open to signals."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            failures.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        for message in mailbox.take():
            on_message(message)
    if failures:
        raise _cause(failures[0])


def _cause(error: BaseException) -> BaseException:
    """The exception that a process raised, rather than the layers around it.

    Where one failed and the others could not go on without it, the one that failed.
    """
    if not isinstance(error, TrainingFailedError):
        return error
    raised: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    if not raised:
        cause: BaseException = getattr(error, "controller_failure", error)
        return cause
    return raised[min(raised, key=lambda r: (isinstance(raised[r], CollectiveError), r))]


def check_resources(workers: Workers) -> None:
    """Refuse what the running cluster cannot hold: Ray would wait for ever for it.

    Raises:
        LaunchError: Says what is needed and what there is.
    """
    if workers.device == "xla":
        check_slices(_slices(workers))
        return
    cpus = cluster_cpus()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if workers.count * workers.cpus > cpus:
        raise LaunchError(
            f"{workers.count} workers of {workers.cpus} CPU need {workers.count * workers.cpus} "
            f"CPUs, but the cluster has {cpus}; set parallel.num_workers to {cpus} or fewer"
        )
    if workers.device == "cuda" and workers.count > gpus:
        raise LaunchError(
            f"{workers.count} cuda workers need {workers.count} GPUs, but the cluster has {gpus}; "
            f"set parallel.num_workers to at most that, or parallel.device to cpu"
        )


def _gpu(workers: Workers) -> dict[str, int]:
    return {"GPU": 1} if workers.device == "cuda" else {}
