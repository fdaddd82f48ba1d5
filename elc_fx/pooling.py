"""Max poolings: which of them can become part of a convolution, and the activation before one, which goes behind it.

A max pooling whose windows are all full is close to the mean of each window, which is affine: a barrier like an
activation. But where the activation stood between the convolution and its pooling, the merge of the two would take it,
too. An activation that never falls gives the same on the other side: max(act(x)) = act(max(x)), to the bit.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from elc_fx.activations import never_falls
from elc_fx.capture import has_hooks
from elc_fx.graph import function_name, module_of, overwritten_argument

MODULES: dict[str, type[Any]] = {f"max_pool{n}d": getattr(nn, f"MaxPool{n}d") for n in (1, 2, 3)}
ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")  # of functions
ALLOCATING = (_ConvNd, _BatchNorm, nn.Linear)  # whose output is no view of what others may read


def max_pooling_of(captured: fx.GraphModule, node: fx.Node) -> Any:
    """The `nn.MaxPool1d`, `2d` or `3d` that a node computes of its only input, if all its windows are full, or None."""
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    pooling: Any = None
    if node.op == "call_module":
        module = module_of(captured, node)
        if type(module) in MODULES.values() and len(node.args) == 1 and not node.kwargs and not has_hooks(module):
            pooling = module
    elif node.op == "call_function" and (cls := MODULES.get(_name(node))) is not None:
        pooling = cls(**{**dict(zip(ARGUMENTS[1:], node.args[1:], strict=False)), **node.kwargs})
    if pooling is None or pooling.ceil_mode or pooling.return_indices or _all(pooling.kernel_size, 1):
        return None
    return pooling if _all(pooling.padding, 0) and _all(pooling.dilation, 1) else None


def poolings_before_activations(captured: fx.GraphModule) -> None:
    """Puts the activation before a max pooling behind it, in place, wherever that changes nothing."""
    graph = captured.graph
    for node in list(graph.nodes):
        if max_pooling_of(captured, node) is None:
            continue
        activation = node.all_input_nodes[0]
        if list(activation.users) != [node] or not never_falls(captured, activation):
            continue
        source = activation.all_input_nodes[0]
        if overwritten_argument(captured, activation) is not None and not _is_private(captured, source):
            continue
        node.replace_all_uses_with(activation)
        node.replace_input_with(activation, source)
        activation.replace_input_with(source, node)
        node.append(activation)
    captured.recompile()


def _is_private(captured: fx.GraphModule, value: fx.Node) -> bool:
    """Whether nobody else sees when its only reader overwrites a value."""
    return value.op == "call_module" and isinstance(module_of(captured, value), ALLOCATING) and len(value.users) == 1


def _name(node: fx.Node) -> str:
    home = getattr(node.target, "__module__", None) or ""
    return function_name(node) if home.startswith("torch") else ""


def _all(sizes: Any, wanted: int) -> bool:
    return all(size == wanted for size in (sizes if isinstance(sizes, tuple | list) else (sizes,)))
