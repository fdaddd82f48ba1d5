"""A scale and shift of each channel behind a join goes into the layers that the join reads, where it costs nothing.

    s · (a(x) + b(y)) + t  =  (s · a(x) + t) + s · b(y)

and so for a concatenation, with the numbers of each branch's own channels. It is a way to fold a batch norm that stands
behind layers of different values, which are no one layer together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.affine import Geometry
from elc_fx.capturing.graph import overwritten_argument
from elc_fx.capturing.origins import origins_of, remember
from elc_fx.errors import NotAffineError
from elc_fx.matching.interpret import Interpreter, Operation

NORMS: dict[int, Callable[..., nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Distribution:
    """Of all scales and shifts in one captured graph, in place."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.captured, self.graph = interpreter.captured, interpreter.captured.graph
        self.shapes = dict(interpreter.shapes)
        self.made: dict[fx.Node, torch.dtype] = {}  # what stands behind layers now, with the type that these compute in

    def run(self) -> bool:
        """Whether anything was changed; then the graph is to be read again, with the shapes that there are now."""
        for node in list(self.graph.nodes):
            operation = self.interpreter.operations.get(node)
            if operation is not None and self._can_be_distributed(operation):
                try:
                    numbers = operation.load()
                except NotAffineError:
                    continue
                scale, offset = numbers.kernel.flatten(), numbers.bias
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
        fresh = overwritten_argument(self.captured, operation.node) is None
        joins = operation.source not in self.interpreter.operations
        elementwise = _is_scale(operation) and operation.geometry.dims in NORMS
        return elementwise and fresh and joins and self._takes_scales(operation.source, operation.geometry.in_channels)

    def _takes_scales(self, value: fx.Node, channels: int) -> bool:
        """Whether a value that nobody else reads is a layer's, scaled or not, or a join of such."""
        known = self.interpreter.features[value].channels == channels
        if not known or len(value.users) != 1 or overwritten_argument(self.captured, value) is not None:
            return False
        if (operation := self.interpreter.operations.get(value)) is not None:
            if _is_scale(operation):
                return operation.source in self.interpreter.operations and self._takes_scales(
                    operation.source, channels
                )
            return operation.convolves and self.interpreter.dtypes[value].is_floating_point
        operands = self._operands(value, channels)
        distinct = len(dict(operands)) == len(operands) > 1
        return distinct and all(itertools.starmap(self._takes_scales, operands))

    def _operands(self, join: fx.Node, channels: int) -> list[tuple[fx.Node, int]]:
        """What a sum or a concatenation reads, and the channels that it has to have."""
        if (terms := self.interpreter.summands(join)) is not None:
            return [(term.value, channels) for term in terms]
        values = self.interpreter.concatenated(join) or ()
        return [(value, self.interpreter.features[value].channels or 0) for value in values]

    def _into(self, value: fx.Node, scale: Tensor, offset: Tensor | None, origins: tuple[str, ...]) -> None:
        if value in self.interpreter.operations:
            self._behind(value, scale, offset, origins)
        elif (terms := self.interpreter.summands(value)) is not None:
            shifted = next(term for term in terms if term.coefficient == 1)
            for term in terms:
                self._into(term.value, scale, offset if term is shifted else None, origins)
        else:
            operands, counts = zip(*self._operands(value, len(scale)), strict=True)
            offsets = [None] * len(counts) if offset is None else offset.split(counts)
            for operand, own, shift in zip(operands, scale.split(counts), offsets, strict=True):
                self._into(operand, own, shift, origins)

    def _behind(self, value: fx.Node, scale: Tensor, offset: Tensor | None, origins: tuple[str, ...]) -> None:
        dims = self.interpreter.operations[value].geometry.dims
        norm: Any = NORMS[dims](len(scale), eps=0.0, device=scale.device, dtype=torch.float64)
        norm.weight = nn.Parameter(scale.detach().clone())
        norm.bias = nn.Parameter(torch.zeros_like(scale) if offset is None else offset.detach().clone())
        remember(norm, origins)
        name = next(n for i in itertools.count(len(self.made)) if not hasattr(self.captured, n := f"scale_{i}"))
        self.captured.add_module(name, norm.eval())
        with self.graph.inserting_after(value):
            scaled = self.graph.call_module(name, (value,))
        value.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        self.made[scaled] = self.interpreter.dtypes[value]
        if value in self.shapes:
            self.shapes[scaled] = self.shapes[value]


def _is_scale(operation: Operation) -> bool:
    """Whether it is a scale and a shift of each channel, and nothing else."""
    geometry = operation.geometry
    plain = replace(Geometry.identity(geometry.in_channels, geometry.dims), bias=geometry.bias)
    return geometry == plain and not operation.convolves
