"""Threads: tracing in one leaves alone what others run, and calls of elc_fx wait for each other."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest
import torch
from networks import assert_same, image, ready
from torch import Tensor, nn

import elc_fx


class Gated(nn.Module):
    """Reads a parameter of its own, and asks for the mode of gradients: for both, tracing puts something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.gain = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x) * self.gain
        return y if torch.is_grad_enabled() else y + 1


class Calling(nn.Module):
    """Calls a function whenever its forward runs, and so while it is traced."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__()
        self.layers = blocks(1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.function()
        return self.layers(x)


def blocks(count: int) -> nn.Sequential:
    layers = [layer for _ in range(count) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    return nn.Sequential(*layers)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_tracing_leaves_the_models_of_other_threads_alone() -> None:
    gated, x = ready(Gated()), image(1, 4, 6, 6)
    expected, given = gated(x), list[Tensor]()
    with ThreadPoolExecutor(1) as other:
        model = ready(Calling(lambda: given.append(other.submit(gated, x).result(timeout=60))))
        assert norms(elc_fx.compile(model)) == 0
    assert given and all(torch.equal(y, expected) for y in given)


def test_a_compile_waits_for_that_of_another_thread() -> None:
    model, calls = ready(blocks(1)), list[Future[nn.Module]]()
    with ThreadPoolExecutor(1) as other:

        def meanwhile() -> None:
            if not calls:
                calls.append(other.submit(elc_fx.compile, model, image(1, 4, 6, 6)))
                assert not wait(calls, timeout=0.2).done

        assert norms(elc_fx.compile(ready(Calling(meanwhile)))) == 0
        assert norms(calls[0].result(timeout=60)) == 0


@pytest.mark.usefixtures("hasty")
def test_networks_are_compiled_in_threads_while_others_run() -> None:
    x, serving = image(1, 4, 6, 6), ready(Gated())
    models = [ready(blocks(6)) for _ in range(6)]
    expected, done = serving(x), False

    def serve() -> int:
        served = 0
        while not done:
            assert torch.equal(serving(x), expected)
            served += 1
        return served

    before = torch.get_rng_state(), random.getstate()
    with ThreadPoolExecutor(5) as pool:
        servers = [pool.submit(serve) for _ in range(2)]
        try:
            compiled = list(pool.map(lambda model: elc_fx.compile(model, x), models))
        finally:
            done = True
        assert all(server.result(timeout=60) for server in servers)
    for model, small in zip(models, compiled, strict=True):
        assert norms(small) == 0
        assert_same(small(x), model(x))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
