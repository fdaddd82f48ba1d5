"""A network with modules in the place of chosen regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from elc_fx.capturing.copying import clone
from elc_fx.capturing.origins import origins_of, remember
from elc_fx.matching.pooling import put_poolings_back
from elc_fx.planning.cost import Choice


def substituted(graph_module: fx.GraphModule, choices: Sequence[Choice], by: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A copy in which each choice is computed by a module of its own, and all else as in the model.

    by: the modules, by names of region outputs.
    """
    result = clone(graph_module, {})
    nodes, now = {node.name: node for node in result.graph.nodes}, dict[str, fx.Node]()
    order = {name: position for position, name in enumerate(nodes)}
    for choice in sorted(choices, key=lambda choice: order[choice.output]):  # each reads what those before it give
        path = f"{choice.output}_collapsed"
        origins = origins_of(result, (nodes[name] for name in choice.candidate.nodes))
        for layer in by[choice.output].modules():
            remember(layer, origins)
        result.add_submodule(path, by[choice.output])
        with result.graph.inserting_after(nodes[choice.output]):
            source = now.get(choice.source, nodes[choice.source])
            now[choice.output] = result.graph.call_module(path, (source,))
        nodes[choice.output].replace_all_uses_with(now[choice.output])
    result.graph.eliminate_dead_code()
    put_poolings_back(result)
    result.delete_all_unused_submodules()
    result.recompile()
    return result
