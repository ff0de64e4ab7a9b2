"""The training loop: batch in, step, then whatever is due.

It knows neither Ray nor MLflow nor the cluster. What it runs with comes in as a `Run`
(`build`); whom it tells goes in as a `Reporter`.

Losses stay on the device; the host looks once per metric row (`_training_row`).
"""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW

from cluster.backends import Backend, Placed
from mone_core.load import load_sums, summary
from mone_core.losses import sigmoid_loss, softmax_loss
from mone_core.models import ViT
from pipelines.checkpoint import Checkpoints
from pipelines.config import RunConfig
from pipelines.data.batch import Batch
from pipelines.data.order import Position, mix64
from pipelines.data.stream import EvalStream
from pipelines.errors import RunFailedError
from pipelines.evaluate import score
from pipelines.gradients import clip_gradients, compute_gradients
from pipelines.load import LoadTable
from pipelines.metrics import MetricRow
from pipelines.optim import learning_rate, set_learning_rate
from pipelines.skipped import COUNT, VAL_COUNT, SkipList, skipped_until

LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
_NOISE = 1  # tells the seed of a step's noise from that of its budget


class Measured(NamedTuple):
    """What one step leaves on the device for the next metric row.

    Attributes:
        loss_and_norm: Loss of this rank in nats (mean over the step's budgets) and norm of the
            whole gradient before clipping, shape [2].
        load: Sums over this rank's tokens, `mone_core.load`; None without sparse experts.
    """

    loss_and_norm: Tensor
    load: Tensor | None


class Outcome(StrEnum):
    """How a training ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # asked to, after a checkpoint; the same command goes on


class Reporter(Protocol):
    """Whom a training tells. Called on rank 0 only."""

    def report(self, row: MetricRow) -> bool:
        """Take a row of metrics; the answer True asks the training to stop."""
        ...


class TrainBatches(Protocol):
    """Where training batches come from."""

    @property
    def num_samples(self) -> int:
        """Samples in the dataset."""
        ...

    @property
    def skipped(self) -> int:
        """Samples of this rank that the batches so far went without, since it started."""
        ...

    @property
    def skipped_samples(self) -> Mapping[str, str]:
        """These samples, each once, and why."""
        ...

    def batches(self, start: Position) -> Generator[tuple[Batch, Position], None, None]:
        """Batches from a position on, without end, each with the position that follows it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that one training process works with.

    Attributes:
        core: This rank's part of the bare model: budgets are set and weights saved on it.
        model: The model to call: `core` on its device, with gradients summed over ranks.
        experts: Names of the parameters of sparse experts.
        start: Where the data begins when there is no checkpoint.
    """

    config: RunConfig
    backend: Backend
    core: ViT
    model: Placed
    experts: frozenset[str]
    optimizer: AdamW
    stream: TrainBatches
    validation: EvalStream
    checkpoints: Checkpoints
    reporter: Reporter
    start: Position


def train(run: Run) -> Outcome:
    """Train to `train.steps`, going on from the newest checkpoint if there is one.

    All ranks see the same answer to "stop?", so they leave the loop at the same step, and
    always behind a checkpoint.
    """
    plan = run.config.train
    step, position = run.checkpoints.restore_newest(run.core, run.optimizer) or (0, run.start)
    skips = _Skips(run, step)
    stop, window = False, _Window(run, skips)
    with closing(run.stream.batches(position)) as batches:
        while step < plan.steps and not stop:
            batch, position = next(batches)
            window.add(train_step(run, step, batch.moved(run.backend.put)))
            step += 1
            last = step == plan.steps
            if last or step % plan.log_every == 0:
                stop = _report(run, window.row(step))
            if last or step % plan.eval_every == 0:
                with window.paused():
                    _report(run, _validation_row(run, step, skips))
            if last or stop or step % plan.checkpoint_every == 0:
                run.checkpoints.save(step, run.core, run.optimizer, position)
    return Outcome.FINISHED if step == plan.steps else Outcome.STOPPED


def train_step(run: Run, step: int, batch: Batch) -> Measured:
    """One update of the weights.

    Args:
        step: Updates done before this one.
        batch: This rank's share of the global batch, on the device.
    """
    plan, optim = run.config.train, run.config.optim
    budgets = plan.budgets
    if plan.budgets_per_step == "one":
        budgets = (budget_at(step, budgets, plan.seed),)
    parts = list(batch.parts(plan.microbatches))
    loads: list[Tensor] = []

    def losses_of(index: int) -> Tensor:
        run.backend.seed(noise_seed(plan.seed, step))  # every part draws for the whole batch
        return torch.stack([_loss(run, parts[index], budget, loads) for budget in budgets])

    loss = compute_gradients(run.model, run.backend, plan.microbatches, losses_of)
    norm = clip_gradients(run.core, run.experts, optim.clip_norm, run.backend)
    set_learning_rate(run.optimizer, learning_rate(step, run.config.train.steps, optim))
    run.optimizer.step()
    run.backend.submit()
    load = torch.stack(loads).sum(dim=0) if loads else None
    return Measured(torch.stack([loss, norm]), load)


def _loss(run: Run, batch: Batch, budget: float, loads: list[Tensor]) -> Tensor:
    """Mean loss over the images of a part at a budget, with what the sparse routers add.

    How full the experts were goes to `loads`.
    """
    run.core.set_effective_capacity(budget)
    output = run.model(batch.inputs())
    if output.dispatched:
        model = run.config.model
        loads.append(load_sums(output.dispatched, model.dims, routing=model.experts.routing))
    targets = batch.targets(run.config.model.num_classes)
    smoothing = run.config.optim.label_smoothing
    loss_B = LOSSES[run.config.train.loss](output.logits_BK, targets, label_smoothing=smoothing)
    loss: Tensor = loss_B.mean() + output.aux_loss
    return loss


def noise_seed(seed: int, step: int) -> int:
    """Seed of what routers draw in a step: the same on all ranks and after a restart."""
    return mix64(mix64(mix64(seed % 2**64) ^ step) ^ _NOISE)


def budget_at(step: int, budgets: Sequence[float], seed: int) -> float:
    """The effective capacity of a step: drawn evenly from `budgets`, the same on every rank.

    Source: arXiv 2407.19985, section 5, Train-Adaptive.
    """
    return budgets[mix64(mix64(seed % 2**64) ^ step) % len(budgets)]


class _Window:
    """Sums over the steps since the last metric row, kept on the device."""

    def __init__(self, run: Run, skips: "_Skips") -> None:
        self._run, self._skips = run, skips
        self._restart()

    def _restart(self) -> None:
        # Moved and not made there: nothing that waits to become part of the next step's program.
        self._sums = torch.zeros(2).to(self._run.backend.device)
        self._load: Tensor | None = None
        self._steps = 0
        self._since = time.perf_counter()
        self._sent_before = self._run.backend.sent_bytes

    def add(self, measured: Measured) -> None:
        """Count one step."""
        self._sums += measured.loss_and_norm
        if measured.load is not None:
            self._load = measured.load if self._load is None else self._load + measured.load
        self._run.backend.submit()  # apart from the step, which is then always the same program
        self._steps += 1

    @torch.no_grad()
    def row(self, step: int) -> MetricRow:
        """The window as a metric row; waits for the device and starts a new window."""
        run = self._run
        sums = run.backend.sum_over_ranks(self._sums, "adding up a metric row")
        loss, norm = (sums / run.backend.world).tolist()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise RunFailedError(
                    f"the {name} is {value} within the {self._steps} steps up to step {step}; "
                    f"start a new run with a lower optim.learning_rate "
                    f"(now {run.config.optim.learning_rate})"
                )
        load = self._load_table(step)
        seconds = time.perf_counter() - self._since
        images = self._steps * run.config.train.batch_size
        row = MetricRow(
            step=step,
            values={
                "loss": loss / self._steps,
                "grad_norm": norm / self._steps,
                "learning_rate": learning_rate(step - 1, run.config.train.steps, run.config.optim),
                "epoch": step * run.config.train.batch_size / run.stream.num_samples,
                "images_per_second": images / seconds,
            }
            | _alpha(run.core)
            | self._skips.of_training()
            | self._of_experts(load),
            load=load,
        )
        self._restart()
        return row

    def _of_experts(self, load: LoadTable | None) -> dict[str, float]:
        if load is None:
            return {}
        sent = (self._run.backend.sent_bytes - self._sent_before) / self._steps
        return summary(load.sums_LWEF) | {"moe/all_to_all_bytes": sent}

    def _load_table(self, step: int) -> LoadTable | None:
        """How full the experts were, over all ranks."""
        if self._load is None:
            return None
        model = self._run.config.model
        return LoadTable(
            step=step,
            layers=model.experts.layers(model.depth),
            dims=model.dims,
            sums_LWEF=self._run.backend.sum_over_images(self._load, "adding up loads").cpu(),
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens meanwhile as time or traffic of training."""
        backend = self._run.backend
        backend.synchronize()
        since, sent = time.perf_counter(), backend.sent_bytes
        yield
        self._since += time.perf_counter() - since
        self._sent_before += backend.sent_bytes - sent


class _Skips:
    """Counts the samples that did not decode, over all ranks, and names them in the run."""

    def __init__(self, run: Run, step: int) -> None:
        self._run, self._names = run, SkipList(run.config.out)
        self._counts = run.config.data.read.on_corrupt == "skip"
        # Metric rows come before every checkpoint, so the last one up to `step` has them all.
        counted = self._counts and run.backend.rank == 0
        self._before = skipped_until(run.config.out, step) if counted else 0

    def of_training(self) -> dict[str, float]:
        """Samples that another took the place of since the run began."""
        run = self._run
        if not self._counts:
            return {}
        self._names.add(run.stream.skipped_samples)
        mine = torch.tensor(float(self._before + run.stream.skipped), device=run.backend.device)
        return {COUNT: run.backend.sum_over_ranks(mine, "counting bad samples").item()}

    def of_validation(self, evaluated: int) -> dict[str, float]:
        """Samples that an evaluation of so many left out."""
        if not self._counts:
            return {}
        self._names.add(self._run.validation.skipped_samples)
        return {VAL_COUNT: float(self._run.validation.num_samples - evaluated)}


def _alpha(model: ViT) -> dict[str, float]:
    """Mean alpha over layers (eq. 1), if the model has any: it must leave 0."""
    alphas = [alpha().detach() for alpha in model.encoder.alphas]
    return {"alpha": torch.stack(alphas).mean().item()} if alphas else {}


def _validation_row(run: Run, step: int, skips: _Skips) -> MetricRow:
    values = {}
    for budget, found in score(
        run.core, run.model, run.validation, run.config.train.eval_budgets, run.backend
    ).items():
        values[f"val_accuracy/ec_{budget:.2f}"] = found.accuracy
        values[f"val_loss/ec_{budget:.2f}"] = found.loss
        values |= skips.of_validation(found.samples)
    return MetricRow(step=step, values=values)


def _report(run: Run, row: MetricRow) -> bool:
    """Tell of a row from rank 0; the reporter's answer reaches every rank."""
    stop = run.backend.rank == 0 and run.reporter.report(row)
    mine = torch.tensor(float(stop), device=run.backend.device)
    agreed = run.backend.sum_over_ranks(mine, "agreeing whether to stop")
    return bool(agreed.item())
