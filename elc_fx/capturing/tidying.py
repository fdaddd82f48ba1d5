"""A traced graph made readable: one spelling for what can be recorded in several, and nothing that computes nothing."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

from elc_fx.capturing.graph import (
    DROPOUT_CLASSES,
    function_name,
    is_identity,
    is_leaf,
    module_of,
    overwritten_argument,
    signature_of,
)
from elc_fx.capturing.questions import reads_training


def tidy(captured: fx.GraphModule, kept: tuple[type[nn.Module], ...] = ()) -> None:
    """Makes a graph that runs in eval mode readable: without identities, and every value read from its last writer."""
    _drop_identities(captured, kept)
    _read_overwritten_values_from_their_writer(captured)
    captured.graph.lint()


def _drop_identities(captured: fx.GraphModule, kept: tuple[type[nn.Module], ...]) -> None:
    """Dropout, drop path and identities compute nothing in eval: their readers read their input. kept: but these.

    Nor do attributes that nobody reads, such as those that tracing put into the text of an error.
    """
    for node in reversed(captured.graph.nodes):
        if node.target is getattr and not node.users:
            captured.graph.erase_node(node)
    for node in list(captured.graph.nodes):
        if is_identity(captured, node) and not (node.op == "call_module" and type(module_of(captured, node)) in kept):
            node.replace_all_uses_with(node.all_input_nodes[0])
            captured.graph.erase_node(node)


def _read_overwritten_values_from_their_writer(captured: fx.GraphModule) -> None:
    """An in-place operation returns the tensor that it changed. Whoever reads that tensor later reads the result.

    y.relu_(); z = y + 1  is recorded as  r = relu_(y); z = y + 1, and becomes  r = relu_(y); z = r + 1: the same
    tensor, but now the graph shows what z depends on.
    """
    latest: dict[fx.Node, fx.Node] = {}  # by what an operation overwrote
    for node in captured.graph.nodes:
        for value in node.all_input_nodes:
            last = value
            while last in latest:
                last = latest[last]
            if last is not value:
                latest[value] = last  # so that no way grows long
                node.replace_input_with(value, last)
        written = overwritten_argument(captured, node)
        if written is not None:
            latest[written] = node


def make_dropouts_modules(captured: fx.GraphModule) -> None:
    """F.dropout(x, p, self.training), which tracing in eval froze, becomes a module that follows `train()`."""
    for node in captured.graph.nodes:
        module_class = DROPOUT_CLASSES.get(function_name(node)) if node.op == "call_function" else None
        if module_class is None or not is_identity(captured, node):
            continue
        module = module_class(signature_of(node).get("p", 0.5)).eval()
        captured.add_submodule(node.name, module)
        with captured.graph.inserting_before(node):
            called = captured.graph.call_module(node.name, (node.all_input_nodes[0],))
        node.replace_all_uses_with(called)
        captured.graph.erase_node(node)


def caller_of(node: fx.Node) -> str:
    """The path of the module in whose `forward` an operation was recorded; "" for the root."""
    stack: Any = node.meta.get("nn_module_stack") or {"": ("", None)}
    path, _ = next(reversed(stack.values()))
    return str(path)


def make_batch_norms_modules(captured: fx.GraphModule, root: nn.Module) -> set[nn.Module]:
    """F.batch_norm on what a batch norm has, with statistics that tracing has fixed, becomes torch's module again.

    As in subclasses whose forward was traced. Not where the code never asks for the mode, and so has them fixed in
    training, too. Returns the batch norms that did.
    """
    made: set[nn.Module] = set()
    for node in list(captured.graph.nodes):
        if node.op != "call_function" or function_name(node) != "batch_norm":
            continue
        arguments = signature_of(node)
        read = {name: arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var")}
        paths = {
            n: str(a.target).rpartition(".") for n, a in read.items() if isinstance(a, fx.Node) and a.op == "get_attr"
        }
        owners = {owner for owner, _, _ in paths.values()}
        if len(owners) != 1 or any(attribute != name for name, (_, _, attribute) in paths.items()):
            continue
        path = owners.pop()
        owner: Any = root.get_submodule(path)
        plain_class = next(
            (cls for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(owner, cls)), None
        )
        if plain_class is None or not path or arguments.get("training", False) is not False:
            continue
        if not reads_training(root.get_submodule(caller_of(node))):
            continue
        parent, _, name = path.rpartition(".")
        holder = captured.get_submodule(parent)
        if holder is root.get_submodule(parent):  # the caller's own, of which the graph calls other parts
            continue
        momentum = owner.momentum if owner.momentum is None else arguments.get("momentum", 0.1)
        plain = plain_class(owner.num_features, arguments.get("eps", 1e-5), momentum, device="meta")
        plain._parameters, plain._buffers = dict(owner._parameters), dict(owner._buffers)
        plain.affine, plain.track_running_stats = owner.affine, owner.track_running_stats
        for child_name, child in captured.get_submodule(path).named_children():
            plain.add_module(child_name, child)
        setattr(holder, name, plain.eval())
        made.add(owner)
        with captured.graph.inserting_before(node):
            called = captured.graph.call_module(path, (arguments["input"],))
        node.replace_all_uses_with(called)
        sources = [source for source in node.all_input_nodes if source.op == "get_attr"]
        captured.graph.erase_node(node)
        for source in sources:
            if not source.users:
                captured.graph.erase_node(source)
    return made


def give_input_by_position(captured: fx.GraphModule) -> None:
    """`layer(input=x)` becomes `layer(x)`, for layers of torch.nn with one argument."""
    for node in captured.graph.nodes:
        if node.op == "call_module" and not node.args and tuple(node.kwargs) == ("input",):
            module = module_of(captured, node)
            if is_leaf(module) and next(iter(inspect.signature(module.forward).parameters)) == "input":
                node.args, node.kwargs = (node.kwargs["input"],), {}
