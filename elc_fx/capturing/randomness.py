"""The random numbers that models and loaders draw: seeded where a result has to be the same each time, and put back.

The generators are the process's, and so is what torch.fx changes while it traces: one thread at a time may do so.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

_BY_ONE_THREAD = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Other threads wait for this to end, so it is for what is short: those that want it too, or have dynamo compile.

    Dynamo's lock comes first, since backends of dynamo's, which it calls under its lock, may call elc_fx.
    """
    with _lock_of_dynamo(), _BY_ONE_THREAD:
        yield


def _lock_of_dynamo() -> AbstractContextManager[Any]:
    """It traces as elc_fx does, by changing `nn.Module`. One thread alone can do without the seconds of its import."""
    if "torch._dynamo" not in sys.modules and threading.active_count() == 1:
        return nullcontext()
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


@contextmanager
def randomness_of_the_caller(*loaders: Any) -> Iterator[None]:
    """Puts the generators of Python, numpy and torch back as they were, and those that loaders have of their own."""
    states = random.getstate(), np.random.get_state()
    own = [(generator, generator.get_state()) for generator in _generators_of(*loaders)]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _seeds_that_cuda_awaits(), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for generator, state in own:
                generator.set_state(state)


@contextmanager
def _seeds_that_cuda_awaits() -> Iterator[None]:
    """If nobody has drawn from CUDA's generators yet, they begin with the seeds that they were to begin with."""
    if torch.cuda.is_initialized():
        yield
        return
    awaited = vars(torch.cuda._lazy_seed_tracker).copy()
    try:
        yield
    finally:
        vars(torch.cuda._lazy_seed_tracker).update(awaited)
        if torch.cuda.is_initialized():  # by now
            torch.cuda.manual_seed_all(torch.initial_seed())
            for call, _ in filter(None, awaited["call_order"]):
                call()


def generators() -> tuple[Any, ...]:
    """The state of the generators, to see whether somebody drew."""
    numpy_state: Any = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)]
    return *states, random.getstate(), numpy_state[1].tobytes(), numpy_state[2]


def seed_all(seed: int, *loaders: Any) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    for generator in _generators_of(*loaders):
        generator.manual_seed(seed)


def parts_of_loader(loader: Any) -> list[Any]:
    """A loader of batches, and what it has samplers and data from."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    return [loader, sampler, batches, getattr(batches, "sampler", None), getattr(loader, "dataset", None)]


def _generators_of(*loaders: Any) -> list[torch.Generator]:
    """Those that loaders draw from besides the global ones."""
    found = (getattr(part, "generator", None) for loader in loaders for part in parts_of_loader(loader))
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


@contextmanager
def seeded() -> Iterator[None]:
    """Without gradients, and with the same random numbers each time; the generators are put back afterwards."""
    with torch.no_grad(), randomness_of_the_caller():
        seed_all(0)
        yield


@contextmanager
def reproducibly() -> Iterator[None]:
    """`seeded`, and `alone`."""
    with alone(), seeded():
        yield
