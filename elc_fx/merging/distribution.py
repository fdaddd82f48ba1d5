"""A scale and shift of each channel behind a join goes into the layers that the join reads, where it costs nothing.

    s · (a(x) + b(y)) + t  =  (s · a(x) + t) + s · b(y)

and so for a concatenation, with the numbers of each branch's own channels. It is a way to fold a batch norm that stands
behind layers of different values, which are no one layer together.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.affine import AffineMap, Geometry
from elc_fx.capturing.graph import attribute_of, module_of, overwritten_argument
from elc_fx.capturing.origins import origins_of, remember
from elc_fx.matching.interpret import Feature, Interpreter, Operation

NORMS: dict[int, Callable[..., nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
META = torch.device("meta")
DEEPEST = 64  # joins inside of each other


class Distribution:
    """Of all scales and shifts in one captured graph, in place."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.captured, self.graph = interpreter.captured, interpreter.captured.graph
        self.shapes = dict(interpreter.shapes)
        self.readers = Counter(id(tensor) for node in self.graph.nodes for tensor in _weights(self.captured, node))
        self.made: dict[fx.Node, torch.dtype] = {}  # what stands behind layers now, with the type that these compute in

    def run(self) -> bool:
        """Whether anything was changed; then the graph is to be read again, with the shapes that there are now."""
        for node in list(self.graph.nodes):
            operation = self.interpreter.operations.get(node)
            if operation is not None and self._can_be_distributed(operation):
                numbers = operation.load()
                scale = numbers.kernel.flatten()
                offset = torch.zeros_like(scale) if numbers.bias is None else numbers.bias
                if not self._remains_finite(operation.source, scale, offset):
                    continue
                self._into(operation.source, scale, offset, origins_of(self.captured, [node]))
                node.replace_all_uses_with(operation.source)
                self._erase(node)
        return bool(self.made)

    def _erase(self, node: fx.Node) -> None:
        """With the constants that only it read."""
        sources = [source for source in node.all_input_nodes if source in self.interpreter.constants]
        self.graph.erase_node(node)
        for source in sources:
            if not source.users:
                self._erase(source)

    def settle(self) -> None:
        """What did not merge after all computes in the type of its layer."""
        for node, dtype in self.made.items():
            if not node._erased:
                self.captured.get_submodule(str(node.target)).to(dtype)

    def _can_be_distributed(self, operation: Operation) -> bool:
        fresh = overwritten_argument(self.captured, operation.node) is None and operation.rank is None
        joins = operation.source not in self.interpreter.operations
        elementwise = _is_scale(operation) and operation.geometry.dims in NORMS
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
            real = self.interpreter.dtypes[value].is_floating_point and operation.device != META
            return operation.convolves and real and self._is_called_once(value)
        operands = self._operands(value, feature.channels or 0)
        distinct = len(dict(operands)) == len(operands) > 1
        return distinct and all(
            self._takes_scales(operand, replace(feature, channels=channels), depth + 1)
            for operand, channels in operands
        )

    def _is_called_once(self, value: fx.Node) -> bool:
        """A layer with weights that others read, too, would have to be there twice."""
        read = (value, *(source for source in value.all_input_nodes if source.op == "get_attr"))
        return all(self.readers[id(tensor)] == 1 for node in read for tensor in _weights(self.captured, node))

    def _layer(self, value: fx.Node) -> Operation:
        """The layer that gives a value, up to scales."""
        operation = self.interpreter.operations[value]
        return operation if operation.convolves else self._layer(operation.source)

    def _remains_finite(self, value: fx.Node, scale: Tensor, offset: Tensor) -> bool:
        """Whether the layers' own type can hold what they become."""
        if (operation := self.interpreter.operations.get(value)) is None:
            return all(self._remains_finite(*branch) for branch in self._branches(value, scale, offset))
        device = self._layer(value).device  # where a scale by a number need not be
        numbers, scale, offset = operation.load(), scale.to(device), offset.to(device)
        kernel = numbers.kernel.flatten(1).to(device)
        shift = offset if numbers.bias is None else offset + numbers.bias.to(device) * scale
        if not operation.convolves:
            return self._remains_finite(operation.source, kernel.flatten() * scale, shift)
        largest, most = kernel.abs().amax(1) * scale.abs(), torch.finfo(self.interpreter.dtypes[value]).max
        return bool((largest <= most).all() and (shift.abs() <= most).all())

    def _operands(self, join: fx.Node, channels: int) -> list[tuple[fx.Node, int]]:
        """What a sum or a concatenation reads, and the channels that it has to have."""
        if (terms := self.interpreter.summands(join)) is not None:
            return [(term.value, channels) for term in terms]
        values = self.interpreter.concatenated(join) or ()
        return [(value, self.interpreter.features[value].channels or 0) for value in values]

    def _branches(self, join: fx.Node, scale: Tensor, offset: Tensor) -> Iterator[tuple[fx.Node, Tensor, Tensor]]:
        """What goes into each value that a join reads."""
        operands = self._operands(join, len(scale))
        if (terms := self.interpreter.summands(join)) is not None:
            shifted = next(term for term in terms if term.coefficient == 1)
            for term in terms:
                yield term.value, scale, offset if term is shifted else torch.zeros_like(offset)
        else:
            counts = [channels for _, channels in operands]
            for (operand, _), own, shift in zip(operands, scale.split(counts), offset.split(counts), strict=True):
                yield operand, own, shift

    def _into(self, value: fx.Node, scale: Tensor, offset: Tensor, origins: tuple[str, ...]) -> None:
        if value in self.interpreter.operations:
            self._behind(value, scale, offset, origins)
        else:
            for branch in list(self._branches(value, scale, offset)):
                self._into(*branch, origins)

    def _behind(self, value: fx.Node, scale: Tensor, offset: Tensor, origins: tuple[str, ...]) -> None:
        interpreter, dims = self.interpreter, self.interpreter.operations[value].geometry.dims
        where: Any = {"device": self._layer(value).device, "dtype": torch.float64}
        norm: Any = NORMS[dims](len(scale), eps=0.0, **where)
        norm.weight = nn.Parameter(scale.detach().to(**where, copy=True))
        norm.bias = nn.Parameter(offset.detach().to(**where, copy=True))
        remember(norm, origins)
        name = next(n for i in itertools.count(len(self.made)) if not hasattr(self.captured, n := f"scale_{i}"))
        self.captured.add_module(name, norm.eval())
        with self.graph.inserting_after(value):
            scaled = self.graph.call_module(name, (value,))
        value.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        self.made[scaled] = interpreter.dtypes[scaled] = interpreter.dtypes[value]
        interpreter.features[scaled] = interpreter.features[value]
        geometry = replace(Geometry.identity(len(scale), dims), bias=True)
        numbers = AffineMap.scale(norm.weight.detach(), norm.bias.detach(), dims)
        interpreter.operations[scaled] = Operation(scaled, value, geometry, lambda: numbers)
        if value in self.shapes:
            self.shapes[scaled] = self.shapes[value]


def _weights(captured: fx.GraphModule, node: fx.Node) -> Iterable[Any]:
    if node.op == "call_module":
        return module_of(captured, node).parameters()
    return [attribute_of(captured, node)] if node.op == "get_attr" else ()


def _is_scale(operation: Operation) -> bool:
    """Whether it is a scale and a shift of each channel, and nothing else."""
    geometry = operation.geometry
    plain = replace(Geometry.identity(geometry.in_channels, geometry.dims), bias=geometry.bias)
    return geometry == plain and not operation.convolves
