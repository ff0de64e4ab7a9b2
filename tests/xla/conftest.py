"""XLA on four virtual devices of a processor; collected only where torch_xla is installed."""

import os
from importlib.util import find_spec

import pytest

DEVICES = 4
# Quick to compile and no other results.
ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "CPU_NUM_DEVICES": str(DEVICES),
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}

if find_spec("torch_xla") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(ENVIRONMENT)  # before torch_xla is imported: it reads them once


@pytest.fixture(scope="session")
def xla_environment():
    """What a process needs to find the same devices."""
    return ENVIRONMENT
