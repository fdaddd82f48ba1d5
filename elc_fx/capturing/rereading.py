"""The code of a graph, traced again, as unpickling does: torch's own tracer takes `x += y` for `x = x + y`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from elc_fx.capturing.graph import IN_PLACE_OPERATORS


class Rereader(fx.Tracer):
    """Of code that was written from a graph: what it changes in place is a tensor, since numbers got new names."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


class _Value(fx.Proxy):
    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)


class _Attribute(_Value, fx.proxy.Attribute):
    """Of a value, such as `x.data`."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda value, other: value.tracer.create_proxy("call_function", function, (value, other), {})


for _name in IN_PLACE_OPERATORS:
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))
