"""Tests run in several processes (pytest-xdist), so that each, and what it starts, gets one thread of the processor."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

import pytest
import torch


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)
