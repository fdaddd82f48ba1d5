"""torch.compile(model, backend="elc_fx"): merged in inference, unchanged in training, right whatever the weights do."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Standardised, assert_same, image, ready
from torch import Tensor, fx, nn

from elc_fx.deploying.dynamo import MergedGraph, backend

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


class Block(nn.Module):
    """Branches that are one convolution in eval, a residual, dropout, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.point = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.wide(x) + self.point(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Seen:
    """A backend that runs the graphs that it is handed, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any], **_: Any) -> Any:
        self.graphs.append(graph_module)
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

    def layers(self) -> int:
        return sum("conv" in str(node.target) for node in self.graphs[-1].graph.nodes)

    def norms(self) -> int:
        return sum("batch_norm" in str(node.target) for node in self.graphs[-1].graph.nodes)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> None:
    torch._dynamo.reset()


@pytest.fixture
def seen() -> Seen:
    return Seen()


def compiled(model: nn.Module, seen: Seen) -> Any:
    return torch.compile(model, backend=backend, options={"backend": seen})


@torch.no_grad()
def test_inference_is_merged_and_handed_on(seen: Seen) -> None:
    model, x = ready(Block()), image(2, 3, 9, 9)
    fast = compiled(model, seen)
    assert_same(fast(x), model(x))
    assert (seen.layers(), seen.norms()) == (1, 0)


@torch.no_grad()
def test_inductor_is_what_it_is_handed_on_to() -> None:
    model, x = ready(Block()).float(), image(2, 3, 9, 9, dtype=torch.float32)
    fast = torch.compile(model, backend=backend)
    for batch in (x, image(5, 3, 9, 9, dtype=torch.float32), image(3, 3, 9, 9, dtype=torch.float32)):
        assert_same(fast(batch), model(batch), 1e-4)


@torch.no_grad()
def test_sizes_may_change(seen: Seen) -> None:
    model = ready(Block())
    fast = compiled(model, seen)
    for shape in ((2, 3, 9, 9), (4, 3, 9, 9), (5, 3, 9, 9), (5, 3, 12, 7), (1, 3, 6, 6)):
        assert_same(fast(image(*shape)), model(image(*shape)))
    assert seen.norms() == 0


def test_with_gradients_the_graph_is_handed_on_unchanged(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    model, x = ready(Block()), image(2, 3, 9, 9)
    with caplog.at_level(logging.WARNING, "elc_fx"):
        compiled(model, seen)(x).sum().backward()
    assert seen.norms() == 3 and model.head.weight.grad is not None
    assert len(caplog.records) == 1 and "gradients are enabled" in caplog.text


@torch.no_grad()
def test_training_mode_is_handed_on_unchanged(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    model, twin, x = ready(Block()), ready(Block()), image(2, 3, 9, 9)
    model.drop.p = twin.drop.p = 0.0
    with caplog.at_level(logging.WARNING, "elc_fx"):
        assert_same(compiled(model.train(), seen)(x), twin.train()(x))
    assert seen.norms() == 3 and len(caplog.records) == 1 and "training mode" in caplog.text
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


def another(model: nn.Module) -> dict[str, Tensor]:
    return ready(type(model)(), seed=1).state_dict()


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(image(2, 3, 9, 9)).square().mean().backward()
    optimizer.step()


def statistics(model: nn.Module) -> None:
    model.train()
    model(image(4, 3, 9, 9, seed=3))
    model.eval()


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(another(model)),
    "assigned": lambda model: model.load_state_dict(another(model), assign=True),
    "optimizer": step,
    "statistics": statistics,  # batch norm writes them without a new version
    "data": lambda model: [p.data.mul_(1.5) for p in model.parameters()],
    "storage": lambda model: [setattr(p, "data", p.data * 1.5) for p in model.parameters()],
    "inference_mode": lambda model: torch.inference_mode()(lambda: model.wide[0].weight.mul_(2))(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_that_change_are_merged_again_without_compiling(change: str, seen: Seen) -> None:
    model, x = ready(Block()), image(2, 3, 9, 9)
    fast = compiled(model, seen)
    fast(x), fast(x)
    before = model(x)
    CHANGES[change](model)
    assert not torch.allclose(model(x), before)
    assert_same(fast(x), model(x))
    assert len([g for g in seen.graphs if "batch_norm" not in g.code]) == 1


@torch.no_grad()
def test_weights_in_channels_last_that_change_are_merged_again(seen: Seen) -> None:
    model, x = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))), image(2, 4, 6, 6)
    fast = compiled(model.to(memory_format=torch.channels_last), seen)
    fast(x), fast(x)
    model[0].weight.data.mul_(1.5)
    assert_same(fast(x), model(x))
    assert len(seen.graphs) == 1


@torch.no_grad()
def test_a_buffer_of_nan_is_no_change(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.register_buffer("none", torch.tensor([float("nan")]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.none + 1

    model, x = ready(Model()), image(2, 4, 6, 6)
    model.none.fill_(float("nan"))
    fast = compiled(model, seen)
    for _ in range(5):
        assert_same(fast(x)[0], model(x)[0])
    assert len(seen.graphs) == 1 and "unmerged" not in caplog.text


class Streaming(nn.Module):
    """A merge, beside what changes with every call: a cache, written in place or anew, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.scale = nn.Parameter(torch.full((4, 1, 1), 2.0))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2, 4, 4, 4))
        self.register_buffer("latest", torch.zeros(2, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.scale.square()
        z = torch.relu(y + self.cache) * self.scale + self.latest
        self.seen += 1
        self.cache.copy_(y)
        self.latest = z * 0.5
        return z * self.seen


@torch.no_grad()
def test_buffers_that_no_merge_reads_may_change_with_every_call(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    model, twin, x = ready(Streaming()), ready(Streaming()), image(2, 4, 6, 6)
    fast = compiled(model, seen)
    for step in range(8):
        assert_same(fast(x), twin(x))
        if step == 5:
            model.scale.mul_(1.5), twin.scale.mul_(1.5)  # read by the merge, squared, and beside it
    assert seen.norms() == 0 and "unmerged" not in caplog.text
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


@torch.no_grad()
def test_numbers_of_layers_may_be_inputs(seen: Seen) -> None:
    """With dynamic=True, eps and momentum are inputs of the graph."""
    model = ready(Block())
    fast = torch.compile(model, backend=backend, options={"backend": seen}, dynamic=True)
    assert_same(fast(image(2, 3, 9, 8)), model(image(2, 3, 9, 8)))
    count = len(seen.graphs)
    assert_same(fast(image(4, 3, 7, 8)), model(image(4, 3, 7, 8)))
    assert seen.norms() == 0 and len(seen.graphs) == count
    model.norm.eps = 0.5
    assert_same(fast(image(2, 3, 9, 9)), model(image(2, 3, 9, 9)))


@torch.no_grad()
def test_weights_that_change_with_every_call_are_not_merged_for_ever(
    seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = ready(Block()), image(2, 3, 9, 9)
    fast = compiled(model, seen)
    for _ in range(8):
        assert_same(fast(x), model(x))
        model.wide[0].weight.mul_(1.1)
    assert seen.norms() == 3 and caplog.text.count("change with every call") == 1
    assert_same(fast(image(5, 3, 7, 7)), model(image(5, 3, 7, 7)))


@torch.no_grad()
def test_a_graph_break_makes_two_graphs_that_are_both_merged(seen: Seen) -> None:
    first, second, x = ready(Block()), ready(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 1), image(2, 3, 9, 9)

    def run(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    fast = torch.compile(run, backend=backend, options={"backend": seen})
    assert_same(fast(x), run(x))
    assert len(seen.graphs) == 2 and seen.graphs[1].code.count("_nn.linear(") == 1


@torch.no_grad()
def test_a_shared_module_is_merged_at_each_call(seen: Seen) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model, x = ready(Twice()), image(2, 4, 6, 6)
    assert_same(compiled(model, seen)(x), model(x))
    assert (seen.layers(), seen.norms()) == (2, 0)


@torch.no_grad()
def test_autocast_inside_of_a_model_stays_as_it_is(seen: Seen) -> None:
    model, x = ready(Block()).float(), image(2, 3, 9, 9, dtype=torch.float32)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_same(torch.compile(run, backend=backend, options={"backend": seen})(x), run(x), 1e-2)


@torch.inference_mode()
def test_inference_mode(seen: Seen) -> None:
    model, x = ready(Block()), image(2, 3, 9, 9)
    fast = compiled(model, seen)
    assert_same(fast(x), model(x))
    assert_same(fast(x), model(x))
    assert seen.norms() == 0


@torch.no_grad()
def test_numbers_that_are_not_finite_run_unmerged(seen: Seen) -> None:
    model, x = ready(Block()), image(2, 3, 9, 9)
    model.wide[0].weight[0, 0, 0, 0] = float("nan")
    torch.testing.assert_close(compiled(model, seen)(x), model(x), equal_nan=True)


def test_the_entry_point_is_the_backend() -> None:
    _, _, declared = PROJECT.read_text(encoding="utf-8").partition("[project.entry-points.torch_dynamo_backends]\n")
    name, _, value = declared.partition("\n")[0].partition(" = ")
    assert name == "elc_fx" and EntryPoint(name, value.strip('"'), "torch_dynamo_backends").load() is backend


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_is_merged(dims: int, seen: Seen) -> None:
    kind, norm = (getattr(nn, f"{name}{dims}d") for name in ("ConvTranspose", "BatchNorm"))
    model = ready(nn.Sequential(kind(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2), norm(6), nn.ReLU()))
    x = image(2, 4, *[5] * dims)
    with torch.no_grad():
        assert_same(compiled(model, seen)(x), model(x))
    assert seen.norms() == 0


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@torch.no_grad()
def test_merging_in_a_call_does_not_trace(mode: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """While fx traces, calls of any module in other threads would be taken for a part of what is traced."""
    layers = [nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    model, x = ready(nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 3))), image(2, 3, 9, 9)
    fast = compiled(model, seen)
    assert_same(fast(x), model(x))
    assert seen.norms() == 0
    monkeypatch.setattr(fx.Tracer, "trace", None)
    model.load_state_dict(ready(model).state_dict())
    model[0].weight.mul_(1.5)
    assert_same(fast(x), model(x))


@torch.no_grad()
def test_threads_with_networks_of_one_class_get_each_their_own_numbers(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: MergedGraph, *arguments: Any) -> Any:
        merged = up_to_date(self, *arguments)
        time.sleep(0.05)  # in which another thread may call it
        return merged

    up_to_date = MergedGraph._up_to_date
    x, models = image(2, 3, 9, 9), [ready(Block()) for _ in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        model.wide[0].weight.copy_(torch.randn_like(model.wide[0].weight))
    wanted = [model(x) for model in models]
    fast = [compiled(model, seen) for model in models]
    for call in fast:
        call(x)
    monkeypatch.setattr(MergedGraph, "_up_to_date", slow)

    def call_it(which: int) -> Tensor:
        with torch.no_grad():
            return fast[which](x)

    with ThreadPoolExecutor(2) as pool:
        for given, expected in zip(pool.map(call_it, [0, 1]), wanted, strict=True):
            assert_same(given, expected)


@torch.no_grad()
def test_networks_of_one_class_are_all_merged_and_forgotten(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def counted(self: MergedGraph, inputs: Any) -> Any:
        merges.append(self)
        return merge(self, inputs)

    merges: list[MergedGraph] = []
    merge = MergedGraph._merge
    monkeypatch.setattr(MergedGraph, "_merge", counted)
    x, blocks = image(2, 3, 9, 9), [ready(Block(), seed) for seed in range(6)]
    for block in blocks:
        block.compile(backend=backend, options={"backend": seen})
    for _ in range(3):
        for seed, block in enumerate(blocks):
            assert_same(block(x), ready(Block(), seed)(x))
    assert len(merges) == len(blocks) and len(seen.graphs) == 1 and "unmerged" not in caplog.text
    networks = merges[0].networks
    last = weakref.ref(networks[next(blocks[-1].parameters())].weights[0])
    assert len(networks) == len(blocks) and last() is not None
    del blocks[2:], block
    gc.collect()
    assert len(networks) == 2 and last() is None
    for _ in range(9):  # each new one is gone after one call
        blocks[1].load_state_dict(blocks[1].state_dict(), assign=True)
        blocks[1].wide[0].weight = nn.Parameter(blocks[1].wide[0].weight.clone())
        assert_same(blocks[1](x), ready(Block(), 1)(x))
    assert "change with every call" in caplog.text


class JoinAroundAWrite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.first(x)
        x[:, 0] = 0
        return y + self.second(x)


class ScaleThatIsWritten(nn.Module):
    """view: reads what is written under another name."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.register_buffer("scale", torch.ones(4, 1, 1))
        self.register_buffer("read", self.scale.view(1, 4, 1, 1) if view else self.scale)

    def forward(self, x: Tensor) -> Tensor:
        self.scale[0] = x.mean()
        return self.layer(x) * self.read


@pytest.mark.parametrize(
    "make",
    [JoinAroundAWrite, lambda: ScaleThatIsWritten(False), lambda: ScaleThatIsWritten(True)],
    ids=["between branches", "into a scale", "into a scale, by another name"],
)
@torch.no_grad()
def test_items_that_are_set_are_writes(seen: Seen, make: Any) -> None:
    model, twin, x = make().double().eval(), make().double().eval(), image(2, 4, 6, 6)
    twin.load_state_dict(model.state_dict())
    fast = compiled(model, seen)
    for _ in range(3):
        assert_same(fast(x.clone()), twin(x.clone()))


@torch.no_grad()
def test_a_batch_norm_of_weights_is_no_training_mode(seen: Seen) -> None:
    model, x = ready(nn.Sequential(Standardised(4, 4, 3), nn.ReLU(), Standardised(4, 4, 1))), image(2, 4, 6, 6)
    fast = compiled(model, seen)
    assert_same(fast(x), model(x))
    assert seen.norms() == 0
    model[0].weight.mul_(torch.linspace(1, 2, 9).view(3, 3))
    assert_same(fast(x), model(x))
