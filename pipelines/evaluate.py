"""One set of weights at many compute budgets: accuracy, cost and time.

Accuracy is counted over a whole validation set, over all ranks; latency is taken on one
process, all budgets in turn, so that a noisy machine is noisy for all of them alike.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.backends import Backend
from mone_core.losses import softmax_loss
from mone_core.models import ModelConfig, Output, ViT
from pipelines.config import RunConfig
from pipelines.data.batch import Batch
from pipelines.data.stream import EvalStream
from pipelines.errors import DatasetError
from pipelines.results import Results, Setting, commit_name, machine_name
from pipelines.run_data import RunData
from pipelines.storage import place

LATENCY_PIXELS = 8 * 224 * 224  # of a timed batch: eight usual images, or more small ones
LATENCY_BATCHES = (1, 64)  # fewest and most images of one
LATENCY_REPEATS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How well a model does at one budget: share of right answers, mean loss in nats."""

    accuracy: float
    loss: float
    samples: int


@torch.no_grad()
def score(
    model: ViT,
    compute: Callable[[Tensor], Output],
    stream: EvalStream,
    budgets: Sequence[float],
    backend: Backend,
) -> dict[float, Score]:
    """Count right answers on every sample of a stream, at each budget.

    Every sample is decoded once for all budgets. All ranks must call it; all get the same.

    Args:
        model: Its budget is changed on the way.
        compute: What to call: the model, or what a backend made of it.
        stream: This rank's images.
        budgets: Effective capacities.
        backend: The ranks. Its random numbers begin anew, the same in every evaluation.

    Raises:
        DatasetError: Every sample was skipped.
    """
    training = model.training
    model.eval()
    backend.seed(0)
    sums = torch.zeros(len(budgets), 3, dtype=torch.float64, device=backend.device)
    backend.submit()  # the first batch is then the same program as the others
    for batch in stream:
        sums += _counted(model, compute, batch.moved(backend.put), budgets)
        backend.submit()
    model.train(training)
    totals = backend.sum_over_images(sums, "adding up an evaluation").tolist()
    if not totals[0][-1]:
        raise DatasetError(
            f"none of the {stream.num_samples} validation samples could be used, all were skipped; "
            "set data.read.on_corrupt to raise to see why"
        )
    return {
        budget: Score(accuracy=right / count, loss=loss / count, samples=int(count))
        for budget, (right, loss, count) in zip(budgets, totals, strict=True)
    }


def _counted(
    model: ViT, compute: Callable[[Tensor], Output], batch: Batch, budgets: Sequence[float]
) -> Tensor:
    """Right answers, summed loss and samples of one batch, a row per budget."""
    inputs, valid_B = batch.inputs(), batch.valid_B
    labels_B = batch.labels_R[:: batch.views]
    rows = []
    for budget in budgets:
        model.set_effective_capacity(budget)
        logits_BK = _over_views(compute(inputs).logits_BK, batch.views)
        right_B = (logits_BK.argmax(dim=1) == labels_B) & valid_B
        loss_B = softmax_loss(logits_BK, labels_B).where(valid_B, 0.0)  # infinite times 0 is no 0
        rows.append(torch.stack([right_B.sum(), loss_B.sum(), valid_B.sum()]))
    return torch.stack(rows).double()


def _over_views(logits_RK: Tensor, views: int) -> Tensor:
    """Scores of samples from those of their views: logarithms of mean probabilities.

    Source: ViViT (arXiv 2103.15691), section 4.2, averages over views of a video.
    """
    if views == 1:
        return logits_RK
    # Not the logarithm of a sum of probabilities: they can be too small for a float.
    log_probs_BVK = logits_RK.log_softmax(dim=1).view(-1, views, logits_RK.shape[1])
    return log_probs_BVK.logsumexp(dim=1) - math.log(views)


def latency_batch(config: ModelConfig) -> int:
    """Images or clips of a timed forward pass: small ones go together, or overhead is all."""
    fewest, most = LATENCY_BATCHES
    pixels = config.video.frames * config.image_size**2
    return max(fewest, min(most, LATENCY_PIXELS // pixels))


@torch.no_grad()
def latencies(model: ViT, budgets: Sequence[float], backend: Backend) -> dict[float, float]:
    """Median milliseconds of one forward pass of `latency_batch` images or clips, per budget."""
    size, frames = model.config.image_size, model.config.video.frames
    shape = (3, size, size) if frames == 1 else (frames, 3, size, size)
    images = torch.zeros(latency_batch(model.config), *shape, device=backend.device)
    images.normal_(generator=torch.Generator(backend.device).manual_seed(0))
    times: dict[float, list[float]] = {budget: [] for budget in budgets}
    for repeat in range(LATENCY_REPEATS + 2):  # two rounds to warm up
        for budget in times:
            model.set_effective_capacity(budget)
            backend.synchronize()
            start = time.perf_counter()
            model(images)
            backend.synchronize()
            if repeat >= 2:
                times[budget].append(1e3 * (time.perf_counter() - start))
    return {budget: statistics.median(taken) for budget, taken in times.items()}


def evaluate(
    name: str,
    step: int,
    model: ViT,
    stream: EvalStream,
    budgets: Sequence[float],
    backend: Backend,
) -> Results:
    """Everything `results.json` holds, for one model on one validation set.

    Args:
        name: What is evaluated, for people.
        step: Training step of the weights.
        model: On the backend's device; its budget is changed on the way.
        stream: The validation set.
        budgets: Effective capacities, each evaluated with the same weights.
        backend: One process.
    """
    model.eval()
    found = score(model, model, stream, budgets, backend)
    taken = latencies(model, budgets, backend)
    return Results(
        name=name,
        step=step,
        num_classes=stream.num_classes,
        settings=tuple(_setting(model, b, found[b], taken[b]) for b in budgets),
        machine=machine_name(),
        torch=torch.__version__,
        commit=commit_name(),
        skipped=stream.num_samples - found[budgets[0]].samples,
    )


def validation_stream(
    config: RunConfig, data: RunData | None = None, *, rank: int = 0, world: int = 1
) -> EvalStream:
    """The validation set of a run.

    Args:
        config: The run.
        data: What the run began with, which the validation set must be; None: any.
        rank, world: This process among those that share the work.
    """
    return EvalStream(
        place(config.data.root) / "val",
        config.rows,
        batch_size=config.train.batch_size // config.parallel.num_workers,  # fits where it trained
        rank=rank,
        world=world,
        digest=data.val if data else None,
    )


def _setting(model: ViT, budget: float, found: Score, latency_ms: float) -> Setting:
    model.set_effective_capacity(budget)
    timed_batch = latency_batch(model.config)
    return Setting(
        effective_capacity=budget,
        realised_effective_capacity=model.realised_effective_capacity,
        accuracy=found.accuracy,
        loss=found.loss,
        samples=found.samples,
        macs=model.macs(),
        latency_ms=latency_ms,
        latency_batch=timed_batch,
        images_per_second=1e3 * timed_batch / latency_ms,
    )
