"""The shapes and types of all values of a captured graph, from one run on its example inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from elc_fx.affine import Ints
from elc_fx.capturing.attributes import unchanged
from elc_fx.capturing.capture import Capture
from elc_fx.capturing.inputs import fresh
from elc_fx.capturing.randomness import reproducibly

T = TypeVar("T")


class Value(NamedTuple):
    """What is known of a tensor."""

    shape: Ints
    dtype: torch.dtype


def run_recording_values(captured: Capture) -> tuple[Any, dict[fx.Node, Value]]:
    """The output on the example inputs, and every tensor on the way. The modules stay as they were."""
    return run_recording(captured, lambda value: Value(tuple(value.shape), value.dtype))


def run_recording(captured: Capture, what: Callable[[Tensor], T]) -> tuple[Any, dict[fx.Node, T]]:
    """As `run_recording_values`, with anything else of the tensors."""
    recorder = _Recorder(captured.graph_module, what)
    with unchanged(captured.graph_module), reproducibly():
        output = recorder.run(*fresh(captured.inputs or ()))
    return output, recorder.found


class PlainInterpreter(fx.Interpreter):
    """Hands lists and dicts on as the code of the graph does: torch's own gives its nodes' immutable ones.

    Errors say what the model's own code says, and no more.
    """

    def __init__(self, module: fx.GraphModule, garbage_collect_values: bool = True) -> None:
        super().__init__(module, garbage_collect_values)
        self.extra_traceback = False

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        return _plain(super().map_nodes_to_values(args, n))


def _plain(value: Any) -> Any:
    """With what a node's arguments are written in made plain; what nodes have computed stays the same object."""
    if isinstance(value, immutable_list):
        return [_plain(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is tuple:
        items = tuple(_plain(item) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


class _Recorder(PlainInterpreter):
    def __init__(self, graph_module: fx.GraphModule, what: Callable[[Tensor], Any]) -> None:
        super().__init__(graph_module)
        self.what = what
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = self.what(value)
        return value
