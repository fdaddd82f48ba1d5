"""The caller's random numbers are as they were, whatever models and loaders draw."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import torch
from torch import Tensor, nn

import elc_fx
from elc_fx.capturing.randomness import randomness_of_the_caller, reproducibly, seed_all


class Drawing(nn.Module):
    """Draws from every generator, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(self.noise(x)))))
        scores: Tensor = self.head(y.mean((2, 3)))
        return scores


class Noise(nn.Module):
    """Which no trace can enter."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == math.inf:
            return x
        return x + torch.randn_like(x) * float(np.random.rand()) * random.random()


def drawn() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def test_every_generator_is_put_back() -> None:
    for context in (reproducibly(), randomness_of_the_caller()):
        seed_all(1)
        expected = drawn()
        seed_all(1)
        with context:
            drawn()
        assert drawn() == expected and torch.initial_seed() == 1


def test_measuring_leaves_the_callers_random_numbers_as_they_were() -> None:
    model, x = Drawing().eval(), torch.randn(2, 3, 8, 8)
    seed_all(1)
    expected = drawn()
    seed_all(1)
    elc_fx.measure(model, x)
    assert drawn() == expected


def test_planning_is_the_same_each_time_and_leaves_no_trace() -> None:
    model, x = Drawing().eval(), torch.randn(8, 3, 8, 8)
    seed_all(1)
    expected, losses = drawn(), []
    for seed in (1, 1, 2):
        seed_all(seed)
        planner = elc_fx.Planner(model, x, [x], progress=False)
        planner.collapse(planner.plan(elc_fx.Budget(flops=0.9, latency="1 s")))
        losses.append(planner.losses)
        if seed == 1:
            assert drawn() == expected
    assert losses[0] == losses[1] == losses[2]


def test_noise_is_no_loss() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 3)]  # one map, exactly
    quiet, x = nn.Sequential(*layers).eval(), torch.randn(64, 3, 8, 8)
    noisy = nn.Sequential(Noise(), *layers[:2], Noise(), *layers[2:]).eval()
    small = [elc_fx.Planner(model, x, [x], progress=False).losses for model in (quiet, noisy)]
    assert max(small[0]) > 1e-4 and min(small[0]) < 1e-6
    assert all(a < 1e-6 for a, b in zip(small[1], small[0], strict=True) if b < 1e-6)


SEED_OF_CUDA = """
import torch, elc_fx
from torch import nn

torch.cuda.manual_seed_all(7)
given = torch.cuda._lazy_seed_tracker.manual_seed_all_cb
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
elc_fx.compile(model, torch.randn(1, 3, 6, 6))
try:
    elc_fx.compile(model, torch.randn(1, 2, 6, 6))
except elc_fx.InvalidInputError:
    assert given is not None and torch.cuda._lazy_seed_tracker.manual_seed_all_cb is given
    print("as it was")
"""


def test_cuda_begins_with_the_seed_that_it_was_given() -> None:
    run = subprocess.run([sys.executable, "-c", SEED_OF_CUDA], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "as it was", run.stderr


class Asking(nn.Module):
    """Draws what tracing would freeze, and so is not traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand()) * random.random()


def test_tracing_leaves_every_generator_as_it_was() -> None:
    model = nn.Sequential(Asking(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    seed_all(3)
    elc_fx.compile(model)
    given = drawn()
    seed_all(3)
    assert given == drawn()
