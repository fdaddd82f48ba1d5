"""What the regions of a network give, compared with what the original gives at the same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.capturing.identity import names_and_shapes
from elc_fx.capturing.inputs import batch_values
from elc_fx.capturing.shapes import PlainInterpreter
from elc_fx.decoupling.nodes import RegionOutput
from elc_fx.errors import InvalidInputError
from elc_fx.matching.serial import serial_capture
from elc_fx.planning.fitting import Substitute
from elc_fx.training.losses import relative_square


class Features:
    """How far what the regions of a network give is from what the teacher gives at the same places.

    The teacher runs first: so of each region only the difference is kept for the gradient,
    and not what others may overwrite. Raises `InvalidInputError` where the network was not made of the teacher.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module) -> None:
        ends = {m.original: m for m in network.modules() if isinstance(m, Substitute | RegionOutput)}
        if not ends:
            raise InvalidInputError("features are those of regions, and the network has none; set features to 0")
        captured = serial_capture(teacher, poolings=ends).graph_module
        if {m.model for m in ends.values()} != {names_and_shapes(captured)}:
            raise InvalidInputError(
                "features need the network that `decouple` or `Planner.collapse` was given as the teacher, and it is "
                "another; set features to 0"
            )
        self.reader = _Reader(captured, set(ends))
        self.errors: dict[str, Tensor] = {}
        self.hooks = [module.register_forward_hook(self._compare(name)) for name, module in ends.items()]

    def teach(self, inputs: Any) -> Any:
        """The teacher's output; the network runs on the same inputs next."""
        self.reader.found.clear()
        self.errors.clear()
        return self.reader.run(*batch_values(self.reader.graph_module, inputs))

    def _compare(self, name: str) -> Callable[..., None]:
        def compare(module: nn.Module, inputs: Any, output: Tensor) -> None:
            wanted = self.reader.found.pop(name, None)
            if wanted is not None:  # else nobody taught: it is being validated
                self.errors[name] = relative_square([(output.float(), wanted.float())])

        return compare

    def distance(self) -> Tensor:
        """The mean over the regions of the squared error over the mean square."""
        return torch.stack(list(self.errors.values())).mean()

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
