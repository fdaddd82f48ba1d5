"""compile(backend=…): the merged network in the runtime that serves it."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from networks import RepVGGBlock, assert_same, conv_bn, image, randomize_, ready
from torch import Tensor, nn

import elc_fx
from elc_fx.deploying import runtimes


class Two(nn.Module):
    """Two inputs, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": self.layer(x) + y, "mean": y.mean((2, 3))}


def network() -> nn.Module:
    return randomize_(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())).eval()


def picture(*shape: int) -> Tensor:
    return image(*shape, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_a_runtime_computes_the_same_for_any_batch(backend: Any) -> None:
    model = network()
    fast = elc_fx.compile(model, picture(1, 3, 8, 8), backend=backend)
    for batch in (1, 3):
        assert_same(fast(picture(batch, 3, 8, 8)), model(picture(batch, 3, 8, 8)), 1e-5)
    assert len(elc_fx.report_of(fast).merged) == 1
    with pytest.raises(elc_fx.InvalidInputError, match=r"made for inputs \[N, 3, 8, 8\].*given \[N, 5, 8, 8\]"):
        fast(picture(1, 5, 8, 8))


@torch.no_grad()
def test_inputs_and_outputs_keep_their_structure() -> None:
    model, x, y = randomize_(Two()).eval(), picture(2, 3, 8, 8), picture(2, 4, 8, 8)
    assert_same(elc_fx.compile(model, (x, y), backend="onnxruntime")(x, y), model(x, y), 1e-5)


class Unused(nn.Module):
    """An input that it does not read comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = network()

    def forward(self, flag: Tensor, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_an_input_that_is_not_used_is_borne(backend: Any) -> None:
    model, inputs = Unused().eval(), (torch.ones(2, 1), picture(2, 3, 8, 8))
    fast = elc_fx.compile(model, inputs, backend=backend)
    assert_same(fast(*inputs), model(*inputs), 1e-5)
    with pytest.raises(elc_fx.InvalidInputError, match=r"takes tensors, and is given \['int', 'Tensor'\]"):
        fast(1, inputs[1])


def test_costs_of_what_runs_elsewhere_are_not_said_to_be_nothing() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(1, 3, 8, 8)
    away = elc_fx.compile(model, x, backend="onnxruntime")
    for called in (
        lambda: elc_fx.measure(away, x),
        lambda: elc_fx.compare(model, away, x),
        lambda: elc_fx.diff(model, away, x),
        lambda: elc_fx.compile(away),
        lambda: elc_fx.candidates(away, x),
        lambda: elc_fx.plan(away, x, elc_fx.Budget(flops=0.5), loss="uniform"),
        lambda: elc_fx.finetune(away, [(x, torch.zeros(1))]),
    ):
        with pytest.raises(elc_fx.InvalidInputError, match="runs in onnxruntime"):
            called()


@torch.no_grad()
def test_inductor_is_torch_compile() -> None:
    torch._dynamo.reset()
    model, x = network(), picture(1, 3, 8, 8)
    fast = elc_fx.compile(model, backend="inductor")
    assert isinstance(fast, torch._dynamo.eval_frame.OptimizedModule) and elc_fx.report_of(fast).merged
    assert_same(fast(x), model(x), 1e-5)


def test_what_a_runtime_needs_is_said_before_anything_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="backend is 'tvm', expected None, 'inductor'"):
        elc_fx.compile(network(), backend="tvm")  # type: ignore[arg-type]
    with pytest.raises(elc_fx.InvalidInputError, match="needs example_inputs"):
        elc_fx.compile(network(), backend="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(elc_fx.MissingPackageError, match=r"pip install 'elc_fx\[openvino\]'"):
        elc_fx.compile(network(), picture(1, 3, 8, 8), backend="openvino")


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_exported_for_any_batch_and_any_size_of_images(runtime: str) -> None:
    model = ready(nn.Sequential(*conv_bn(3, 4), RepVGGBlock(4, 4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1)))
    model, x, auto = model.float(), torch.randn(2, 3, 16, 16), torch.export.Dim.AUTO
    small = elc_fx.compile(model, x)
    sizes = ({0: auto, 2: auto, 3: auto},)
    if runtime == "torch":
        run: Any = torch.export.export(small, (x,), dynamic_shapes=sizes).module()
    else:
        program = torch.onnx.export(small, (x,), dynamo=True, dynamic_shapes=sizes, verbose=False)
        assert program is not None
        run_arrays = runtimes.RUNS[runtime](program.model_proto.SerializeToString())
        run = lambda y: torch.from_numpy(run_arrays([y.numpy()])[0])  # noqa: E731
    for shape in ((2, 3, 16, 16), (5, 3, 23, 32), (1, 3, 64, 17)):
        y = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(run(y), model(y), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_precision_that_a_runtime_lacks_is_told_with_the_way_out(runtime: Any) -> None:
    x = torch.randn(1, 3, 6, 6, dtype=torch.bfloat16)
    with pytest.raises(elc_fx.RuntimeFailedError, match=r"bfloat16.*model\.float\(\)"):
        elc_fx.compile(network().bfloat16(), x, backend=runtime)(x)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_threads_may_call_the_same_network(backend: Any) -> None:
    model = network()
    fast = elc_fx.compile(model, picture(1, 3, 8, 8), backend=backend)
    pictures = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        wanted = [model(x) for x in pictures]

    def call(number: int) -> bool:
        called = fast if number % 2 else copy.deepcopy(fast)
        which = number % len(pictures)
        return all(torch.allclose(called(pictures[which]), wanted[which], atol=1e-5) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(8)))
    with pytest.raises(elc_fx.RuntimeFailedError, match="without a backend"):
        pickle.dumps(fast)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(3, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.block(a) - 2 * self.block(b)
        return y


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_one_tensor_may_be_the_example_of_two_inputs(backend: Any) -> None:
    model, x = ready(Pair()).float(), picture(2, 3, 6, 6)
    deployed = elc_fx.compile(model, (x, x), backend=backend)
    a, b = picture(3, 3, 6, 6), -picture(3, 3, 6, 6)
    assert_same(deployed(a, b), model(a, b), 1e-5)
    with pytest.raises(elc_fx.InvalidInputError, match="by position, not by name: a, b"):
        deployed(a=a, b=b)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(3, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.block(x) * self.calls
        return y


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_keeps_state_is_refused(backend: Any) -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="keeps state from call to call"):
        elc_fx.compile(ready(Counting()).float(), picture(2, 3, 6, 6), backend=backend)


def test_a_runtime_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = runtimes.RUNS["onnxruntime"]

    def off(stored: bytes) -> runtimes.Run:
        run = original(stored)
        return lambda arrays: [2 * array for array in run(arrays)]

    monkeypatch.setitem(runtimes.RUNS, "onnxruntime", off)
    with pytest.raises(elc_fx.RuntimeFailedError, match="computes something else than the network"):
        elc_fx.compile(network(), picture(1, 3, 8, 8), backend="onnxruntime")


class Caching(nn.Module):
    """What it remembers changes nothing of what it gives."""

    last: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.block(x)
        return self.last  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_only_remembers_runs(backend: Any) -> None:
    model, x = ready(Caching()).float(), picture(3, 3, 6, 6)
    assert_same(elc_fx.compile(model, picture(2, 3, 6, 6), backend=backend)(x), model(x), 1e-5)


def test_a_runtime_need_not_be_compared() -> None:
    model = ready(nn.Sequential(nn.InstanceNorm2d(3), conv_bn(3, 4), nn.InstanceNorm2d(4))).float()
    zeros = torch.full((2, 3, 8, 8), 0.1)  # what is left is rounding
    deployed = elc_fx.compile(model, zeros, backend="onnxruntime", verify=False)
    assert_same(deployed(picture(2, 3, 8, 8)), model(picture(2, 3, 8, 8)), 1e-4)


def test_a_network_that_draws_numbers_is_not_compared() -> None:
    noisy = ready(Noisy()).float()
    deployed = elc_fx.compile(noisy, picture(2, 3, 6, 6), backend="onnxruntime")
    assert deployed(picture(2, 3, 6, 6)).shape == (2, 4, 6, 6)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y + torch.randn_like(y)
