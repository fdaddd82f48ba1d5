"""Latency: every distinct layer that a choice could leave behind, measured on the machine at hand.

A layer is run several times over in one small network, with weights of its own each time, and the time of a network
with half as many is taken off: so its time is that inside of a network, not that of a call. Where its output has the
shape of its input, the copies follow each other, since runtimes keep data in layouts of their own between layers.
Layers for runtimes other than torch are exported several at a time, since every export begins with seconds of work that
does not depend on the network. What a network takes beyond its layers is not measured, but follows: two networks are
timed as a whole, the original and one of the fastest that choices can leave behind, and the time of all others is on
the line through both, until more of them are known (`Planner` times its plans).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx, nn

from elc_fx.affine import AffineMap, Geometry
from elc_fx.capturing.graph import function_name, module_of, runs_foreign_code, vanishes
from elc_fx.capturing.identity import described
from elc_fx.capturing.shapes import run_recording
from elc_fx.deploying.exporting import onnx_model
from elc_fx.deploying.runtimes import RUNS
from elc_fx.errors import ElcError, InvalidInputError, LatencyError
from elc_fx.matching.pooling import put_poolings_back
from elc_fx.matching.serial import SerialGraph
from elc_fx.merging.fusion import layer_of, padded
from elc_fx.merging.lossless import LosslessCompilation
from elc_fx.planning.agreement import of_the_first
from elc_fx.planning.candidates import check_computes
from elc_fx.planning.cost import Choice, LatencyModel
from elc_fx.planning.stored import StoredTable
from elc_fx.planning.substitution import substituted

Backend = Literal["eager", "compile", "onnxruntime", "openvino"]
Call = Callable[[], object]

COPIES = 8  # of a layer, by which two networks differ; fewer where they would have more weights than MOST_NUMBERS
TOGETHER = 8  # layers in one exported model, at most
MOST_NUMBERS = 2**25  # weights, inputs and outputs in one exported model, at most
BLOCKS = 7  # of which the fastest counts: what else runs on a machine only adds
WHOLE_BLOCKS = 21  # for whole networks
BLOCK_SECONDS = 0.03
UNLIMITED = 2**30


def runner(module: nn.Module, inputs: Sequence[Any], backend: Backend) -> Call:
    """A call that runs the module once on the inputs, as the backend deploys it; it has run once already.

    inputs: of `forward`, by position; what is no tensor is a constant. Raises `LatencyError`, `MissingPackageError`.
    """
    check_backend(backend)
    return _started(functools.partial(_RUNNERS[backend], module, tuple(inputs)), backend)


def _started(make: Callable[[], Call], backend: Backend) -> Call:
    try:
        call = make()
        call()
        return call
    except ElcError:
        raise
    except Exception as error:  # whatever the backend runs into
        raise LatencyError(f"{backend} does not run this network: {type(error).__name__}: {error}") from error


def runners(networks: Sequence[tuple[nn.Module, Sequence[Tensor]]], backend: Backend) -> list[Call]:
    """As `runner`, for several networks; what is exported is exported together, if it can be."""
    check_backend(backend)
    parts: Sequence[Any] = [None] * len(networks)
    if backend in RUNS and len(networks) > 1:
        with contextlib.suppress(Exception):  # then each alone: the error is that of the one which is refused
            parts = _parts(networks)
    pairs = zip(parts, networks, strict=True)
    return [_part_or_alone(part, network, inputs, backend) for part, (network, inputs) in pairs]


def _part_or_alone(part: Any, network: nn.Module, inputs: Sequence[Tensor], backend: Backend) -> Call:
    if part is not None:
        with contextlib.suppress(LatencyError):  # one whose output became a constant, say, does not run by itself
            return _started(functools.partial(_running, backend, part, inputs), backend)
    return runner(network, inputs, backend)


def _parts(networks: Sequence[tuple[nn.Module, Sequence[Tensor]]]) -> list[Any]:
    """The ONNX model of each network, cut out of one model of all."""
    from onnx.utils import Extractor

    with torch.no_grad():
        sizes = [(len(inputs), len(pytree.tree_leaves(network(*inputs)))) for network, inputs in networks]
    together = onnx_model(_Beside([network for network, _ in networks]), [tuple(inputs) for _, inputs in networks])
    names = [[value.name for value in values] for values in (together.graph.input, together.graph.output)]
    if [len(own) for own in names] != [sum(counts) for counts in zip(*sizes, strict=True)]:
        raise LatencyError("the exported networks have other inputs or outputs than were given")
    given, returned = map(iter, names)
    extractor = Extractor(together)
    return [
        extractor.extract_model(list(islice(given, inputs)), list(islice(returned, outputs)))
        for inputs, outputs in sizes
    ]


def check_backend(backend: Any) -> None:
    """Raises `InvalidInputError` for what is no backend."""
    if not isinstance(backend, str) or backend not in FUSES:
        raise InvalidInputError(f"backend is {backend!r}, expected one of {', '.join(map(repr, FUSES))}")


def _eager(module: nn.Module, inputs: tuple[Any, ...]) -> Call:
    def call() -> object:
        with torch.no_grad():
            return module(*inputs)

    return call


def _compiled(module: nn.Module, inputs: tuple[Any, ...]) -> Call:
    """What dynamo compiles it keeps with the code, and only so often for the same code: so this is code of its own."""
    graph = fx.Graph()
    graph.output(graph.call_module("module", tuple(graph.placeholder(f"x{i}") for i in range(len(inputs)))))
    compiled = torch.compile(fx.GraphModule({"module": module}, graph), dynamic=False)
    call = _eager(compiled, inputs)  # type: ignore[arg-type]
    with torch._dynamo.config.patch(recompile_limit=UNLIMITED, accumulated_recompile_limit=UNLIMITED):
        call()  # what it cannot compile in one piece has code that is shared
    return call


def _exported(runtime: str, module: nn.Module, inputs: tuple[Any, ...]) -> Call:
    return _running(runtime, onnx_model(module, inputs), inputs)


def _running(runtime: str, model: Any, inputs: Sequence[Any]) -> Call:
    """inputs: of these, an exported network is given the tensors; the rest is part of it."""
    run = RUNS[runtime](model.SerializeToString())
    leaves = pytree.tree_leaves(tuple(inputs))
    arrays = [value.detach().cpu().numpy() for value in leaves if isinstance(value, Tensor)]
    return lambda: run(arrays)


_RUNNERS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Call]] = {
    "eager": _eager,
    "compile": _compiled,
    **{runtime: functools.partial(_exported, runtime) for runtime in RUNS},
}
# Whether elementwise operations after a layer become part of it, or cost next to nothing.
FUSES: dict[str, bool] = {"eager": False, "compile": True, "onnxruntime": True, "openvino": True}


def rounds(calls: Sequence[Call], blocks: int) -> list[list[float]]:
    """Seconds of each call, in each of so many blocks. They take turns, so that a slow moment meets all of them."""
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        _timed(call, 1)
        repeats.append(max(1, round(BLOCK_SECONDS / max(time.perf_counter() - start, 1e-7))))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(blocks):
        for call, count, own in zip(calls, repeats, taken, strict=True):
            own.append(_timed(call, count) / count)
    return taken


def seconds(calls: Sequence[Call], blocks: int = BLOCKS) -> list[float]:
    """The time of each call: of its fastest block."""
    return [min(own) for own in rounds(calls, blocks)]


def _timed(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class LatencyMeter:
    """Times networks and layers of one graph, and remembers them. cache: a folder for the times."""

    def __init__(
        self, graph: SerialGraph, backend: Backend, cache: str | Path | None = None, *, progress: bool = False
    ) -> None:
        self.graph, self.backend = graph, backend
        self.cache = None if cache is None else Path(cache)
        self.progress = progress and sys.stderr.isatty()
        self.inputs = list(graph.captured.inputs or ())
        weight = next(graph.graph_module.parameters(), torch.empty(0))
        self.dtype, self.device = weight.dtype, weight.device
        self.values: dict[fx.Node, tuple[tuple[int, ...], torch.dtype]] = {}

    def model(self, choices: Sequence[Choice]) -> LatencyModel:
        """Measures every layer of the graph, and every convolution that a choice becomes; in the first process only."""
        check_computes(self.graph.graph_module)
        self.values = run_recording(self.graph.captured, lambda value: (tuple(value.shape), value.dtype))[1]
        known = StoredTable(self.cache, f"times-{self._key()}")
        nodes = {node.name: self._unit(node) if node is leader else None for node, leader in self._leaders().items()}
        merged = {
            choice.key: self._layer(choice.geometry, choice.region.source, choice.region.output) for choice in choices
        }
        units = {unit.key: unit for unit in (*nodes.values(), *merged.values()) if unit is not None}
        times: dict[str, float] = of_the_first(lambda: {key: known[key] for key in units if key in known})
        missing = [unit for unit in units.values() if unit.key not in times]
        groups = list(_grouped(missing)) if self.backend in RUNS else [[unit] for unit in missing]
        bar = track(groups, f"{len(missing)} layers", console=Console(stderr=True), disable=not self.progress)
        for group in bar:
            measured = of_the_first(functools.partial(self._measured, group))
            for unit, time_taken in zip(group, measured, strict=True):
                times[unit.key] = time_taken
                if unit.shared:
                    known[unit.key] = time_taken
        spent = {name: 0.0 if unit is None else times[unit.key] for name, unit in nodes.items()}
        summed = LatencyModel(sum(spent.values()), spent, {key: times[unit.key] for key, unit in merged.items()})
        fast = _fast(summed, choices)
        return summed.through(fast, *self.whole(fast))

    def whole(self, choices: Sequence[Choice]) -> tuple[float, float]:
        """Seconds of the original and of what the choices leave behind, side by side."""
        known, name = self._networks, ", ".join(sorted(choice.key for choice in choices))
        first, second = f"before: {name}", f"after: {name}"
        there = first in known and second in known
        found = of_the_first(lambda: (known[first], known[second]) if there else self._whole(choices))
        if not there:
            known[first], known[second] = found
        return found

    @functools.cached_property
    def _networks(self) -> StoredTable:
        """Times of whole networks; not kept where there is code of which nobody knows what it depends on."""
        network = self.graph.graph_module
        foreign = any(runs_foreign_code(network, node) for node in network.graph.nodes)
        inputs = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(self.inputs)]
        what = f"{network.graph} {described(network)} {inputs}"
        key = f"networks-{self._key()}-{hashlib.sha256(what.encode()).hexdigest()[:20]}"
        return StoredTable(None if foreign else self.cache, key)

    def _whole(self, choices: Sequence[Choice]) -> tuple[float, float]:
        layers = {choice.output: _Layer(choice.geometry, self.dtype).to(self.device) for choice in choices}
        network = self._deployed(substituted(self.graph.graph_module, choices, layers))
        before, after = seconds([self._original, network], blocks=WHOLE_BLOCKS)
        return before, after

    @functools.cached_property
    def _original(self) -> Call:
        captured = self.graph.graph_module
        network = fx.GraphModule(captured, copy.deepcopy(captured.graph))  # with the same modules
        put_poolings_back(network)
        network.recompile()
        return self._deployed(network)

    def _deployed(self, network: nn.Module) -> Call:
        """A call of a network with its batch norms folded."""
        return runner(LosslessCompilation(None, verify=False).run(network), self.inputs, self.backend)

    def _key(self) -> str:
        """Of all that times depend on, besides the layers."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()
        version = importlib.metadata.version(self.backend) if self.backend in ("onnxruntime", "openvino") else ""
        versions = (importlib.metadata.version("elc_fx"), torch.__version__, version)
        parts = (self.backend, self.device.type, name, os.cpu_count(), torch.get_num_threads(), *versions)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]

    def _measured(self, units: Sequence[_Unit]) -> list[float]:
        """The time of each."""
        networks = [self._copies(unit, count) for unit in units for count in (unit.copies, 2 * unit.copies)]
        calls = iter(runners(networks, self.backend))
        times = []
        for unit, fewer, more in zip(units, calls, calls, strict=True):
            less, all_of_it = seconds([fewer, more])
            times.append(max(all_of_it - less, 0.0) / unit.copies)
        return times

    def _copies(self, unit: _Unit, count: int) -> tuple[nn.Module, list[Tensor]]:
        """A network of copies of a unit, and its inputs."""
        copies = [unit.make().eval().to(self.device) for _ in range(count)]
        inputs = [self._random(shape, dtype) for _ in range(count) for shape, dtype in unit.inputs]
        arity = len(unit.inputs)
        try:
            with torch.no_grad():
                output = copies[0](*inputs[:arity])
        except Exception as error:  # whatever the module runs into on random numbers
            raise LatencyError(f"{unit.key:.200} does not run alone: {type(error).__name__}: {error}") from error
        chains = unit.layer or not FUSES[self.backend]  # else all of them would become one
        if chains and arity == 1 and isinstance(output, Tensor) and output.shape == inputs[0].shape:
            return nn.Sequential(*copies), inputs[:1]
        return _Copies(copies, arity, keep=self.backend != "eager"), inputs

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(tuple(shape), dtype=dtype, device=self.device)
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def _unit(self, node: fx.Node) -> _Unit | None:
        """What is timed for a node; None where it costs nothing."""
        operations = self.graph.interpreter.operations
        sources = node.all_input_nodes
        if node.op not in ("call_module", "call_function", "call_method") or node not in self.values:
            return None
        if not sources or any(source not in self.values for source in sources):
            return None
        if vanishes(self.graph.graph_module, node):  # a deployed network has no such module
            return None
        if self._convolves(node):
            return self._layer(operations[node].geometry, operations[node].source, node)
        inputs = tuple(self.values[source] for source in sources)
        network = self.graph.graph_module
        shared, what = not runs_foreign_code(network, node), node.name
        if shared:
            called = described(module_of(network, node)) if node.op == "call_module" else function_name(node)
            what = f"{called} {_plain(node)}"
        weights = sum(p.numel() for p in module_of(network, node).parameters()) if node.op == "call_module" else 0
        make, outputs = functools.partial(_alone, network, node), self._numbers_of(node)
        return _Unit(f"{what} {inputs}", inputs, make, shared, weights=weights, outputs=outputs)

    def _layer(self, geometry: Geometry, source: fx.Node, output: fx.Node) -> _Unit:
        inputs = (self.values[source],)
        geometry = replace(geometry, bias=True, fill=False)
        weights = geometry.out_channels * geometry.in_channels // geometry.groups * math.prod(geometry.kernel_size)
        outputs = self._numbers_of(output)
        make = functools.partial(_Layer, geometry, self.dtype)
        return _Unit(f"{geometry} {inputs}", inputs, make, layer=True, weights=weights, outputs=outputs)

    def _numbers_of(self, node: fx.Node) -> int:
        return math.prod(self.values[node][0]) if node in self.values else 0

    def _leaders(self) -> dict[fx.Node, fx.Node]:
        """For every node the one together with which a deployed network computes it: itself, or one before it."""
        leaders: dict[fx.Node, fx.Node] = {}
        for node in self.graph.graph_module.graph.nodes:
            leaders[node] = next((leaders[source] for source in self._joinable(node, leaders)), node)
        return leaders

    def _joinable(self, node: fx.Node, leaders: Mapping[fx.Node, fx.Node]) -> Iterator[fx.Node]:
        """What a node reads and is computed together with."""
        if self._convolves(node):
            return
        fuses = FUSES[self.backend]
        scales = node in self.graph.interpreter.operations and node not in self.graph.activations
        for source in node.all_input_nodes:
            if len(source.users) > 1 or not {source, node} <= self.values.keys():  # no tensors, such as sizes
                continue
            same = self.values[source][0] == self.values[node][0]
            if same and self._convolves(leaders[source]) and (fuses or scales):
                yield source

    def _convolves(self, node: fx.Node) -> bool:
        operation = self.graph.interpreter.operations.get(node)
        return operation is not None and operation.convolves


@dataclass(frozen=True)
class _Unit:
    """What is timed.

    inputs: shape and data type of each. make: a new one, with weights of its own. shared: whether any other of its key
    takes as long, in any network: not so where code is not torch's, of which nobody knows what it depends on. layer: a
    convolution or linear layer. weights, outputs: how many numbers they are.
    """

    key: str
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    make: Callable[[], nn.Module]
    shared: bool = True
    layer: bool = False
    weights: int = 0
    outputs: int = 0

    @property
    def copies(self) -> int:
        """By which its two networks differ."""
        return max(1, min(COPIES, MOST_NUMBERS // max(self.weights, 1)))

    @property
    def numbers(self) -> int:
        """In its two networks, at most."""
        inputs = sum(math.prod(shape) for shape, _ in self.inputs)
        return 3 * self.copies * (self.weights + inputs + self.outputs)


class _Layer(nn.Module):
    """A convolution of a geometry with random weights."""

    def __init__(self, geometry: Geometry, dtype: torch.dtype) -> None:
        super().__init__()
        self.geometry = g = replace(geometry, ones=False)
        kernel = torch.randn(g.out_channels, g.in_channels // g.groups, *g.kernel_size) / 100
        self.layer = layer_of(AffineMap(g, kernel, torch.zeros(g.out_channels)), dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(padded(self.geometry, x))
        return y


def _grouped(units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
    """Those of torch together, as long as they do not have too many numbers; all else alone."""
    group: list[_Unit] = []
    for unit in units:
        if not unit.shared:
            yield [unit]
            continue
        if len(group) == TOGETHER or (group and sum(one.numbers for one in (*group, unit)) > MOST_NUMBERS):
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


class _Beside(nn.Module):
    """Networks side by side, each with inputs of its own."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *inputs: Sequence[Tensor]) -> list[Any]:
        return [network(*own) for network, own in zip(self.networks, inputs, strict=True)]


class _Copies(nn.Module):
    """Modules side by side, each on its own inputs.

    keep: give all outputs, which a compiler would not compute otherwise. Else memory is used again, as in a network.
    """

    def __init__(self, modules: Sequence[nn.Module], arity: int, *, keep: bool) -> None:
        super().__init__()
        self.parts, self.arity, self.keep = nn.ModuleList(modules), arity, keep

    def forward(self, *inputs: Tensor) -> list[Any]:
        n = self.arity
        outputs: list[Any] = []
        for i, part in enumerate(self.parts):
            output = part(*inputs[i * n : (i + 1) * n])
            outputs = [*outputs, output] if self.keep else [output]
        return outputs


def _fast(model: LatencyModel, choices: Sequence[Choice]) -> list[Choice]:
    """Choices that do not overlap, those first that save most."""
    fast: list[Choice] = []
    taken: set[str] = set()
    for choice in sorted(choices, key=model.saved, reverse=True):
        if model.saved(choice) > 0 and taken.isdisjoint(choice.candidate.nodes):
            fast.append(choice)
            taken.update(choice.candidate.nodes)
    return fast


def _alone(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module:
    """A network of this node."""
    graph = fx.Graph()
    inputs = {source: graph.placeholder(f"x{i}") for i, source in enumerate(node.all_input_nodes)}
    graph.output(graph.node_copy(node, inputs.__getitem__))
    return fx.GraphModule(graph_module, graph)


def _plain(node: fx.Node) -> str:
    return repr(fx.map_arg((node.args, node.kwargs), lambda n: "x"))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in file}
        return f"{lines.get('model name')} {lines.get('flags')}"
    except OSError:
        return platform.processor() or platform.machine()
