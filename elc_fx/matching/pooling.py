"""Max poolings: which of them can become part of a convolution, and the activation before one, which goes behind it.

A max pooling is close to the mean of each window, which is affine: a barrier like an activation. Where it pads, the
border is left out of its windows, and is zero in the mean. But where the activation stood between the convolution and
its pooling, the merge of the two would take it, too. An activation that never falls gives the same on the other side:
max(act(x)) = act(max(x)), to the bit.
"""

from __future__ import annotations

from collections.abc import Container, Set
from typing import Any

from torch import fx, nn

from elc_fx.capturing.graph import (
    function_name,
    has_hooks,
    is_torchs,
    module_of,
    overwritten_argument,
    runs_foreign_code,
)
from elc_fx.matching.activations import never_falls
from elc_fx.matching.chains import allocating

MAX_POOLS: dict[type[Any], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
FUNCTIONS = {f"max_pool{dims}d": cls for cls, dims in MAX_POOLS.items()}
ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")  # of functions
EXCHANGED = "elc_fx_poolings_first"  # in the meta of an activation: how many poolings it was put behind


def max_pooling_of(captured: fx.GraphModule, node: fx.Node) -> Any:
    """The `nn.MaxPool1d`, `2d` or `3d` that a node computes of its only input, or None.

    Not where it is dilated, gives indices, or rounds its size up: then the last windows depend on the input's size.
    """
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    pooling: Any = None
    if node.op == "call_module":
        module = module_of(captured, node)
        if type(module) in MAX_POOLS and len(node.args) == 1 and not node.kwargs and not has_hooks(module):
            pooling = module
    elif node.op == "call_function" and is_torchs(node) and function_name(node) in FUNCTIONS:
        pooling = FUNCTIONS[function_name(node)](
            **{**dict(zip(ARGUMENTS[1:], node.args[1:], strict=False)), **node.kwargs}
        )
    if pooling is None or pooling.return_indices or _all(pooling.kernel_size, 1) or not _all(pooling.dilation, 1):
        return None
    return None if pooling.ceil_mode and not _all(pooling.stride, 1) else pooling


def put_poolings_first(captured: fx.GraphModule, names: Container[str] | None = None) -> None:
    """Puts the activation before a max pooling behind it, in place, wherever that changes nothing.

    names: of the poolings that matter, by default all.
    """
    changed, own = False, allocating(captured)
    for node in list(captured.graph.nodes):
        if max_pooling_of(captured, node) is None or not (names is None or node.name in names):
            continue
        activation = node.all_input_nodes[0]
        if list(activation.users) != [node] or not never_falls(captured, activation):
            continue
        if _overwrites_nothing_shared(captured, activation, own) and not _may_be_overwritten(captured, node, own):
            _exchange(activation, node)
            activation.meta[EXCHANGED] = activation.meta.get(EXCHANGED, 0) + 1
            changed = True
    if changed:
        captured.recompile()


def put_poolings_back(captured: fx.GraphModule) -> None:
    """Undoes that, in place, for the poolings that are still there. The caller recompiles."""
    for activation in list(captured.graph.nodes):
        for _ in range(activation.meta.pop(EXCHANGED, 0)):
            (pooling,) = activation.all_input_nodes
            if max_pooling_of(captured, pooling) is not None:
                _exchange(pooling, activation)


def _exchange(first: fx.Node, second: fx.Node) -> None:
    """The second reads the first alone, and then the first reads the second, where it read its source before.

    Not later, since what the source holds may be overwritten in between.
    """
    (source,) = first.all_input_nodes
    second.replace_all_uses_with(first)
    second.replace_input_with(first, source)
    first.replace_input_with(source, second)
    first.prepend(second)


def _overwrites_nothing_shared(captured: fx.GraphModule, activation: fx.Node, own: Set[fx.Node]) -> bool:
    """Whether an activation overwrites nothing, or what a layer gives to it alone. own: values in their own memory."""
    if overwritten_argument(captured, activation) is None:
        return True
    (source,) = activation.all_input_nodes
    hooked = source.op == "call_module" and has_hooks(module_of(captured, source))
    return source in own and not hooked and len(source.users) == 1


def _may_be_overwritten(captured: fx.GraphModule, value: fx.Node, own: Set[fx.Node]) -> bool:
    """By a reader in the graph, or through a view of it: what an activation gives is needed for its gradient."""
    seen, left = {value}, [value]
    while left:
        for user in left.pop().users:
            written = overwritten_argument(captured, user)
            if written in seen or runs_foreign_code(captured, user):
                return True
            elsewhere = written in own  # as a sum in place of a layer's output
            if user not in seen and not elsewhere and user not in own:
                seen.add(user)
                left.append(user)
    return False


def _all(sizes: Any, wanted: int) -> bool:
    return all(size == wanted for size in (sizes if isinstance(sizes, tuple | list) else (sizes,)))
