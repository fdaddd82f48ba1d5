"""Origins: a layer that a pass makes remembers which layers of the original network it stands for.

Their names are an attribute of the layer itself, so that they survive what a network goes through: copies, pickling,
training, and further passes, whose layers take over the origins of those that they replace.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx, nn

from elc_fx.capturing.graph import label, module_of

ORIGIN = "elc_fx_origin"


def place_of(node: fx.Node) -> str:
    """Where a layer is in its model: the module that it calls or whose parameters it is given, else its own name."""
    if node.op == "call_function":
        for source in node.all_input_nodes:
            if source.op == "get_attr" and "." in str(source.target):
                return str(source.target).rpartition(".")[0]
    return label(node)


def recorded_origin(graph_module: fx.GraphModule, node: fx.Node) -> tuple[str, ...]:
    """The places in the original that a node stands for, as the pass that made it noted them; () where none did."""
    return getattr(module_of(graph_module, node), ORIGIN, ()) if node.op == "call_module" else ()


def origins_of(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The places in the original that nodes stand for; their own, for those that no pass made.

    Nodes without numbers of their own are left out, but for modules that pool, which can be part of a convolution: the
    name of a sum says little, since the next trace counts anew.
    """
    places: dict[str, None] = {}
    for node in nodes:
        if recorded := recorded_origin(graph_module, node):
            places.update(dict.fromkeys(recorded))
        elif _has_place(graph_module, node):
            places[place_of(node)] = None
    return tuple(places)


def _has_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = module_of(graph_module, node)
        pools = isinstance(module, nn.modules.pooling._MaxPoolNd)
        return pools or any(True for _ in itertools.chain(module.parameters(), module.buffers()))
    return any(source.op == "get_attr" for source in node.all_input_nodes)


def remember(module: nn.Module, origins: Iterable[str]) -> None:
    """Notes what a new layer stands for."""
    setattr(module, ORIGIN, tuple(origins))


def all_origins(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """What all layers of a network remember, by their path."""
    return {path: getattr(layer, ORIGIN) for path, layer in module.named_modules() if hasattr(layer, ORIGIN)}
