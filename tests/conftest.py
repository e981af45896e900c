"""What every test stands on: one thread, no display, the same random numbers in every run and in any order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that tests start
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# No deadline: a busy machine must not fail a law.
hypothesis.settings.register_profile("curvepress", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("curvepress")


@pytest.fixture(autouse=True)
def seeds() -> Iterator[int]:
    """Seed every global generator before each test and put torch's default dtype back after it; the seed is the value."""
    dtype = torch.get_default_dtype()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may draw from it
    torch.manual_seed(0)
    yield 0
    torch.set_default_dtype(dtype)


@pytest.fixture
def generator(seeds: int) -> torch.Generator:
    """A torch generator of the test's own."""
    return torch.Generator().manual_seed(seeds)
