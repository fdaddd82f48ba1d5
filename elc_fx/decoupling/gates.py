"""Gates: how far each decoupling node has gone from the original to what is mergeable, and when it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, fx, nn

from elc_fx.arguments import check_whole
from elc_fx.decoupling.decoupled import DecoupledModule
from elc_fx.decoupling.nodes import DecouplingNode, RegionInput, RegionOutput
from elc_fx.errors import InvalidInputError

Shape: TypeAlias = Literal["linear", "cosine"]
Order: TypeAlias = Literal["together", "depth", "reverse depth", "cost"]


def gates(module: nn.Module) -> dict[str, float]:
    """The gate of every decoupling node, by the name of its module, in the order of the graph."""
    return {name: float(node.gate) for name, node in decoupling_nodes(module).items()}


def decoupling_nodes(module: nn.Module) -> dict[str, DecouplingNode]:
    """The decoupling nodes whose gates change anything, by name, in the order of the graph."""
    nodes = {name: m for name, m in module.named_modules() if isinstance(m, DecouplingNode) and m.has_gate}
    if isinstance(module, fx.GraphModule):
        order = {str(node.target): i for i, node in enumerate(module.graph.nodes) if node.op == "call_module"}
        nodes = dict(sorted(nodes.items(), key=lambda item: order.get(item[0], len(order))))
    return nodes


def set_gate(module: nn.Module, value: float | Tensor | Mapping[str, float | Tensor]) -> None:
    """Sets the gates of all decoupling nodes, or of some.

    value: one number in [0, 1] for all; or a mapping from names of decoupling nodes, or patterns such as "layer1.*", to
    numbers. 1 is the original network, 0 can be merged. Raises `InvalidInputError` for other numbers, for a name that
    no node has, and for a module that `decouple` did not return.
    """
    nodes = _decoupled(module)
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {"*": value}
    for pattern, number in given.items():
        if not _is_share(number):
            raise InvalidInputError(f"a gate is {number!r}, expected a number from 0 (mergeable) to 1 (original)")
        if not isinstance(pattern, str):
            raise InvalidInputError(f"a decoupling node is called {pattern!r}, expected a name or a pattern")
        chosen = [node for name, node in nodes.items() if name == pattern or fnmatchcase(name, pattern)]
        if not chosen and isinstance(value, Mapping):
            raise InvalidInputError(f"no decoupling node is called `{pattern}`; there are {', '.join(nodes) or 'none'}")
        for node in chosen:
            node.set_gate(float(number))


class GateSchedule:
    """Closes the gates of a decoupled network over a number of training steps, as a learning-rate scheduler would.

    Call `step()` after each training step. After `total_steps` of them, all gates are 0.

    Args:
        module: what `decouple` returned, or a module that contains it.
        total_steps: steps until all gates are closed.
        start: steps during which all gates stay at 1.
        shape: "linear", or "cosine": slow at both ends.
        order: "together"; or one node after the other: "depth" from the input to the output, "reverse depth" from the
            output to the input, "cost" with the regions that save most first.
        overlap: with an order, how much of its time a node shares with others: 0 is strictly one after the other, 1 all
            together.

    Raises:
        InvalidInputError: an argument is out of its range, or the module has no decoupling nodes.
    """

    def __init__(
        self,
        module: nn.Module,
        total_steps: int,
        *,
        start: int = 0,
        shape: Shape = "linear",
        order: Order = "together",
        overlap: float = 0.5,
    ) -> None:
        check_whole(1, total_steps=total_steps)
        check_whole(0, start=start)
        self.total_steps = total_steps
        self.start = start
        self.shape = shape
        self.steps = 0
        if shape not in get_args(Shape):
            raise InvalidInputError(f"shape is {shape!r}, expected one of {', '.join(get_args(Shape))}")
        if order not in get_args(Order):
            raise InvalidInputError(f"order is {order!r}, expected one of {', '.join(get_args(Order))}")
        if start >= total_steps or not _is_share(overlap):
            raise InvalidInputError("expected 0 <= start < total_steps and 0 <= overlap <= 1")
        self.nodes = _decoupled(module)
        self.ranks, regions = _ranks(module, list(self.nodes), order)
        # The share of the time in which a node closes; without overlap, one region begins where the last one ends.
        self.share = max(float(overlap), 1 / regions)
        self._apply()

    def step(self) -> None:
        """One training step is done."""
        self.steps += 1
        self._apply()

    @property
    def closed(self) -> bool:
        """Whether all gates are at 0."""
        return self.steps >= self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """The steps that were done; the gates themselves are in the module's own state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, and sets the gates to where they were then."""
        self.steps = int(state["steps"])
        self._apply()

    def gate(self, rank: float) -> float:
        """The gate now of a node that closes at `rank`, from 0 (first) to 1 (last)."""
        progress = (self.steps - self.start) / (self.total_steps - self.start)
        done = min(max((progress - rank * (1 - self.share)) / self.share, 0.0), 1.0)
        if self.steps >= self.total_steps:
            done = 1.0
        return 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def _apply(self) -> None:
        for name, node in self.nodes.items():
            value = self.gate(self.ranks[name])
            node.set_gate(0.0 if value < 1e-9 else value)


def _is_share(value: Any) -> bool:
    """Whether this is a number from 0 to 1, or a tensor that holds just one."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and _is_share(value.item())
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return 0 <= float(value) <= 1


def _decoupled(module: nn.Module) -> dict[str, DecouplingNode]:
    """The decoupling nodes of what `decouple` returned; there are none where all merges of the plan are exact."""
    if not isinstance(module, nn.Module):
        raise InvalidInputError(f"module is a {type(module).__name__}, expected what elc_fx.decouple returned")
    nodes = decoupling_nodes(module)
    if not nodes and not any(isinstance(part, DecoupledModule) for part in module.modules()):
        raise InvalidInputError(f"this {type(module).__name__} has no decoupling nodes; elc_fx.decouple inserts them")
    return nodes


def _ranks(module: nn.Module, names: list[str], order: str) -> tuple[dict[str, float], int]:
    """When each node closes, from 0 to 1, and the number of times; the nodes of one region close together."""
    if order == "together":
        return dict.fromkeys(names, 0.0), 1
    regions = _regions(module)
    keys = {name: regions.get(name, (0, 0)) for name in names}
    if order == "cost":
        distinct = sorted(set(keys.values()), key=lambda key: (-key[1], key[0]))
    else:
        distinct = sorted(set(keys.values()), reverse=order == "reverse depth")
    last = max(len(distinct) - 1, 1)
    return {name: distinct.index(keys[name]) / last for name in names}, max(len(distinct), 1)


def _regions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(number of its region, FLOPs that the region saves) for every decoupling node, by name."""
    found: dict[str, tuple[int, int]] = {}
    number = 0
    for prefix, part in module.named_modules():
        if not isinstance(part, DecoupledModule):
            continue
        savings = {c.full_name: c.flops[0] - c.flops[1] for c in part.elc_fx_plan.candidates}
        current: list[tuple[int, int]] = []
        for node in part.graph.nodes:
            if node.op != "call_module":
                continue
            called = part.get_submodule(str(node.target))
            if isinstance(called, RegionOutput):
                current.pop()
            elif isinstance(called, RegionInput):
                number += 1
                current.append((number, savings.get(called.candidate, 0)))
            elif current:
                found[f"{prefix}.{node.target}".lstrip(".")] = current[-1]
    return found
