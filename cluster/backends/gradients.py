"""Gradients added up over ranks while the backward pass is still running.

Every parameter's gradient is a view of a bucket, a flat buffer that lives as long as training.
When the last gradient of a bucket is final, the bucket is on its way to the other ranks; buckets
go in one fixed order, that of their last gradients, so that all ranks send the same one at the same
time. Dense parameters and experts have buckets of their own, since different ranks add them up.
"""

from collections.abc import Callable, Collection, Iterator
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
        size: How many.
        first, last: Names of the parameters that the backward pass finishes first and last.
        missing: Gradients that the running backward pass has not finished yet.
    """

    group: Group
    flat: Tensor
    size: int
    first: str
    last: str
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
        self._model = model
        self._gradients = Gradients(
            dict(model.named_parameters()),
            experts,
            collectives,
            everyone=everyone,
            replicas=replicas,
        )

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass."""
        return self._model(*inputs)

    def zero_gradients(self) -> None:
        """Begin a step."""
        self._gradients.zero()

    def last_backward(self) -> None:
        """The next backward pass is the step's last: what it finishes may leave."""
        self._gradients.last_backward()

    def finish_gradients(self) -> None:
        """Wait until every gradient is the sum over ranks."""
        self._gradients.finish()


class Gradients:
    """The gradients of some parameters, in buckets that are summed over ranks.

    Args:
        parameters: By name, in the order in which a pass first uses them.
        experts: Names of those that only `replicas` hold.
        everyone: All ranks.
        replicas: The ranks with the same experts as this one.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        experts: Collection[str],
        collectives: Collectives,
        *,
        everyone: Group,
        replicas: Group,
    ) -> None:
        self._collectives = collectives
        self._buckets: list[_Bucket] = []
        self._sent: list[Callable[[], None]] = []
        self._in_last_backward = False
        # Last layers first: the order in which the backward pass finishes them.
        learned = [(n, p) for n, p in parameters.items() if p.requires_grad][::-1]
        self._collect({n: p for n, p in learned if n not in experts}, everyone)
        self._collect({n: p for n, p in learned if n in experts}, replicas)
        place = {name: index for index, (name, _) in enumerate(learned)}
        self._buckets.sort(key=lambda bucket: place[bucket.last])

    def zero(self) -> None:
        """Begin a step."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def last_backward(self) -> None:
        """Let buckets leave in the next backward pass as they become full."""
        self._in_last_backward = True
        for bucket in self._buckets:
            bucket.missing = bucket.size

    def finish(self) -> None:
        """Send what no backward pass reached, and wait for all."""
        self._send(len(self._buckets))
        for wait in self._sent:
            wait()
        self._sent.clear()
        self._in_last_backward = False

    def _collect(self, parameters: dict[str, nn.Parameter], group: Group) -> None:
        """Give parameters the values of the group's first rank, and a place in a bucket each."""
        for names in _in_buckets(parameters):
            members = [parameters[name] for name in names]
            flat = torch.cat([parameter.detach().flatten() for parameter in members])
            self._collectives.broadcast(flat, group, "sharing the first weights")
            bucket = _Bucket(group, flat, len(members), names[0], names[-1])
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
            what = f"adding up the gradients from {bucket.first} to {bucket.last}"
            self._sent.append(self._collectives.start_sum(bucket.flat, bucket.group, what))


def _in_buckets(parameters: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    """Neighbours of one dtype, up to a bucket's size together."""
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        size += parameter.nbytes
        if names and (size > BUCKET_BYTES or parameter.dtype != parameters[names[0]].dtype):
            yield names
            names, size = [], parameter.nbytes
        names.append(name)
    if names:
        yield names
