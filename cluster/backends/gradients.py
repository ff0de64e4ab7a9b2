"""Gradients added up over ranks while the backward pass is still running.

Every parameter's gradient is a view of a bucket, a flat buffer that lives as long as training.
When the last gradient of a bucket is final, the bucket is on its way to the other ranks; buckets
go in one fixed order, so that all ranks send the same one at the same time. Dense parameters and
experts have buckets of their own, since different ranks add them up.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cluster.backends.collectives import Collectives, Group

BUCKET_BYTES = 25 << 20


@dataclass(eq=False, slots=True)
class _Bucket:
    """Gradients that travel together.

    Attributes:
        missing: Gradients that the running backward pass has not finished yet.
    """

    group: Group
    flat: Tensor
    size: int
    missing: int = 0


class PlacedModel:
    """A model on one device whose gradients are summed over ranks; see `base.Placed`.

    Args:
        model: Already on its device.
        experts: Names of the parameters that only `replicas` hold.
        everyone: All ranks.
        replicas: The ranks with the same experts as this one.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Collection[str],
        collectives: Collectives,
        *,
        everyone: Group,
        replicas: Group,
    ) -> None:
        self._model, self._collectives = model, collectives
        self._buckets: list[_Bucket] = []
        self._sent: list[Callable[[], None]] = []
        self._in_last_backward = False
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._collect([p for name, p in learned.items() if name not in experts], everyone)
        self._collect([p for name, p in learned.items() if name in experts], replicas)

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass."""
        return self._model(*inputs)

    def zero_gradients(self) -> None:
        """Begin a step."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def last_backward(self) -> None:
        """Let buckets leave in the next backward pass as they become full."""
        self._in_last_backward = True
        for bucket in self._buckets:
            bucket.missing = bucket.size

    def finish_gradients(self) -> None:
        """Send what no backward pass reached, and wait for all."""
        self._send(len(self._buckets))
        for wait in self._sent:
            wait()
        self._sent.clear()
        self._in_last_backward = False

    def _collect(self, parameters: Sequence[nn.Parameter], group: Group) -> None:
        """Give parameters the values of the group's first rank, and a place in a bucket each."""
        # Last layers first: the order in which the backward pass finishes them.
        for members in _in_buckets(parameters[::-1]):
            flat = torch.cat([parameter.detach().flatten() for parameter in members])
            self._collectives.broadcast(flat, group, "sharing the first weights")
            bucket = _Bucket(group, flat, len(members))
            self._buckets.append(bucket)
            sizes = [parameter.numel() for parameter in members]
            for parameter, part in zip(members, torch.split(flat, sizes), strict=True):
                view = part.view_as(parameter)
                parameter.detach().copy_(view)
                parameter.grad = view
                hook = partial(self._is_final, bucket)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            flat.zero_()

    def _is_final(self, bucket: _Bucket, _parameter: Tensor) -> None:
        """One gradient is; send the buckets that are full, in their order."""
        if not self._in_last_backward:
            return
        bucket.missing -= 1
        full = len(self._sent)
        while full < len(self._buckets) and not self._buckets[full].missing:
            full += 1
        self._send(full)

    def _send(self, until: int) -> None:
        for bucket in self._buckets[len(self._sent) : until]:
            what = f"adding up gradients, bucket {len(self._sent)}"
            self._sent.append(self._collectives.start_sum(bucket.flat, bucket.group, what))


def _in_buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype, up to a bucket's size together."""
    members: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(each.nbytes for each in members) + parameter.nbytes
        if members and (size > BUCKET_BYTES or parameter.dtype != members[0].dtype):
            yield members
            members = []
        members.append(parameter)
    if members:
        yield members
