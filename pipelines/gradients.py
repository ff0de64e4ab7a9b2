"""The gradient of one step: over budgets, parts of a batch and ranks, and its norm.

The loss is the mean over all images of all ranks. Every gradient is a sum, see
`cluster.backends.base`: the one divisor of the whole computation stands here, on the loss.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cluster.backends import Backend, Placed


def compute_gradients(
    model: Placed, backend: Backend, microbatches: int, losses_of: Callable[[int], Tensor]
) -> Tensor:
    """Leave in every parameter the gradient of the mean loss over all images of all ranks.

    Args:
        model: What the losses are computed with.
        backend: The ranks.
        microbatches: Equal parts that this rank computes its images in, one by one.
        losses_of: Number of a part -> mean losses over its images, one per budget, of which
            the sum is minimised. Called in order.

    Returns:
        This rank's loss, mean over its images and the budgets, on the device.
    """
    model.zero_gradients()
    means = []
    for index in range(microbatches):
        backend.take_part(index, microbatches)
        losses = losses_of(index)
        if index == microbatches - 1:
            model.last_backward()
        (losses.sum() / backend.parts).backward()  # type: ignore[no-untyped-call]
        means.append(losses.detach().mean())
    backend.take_part(0, 1)
    model.finish_gradients()
    return torch.stack(means).mean()


def clip_gradients(
    model: nn.Module, experts: Collection[str], max_norm: float, backend: Backend
) -> Tensor:
    """Scale gradients down to a global norm, in which every expert of all ranks counts once.

    Args:
        model: This rank's part, gradients summed over ranks.
        experts: Names of the parameters that are stacked by expert.
        max_norm: Larger gradients are scaled down to it.
        backend: The ranks.

    Returns:
        The norm before clipping, on the device, the same on every rank.
    """
    learned = {name: p for name, p in model.named_parameters() if p.grad is not None}
    spread = [p for name, p in learned.items() if name in experts]
    parts = [p for p in learned.values() if isinstance(p, DTensor)]
    whole = [p for name, p in learned.items() if name not in experts and not isinstance(p, DTensor)]
    norm = _norm(whole)
    if parts:
        of_all = backend.sum_over_ranks(_norm(parts).square(), "the gradient norm")
        norm = (norm.square() + of_all).sqrt()
    if spread:
        of_all = backend.sum_over_experts(
            _norm(spread).square(), "the gradient norm of the experts"
        )
        norm = (norm.square() + of_all).sqrt()
    for alike in (parts, whole + spread):  # torch does not scale both kinds in one go
        nn.utils.clip_grads_with_norm_(alike, max_norm, norm)
    return norm


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm of their gradients; where ranks hold parts of one, that of the part here."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    here = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm: Tensor = nn.utils.get_total_norm(here)
    return norm
