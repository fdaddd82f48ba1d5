"""tools/bench_compile.py: its chains are what they are called, and growth is per layer."""

from typing import Any

import pytest
import torch

import bench_compile


@pytest.mark.parametrize(
    ("kind", "left"), [("conv, batch norm, ReLU", 6), ("1×1 convolutions", 1), ("multi-branch blocks", 3)]
)
def test_chain_of_six_convolutions_is_compiled(kind: str, left: int) -> None:
    row = bench_compile.time_chain(kind, 6, repeats=1)
    assert row["convolutions_after"] == left
    assert row["seconds"].keys() == {"elc_fx", "unverified", "trace"}


@pytest.mark.parametrize("kind", bench_compile.CHAINS)
def test_chain_runs(kind: str) -> None:
    image = torch.rand(1, bench_compile.CHANNELS, 16, 16)
    assert bench_compile.CHAINS[kind](4).eval()(image).shape[:2] == (1, bench_compile.CHANNELS)


def test_growth_is_of_the_time_per_layer_between_the_two_longest_chains() -> None:
    assert bench_compile.growths([_row(100, 9.0), _row(10_000, 40.0), _row(1_000, 2.0)]) == {"chain": 2.0}


def _row(layers: int, seconds: float) -> dict[str, Any]:
    return {"chain": "chain", "layers": layers, "seconds": {"elc_fx": {"median": seconds}}}
