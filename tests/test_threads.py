"""Threads: tracing in one leaves alone what others run, and calls of elc_fx wait for each other."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest
import torch
from networks import assert_same, batch_norms, image, ready
from torch import Tensor, fx, nn

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
        assert not batch_norms(elc_fx.compile(model))
    assert given and all(torch.equal(y, expected) for y in given)


def test_a_compile_waits_for_that_of_another_thread() -> None:
    model, calls, waited = ready(blocks(1)), list[Future[nn.Module]](), list[bool]()
    with ThreadPoolExecutor(1) as other:

        def meanwhile() -> None:
            if not calls:
                calls.append(other.submit(elc_fx.compile, model, image(1, 4, 6, 6)))
                waited.append(not wait(calls, timeout=0.2).done)  # an error in here would be one of the model's

        assert not batch_norms(elc_fx.compile(ready(Calling(meanwhile))))
        assert waited == [True]
        assert not batch_norms(calls[0].result(timeout=60))


def test_dynamo_compiles_in_another_thread_when_tracing_has_ended() -> None:
    """It traces by changing `nn.Module`, too: at once, each would undo what the other changed."""
    model, x, calls, waited = ready(blocks(1)), image(1, 4, 6, 6), list[Future[Tensor]](), list[bool]()
    call, fast = nn.Module.__call__, torch.compile(model, backend="aot_eager")
    with ThreadPoolExecutor(1) as other:

        def meanwhile() -> None:
            if not calls:
                calls.append(other.submit(fast, x))
                waited.append(not wait(calls, timeout=0.2).done)  # an error in here would be one of the model's

        assert not batch_norms(elc_fx.compile(ready(Calling(meanwhile))))
        assert waited == [True]
        assert_same(calls[0].result(timeout=120), model(x))
    assert nn.Module.__call__ is call


def test_a_backend_of_dynamos_may_call_elc_fx_while_another_thread_does() -> None:
    """A thread that holds dynamo's lock wants elc_fx's, and one that holds elc_fx's wants dynamo's."""
    x, compiling, tracing = image(1, 4, 6, 6), threading.Event(), threading.Event()

    def backend(graph_module: fx.GraphModule, _: object) -> nn.Module:
        compiling.set()
        tracing.wait(timeout=1)
        return elc_fx.compile(graph_module.eval())

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tracing.set()
            return x + 1

    child = torch.compile(blocks(1), backend="eager")
    with ThreadPoolExecutor(1) as other:
        call = other.submit(torch.no_grad()(torch.compile(ready(blocks(1)), backend=backend)), x)
        assert compiling.wait(timeout=60)
        elc_fx.compile(ready(nn.Sequential(Waits(), child)), x)
        assert_same(call.result(timeout=120), ready(blocks(1))(x))


class InThreads(nn.Module):
    """Hands its work to threads of its own."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.others = layers, blocks(1)

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.layers, x).result() + pool.submit(self.others, x).result()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.calls = blocks(1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x) * self.calls


def hooked() -> nn.Module:
    layers = blocks(1)
    layers.register_forward_hook(lambda module, args, output: output * 2 if type(output) is Tensor else output)
    return layers


@pytest.mark.parametrize(
    ("layers", "left", "reasons"),
    [
        (lambda: blocks(1), 0, []),
        (hooked, 1, ["layers: it has hooks"]),
        (Counting, 0, ["layers: its forward changes attributes of the module"]),
    ],
)
def test_what_a_model_does_in_threads_is_traced_as_what_it_does_itself(
    layers: Callable[[], nn.Module], left: int, reasons: list[str]
) -> None:
    x, model = image(1, 4, 6, 6), ready(InThreads(layers()))
    compiled = elc_fx.compile(model)
    assert len(batch_norms(compiled)) == left
    assert [str(refusal) for refusal in elc_fx.report_of(compiled).opaque] == reasons
    assert_same([compiled(x) for _ in range(3)], [model(x) for _ in range(3)])


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
        assert not batch_norms(small)
        assert_same(small(x), model(x))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
