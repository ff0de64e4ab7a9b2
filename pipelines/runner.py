"""A training run from the driver's side: its folder, its data, its workers, its record.

Everything that a user may have got wrong is checked here, before a worker starts. The loop
itself is in `train`, what happens on a worker in `worker`.
"""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cluster.errors import CollectiveError
from cluster.launch import Workers, run_on_workers
from cluster.mailbox import Mailbox
from cluster.session import ray_session
from mone_core.models import build_model
from mone_core.warmstart import Report
from pipelines.checkpoint import newest_checkpoint, step_of
from pipelines.config import CONFIG, RunConfig, flatten, read_config, write_config
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.order import steps_per_epoch
from pipelines.errors import DatasetError, RunError, RunFailedError
from pipelines.files import write_json
from pipelines.metrics import METRICS, MetricRow, read_rows, rewind
from pipelines.run_data import DATA, data_of, read_data
from pipelines.storage import place
from pipelines.terminal import Terminal
from pipelines.tracking import Tracker
from pipelines.train import Outcome
from pipelines.weights import start_from
from pipelines.worker import train_worker

# What may change between two starts of one run: none of it changes a single loss, other than
# another sharing out of the work by the order in which numbers are added up.
_MAY_CHANGE = (
    "out",  # a folder that was moved
    "train.microbatches",
    "parallel.num_workers",
    "parallel.expert",
    "parallel.shard",
    "train.keep_checkpoints",
    "parallel.collective_timeout_s",
    "tracking.uri",
    "tracking.experiment",
    "tracking.model",
    "data.root",
    "data.embedded",
    "data.reader",
    "data.read.threads",
    "data.read.prefetch",
    "data.read.check",
    "data.read.remote",
    "data.read.cache",
    "data.read.cache_gib",
    "data.read.on_corrupt",  # where it matters, the run has stopped or goes on with other samples
    "data.read.corrupt_share",
)


def run_training(
    config: RunConfig, terminal: Terminal, *, tracker: Tracker, verbose: bool = False
) -> Outcome:
    """Train a run to its end, or on from where it stopped, and keep its record.

    Args:
        config: The run, as `resolve` gave it; its folder has been opened by `open_run`.
        terminal: Where progress is shown.
        tracker: Where metrics go besides the run's own file.
        verbose: Let Ray and the workers write to the terminal.

    Raises:
        RunFailedError: A worker failed.
    """
    done = steps_done(config.out)
    rewind(config.out, done)
    tracker.resume_after(read_rows(config.out))
    with (
        ray_session(verbose=verbose),
        terminal.meter("training", "steps") as meter,
    ):
        mailbox = Mailbox()
        outcomes: list[Outcome] = []
        meter.update(done, config.train.steps, "starting workers")

        def on_message(message: MetricRow | Outcome) -> None:
            if isinstance(message, Outcome):
                outcomes.append(message)
                return
            tracker.log(message)
            if "loss" in message.values:
                meter.update(message.step, config.train.steps, _note(message))

        with _stop_signals(mailbox.ask_to_stop), _goes_on_later(config):
            run_on_workers(
                train_worker,
                {"config": config, "data": read_data(config.out), "mailbox": mailbox},
                workers_of(config),
                storage=config.out / ".ray-train",
                mailbox=mailbox,
                on_message=on_message,
            )
    if not outcomes:
        raise RunFailedError(f"training of {config.out} ended without saying how")
    return outcomes[0]


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what only the data knows: absolute paths and the number of classes.

    Raises:
        DatasetError: The data is not there, is less than a batch, or training and validation
            differ in classes.
    """
    root = place(config.data.root).absolute()
    start, read = config.train.start_from, config.data.read
    read = dataclasses.replace(read, cache=read.cache and read.cache.expanduser().absolute())
    train, val = read_manifest(root / "train"), read_manifest(root / "val")
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise DatasetError(
            f"{root}: training has {len(train.classes)} classes and validation "
            f"{len(val.classes)}, which differ in {', '.join(odd) or 'their order'}; shard the "
            f"validation archive with `mone shard VAL {root / 'val'} --classes-of {root / 'train'}`"
        )
    steps_per_epoch(train.samples, config.train.batch_size)  # refuses what is less than a batch
    return dataclasses.replace(
        config,
        out=config.out.expanduser().absolute(),
        data=dataclasses.replace(config.data, root=str(root), read=read),
        model=dataclasses.replace(config.model, num_classes=len(train.classes)),
        train=dataclasses.replace(config.train, start_from=start and start.expanduser().absolute()),
    )


def workers_of(config: RunConfig) -> Workers:
    """The processes that a run asks a cluster for."""
    parallel = config.parallel
    return Workers(
        count=parallel.num_workers,
        device=parallel.device,
        cpus=parallel.threads,
        collective_timeout_s=parallel.collective_timeout_s,
        accelerator_type=parallel.accelerator_type,
        topology=parallel.topology,
    )


def check_run(config: RunConfig) -> int:
    """Refuse a folder that this run cannot be made or continued in; make nothing.

    Returns:
        Steps already done: 0 for a new run, also for one that was killed before its first row.

    Raises:
        RunError: The folder holds something else, a run with other values or of other data.
    """
    if (config.out / CONFIG).is_file():
        done = steps_done(config.out)
        if done or (config.out / METRICS).is_file():
            _check_same(read_config(config.out), config)
            if done < config.train.steps:
                _check_data(config)
        if not done:
            check_start(config)
        return done
    if config.out.exists():
        if not config.out.is_dir():
            raise RunError(f"{config.out} is a file; name a new folder with --out")
        others = sorted(path.name for path in config.out.iterdir())
        if others:
            raise RunError(
                f"{config.out} holds something else ({others[0]}"
                f"{', ...' if len(others) > 1 else ''}) and no run; name a new folder with --out"
            )
    check_start(config)
    return 0


def open_run(config: RunConfig) -> int:
    """Make a run's folder, or take up the one there; as `check_run` otherwise."""
    done = check_run(config)
    if not done and not (config.out / METRICS).is_file():
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / DATA, data_of(place(config.data.root)))
        write_config(config.out, config)
    return done


def _check_data(config: RunConfig) -> None:
    """The order of samples is a function of the manifest: another one is another run."""
    began, now = read_data(config.out), data_of(place(config.data.root))
    changed = [part for part in ("train", "val") if getattr(began, part) != getattr(now, part)]
    if changed:
        raise RunError(
            f"the data in {config.data.root}/{changed[0]} is not what {config.out} began with (its "
            f"{MANIFEST} is another); give that data with --data.root, or start a new run with "
            f"--out"
        )


def check_start(config: RunConfig) -> Report | None:
    """Fit the weights that a run starts from to a throw-away model; what became of them.

    Raises:
        RunError: They do not fit.
    """
    if config.train.start_from is None:
        return None
    model = build_model(config.model)
    return start_from(model, config.train.start_from, config.train.start_allow)


def _check_same(old: RunConfig, new: RunConfig) -> None:
    before, after = flatten(old), flatten(new)
    odd = [
        f"{name} was {before[name]}, now {after[name]}"
        for name in before
        if name not in _MAY_CHANGE and before[name] != after[name]
    ]
    if odd:
        kind = "another model" if any(line.startswith("model.") for line in odd) else "other values"
        raise RunError(
            f"{new.out} holds checkpoints of a run with {kind}: {'; '.join(odd)}. Give the same "
            f"values to go on with it, or another --out to start a new run"
        )


def steps_done(run: Path) -> int:
    """Optimizer steps behind a run's newest whole checkpoint; 0 without one."""
    found = newest_checkpoint(run)
    return step_of(found) if found else 0


def _note(row: MetricRow) -> str:
    values = row.values
    return f"loss {values['loss']:.3f}  {values['images_per_second']:.0f} samples/s"


@contextmanager
def _goes_on_later(config: RunConfig) -> Iterator[None]:
    """Workers that lost each other are nobody's mistake, and cost no more than some steps."""
    try:
        yield
    except CollectiveError as error:
        raise RunFailedError(
            f"{error}; the same command goes on from the last checkpoint in {config.out}"
        ) from error


@contextmanager
def _stop_signals(ask: Callable[[], None]) -> Iterator[None]:
    """First SIGINT or SIGTERM: finish the steps up to a checkpoint. Second: stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
