"""Questions about a graph, a node or a module: names, arguments by name, what is overwritten, what is constant."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_AVG_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_BINARY = ("input", "other", "alpha")
_CAT = ("tensors", "dim")
# Parameter names of functions that are written in C++, and so have no signature to inspect.
PARAMETERS: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _CONV_TRANSPOSE for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _AVG_POOL for n in (1, 2, 3)},
    **dict.fromkeys(("add", "sub", "subtract", "iadd", "isub", "add_", "sub_", "subtract_", "rsub"), _BINARY),
    **dict.fromkeys(("mul", "multiply", "imul", "mul_", "multiply_"), _BINARY[:2]),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide", "itruediv", "div_"), (*_BINARY[:2], "rounding_mode")),
    **dict.fromkeys(("neg", "negative", "neg_"), ("input",)),
    **dict.fromkeys(("cat", "concat", "concatenate"), _CAT),
    "batch_norm": (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
    "linear": ("input", "weight", "bias"),
    "pad": ("input", "pad", "mode", "value"),
    "dropout": ("input", "p", "train"),
    "getitem": ("input", "index"),
}
TORCHS_LIBRARIES = ("aten", "prim", "prims")  # of operators under torch.ops
SPLITS = ("chunk", "split", "tensor_split", "split_with_sizes", "unbind", "hsplit", "vsplit", "dsplit", "unsafe_chunk")
ALLOCATING = frozenset(
    (
        *(
            "add",
            "sub",
            "mul",
            "truediv",
            "div",
            "cat",
            "concat",
            "concatenate",
            "stack",
            "neg",
            "matmul",
            "sum",
            "mean",
        ),
        *("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh"),
        *("softmax", "log_softmax", "softplus", "clone", "exp", "sqrt", "batch_norm", "layer_norm", "interpolate"),
        *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
        *("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))),
    )
)
VIEWS = frozenset(  # what may give memory of an argument, beside the operators whose schema says so
    (
        *("getitem", "getattr", "type", "type_as", "float", "double", "half", "bfloat16", "dropout"),
        *("broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"),
    )
)
IN_PLACE_OPERATORS = frozenset(  # "iadd", but not "index"; nor "imatmul", of which tensors have none
    name
    for name in dir(operator)
    if name.startswith("i") and {name[1:], f"{name[1:]}_"} & {*dir(operator)} and hasattr(torch.Tensor, f"__{name}__")
)
IN_PLACE_METHODS = frozenset(f"__{name}__" for name in IN_PLACE_OPERATORS)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DROPOUT_CLASSES: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
DROPOUT_MODULES: tuple[type[nn.Module], ...] = tuple(DROPOUT_CLASSES.values())
DROPOUT_FUNCTIONS = {*DROPOUT_CLASSES, "feature_dropout", "stochastic_depth", "drop_path"}
IDENTITY_MODULES: tuple[type[nn.Module], ...] = (nn.Identity, *DROPOUT_MODULES)
VIEW_MODULES = (nn.Flatten, nn.Unflatten)
DROP_PATHS = ("DropPath", "StochasticDepth")  # as torchvision, timm and many others call them
KNOWN_PACKAGES = ("torch", "torchvision", "builtins", "collections", "math")  # of which it is known what they overwrite


def module_of(captured: nn.Module, node: fx.Node) -> nn.Module:
    """The module that a node calls."""
    module: nn.Module = attribute_of(captured, node)
    return module


def attribute_of(captured: nn.Module, node: fx.Node) -> Any:
    """What the path of a node that calls a module or reads an attribute leads to."""
    return operator.attrgetter(str(node.target))(captured)


def owners(path: str) -> set[str]:
    """The paths of the modules that hold what is at a path."""
    return set(itertools.accumulate(path.split(".")[:-1], "{}.{}".format))


def put_attribute(root: nn.Module, path: str, value: Any, *, persistent: bool = True) -> None:
    """Puts a module or a tensor at a path, with modules on the way where there are none.

    Other tensors than parameters are buffers. persistent: whether those are in the state dict.
    """
    *holders, name = path.split(".")
    for holder in holders:
        if holder not in root._modules:
            root.add_module(holder, nn.Module())
        root = root.get_submodule(holder)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value, persistent=persistent)
    else:
        setattr(root, name, value)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Attributes, and what is computed from them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def erase_unread(node: fx.Node, constant: Container[fx.Node]) -> list[fx.Node]:
    """Erases a node if it has no readers, and the constants that only it read; returns those that it erased."""
    erased, pending = list[fx.Node](), [node]
    while pending:
        node = pending.pop()
        if not node.users and not node._erased:
            pending += [source for source in node.all_input_nodes if source in constant]
            node.graph.erase_node(node)
            erased.append(node)
    return erased


def unknown(node: fx.Node, known: Container[fx.Node]) -> Iterator[fx.Node]:
    """The node and what it is computed from, inputs first; the caller makes each known before it asks for the next."""
    pending = [node]
    while pending:
        node = pending[-1]
        if missing := [value for value in node.all_input_nodes if value not in known]:
            pending.extend(missing)
            continue
        pending.pop()
        if node not in known:
            yield node


def tuples(graph: fx.Graph) -> set[fx.Node]:
    """Values that may be several tensors, as far as functions and their arguments tell."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = function_name(node)
        joins = name in ("add", "mul", "iadd", "imul")
        passes_on = joins or (name == "getitem" and any(isinstance(index, slice) for index in node.args[1:]))
        literal = joins and any(isinstance(value, tuple | list) for value in node.args)
        if name in SPLITS or literal or (passes_on and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def label(node: fx.Node) -> str:
    """The name of a node for people: the module's path for a call of a module, else the node's own name."""
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def function_name(node: fx.Node) -> str:
    """The bare name of the function or method that a node calls, "" for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def package_of(node: fx.Node) -> str:
    """The package of the function that a node calls; "torch" also for operators, "" where it is not known."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        library = str(target).partition(".")[0]
        return "torch" if library in TORCHS_LIBRARIES else library
    home = getattr(target, "__module__", None)
    if home is None and not inspect.isfunction(target):  # as those of torch that are written in C++
        return "torch"
    package = (home or "").partition(".")[0]
    return "torch" if package == "_operator" else package


def is_torchs(node: fx.Node) -> bool:
    """Whether a function or method is torch's or an operator, and not a user's of the same name."""
    return node.op != "call_function" or package_of(node) == "torch"


def may_be_view(node: fx.Node) -> bool:
    """Whether a function or method may give memory of one of its arguments."""
    return function_name(node) in VIEWS or _is_view(function_name(node))


@functools.cache
def _is_view(name: str) -> bool:
    """Whether an operator of that name gives a view, as its schema says."""
    given = (value for schema in schemas(name) for value in schema.returns)
    return any(value.alias_info is not None and not value.alias_info.is_write for value in given)


def schemas(name: str) -> list[Any]:
    """Of torch's operators of that name."""
    packet = getattr(torch.ops.aten, name, None) if name else None
    found = _overloads(packet) if isinstance(packet, torch._ops.OpOverloadPacket) else []
    return [overload._schema for overload in found]


def signature_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function or method call by parameter name; what was left out is missing.

    Empty where the parameters are not known.
    """
    name = function_name(node)
    if node.op == "call_function" and inspect.isfunction(node.target):
        try:
            return dict(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments)
        except TypeError:
            return {}
    names = PARAMETERS.get(name, ())
    if len(node.args) > len(names):
        return {}
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def overwritten_argument(captured: nn.Module, node: fx.Node) -> fx.Node | None:
    """The value that an in-place operation overwrites, and returns."""
    if overwrites_unseen(node):
        return None
    given = node.args or tuple(node.kwargs.values())
    first = next((value for value in given if isinstance(value, fx.Node)), None)
    if node.op == "call_method":
        name = str(node.target)
        return first if (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE_METHODS else None
    if node.op == "call_module":
        return first if getattr(module_of(captured, node), "inplace", False) is True else None
    if node.op == "call_function":
        name = function_name(node)
        if isinstance(out := node.kwargs.get("out"), fx.Node):
            return out
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if isinstance(target, torch._ops.OpOverload):
            return next((v for v in written_arguments(target, node.args, node.kwargs) if isinstance(v, fx.Node)), None)
        if name == "assign" or (getattr(target, "__module__", "") == "_operator" and name in IN_PLACE_OPERATORS):
            return first
        if (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True:
            return first
        if inspect.isfunction(target) and signature_of(node).get("inplace") is True:
            return first
    return None


def overwrites_unseen(node: fx.Node) -> bool:
    """Whether an operation may write into several of its inputs, or into one that it does not return."""
    target, name = node.target, function_name(node)
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        for overload in _overloads(target):
            written = len(written_arguments(overload, node.args, node.kwargs))
            given = [value.alias_info for value in overload._schema.returns]
            gives_it = len(given) == 1 and given[0] is not None and given[0].is_write
            if written > 1 or (written and not gives_it):
                return True
        return False
    in_lists = name.startswith(("_foreach_", "_fused_")) and name.endswith("_")
    several = isinstance(node.kwargs.get("out"), tuple | list)
    return in_lists or several or name in ("set_", "setitem", "__setitem__") or _updates_statistics(node, name)


def _overloads(operation: Any) -> list[Any]:
    """Of an operator, or itself if it is one."""
    packet = isinstance(operation, torch._ops.OpOverloadPacket)
    return [getattr(operation, name) for name in operation.overloads()] if packet else [operation]


def _updates_statistics(node: fx.Node, name: str) -> bool:
    """As normalisation in training mode does."""
    if name not in ("batch_norm", "instance_norm"):
        return False
    arguments = signature_of(node)
    trains = arguments.get("training", False) if name == "batch_norm" else arguments.get("use_input_stats", True)
    return trains is not False and isinstance(arguments.get("running_mean"), fx.Node)


def written_arguments(overload: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What the schema of an operator says that a call of it overwrites; not all of it is among what it returns."""
    schema = overload._schema
    if not schema.is_mutable:
        return []
    given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
    return tree_leaves([given.get(argument.name) for argument in schema.arguments if argument.is_write])


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in HOOKS)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module computes what torch.nn's `forward` of its class says, and is kept whole."""
    if (
        isinstance(module, torch.jit.ScriptModule)
        or calls_differently(module)
        or "forward" in vars(module)
        or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    ):
        return False
    convolves = getattr(type(module), "_conv_forward", None)
    return all(
        (getattr(f, "__module__", None) or "").startswith(("torch.nn.", "torch.ao.nn."))
        for f in (type(module).forward, convolves)
        if f
    ) and not type(module).__module__.startswith("torch.fx.")


def calls_differently(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward` and hooks: a class of it has a `__call__` of its own."""
    own = (vars(cls)["__call__"] for cls in type(module).__mro__ if cls is not nn.Module and "__call__" in vars(cls))
    # fx gives every GraphModule one that only makes tracebacks readable.
    return any(not getattr(call, "__qualname__", "").startswith(fx.GraphModule.__qualname__) for call in own)


def has_unknown_hooks(module: nn.Module) -> bool:
    """Whether it has other hooks than those of torch.nn.utils.weight_norm or spectral_norm (before 2.x style).

    And those of its weight alone: what others compute, such as a bias, is not looked up.
    """
    others = any(getattr(module, hooks, None) for hooks in HOOKS if hooks != "_forward_pre_hooks")
    return others or not all(_computes_weight(hook) for hook in module._forward_pre_hooks.values())


def _computes_weight(hook: Any) -> bool:
    return type(hook) in (WeightNorm, SpectralNorm) and hook.name == "weight"


def runs_foreign_code(captured: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may write into anything that it reads: code that is not torch's, and nobody knows what it is."""
    if node.op == "call_module":
        return not is_leaf(module_of(captured, node))
    foreign = node.op == "call_function" and package_of(node) not in KNOWN_PACKAGES
    return foreign or overwrites_unseen(node)


def allocates(captured: nn.Module, node: fx.Node) -> bool:
    """Whether it is known that what a node gives, if that is one tensor, is in memory of its own.

    Not asked of what works in place.
    """
    if node.op == "call_module":
        module = module_of(captured, node)
        known = type(module).__module__.startswith("torch.nn.") and is_leaf(module)
        return known and not isinstance(module, (*VIEW_MODULES, *IDENTITY_MODULES))
    return function_name(node) in ALLOCATING and is_torchs(node)


def is_identity(captured: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = module_of(captured, node)
        off = type(module) is nn.Identity or not module.training
        return type(module) in IDENTITY_MODULES and off and not has_hooks(module)
    if node.op == "call_function" and function_name(node) in DROPOUT_FUNCTIONS:
        arguments = signature_of(node)
        training = arguments.get("training", arguments.get("train"))
        return training is False and len(node.all_input_nodes) == 1
    return False


def vanishes(captured: nn.Module, node: fx.Node) -> bool:
    """Whether a module computes nothing in eval mode, dropped paths included."""
    if node.op != "call_module":
        return False
    module = module_of(captured, node)
    return is_identity(captured, node) or (is_drop_path(module) and not has_hooks(module))


def is_drop_path(module: nn.Module) -> bool:
    """Whether a module drops whole samples of a branch in training (stochastic depth), and is an identity in eval."""
    return type(module).__name__ in DROP_PATHS and next(module.parameters(), None) is None
