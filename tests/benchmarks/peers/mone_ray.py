"""Ours with `--data.reader ray`: the same batches, decoded in Ray's processes."""

from contextlib import AbstractContextManager

from cluster.session import ray_session
from pipelines.data.ray_reader import RayStream
from tests.benchmarks.peers import mone
from tests.benchmarks.peers.mone import prepare
from tests.benchmarks.peers.setup import Setup

__all__ = ["Loader", "machinery", "prepare"]


def machinery(setup: Setup) -> AbstractContextManager[None]:
    """A Ray of as many CPUs as others have workers; it runs before the clock does."""
    return ray_session(num_cpus=setup.workers)


class Loader(mone.Loader):
    """`RayStream` with the default order and augmentation."""

    stream = RayStream
