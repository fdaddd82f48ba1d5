"""The random numbers that models and loaders draw: seeded where a result has to be the same each time, and put back.

The generators are the process's: one thread at a time may do so.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_BY_ONE_THREAD = threading.RLock()


@contextmanager
def randomness_of_the_caller() -> Iterator[None]:
    """Puts the generators of Python, numpy and torch back as they were. Other threads wait for it to end."""
    with _BY_ONE_THREAD:
        states = random.getstate(), np.random.get_state()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
        if not devices:  # nobody drew from CUDA's yet: it begins, as it would have, with the seed that torch was given
            torch.cuda.manual_seed_all(torch.initial_seed())


class DrawsError(Exception):
    """An operation draws random numbers."""


class WithoutDraws(TorchDispatchMode):
    """While active, operations of torch that draw random numbers raise `DrawsError` instead; of this thread alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise DrawsError(str(func))
        return func(*args, **(kwargs or {}))


def generators() -> tuple[Any, ...]:
    """The state of the generators, to see whether somebody drew."""
    numpy_state: Any = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)]
    return *states, random.getstate(), numpy_state[1].tobytes(), numpy_state[2]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def reproducibly() -> Iterator[None]:
    """Without gradients, and with the same random numbers each time; the generators are put back afterwards."""
    with torch.no_grad(), randomness_of_the_caller():
        seed_all(0)
        yield
