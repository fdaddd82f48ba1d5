"""The shapes of all values of a captured graph, from one run on its example inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from elc_fx.affine import Ints
from elc_fx.capture import Attributes, Capture
from elc_fx.inputs import fresh, reproducibly


def run_recording_shapes(captured: Capture) -> tuple[Any, dict[fx.Node, Ints]]:
    """The output on the example inputs, and the shape of every tensor on the way. The modules stay as they were."""
    recorder, before = _ShapeRecorder(captured.graph_module), Attributes(captured.graph_module)
    try:
        with reproducibly():
            output = recorder.run(*fresh(captured.inputs or ()))
    finally:
        before.restore()
    return output, recorder.shapes


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, Ints] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value
