"""What the regions of a network give, compared with what the original gives at the same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from elc_fx.decoupling.nodes import RegionOutput
from elc_fx.errors import InvalidInputError
from elc_fx.inputs import batch_values
from elc_fx.losses import relative_square
from elc_fx.planning.fitting import Substitute
from elc_fx.serial import serial_capture
from elc_fx.shapes import PlainInterpreter


class Features:
    """What the regions of a network give, beside what the teacher gives at the same places."""

    def __init__(self, network: nn.Module, teacher: nn.Module) -> None:
        ends = {m.original: m for m in network.modules() if isinstance(m, Substitute | RegionOutput)}
        self.given: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        captured = serial_capture(teacher, poolings=ends).graph_module
        missing = set(ends) - {node.name for node in captured.graph.nodes}
        if not ends or missing:
            raise InvalidInputError(
                "features need a network that was made of the teacher by decouple or Planner.collapse; "
                + (f"the teacher has no {sorted(missing)[0]}" if missing else "this one has no regions")
            )
        self.reader = _Reader(captured, set(ends))
        self.hooks = [module.register_forward_hook(self._note(name)) for name, module in ends.items()]

    def _note(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.given[name] = output.clone()  # which others may overwrite

        return note

    def teach(self, inputs: Any) -> Any:
        """The teacher's output."""
        output = self.reader.run(*batch_values(self.reader.graph_module, inputs))
        self.wanted = self.reader.found
        return output

    def distance(self) -> Tensor:
        """The mean over the regions of the squared error over the mean square."""
        return relative_square((self.given[name].float(), wanted.float()) for name, wanted in self.wanted.items())

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Reader(PlainInterpreter):
    """Runs a graph and keeps some of its values."""

    def __init__(self, graph_module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(graph_module)
        self.graph_module, self.names = graph_module, names
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = value.clone()
        return value
