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
                self.graph.erase_node(node)
        return bool(self.made)

    def settle(self) -> None:
        """What did not merge after all computes in the type of its layer."""
        for node, dtype in self.made.items():
            if not node._erased:
                self.captured.get_submodule(str(node.target)).to(dtype)

    def _can_be_distributed(self, operation: Operation) -> bool:
        geometry, channels = operation.geometry, operation.geometry.in_channels
        plain = replace(Geometry.identity(channels, geometry.dims), bias=geometry.bias)
        elementwise = geometry == plain and geometry.dims in NORMS and not operation.convolves
        fresh = overwritten_argument(self.captured, operation.node) is None
        joins = operation.source not in self.interpreter.operations
        return elementwise and fresh and joins and self._takes_scales(operation.source, channels)

    def _takes_scales(self, value: fx.Node, channels: int) -> bool:
        """Whether a value that nobody else reads is a layer's, or a join of such."""
        known = self.interpreter.features[value].channels == channels
        if not known or len(value.users) != 1 or overwritten_argument(self.captured, value) is not None:
            return False
        if (operation := self.interpreter.operations.get(value)) is not None:
            return operation.convolves and operation.dtype is not None and operation.dtype.is_floating_point
        operands = self._operands(value)
        counts = [self.interpreter.features[operand].channels or 0 for operand in operands]
        if self.interpreter.concatenated(value) is None:
            counts = [channels] * len(operands)
        elif sum(counts) != channels:
            return False
        distinct = len(set(operands)) == len(operands) > 1
        return distinct and all(itertools.starmap(self._takes_scales, zip(operands, counts, strict=True)))

    def _operands(self, join: fx.Node) -> list[fx.Node]:
        if (terms := self.interpreter.summands(join)) is not None:
            return [term.value for term in terms]
        return list(self.interpreter.concatenated(join) or ())

    def _into(self, value: fx.Node, scale: Tensor, offset: Tensor | None, origins: tuple[str, ...]) -> None:
        if value in self.interpreter.operations:
            self._behind(value, scale, offset, origins)
        elif (terms := self.interpreter.summands(value)) is not None:
            shifted = next(term for term in terms if term.coefficient == 1)
            for term in terms:
                self._into(term.value, scale, offset if term is shifted else None, origins)
        else:
            operands = self._operands(value)
            counts = [self._channels(operand) for operand in operands]
            offsets = [None] * len(counts) if offset is None else offset.split(counts)
            for operand, own, shift in zip(operands, scale.split(counts), offsets, strict=True):
                self._into(operand, own, shift, origins)

    def _channels(self, value: fx.Node) -> int:
        channels = self.interpreter.features[value].channels
        assert channels is not None
        return channels

    def _behind(self, value: fx.Node, scale: Tensor, offset: Tensor | None, origins: tuple[str, ...]) -> None:
        operation = self.interpreter.operations[value]
        assert operation.dtype is not None
        norm: Any = NORMS[operation.geometry.dims](len(scale), eps=0.0, device=operation.device, dtype=torch.float64)
        norm.weight = nn.Parameter(scale.detach().clone())
        norm.bias = nn.Parameter(torch.zeros_like(scale) if offset is None else offset.detach().clone())
        remember(norm, origins)
        name = next(name for i in range(len(self.graph.nodes)) if not hasattr(self.captured, name := f"scale_{i}"))
        self.captured.add_module(name, norm.eval())
        with self.graph.inserting_after(value):
            scaled = self.graph.call_module(name, (value,))
        value.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        self.made[scaled] = operation.dtype
        if value in self.shapes:
            self.shapes[scaled] = self.shapes[value]
