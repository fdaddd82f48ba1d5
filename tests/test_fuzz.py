"""The first networks of tools/fuzz.py: compiled, saved, decoupled and merged. The tool goes on with others."""

from __future__ import annotations

import random

import pytest

from fuzz import check, drawn

NETWORKS = 96
PER_TEST = 8


@pytest.mark.parametrize("first", range(0, NETWORKS, PER_TEST))
@pytest.mark.filterwarnings("ignore")  # of merges that cost more, and of drop-outs that training would have
def test_random_networks_remain_what_they_are(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        check(*drawn(random.Random(seed)), seed=seed)
