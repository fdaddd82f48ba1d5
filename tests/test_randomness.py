"""The caller's random numbers are as they were, whatever models and loaders draw."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

import elc_fx
from elc_fx.randomness import randomness_of_the_caller, reproducibly, seed_all


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
    def forward(self, x: Tensor) -> Tensor:
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
