"""Proof that training over many processes is training in one, in float64, on any machine.

Every case of the grid is a small model with sparse experts: who chooses, how even the choices are,
whether choices are dropped. One process computes the whole batch; then 1, 2 and 4 processes compute
the same, each its own images and experts, in every way to spread the experts. Compared are
outputs, gradients of inputs and of every parameter, the gradient norm, parameters after three
steps of plain SGD with clipping (an adaptive optimizer would hide a wrong factor), gradients
added up over parts of the batch, what the routers report, and the bytes exchanged.

Memory that nothing has written is NaN in these processes: a result that reads some is not equal.
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn
from torch.utils import deterministic

from cluster.backends import Backend, Placed, get_backend
from cluster.topology import Mesh, meshes
from mone_core.experts import Dispatched, ExpertsConfig, SparseBlock
from mone_core.load import load_sums
from mone_core.losses import softmax_loss
from mone_core.models import DENSE, ModelConfig, NestingConfig, Output, ViT, build_model
from mone_core.parallel import expert_parameters, spread
from pipelines.errors import RunFailedError
from pipelines.gradients import clip_gradients, compute_gradients

TOLERANCE = 1e-10  # relative, of float64
WORLDS = (1, 2, 4)
EXPERTS, IMAGES, GROUP = 4, 8, 2
STEPS, RATE, CLIP_NORM = 3, 0.1, 0.05
TIMEOUT_S = 60
_LOOK_S = 0.5  # between two looks at how far the processes are

Tell = Callable[[int, int], None]  # what is done, of how many

Routing = Literal[
    "top-1",
    "top-2",
    "batch priority",
    "expert choice",
    "dropless",
    "nested top-2",
    "nested dropless",
]
Load = Literal["balanced", "skewed", "one empty", "all to one"]

_KINDS = (
    "output",
    "input gradient",
    "load",
    "gradient norm",
    "gradient in parts",
    "gradient",
    "parameter",
)

_EXPERTS = ExpertsConfig(
    placement="every", spacing=1, num_experts=EXPERTS, k=2, group_images=GROUP, rounding="ceil"
)
_ROUTING: dict[Routing, ExpertsConfig] = {
    "top-1": replace(_EXPERTS, k=1),
    "top-2": _EXPERTS,
    "batch priority": replace(_EXPERTS, batch_priority=True),
    "expert choice": replace(_EXPERTS, routing="experts_choose"),
    "dropless": replace(_EXPERTS, dropless=True),
    "nested top-2": _EXPERTS,
    "nested dropless": replace(_EXPERTS, dropless=True),
}
# Added to the router's logits, an expert each.
_PREFERENCE: dict[Load, tuple[float, ...]] = {
    "balanced": (0.0, 0.0, 0.0, 0.0),
    "skewed": (2.0, 1.0, 0.0, -1.0),
    "one empty": (-12.0, 0.0, 0.0, 0.0),
    "all to one": (0.0, 0.0, 12.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One model of the grid."""

    routing: Routing
    load: Load
    drops: bool

    @property
    def name(self) -> str:
        """For people, and for files."""
        return f"{self.routing}, {self.load}, {'drops' if self.drops else 'no drops'}"

    @property
    def config(self) -> ModelConfig:
        """Two sparse layers of four experts on 16 tokens."""
        return ModelConfig(
            image_size=16,
            patch_size=4,
            num_classes=5,
            dim=16,
            depth=2,
            heads=2,
            nesting=NestingConfig() if self.routing.startswith("nested") else DENSE,
            experts=replace(_ROUTING[self.routing], capacity_ratio=0.5 if self.drops else EXPERTS),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """How far many processes were from one.

    Attributes:
        mesh: Of the many.
        case: What was computed.
        errors: For each quantity the largest difference over the largest value of one process,
            over all ranks.
    """

    mesh: Mesh
    case: Case
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The quantity that differs most, and how much."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def equal(self) -> bool:
        """Whether all quantities are what one process has."""
        return self.worst[1] <= TOLERANCE


def cases() -> Iterator[Case]:
    """The whole grid."""
    for routing, load, drops in itertools.product(_ROUTING, _PREFERENCE, (True, False)):
        if not (drops and _ROUTING[routing].dropless):
            yield Case(routing, load, drops)


def refer(scratch: Path, chosen: Sequence[Case], tell: Tell = lambda *_: None) -> None:
    """Compute cases in one process alone, what the others are compared with.

    Args:
        scratch: An empty folder, for what comes out and for `compare`.
        chosen: Cases.
        tell: Told of progress.

    Raises:
        RunFailedError: The process failed.
    """
    _spawn(_refer_rank, 1, scratch, chosen, tell, len(chosen))


def compare(
    scratch: Path, world: int, chosen: Sequence[Case], tell: Tell = lambda *_: None
) -> list[Finding]:
    """Compute cases over many processes on this machine, on all their meshes, and compare.

    Args:
        scratch: The folder that `refer` filled with the same cases.
        world: Processes, one of `WORLDS`.
        chosen: Cases.
        tell: Told of progress.

    Raises:
        RunFailedError: A process failed.
    """
    of_world = meshes(world, EXPERTS)
    _spawn(_compare_rank, world, scratch, chosen, tell, len(of_world) * len(chosen))
    of_ranks = [
        json.loads((scratch / _errors_of(world, rank)).read_text()) for rank in range(world)
    ]
    what = itertools.product(of_world, chosen)
    return [
        Finding(
            mesh=mesh,
            case=case,
            errors={name: max(each[name] for each in errors) for name in errors[0]},
        )
        for (mesh, case), *errors in zip(what, *of_ranks, strict=True)
    ]


def _spawn(
    work: Callable[..., None],
    world: int,
    scratch: Path,
    chosen: Sequence[Case],
    tell: Tell,
    total: int,
) -> None:
    """`work(rank, world, scratch, chosen)` in so many processes."""
    progress = _progress_of(scratch, world)
    progress.write_bytes(b"")
    try:
        running = spawn(  # type: ignore[no-untyped-call]
            work, (world, scratch, chosen), nprocs=world, join=False
        )
        told = -1
        while not running.join(timeout=_LOOK_S):
            if told < (done := progress.stat().st_size) < total:
                tell(done, total)
                told = done
    except (ProcessRaisedException, ProcessExitedException) as error:
        last = str(error).strip().splitlines()[-1]
        raise RunFailedError(
            f"one of {world} processes failed: {last}; free memory and run it again, or with fewer "
            f"processes (--worlds)"
        ) from error
    tell(total, total)


def _refer_rank(_rank: int, world: int, scratch: Path, chosen: Sequence[Case]) -> None:
    """One process alone computes all cases and writes what came out."""
    backend = poisoned_backend()
    for index, case in enumerate(chosen):
        save_file(_compute(case, backend), reference_of(scratch, index))
        _one_more(scratch, world)


def _compare_rank(rank: int, world: int, scratch: Path, chosen: Sequence[Case]) -> None:
    """One of many processes computes its part of all cases on all meshes, and compares it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{scratch / f'meeting-{world}'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    errors = []
    for mesh in meshes(world, EXPERTS):
        backend = poisoned_backend(mesh.expert)
        for index, case in enumerate(chosen):
            errors.append(differences(case, reference_of(scratch, index), backend))
            if rank == 0:
                _one_more(scratch, world)
    # Python's JSON, which has infinity.
    (scratch / _errors_of(world, rank)).write_text(json.dumps(errors))
    dist.destroy_process_group()


def reference_of(scratch: Path, index: int) -> Path:
    """What one process computed of the case of this number."""
    return scratch / f"{index}.safetensors"


def differences(case: Case, reference: Path, backend: Backend) -> dict[str, float]:
    """Compute this rank's part of a case and compare it with the same part of the whole.

    Args:
        case: To be computed.
        reference: What one process computed of it, a file of `reference_of`.
        backend: The ranks, this one among them.

    Returns:
        Relative error of every kind of quantity: infinite where something is not a number.
    """
    found, whole = _compute(case, backend), load_file(reference)
    sent, planned = found.pop("bytes").tolist()
    errors = {"bytes": abs(sent - planned) / max(planned, 1)}
    for name, mine in found.items():
        kind = next(each for each in _KINDS if name.startswith(each))
        same = whole[name.replace("gradient in parts", "gradient")]
        if kind in ("output", "input gradient"):
            same = _share(same, backend)
        elif ".bank." in name:
            held = backend.held(EXPERTS)
            same = same[held.start : held.stop]
        errors[kind] = max(errors.get(kind, 0.0), _relative(mine, same))
    return errors


def poisoned_backend(expert: int = 1) -> Backend:
    """The ranks of this process, in which memory that nothing has written is NaN from now on.

    Args:
        expert: Ranks to spread experts over.
    """
    torch.use_deterministic_algorithms(True)  # under which unwritten memory is filled
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    return get_backend("cpu", expert=expert, timeout_s=TIMEOUT_S)


def _errors_of(world: int, rank: int) -> str:
    return f"errors-{world}-{rank}.json"


def _progress_of(scratch: Path, world: int) -> Path:
    """A file that holds a byte for everything done."""
    return scratch / f"progress-{world}"


def _one_more(scratch: Path, world: int) -> None:
    with _progress_of(scratch, world).open("ab") as progress:
        progress.write(b".")


def _compute(case: Case, backend: Backend) -> dict[str, Tensor]:
    """This rank's part of a case: every quantity, parameters and gradients under their names."""
    model = _model(case)
    spread(model, backend)
    experts = frozenset(expert_parameters(model))
    placed = backend.place(model, experts)
    pixels, labels = _images(backend)
    found: dict[str, Tensor] = {}

    if IMAGES // backend.world > GROUP:
        _gradients(placed, backend, pixels, labels, parts=2)
        found |= _named("gradient in parts", model, lambda p: _of(p.grad))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        before = backend.sent_bytes
        output = _gradients(placed, backend, pixels, labels)[0]
        if step == 0:
            sent, planned = backend.sent_bytes - before, _bytes(output.dispatched, case, backend)
            # Of all ranks: without a capacity a rank sends back as many rows as came to it.
            found["bytes"] = backend.sum_over_ranks(torch.tensor([sent, planned]), "bytes")
            found["output"] = output.logits_BK.detach()
            found["input gradient"] = _of(pixels.grad)
            found["load"] = backend.sum_over_ranks(_load(output, case), "load")
            found |= _named("gradient", model, lambda p: _of(p.grad))
        found[f"gradient norm {step}"] = clip_gradients(model, experts, CLIP_NORM, backend)
        optimizer.step()
    return found | _named("parameter", model, lambda p: p.detach())


def _gradients(
    placed: Placed, backend: Backend, pixels: Tensor, labels: Tensor, parts: int = 1
) -> list[Output]:
    """One step's gradients, and the outputs of all its parts."""
    outputs: list[Output] = []
    pixels.grad = None

    def losses_of(index: int) -> Tensor:
        torch.manual_seed(1)
        output: Output = placed(pixels.tensor_split(parts)[index])
        outputs.append(output)
        loss_B = softmax_loss(output.logits_BK, labels.tensor_split(parts)[index])
        return (loss_B.mean() + output.aux_loss).reshape(1)

    compute_gradients(placed, backend, parts, losses_of)
    return outputs


def _model(case: Case) -> ViT:
    """The case's model in float64, every weight random, experts different from each other."""
    torch.manual_seed(0)
    model = build_model(case.config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for block in model.modules():
            if isinstance(block, SparseBlock):  # a feature that all tokens share carries it
                block.mlp_norm.weight[0], block.mlp_norm.bias[0] = 0, 1
                block.mlp.router.weight[:, 0] = torch.tensor(_PREFERENCE[case.load])
    return model


def _images(backend: Backend) -> tuple[Tensor, Tensor]:
    """This rank's images, which want a gradient, and their labels."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (IMAGES,), generator=generator)
    return _share(pixels, backend).clone().requires_grad_(), _share(labels, backend)


def _share(whole: Tensor, backend: Backend) -> Tensor:
    return whole.tensor_split(backend.world)[backend.rank]


def _load(output: Output, case: Case) -> Tensor:
    config = case.config
    sums: Tensor = load_sums(output.dispatched, config.dims, routing=config.experts.routing)
    return sums


def _bytes(dispatched: Sequence[Dispatched], case: Case, backend: Backend) -> int:
    """What four exchanges of every layer's slots take: there and back, forward and backward.

    Without a capacity it is all choices instead of all slots, and once the numbers of rows.
    """
    if backend.expert_ranks == 1:
        return 0
    classes = [of for each in dispatched for of in each.classes]
    if case.config.experts.dropless:
        features = sum(of.assignment.kept_GSK.numel() * of.dim for of in classes)
        numbers = EXPERTS * len(classes)
        return 4 * features * torch.float64.itemsize + numbers * torch.int64.itemsize
    features = sum(of.assignment.filled_GEC.numel() * of.dim for of in classes)
    return 4 * features * torch.float64.itemsize


def _named(what: str, model: nn.Module, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Of every parameter, whole where ranks split it."""
    found = {}
    for name, parameter in model.named_parameters():
        value = of(parameter)
        whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        found[f"{what} {name}"] = whole.clone()
    return found


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _relative(mine: Tensor, whole: Tensor) -> float:
    if mine.shape != whole.shape:
        return math.inf
    error = (mine - whole).abs().max().item()
    if math.isnan(error):
        return math.inf
    scale = whole.abs().max().item()
    return error / scale if scale else (0.0 if error == 0 else math.inf)
