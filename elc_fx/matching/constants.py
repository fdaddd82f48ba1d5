"""Values that no input changes: attributes of the model, and what is computed from them alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.nn.parameter import is_lazy

from elc_fx.capturing.graph import (
    allocates,
    attribute_of,
    constants,
    function_name,
    is_torchs,
    overwritten_argument,
    runs_foreign_code,
    unknown,
)
from elc_fx.capturing.randomness import generators, randomness_of_the_caller


class Constants:
    """Those of a captured graph. written: the memory of tensors that the graph may change, which are none."""

    def __init__(self, captured: fx.GraphModule) -> None:
        self.captured = captured
        self.written = self._overwritten_attributes()
        self._computed_from_attributes = constants(captured.graph)
        self._known: dict[fx.Node, Any] = {}

    def __contains__(self, node: object) -> bool:
        """Whether no input changes it, though its value may be random or unknown."""
        return node in self._computed_from_attributes

    def may_change(self, tensor: Tensor) -> bool:
        """Whether the graph may write into its memory, by this name or by another."""
        return memory_of(tensor) in self.written

    def value(self, argument: Any) -> Any:
        """The number or tensor that an argument always is, or None."""
        if not isinstance(argument, fx.Node):
            return argument if isinstance(argument, int | float | complex) and not isinstance(argument, bool) else None
        if argument not in self:
            return None
        for node in unknown(argument, self._known):
            self._known[node] = self._evaluate(node)
        return self._known[argument]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            found = attribute_of(self.captured, node)
            settled = isinstance(found, Tensor) and not is_lazy(found) and not self.may_change(found)
            return found.detach() if settled else None
        name = function_name(node)
        if "empty" in name or overwritten_argument(self.captured, node) is not None:  # what nobody filled is nothing
            return None
        if any(self._known[source] is None for source in node.all_input_nodes):
            return None
        known = is_torchs(node) or node.target is getattr  # such as w.T
        if node.op != "call_method" and not (node.op == "call_function" and known):
            return None
        args: Any = fx.map_arg(node.args, self._known.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self._known.__getitem__)
        call: Any = node.target
        if node.op == "call_method":
            call, args = getattr(args[0], name), args[1:]
        with randomness_of_the_caller():
            before = generators()
            value = call(*args, **kwargs)
            return value if generators() == before else None

    def _overwritten_attributes(self) -> set[int]:
        """The memory of tensors that the graph may change, maybe through a view, and that are thus no constants."""
        written: set[int] = set()
        origins: dict[fx.Node, set[int]] = {}  # the attributes that a value may be a view of
        for node in self.captured.graph.nodes:
            if node.op == "get_attr":
                found = attribute_of(self.captured, node)
                origins[node] = {memory_of(found)} if isinstance(found, Tensor) else set()
                continue
            given = [origins[value] for value in node.all_input_nodes if origins[value]]
            reached: set[int] = set().union(*given)
            origins[node] = reached if reached and not allocates(self.captured, node) else set()
            if reached and runs_foreign_code(self.captured, node):
                written |= reached
            elif reached and (value := overwritten_argument(self.captured, node)) is not None:
                written |= origins[value]
                origins[node] = origins[value]
        return written


def memory_of(tensor: Tensor) -> int:
    """The same number for tensors that share memory; sparse and lazy ones, which have none yet, share it with none."""
    try:
        return id(tensor) if is_lazy(tensor) else tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse
        return id(tensor)
