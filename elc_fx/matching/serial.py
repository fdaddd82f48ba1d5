"""Serial layers: chains of convolutions with activations and padding between them, and what each could become.

Read as what they become when their gates close, activations are scales and shifts, max poolings are means of their
windows, kernels are windows of kernels, and inner zero padding moves to the front. So the chains of `regions` reach
over whole stages of a network, and a run of layers in a chain, at any depth of nesting, is one affine map whose
geometry is known before anything is changed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from elc_fx.affine import Geometry, Ints, Padding, moved
from elc_fx.capturing.attributes import unchanged
from elc_fx.capturing.capture import Capture, capture
from elc_fx.capturing.equivalence import verify_trace
from elc_fx.capturing.graph import vanishes
from elc_fx.capturing.inputs import NO_EXAMPLES, ExampleInputs, fresh, running
from elc_fx.capturing.randomness import reproducibly
from elc_fx.capturing.shapes import Value
from elc_fx.errors import NotAffineError
from elc_fx.matching.activations import MODULES, activation_of
from elc_fx.matching.chains import find_chains
from elc_fx.matching.interpret import Interpreter, Operation
from elc_fx.matching.pooling import MAX_POOLS, max_pooling_of, put_poolings_first
from elc_fx.matching.regions import Chain, Join, Part, fit_one_layer, interpret, kinds_of, nodes_of, operations_of

KeptWindows = Mapping[fx.Node, Ints]  # the kernel size that a convolution keeps, where that is less than all of it


class SerialInterpreter(Interpreter):
    """Reads activations as scales and shifts, max poolings as means, and what does nothing in eval as the identity."""

    trusting = True

    def __init__(self, captured: fx.GraphModule, values: Mapping[fx.Node, Value] | None = None) -> None:
        self.activations: set[fx.Node] = set()
        self.poolings: set[fx.Node] = set()
        super().__init__(captured, values)

    def _operation(self, node: fx.Node) -> Operation | None:
        if vanishes(self.captured, node):
            return self._stand_in(node)
        if (activation := activation_of(self.captured, node)) is not None:
            if not self._acts_per_channel(node, activation):
                return None
            operation = self._stand_in(node, bias=True)
            if operation is not None:
                self.activations.add(node)
            return operation
        if (pooling := max_pooling_of(self.captured, node)) is not None:
            operation = self._mean_of_windows(node, pooling)
            if operation is not None:
                self.poolings.add(node)
            return operation
        return super()._operation(node)

    def _passes_on(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(node.all_input_nodes[:1]) if vanishes(self.captured, node) else super()._passes_on(node)

    def _mean_of_windows(self, node: fx.Node, pooling: Any) -> Operation | None:
        source = node.all_input_nodes[0]
        if self.features[source].channels is None:
            return None
        dims = MAX_POOLS[type(pooling)]
        operation = self._average_pool(node, source, dims, pooling.kernel_size, pooling.stride, pooling.padding)
        return replace(operation, geometry=replace(operation.geometry, bias=True))

    def _acts_per_channel(self, node: fx.Node, activation: nn.Module) -> bool:
        """Whether parameters that an activation has for each index of axis 1 stand for the channels."""
        dims, shape = self.features[node.all_input_nodes[0]].dims, self.shapes.get(node)
        several = any(parameter.numel() > 1 for parameter in activation.parameters())
        return not several or dims is None or shape is None or len(shape) == dims + 2

    def _stand_in(self, node: fx.Node, **settings: bool) -> Operation | None:
        """For what the node becomes: only its geometry matters here."""
        source = node.all_input_nodes[0]
        return self._identity(node, source, **settings) if self.features[source].is_known else None


@dataclass(frozen=True)
class Region:
    """A run of parts of a chain, which one convolution could replace."""

    chain: Chain
    start: int
    end: int

    @property
    def parts(self) -> list[Part]:
        return self.chain.parts[self.start : self.end]

    @property
    def source(self) -> fx.Node:
        return self.chain.parts[self.start - 1].node if self.start else self.chain.source

    @property
    def output(self) -> fx.Node:
        return self.chain.parts[self.end - 1].node

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return next(operations_of(self.parts)).geometry.dims

    @property
    def channels(self) -> int | None:
        """Of the source, as its first layers say."""
        return channels_of(self.parts)

    @property
    def layers(self) -> list[fx.Node]:
        """Its convolutions and linear layers, in order."""
        return [op.node for op in operations_of(self.parts) if op.convolves]

    @property
    def is_one_layer(self) -> bool:
        """Whether nothing merges here: all that can change is the kernel of the layer."""
        return len(self.layers) == 1 and not any(isinstance(part, Join) for part in self.parts)

    @property
    def ends_with_pooling(self) -> bool:
        """Whether the last thing in it that is a layer, or more than a scale, is a pooling."""
        *_, last = (p for p in self.parts if isinstance(p, Join) or p.convolves or not p.geometry.is_scale)
        return isinstance(last, Operation) and not last.convolves

    @property
    def windows(self) -> Iterator[KeptWindows]:
        """The windows that are worth a candidate, small kernels first, by their longest axis.

        A layer by itself keeps all of its kernel, three taps or one, along each axis, but not all along every axis if
        there is no pooling that it could take with it.
        """
        if not self.is_one_layer:
            yield from (windows_keeping(self.parts, count) for count in range(capacity(self.parts) + 1))
            return
        (layer,) = (op for op in operations_of(self.parts) if op.convolves)
        options = itertools.product(*(sorted({1, min(3, k), k}) for k in layer.geometry.kernel_size))
        *shrunk, _ = sorted(options, key=lambda kept: (max(kept), math.prod(kept)))
        yield from ({layer.node: kept} for kept in shrunk)
        if self.ends_with_pooling:
            yield {}

    def nodes(self) -> set[fx.Node]:
        return set(nodes_of(self.parts))

    def geometry(self, windows: KeptWindows) -> Geometry:
        """The convolution that it becomes. Raises `NotAffineError` where it does not become one."""
        if not fit_one_layer(kinds_of(self.parts)):
            raise NotAffineError("the layers differ in data type or device")

        def read(op: Operation) -> Geometry:
            return closed_geometry(op, windows)

        return interpret(self.parts, read, lambda n: Geometry.identity(n, self.dims), self.channels, _moved_then)


def channels_of(parts: Sequence[Part]) -> int | None:
    """The channels that parts read, as the first layer says on any of their branches."""
    first = parts[0]
    if isinstance(first, Operation):
        return first.geometry.in_channels
    found = (channels_of(branch.chain.parts) for branch in first.branches if branch.chain.parts)
    return next((channels for channels in found if channels is not None), None)


def _moved_then(first: Geometry, second: Geometry) -> Geometry:
    """As they compose in their region: all padding is moved to its front."""
    merged = first.then(replace(second, padding=((0, 0),) * second.dims))
    return replace(merged, padding=moved(first.padding, first.stride, second.padding))


def closed_geometry(op: Operation, windows: KeptWindows) -> Geometry:
    """The geometry of an operation whose gates are closed: zero padding, and the window of the kernel that is kept."""
    geometry = replace(op.geometry, padding_mode="zeros")
    if (kept := windows.get(op.node)) is None:
        return geometry
    padding = window_padding(geometry.padding, geometry.kernel_size, kept, geometry.dilation)
    return replace(geometry, kernel_size=kept, padding=padding)


def window_padding(padding: Padding, kernel_size: Ints, kept: Ints, dilation: Ints) -> Padding:
    """What the middle `kept` taps of each axis pad, where all of them pad `padding`."""
    sides = []
    for k, size, d, (low, high) in zip(kernel_size, kept, dilation, padding, strict=True):
        start = window_start(k, size)
        sides.append((low - d * start, high - d * (k - size - start)))
    return tuple(sides)


def window_start(kernel_size: int, kept: int) -> int:
    return (kernel_size - kept) // 2


class SerialGraph:
    """A captured model with its serial chains, those inside of branches included."""

    def __init__(self, captured: Capture, values: Mapping[fx.Node, Value] | None = None) -> None:
        self.captured = captured
        self.graph_module = captured.graph_module
        self.interpreter = SerialInterpreter(self.graph_module, values)
        self.shapes = self.interpreter.shapes
        self.interpreter.free_layers_of_questions()
        chains, joins, _ = find_chains(self.interpreter)
        self.chains = list(_all_chains(chains, joins))
        self.activations, self.poolings = self.interpreter.activations, self.interpreter.poolings
        self.barriers = self.activations | self.poolings

    @classmethod
    def of(cls, model: nn.Module, examples: ExampleInputs) -> SerialGraph:
        """The graph of a model in eval mode, with the shapes and types of all values.

        Raises `CaptureError`, also where the graph computes something else there, and `InvalidInputError` where the
        model does not run on the examples.
        """
        captured = serial_capture(model, examples.bound(model))
        args, kwargs = fresh((examples.args, examples.kwargs))
        with unchanged(model), reproducibly(), running(f"{type(model).__name__} {NO_EXAMPLES}"):
            expected = model(*args, **kwargs)
        return cls(captured, verify_trace(captured, expected))

    def regions(self, longest: int) -> Iterator[Region]:
        """Every run of at most `longest` layers or joins that follow each other in a chain."""
        for chain in self.chains:
            heavy = [i for i, part in enumerate(chain.parts) if is_heavy(part)]
            for first, start in enumerate(heavy):
                seen = start
                for last in heavy[first : first + longest]:
                    if not all(self._can_be_decoupled(op) for op in operations_of(chain.parts[seen : last + 1])):
                        break
                    seen = last + 1
                    end = self._end(chain, last)
                    region = Region(chain, start, end)
                    if not region.is_one_layer or capacity(region.parts):
                        yield region
                    if end < len(chain.parts) and chain.parts[end].node in self.poolings:
                        yield Region(chain, start, self._end(chain, end))

    def _can_be_decoupled(self, op: Operation) -> bool:
        geometry = op.geometry
        pads_by_gate = op.convolves or pads(op) or op.node in self.poolings
        shifts = geometry.padded and any(min(sides) < 0 for sides in geometry.padding)
        return not (geometry.transposed or geometry.fill or shifts) and (pads_by_gate or not geometry.padded)

    def _end(self, chain: Chain, last: int) -> int:
        """A layer takes the scales and shifts after it, such as its batch norm, with it."""
        end = last + 1
        while end < len(chain.parts):
            part = chain.parts[end]
            if not isinstance(part, Operation) or not part.geometry.is_scale or part.convolves:
                break
            if part.node in self.activations:
                break
            end += 1
        return end


def serial_capture(
    model: nn.Module, given: Mapping[str, Any] | None = None, poolings: Container[str] | None = None
) -> Capture:
    """The graph of which `SerialGraph` reads chains: trainable, activations whole, and behind max poolings.

    given: as for `capture`. poolings: the names of those that regions may end with, by default all. Raises
    `CaptureError`.
    """
    captured = capture(model, given, trainable=True, leaves=tuple(MODULES))
    put_poolings_first(captured.graph_module, poolings)
    return captured


def _all_chains(chains: Sequence[Chain], joins: Sequence[Join]) -> Iterator[Chain]:
    inner = [branch.chain for join in joins for branch in join.branches]
    for chain in [*chains, *inner]:
        if chain.parts:
            yield chain
            yield from _all_chains([], [part for part in chain.parts if isinstance(part, Join)])


def is_heavy(part: Part) -> bool:
    """Whether it is, or has, a convolution or linear layer."""
    return any(op.convolves for op in operations_of([part]))


# Which convolutions of a region keep their kernels.


def capacity(parts: Sequence[Part]) -> int:
    """How many convolutions one after the other could keep a kernel larger than one tap."""
    return sum(_capacity_of(part) for part in parts)


def _capacity_of(part: Part) -> int:
    if isinstance(part, Operation):
        return int(part.convolves and any(k > 1 for k in part.geometry.kernel_size))
    return max(capacity(branch.chain.parts) for branch in part.branches)


def windows_keeping(parts: Sequence[Part], count: int) -> dict[fx.Node, Ints]:
    """The windows with which `count` convolutions on each path keep their kernels, and the others become pointwise.

    Those with a stride come first, since without its kernel such a layer would not look at most of its input; then
    those before others, since a padding is only in the way where the layer behind it keeps its kernel.
    """
    share = [0] * len(parts)
    order = sorted(range(len(parts)), key=lambda i: not _strides(parts[i]))
    for i in order:
        share[i] = min(_capacity_of(parts[i]), count - sum(share))
    windows: dict[fx.Node, Ints] = {}
    for part, own in zip(parts, share, strict=True):
        if isinstance(part, Join):
            for branch in part.branches:
                windows |= windows_keeping(branch.chain.parts, own)
        elif _capacity_of(part) and not own:
            windows[part.node] = (1,) * part.geometry.dims
    return windows


def _strides(part: Part) -> bool:
    return any(op.convolves and any(s > 1 for s in op.geometry.stride) for op in operations_of([part]))


# Rings: how far beyond its border an inner value has to be known.


@dataclass(frozen=True)
class RingStep:
    """The rings of the input and output of an operation or join of a region, per axis and side."""

    ring_in: Padding
    ring_out: Padding


def rings(parts: Sequence[Part], windows: KeptWindows, ring: Padding, steps: dict[fx.Node, RingStep]) -> Padding:
    """The ring that the parts need of their source to give `ring` at their end. steps: gets that of every operation.

    An operation with stride s and padding p reads s·r + p beyond the border to give a ring of r.
    """
    for part in reversed(parts):
        if isinstance(part, Join):
            needs = [rings(branch.chain.parts, windows, ring, steps) for branch in part.branches]
            before = tuple((max(low for low, _ in n), max(high for _, high in n)) for n in zip(*needs, strict=True))
            steps[part.node] = RingStep(before, ring)
            ring = before
            continue
        geometry = closed_geometry(part, windows)
        padding = geometry.padding if part.geometry.padding_mode == "zeros" else part.geometry.padding
        if not part.convolves and not geometry.padded:
            padding = ((0, 0),) * geometry.dims  # a crop is done as it is
        before = moved(padding, geometry.stride, ring)
        before = tuple((max(low, 0), max(high, 0)) for low, high in before)
        steps[part.node] = RingStep(before, ring)
        ring = before
    return ring


def pads(op: Operation) -> bool:
    """Whether the operation is a padding and nothing else."""
    geometry = op.geometry
    alone = all(k == 1 for k in geometry.kernel_size) and geometry.groups == geometry.in_channels
    return not op.convolves and geometry.padded and alone and geometry.out_channels == geometry.in_channels


def decouples_padding(op: Operation, step: RingStep, *, at_source: bool) -> bool:
    """Whether an operation pads what has a ring. Zeros around the source of the region are there already."""
    free = at_source and op.geometry.padding_mode == "zeros"
    return (op.convolves or pads(op)) and op.geometry.padded and not free and has_size(step.ring_in)


def has_size(ring: Padding) -> bool:
    return any(side for sides in ring for side in sides)
