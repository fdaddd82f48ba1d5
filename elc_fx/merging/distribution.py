"""A scale and shift of each channel behind a join goes into the layers that the join reads, where it costs nothing.

    s · (a(x) + b(y)) + t  =  (s · a(x) + t) + s · b(y)

and so for a concatenation, with the numbers of each branch's own channels. It is a way to fold a batch norm that stands
behind layers of different values, which are no one layer together.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.affine import AffineMap, Geometry
from elc_fx.capturing.graph import attribute_of, erase_unread, module_of, overwritten_argument
from elc_fx.capturing.origins import origins_of, remember
from elc_fx.matching.interpret import Feature, Interpreter, Operation
from elc_fx.merging.fusion import BATCH_NORM_MODULES

DEEPEST = 64  # joins inside of each other


class Distribution:
    """Of all scales and shifts in one captured graph, in place."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.captured, self.graph = interpreter.captured, interpreter.captured.graph
        self.values = dict(interpreter.values)
        self.made: dict[fx.Node, torch.dtype] = {}  # what stands behind layers now, with the type that these compute in

    def run(self) -> bool:
        """Whether anything was changed; then the graph is to be read again, with the values that there are now."""
        for node in list(self.graph.nodes):
            operation = self.interpreter.operations.get(node)
            if operation is None or not self._can_be_distributed(operation):
                continue
            numbers = operation.load()
            scale = numbers.kernel.flatten()
            offset = torch.zeros_like(scale) if numbers.bias is None else numbers.bias
            layers = list(self._at_layers(operation.source, scale, offset))
            alike = len({self._layer(value).dtype for value, *_ in layers}) == 1  # else a narrow one rounds for a wide
            if alike and all(itertools.starmap(self._remains_finite, layers)):
                origins = origins_of(self.captured, [node])
                for layer in layers:
                    self._behind(*layer, origins)
                node.replace_all_uses_with(operation.source)
                erase_unread(node, self.interpreter.constants)
        return bool(self.made)

    def settle(self) -> None:
        """What did not merge after all computes in the type of its layer."""
        for node, dtype in self.made.items():
            if not node._erased:
                self.captured.get_submodule(str(node.target)).to(dtype)

    def _can_be_distributed(self, operation: Operation) -> bool:
        fresh = overwritten_argument(self.captured, operation.node) is None and operation.rank is None
        joins = operation.source not in self.interpreter.operations
        elementwise = _is_scale(operation) and operation.geometry.dims in BATCH_NORM_MODULES
        feature = Feature(operation.geometry.in_channels, operation.geometry.dims)
        return elementwise and fresh and joins and self._takes_scales(operation.source, feature)

    def _takes_scales(self, value: fx.Node, feature: Feature, depth: int = 0) -> bool:
        """Whether a value that nobody else reads is a layer's, scaled or not, or a join of such."""
        alone = len(value.users) == 1 and overwritten_argument(self.captured, value) is None
        if not alone or self.interpreter.features[value] != feature or depth > DEEPEST:
            return False
        if (operation := self.interpreter.operations.get(value)) is not None:
            if _is_scale(operation):
                source = operation.source
                return source in self.interpreter.operations and self._takes_scales(source, feature, depth)
            dtype = operation.dtype if operation.convolves else None
            return dtype is not None and dtype.is_floating_point and self._is_called_once(value)
        operands = self._operands(value, feature.channels or 0)
        distinct = len(dict(operands)) == len(operands) > 1
        return distinct and all(
            self._takes_scales(operand, replace(feature, channels=channels), depth + 1)
            for operand, channels in operands
        )

    @functools.cached_property
    def _readers(self) -> Counter[int]:
        """How many nodes read a tensor, by its identity; only asked where there is something to distribute."""
        return Counter(id(tensor) for node in self.graph.nodes for tensor in _weights(self.captured, node))

    def _is_called_once(self, value: fx.Node) -> bool:
        """A layer with weights that others read, too, would have to be there twice."""
        read = (value, *(source for source in value.all_input_nodes if source.op == "get_attr"))
        return all(self._readers[id(tensor)] == 1 for node in read for tensor in _weights(self.captured, node))

    def _layer(self, value: fx.Node) -> Operation:
        """The layer that gives a value, up to scales."""
        operation = self.interpreter.operations[value]
        return operation if operation.convolves else self._layer(operation.source)

    def _remains_finite(self, value: fx.Node, scale: Tensor, offset: Tensor) -> bool:
        """Whether the layer's own type can hold what it becomes."""
        operation, device = self.interpreter.operations[value], self._layer(value).device
        numbers, scale, offset = operation.load(), scale.to(device), offset.to(device)  # a number may be elsewhere
        kernel = numbers.kernel.flatten(1).to(device)
        shift = offset if numbers.bias is None else offset + numbers.bias.to(device) * scale
        if not operation.convolves:
            return self._remains_finite(operation.source, kernel.flatten() * scale, shift)
        if kernel.is_meta:
            return False
        largest, most = kernel.abs().amax(1) * scale.abs(), torch.finfo(kernel.dtype).max
        return bool((largest <= most).all() and (shift.abs() <= most).all())

    def _operands(self, join: fx.Node, channels: int) -> list[tuple[fx.Node, int]]:
        """What a sum or a concatenation reads, and the channels that it has to have."""
        if (terms := self.interpreter.summands(join)) is not None:
            return [(term.value, channels) for term in terms]
        values = self.interpreter.concatenated(join) or ()
        return [(value, self.interpreter.features[value].channels or 0) for value in values]

    def _at_layers(self, value: fx.Node, scale: Tensor, offset: Tensor) -> Iterator[tuple[fx.Node, Tensor, Tensor]]:
        """What is to stand behind each layer that joins read."""
        if value in self.interpreter.operations:
            yield value, scale, offset
        elif (terms := self.interpreter.summands(value)) is not None:
            shifted = next(term for term in terms if term.coefficient == 1)
            for term in terms:
                yield from self._at_layers(term.value, scale, offset if term is shifted else torch.zeros_like(offset))
        else:
            operands, counts = zip(*self._operands(value, len(scale)), strict=True)
            for branch in zip(operands, scale.split(counts), offset.split(counts), strict=True):
                yield from self._at_layers(*branch)

    def _behind(self, value: fx.Node, scale: Tensor, offset: Tensor, origins: tuple[str, ...]) -> None:
        interpreter, dims = self.interpreter, self.interpreter.operations[value].geometry.dims
        where: Any = {"device": self._layer(value).device, "dtype": torch.float64}
        norm: Any = BATCH_NORM_MODULES[dims](len(scale), eps=0.0, **where)
        norm.weight = nn.Parameter(scale.detach().to(**where, copy=True))
        norm.bias = nn.Parameter(offset.detach().to(**where, copy=True))
        remember(norm, origins)
        name = next(n for i in itertools.count(len(self.made)) if not hasattr(self.captured, n := f"scale_{i}"))
        self.captured.add_module(name, norm.eval())
        with self.graph.inserting_after(value):
            scaled = self.graph.call_module(name, (value,))
        value.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        dtype = self._layer(value).dtype
        assert dtype is not None  # of what convolves
        self.made[scaled] = dtype
        interpreter.features[scaled] = interpreter.features[value]
        geometry = replace(Geometry.identity(len(scale), dims), bias=True)
        numbers = AffineMap.scale(norm.weight.detach(), norm.bias.detach(), dims)
        interpreter.operations[scaled] = Operation(scaled, value, geometry, lambda: numbers)
        if value in self.values:
            self.values[scaled] = self.values[value]


def _weights(captured: fx.GraphModule, node: fx.Node) -> Iterable[Any]:
    if node.op == "call_module":
        return module_of(captured, node).parameters()
    return [attribute_of(captured, node)] if node.op == "get_attr" else ()


def _is_scale(operation: Operation) -> bool:
    """Whether it is a scale and a shift of each channel, and no layer."""
    return operation.geometry.is_scale and not operation.convolves
