"""Times of several jobs, measured side by side."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one job over all its repeats."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def seconds(job: Callable[[], object]) -> float:
    """The wall-clock time of one call. What the job returns is freed after the clock stops."""
    gc.collect()
    start = time.perf_counter()
    result = job()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def side_by_side(jobs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times the jobs in turn, `repeats` times over, so that a slow moment of the machine meets all of them alike.

    The order is reversed in every other round: no job always runs on the caches that one particular other job left.
    """
    for _ in range(warmup):
        for job in jobs.values():
            job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    order = list(jobs)
    for _ in range(repeats):
        for name in order:
            taken[name].append(seconds(jobs[name]))
        order.reverse()
    return {name: Timing.of(times) for name, times in taken.items()}


def milliseconds(timing: Mapping[str, Any]) -> str:
    """A stored Timing as `median (fastest–slowest)`, in milliseconds."""
    return "{:,.2f} ({:,.2f}–{:,.2f})".format(*(1000 * timing[key] for key in ("median", "fastest", "slowest")))
