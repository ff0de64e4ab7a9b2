"""Sparse layers whose experts are spread over ranks, against the same layer in one process.

    python -m tests.benchmarks.bench_expert_parallel [--device cpu|cuda] [--threads N] [--quick]

The layers of `bench_moe_layer` (B/16, 8 images a rank, 128 on CUDA), on 1, 2 and 4 gloo processes
of this machine, or on all of its CUDA devices; one rank sends to itself, through the same code.
Every rank has as many images as the one process that it is compared with, so a ratio of 1 is all
that can be had. Where ranks outnumber cores they share them: times there are bound by that
("on 2 cores" stands in the row), and what remains to be read is how the time is divided.

Columns beside the times:

* exchange, products, overhead: the layer's time on its own clock, divided without a rest. Exchange
  is starting all-to-alls, waiting for them (also for ranks that are late), and the copies that only
  they need. Products is the rest of the expert bank. Overhead is all outside of both: router, slot
  tables, dispatch, combine and their gradients.
* alone: the bank by itself on as many slots, on all ranks at once, over the layer's time. What
  products have above it is the exchange again, at work beside them on the same cores.
* MB: given to all-to-alls by one rank in one pass, what stays with it included.
* of flat: these bytes over those of the layer without nesting: e_c, in whole slots.

On CUDA also a whole training step of nested-sparse B/16 as one CUDA graph, against eager.
"""

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn as spawn_processes
from torch.optim import AdamW

from cluster.backends import Backend, get_backend
from cluster.backends.collectives import Group
from mone_core.capacity import capacity_distribution, token_counts
from mone_core.experts import ExpertsConfig
from mone_core.losses import softmax_loss
from mone_core.models import VIT_SIZES, ModelConfig, build_model
from mone_core.nested import Layout
from mone_core.parallel import expert_parameters, spread
from tests.benchmarks.bench_moe_layer import EXPERTS, GROUP, NESTED, TOKENS, Layer
from tests.benchmarks.harness import (
    BenchRow,
    Case,
    Mode,
    Run,
    Setting,
    aligned,
    append_rows,
    forward,
    forward_backward,
    graph_or_run,
    interleave,
    main,
    prepare,
    read_rows,
    row_of,
)
from tests.benchmarks.stopwatch import PARTS, Stopwatch, Timed, TimedRanks, watch

WORLDS, FEW = (1, 2, 4), (1, 2)
_TIMEOUT_S = 600  # of a collective: a crowded machine is slow, not broken
_WARM_UP_STEPS = 3
_ROWS = "rows.jsonl"

STEP = replace(
    VIT_SIZES["B"],
    experts=ExpertsConfig(placement="every", num_experts=EXPERTS, k=1, group_images=GROUP),
)


class WithItself(Group):
    """One rank that is not left out of the exchange for being alone."""

    alone = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One layer and one pass over it, in three forms that take turns.

    Attributes:
        together: The layer on all ranks; its run is `timed`.
        timed: Remembers its parts.
        alone: In one process; rank 0 runs it while the others wait.
        bank: The experts by themselves, on all ranks.
        nested: Whether tokens have several widths.
    """

    together: Case
    timed: Timed
    alone: Run
    bank: Run
    nested: bool


class Layers:
    """A layer whole, and the same one with its experts spread over ranks.

    Args:
        size: Letter of `VIT_SIZES`.
        k: Experts that a token chooses.
    """

    def __init__(self, setting: Setting, size: str, k: int, backend: Backend) -> None:
        self._setting, self._backend = setting, backend
        self._config = VIT_SIZES[size]
        self._stopwatch = Stopwatch(setting.device)
        torch.manual_seed(0)
        self.whole = Layer(self._config, k, 1.0).to(setting.device, setting.dtype)
        self.part = copy.deepcopy(self.whole)
        watch(self.part.sparse.bank, self._stopwatch)
        self.part.sparse.spread(TimedRanks(backend, self._stopwatch), "sparse layer")
        torch.manual_seed(1 + backend.rank)
        self.x_NBD = self._randn(TOKENS, setting.images, self._config.dim)
        self._shape = f"{size}/16 B={setting.images} N={TOKENS} K={k} E={EXPERTS}"

    def trial(self, budget: float, *, training: bool) -> Trial:
        """All forms of a pass at a budget."""
        setting, run = self._setting, forward_backward if training else forward
        whole, part = (self._at(layer, budget) for layer in (self.whole, self.part))
        accelerator, rows = setting.accelerator, TOKENS * setting.images
        timed = Timed(run(part, self.x_NBD), self._stopwatch)
        together = Case(
            case=f"expert_parallel/{'train' if training else 'forward'}",
            shape=f"{self._shape} e_c={budget} R={ranks_in_words(setting, self._backend.world)}",
            run=timed,
            floor_ms=accelerator and part.floor_ms(accelerator, rows, training=training),
        )
        return Trial(
            together=together,
            timed=timed,
            alone=_nothing if self._backend.rank else run(whole, self.x_NBD),
            bank=self._bank(part, training=training),
            nested=budget < 1,
        )

    def _at(self, layer: Layer, budget: float) -> Layer:
        """The same weights at another budget."""
        other = copy.copy(layer)
        counts = token_counts(capacity_distribution(budget), TOKENS)
        other.layout = Layout.of(counts, self._config.dims)
        return other

    def _bank(self, layer: Layer, *, training: bool) -> Run:
        """The experts of this rank on as many slots as all ranks send it."""
        bank, ranks = layer.sparse.bank, self._backend.world
        held = EXPERTS // ranks
        shapes = [(held, slots // held, dim) for slots, dim in layer.slots(self._setting.images)]
        each_x_EQd = [self._randn(*shape) for shape in shapes]
        if not training:
            return torch.inference_mode()(lambda: bank(each_x_EQd))
        seeds = [self._randn(*shape) for shape in shapes]

        def run() -> None:
            bank.zero_grad(set_to_none=True)
            for x_EQd in each_x_EQd:
                x_EQd.grad = None
            torch.autograd.backward(bank(each_x_EQd), seeds)

        for x_EQd in each_x_EQd:
            x_EQd.requires_grad_()
        return run

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self._setting.device, self._setting.dtype)


def measure(setting: Setting) -> list[BenchRow]:
    """All rows, one number of ranks after the other."""
    worlds = FEW if setting.quick else WORLDS
    if setting.device == "cuda":
        worlds = (torch.cuda.device_count(),)
    size = "Ti" if setting.quick else "B"
    return [row for world in worlds for row in measure_world(setting, world, size)]


def measure_world(setting: Setting, world: int, size: str) -> list[BenchRow]:
    """The rows of one number of ranks, each of them a process."""
    with tempfile.TemporaryDirectory() as scratch:
        spawn_processes(_be_a_rank, (world, setting, size, Path(scratch)), nprocs=world)
        return read_rows(Path(scratch) / _ROWS)


def compare_layers(setting: Setting, size: str, k: int, backend: Backend) -> list[BenchRow]:
    """A layer flat and nested, forward and in training; all take turns."""
    layers = Layers(setting, size, k, backend)
    trials = [
        layers.trial(budget, training=training)
        for budget in (1.0, NESTED)
        for training in (False, True)
    ]
    sent = [_sent_bytes(trial.timed, backend) for trial in trials]
    ready = [_prepared(trial, setting) for trial in trials]
    times = interleave(
        {f"{index} {form}": run for index, (runs, _) in enumerate(ready) for form, run in runs},
        setting.rounds,
        lambda: _everyone(backend),
        time.perf_counter,
        burst=setting.burst,
    )
    flat = {
        trial.together.case: of for trial, of in zip(trials, sent, strict=True) if not trial.nested
    }
    rows = []
    for index, (trial, (runs, mode)) in enumerate(zip(trials, ready, strict=True)):
        alone, together, bank = (times[f"{index} {form}"] for form, _ in runs)
        measures = shares(dict(runs)["together"], trial.timed, setting.rounds, backend)
        measures["bank_alone"] = statistics.median(bank) / statistics.median(together)
        measures["sent_mb"] = sent[index] / 1e6
        measures["sent_over_flat"] = sent[index] / flat[trial.together.case]
        baseline = "the layer in one process"
        row = row_of(trial.together, mode, together, baseline, alone, setting)
        rows.append(replace(row, measures=measures))
    return rows


def shares(run: Run, timed: Timed, rounds: int, backend: Backend) -> dict[str, float]:
    """How a layer's time is divided, over all ranks and some runs.

    Args:
        run: Runs or replays `timed`.
    """
    total = torch.zeros(len(PARTS), dtype=torch.float64)
    for _ in range(rounds):
        _everyone(backend)
        run()
        backend.synchronize()
        total += torch.tensor(timed.milliseconds(), dtype=torch.float64)
    of_all = backend.sum_over_ranks(total.to(backend.device), "times of parts of a layer")
    layer, bank, exchange = of_all.tolist()
    return {
        "exchange": exchange / layer,
        "products": (bank - exchange) / layer,
        "overhead": (layer - bank) / layer,
    }


class TrainStep:
    """One step of training on a batch that stays where it is, as a CUDA graph wants it.

    Args:
        config: Of the model.
        images: Of this rank.
    """

    def __init__(self, config: ModelConfig, images: int, backend: Backend) -> None:
        torch.manual_seed(0)
        model = build_model(config)
        spread(model, backend)
        self._backend, device = backend, backend.device
        self._model = backend.place(model, frozenset(expert_parameters(model)))
        on_cuda = device.type == "cuda"
        self._optimizer = AdamW(model.parameters(), lr=1e-3, fused=True, capturable=on_cuda)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_cuda)
        size = config.image_size
        self._pixels = torch.randn(images, 3, size, size).to(device)
        self._labels = torch.randint(config.num_classes, (images,)).to(device)
        self.loss = torch.zeros((), device=device)

    def __call__(self) -> None:
        """Forward, loss, backward, sum over ranks, update."""
        self._model.zero_gradients()
        with self._autocast:
            output = self._model(self._pixels)
        loss = softmax_loss(output.logits_BK, self._labels).mean() + output.aux_loss
        self._model.last_backward()
        (loss / self._backend.parts).backward()
        self._model.finish_gradients()
        self._optimizer.step()
        self.loss.copy_(loss.detach())


def compare_steps(setting: Setting, backend: Backend) -> list[BenchRow]:
    """A whole training step of nested-sparse B/16 as a CUDA graph, against eager."""
    step = TrainStep(STEP, setting.images, backend)
    case = Case(
        case="expert_parallel/step",
        shape=f"B/16 B={setting.images} K=1 E={EXPERTS} e_c={NESTED} R={backend.world}",
        run=step,
    )
    replay, mode = graph_or_run(case, capture_step)
    times = interleave(
        {"eagerly": step, "replayed": replay},
        setting.rounds,
        lambda: _everyone(backend),
        time.perf_counter,
        burst=setting.burst,
    )
    baseline, measured = times["eagerly"], times["replayed"]
    return [row_of(case, mode, measured, "the step, eager", baseline, setting)]


def capture_step(step: Run) -> Run:
    """A training step as a graph, after a few eager ones that make all that stays.

    Those run on the stream that captures, since autograd remembers streams.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: NCCL's own watchdog asks the device how far it is.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def ranks_in_words(setting: Setting, world: int) -> str:
    """How many, and on how few cores if those are fewer."""
    if setting.device == "cuda":
        return str(world)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    crowded = world * setting.threads > (cores or 1)
    return f"{world} (on {cores} cores)" if crowded else str(world)


def show(rows: Sequence[BenchRow]) -> str:
    """Rows as plain text; what the columns mean stands at the top of this file."""
    head = ("case", "shape", "mode", "ms", "spread", "one process", "ratio")
    parts = ("exchange", "products", "overhead", "bank_alone")
    amounts = ("sent_mb", "sent_over_flat")
    lines = [(*head, *parts[:3], "alone", "MB", "of flat", "n")]
    for row in rows:
        of = row.measures
        lines.append(
            (
                row.case.removeprefix("expert_parallel/"),
                row.shape,
                row.mode,
                f"{row.median_ms:.2f}",
                f"{row.spread_ms:.2f}",
                f"{row.baseline_ms:.2f}",
                f"{row.ratio:.3f}",
                *(f"{of[name]:.1%}" if name in of else "-" for name in parts),
                *(f"{of[name]:.3f}" if name in of else "-" for name in amounts),
                str(row.repeats),
            )
        )
    return aligned(lines, words=3)


def _be_a_rank(rank: int, world: int, setting: Setting, size: str, scratch: Path) -> None:
    on_cuda = setting.device == "cuda"
    if on_cuda:
        torch.cuda.set_device(rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        init_method=f"file://{scratch / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_TIMEOUT_S),
        device_id=torch.device("cuda", rank) if on_cuda else None,
    )
    backend = get_backend(
        setting.device, threads=setting.threads, expert=world, timeout_s=_TIMEOUT_S
    )
    if world == 1:
        backend._row = WithItself(backend._row.ranks, dist.group.WORLD)
    rows = []
    for k in (1,) if setting.quick else (1, 2):
        rows += compare_layers(setting, size, k, backend)
    if on_cuda:
        rows += compare_steps(setting, backend)
    if rank == 0:
        append_rows(scratch / _ROWS, rows)
    dist.destroy_process_group()


def _prepared(trial: Trial, setting: Setting) -> tuple[list[tuple[str, Run]], Mode]:
    """All forms as they are timed, graphs where there can be; and what the layer became."""
    what = trial.together
    alone = trial.alone
    if alone is not _nothing:
        alone, _ = prepare(replace(what, run=alone), setting.device)
    together, mode = prepare(what, setting.device)
    bank, _ = prepare(replace(what, run=trial.bank), setting.device)
    return [("alone", alone), ("together", together), ("bank", bank)], mode


def _sent_bytes(run: Run, backend: Backend) -> int:
    before = backend.sent_bytes
    run()
    return backend.sent_bytes - before


def _everyone(backend: Backend) -> None:
    """The device has finished, on all ranks."""
    backend.synchronize()
    backend.barrier("taking turns")


def _nothing() -> None:
    """What other ranks run while one computes alone."""


if __name__ == "__main__":
    main("expert_parallel", measure, show)
