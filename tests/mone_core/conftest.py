"""What all tests of the mathematics share: one thread and a fixed seed. Torch and pytest only."""

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """The same random numbers in every test, whichever tests run, and sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _dirty_memory():
    """Every tensor that is made without a value starts as NaN."""
    filled = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = filled
