"""Answers to what code asks of stand-ins by Python's own functions, where they are known.

A stand-in is of its own class, so `isinstance(x, list)` in the traced code must not look at it. Where the value is a
tensor for sure, or a number that was computed from sizes, such a value is asked in its place. The larger of two such
numbers is recorded, which `max` would have to compare. All of that in the files whose code asks, and only there: in
torch's own, written in C, what seems to be a tensor is taken for one.
"""

from __future__ import annotations

import abc
import builtins
import functools
import operator
import types
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from elc_fx.capturing.graph import SPLITS, function_name, has_unknown_hooks, is_leaf, is_torchs, module_of, schemas

EXAMPLE = torch.empty(0)
SIZES = (torch.Size(),)
NUMBERS = (1, 1.0, True)
COUNTS = ("ndim", "size", "dim", "numel")
FIXED = ("data", "device", "dtype", "layout", "ndim", "shape")  # attributes that are of one type, of any tensor
# How classes decide what is of them: by its class alone. Those of others may look at the value.
BY_CLASS = (type, abc.ABCMeta, type(Tensor), type(nn.Parameter), type(nn.Buffer))
CONVERSIONS = ("bfloat16", "bool", "cpu", "cuda", "double", "float", "half", "int", "long")  # methods of tensors alone
PARTS = {  # how the argument is called that says how many, or of which sizes
    "chunk": ("chunks",),
    "unsafe_chunk": ("chunks",),
    "split": ("split_size_or_sections", "split_size"),
    "split_with_sizes": ("split_sizes",),
    "tensor_split": ("tensor_indices_or_sections", "indices_or_sections", "indices", "sections"),
}
GIVE_OTHERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.AdaptiveLogSoftmaxWithLoss)


@fx.wrap
def largest(*values: Any) -> Any:
    """`max`, in a graph: Python's own cannot be traced again, as unpickling does."""
    return max(*values)


@fx.wrap
def smallest(*values: Any) -> Any:
    """`min`, likewise."""
    return min(*values)


@fx.wrap
def has_parts(value: list[Tensor], count: int) -> bool:
    """Of a list or a tuple of tensors; TorchScript asks for one type."""
    return len(value) == count


LARGEST, SMALLEST, HAS_PARTS = largest, smallest, has_parts  # while fx traces, the names are of its own wrappers
EXTREMES = (LARGEST, SMALLEST)


class Answers:
    """While active. namespaces: the globals of the files that ask.

    examples_of: of a value, something of each type that it may be of; nothing where that is not known.
    """

    def __init__(self, namespaces: Collection[dict[str, Any]], examples_of: Callable[[Any], tuple[Any, ...]]) -> None:
        self.namespaces = namespaces
        self.examples_of = examples_of
        self.put: list[tuple[dict[str, Any], str, bool]] = []  # the last: whether Python's own was there by its name

    def __enter__(self) -> None:
        answers = {
            "isinstance": self._isinstance,
            "max": functools.partial(self._extreme, max, LARGEST),
            "min": functools.partial(self._extreme, min, SMALLEST),
        }
        for namespace in self.namespaces:
            for name, answer in answers.items():
                pythons = getattr(builtins, name)
                if namespace.get(name, pythons) is pythons:
                    self.put.append((namespace, name, name in namespace))
                    namespace[name] = answer

    def __exit__(self, *_: object) -> None:
        while self.put:
            namespace, name, was_there = self.put.pop()
            if was_there:
                namespace[name] = getattr(builtins, name)
            else:
                namespace.pop(name, None)
        self.examples_of = lambda _: ()  # for files that imported it from there meanwhile

    def _isinstance(self, value: Any, classes: Any) -> bool:
        if issubclass(type(value), fx.Proxy):
            examples = self.examples_of(value)
            if all(_tells(cls, example) for example in examples for cls in _classes(classes)):
                answers = {builtins.isinstance(example, classes) for example in examples}
                if len(answers) == 1:
                    return answers.pop()
        return builtins.isinstance(value, classes)

    def _extreme(self, function: Callable[..., Any], recorded: Any, *args: Any, **options: Any) -> Any:
        proxies = [value for value in tree_leaves(args) if issubclass(type(value), fx.Proxy)]
        of_sizes = all(any(type(e) in (int, torch.Size) for e in self.examples_of(value)) for value in proxies)
        if not proxies or not of_sizes or options:
            return function(*args, **options)
        made = proxies[0].tracer.create_proxy("call_function", recorded, args, {})
        made.node.meta["is_wrapped"] = True
        return made


def _tells(cls: Any, example: Any) -> bool:
    """Whether an example is of a class if the value is: what is a tensor for sure may be a kind of tensor as well."""
    narrower = type(example) is Tensor and cls is not Tensor and isinstance(cls, type) and issubclass(cls, Tensor)
    return type(cls) in BY_CLASS and not narrower


def _classes(given: Any) -> Iterator[Any]:
    """Of nested tuples and unions."""
    if type(given) is not tuple and type(given) is not types.UnionType:
        yield given
        return
    for item in given if type(given) is tuple else get_args(given):
        yield from _classes(item)


def examples_of_size(
    node: fx.Node, tensors: Container[fx.Node], sizes: Mapping[fx.Node, tuple[Any, ...]]
) -> tuple[Any, ...]:
    """Of what a node computes from the sizes of tensors, something of each type that it may be of; else nothing.

    tensors: of the nodes before, those that give tensors. sizes: those that give something of sizes, and what.
    """
    first, *others = node.args or (None,)
    if isinstance(first, fx.Node) and first in tensors and (node.target is getattr or node.op == "call_method"):
        if _is_shape(node):
            return SIZES
        return (1,) if (others[0] if node.target is getattr else node.target) in COUNTS else ()
    if node.target is operator.getitem and isinstance(first, fx.Node) and sizes.get(first) == SIZES:
        return SIZES if isinstance(others[0], slice) else (1,)
    inputs = node.all_input_nodes
    if node.op != "call_function" or not inputs or not all(value in sizes for value in inputs):
        return ()
    if node.target in EXTREMES and not others:  # of the parts of one shape, or of a list of numbers
        of_shape = isinstance(first, fx.Node)
        return NUMBERS if of_shape or all(sizes[value] != SIZES for value in inputs) else ()
    # What is computed from a shape, or with a sequence or a text, may be one.
    numbers = all(isinstance(value, fx.Node | int | float) for value in (first, *others))
    computed = getattr(node.target, "__module__", None) in ("_operator", "math") or node.target in EXTREMES
    return NUMBERS if computed and numbers and all(sizes[value] != SIZES for value in inputs) else ()


def number_of_parts(node: fx.Node) -> int | None:
    """How many parts the value of a node has, as far as its arguments tell; whoever relies on it checks it."""
    first, *others = node.args or (None,)
    if node.target is operator.getitem and isinstance(first, fx.Node) and _is_shape(first):
        return _length(others[0]) if isinstance(others[0], slice) else None
    name = function_name(node)
    if name not in PARTS or not is_torchs(node):
        return None
    parts = others[0] if others else next((node.kwargs[key] for key in PARTS[name] if key in node.kwargs), None)
    if isinstance(parts, list | tuple):
        return len(parts) + (name == "tensor_split")  # it is given where to split
    if name.endswith("chunk"):  # of a batch there may be fewer
        axis = others[1] if len(others) > 1 else node.kwargs.get("dim", 0)
        return parts if isinstance(parts, int) and isinstance(axis, int) and axis != 0 else None
    return parts if isinstance(parts, int) and name == "tensor_split" else None


def _is_shape(node: fx.Node) -> bool:
    """`x.shape` or `x.size()`, if x is a tensor."""
    by_method = node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    return by_method or (node.target is getattr and node.args[1:] == ("shape",))


def _length(part: slice) -> int | None:
    """Of a slice of something that is long enough."""
    start, stop = part.start, part.stop
    if part.step is not None or not all(bound is None or isinstance(bound, int) for bound in (start, stop)):
        return None
    if stop is not None and stop > 0 and (start is None or 0 <= start < stop):
        return int(stop) - (start or 0)
    if start is not None and start < 0 and (stop is None or start < stop < 0):
        return (stop or 0) - int(start)
    return None


def gives_tensor(root: nn.Module, node: fx.Node, tensors: Container[fx.Node]) -> bool:
    """Whether a node gives one tensor, whatever the inputs are. tensors: of the nodes before, those that do."""

    def is_tensor(value: Any) -> bool:
        return isinstance(value, fx.Node) and (value in tensors or value.op == "get_attr")

    first, *others = node.args or (None,)
    if node.op == "call_module":
        module = module_of(root, node)
        if (
            not is_leaf(module)
            or has_unknown_hooks(module)
            or not type(module).__module__.startswith("torch.nn.modules.")
        ):
            return False
        if isinstance(module, nn.Identity):
            return is_tensor(first)
        return not isinstance(module, GIVE_OTHERS) and not getattr(module, "return_indices", False)
    if node.op not in ("call_function", "call_method"):
        return False
    name = function_name(node)
    if getattr(node.target, "__module__", None) == "_operator":
        if name == "getitem":
            return is_tensor(first) or (_splits(first, is_tensor) and isinstance(others[0], int))
        numbers = all(is_tensor(value) or isinstance(value, int | float | complex) for value in (first, *others))
        return numbers and any(map(is_tensor, (first, *others)))
    given = tree_leaves(first)
    if not given or not all(map(is_tensor, given)):
        return False
    if (name == "nonzero" or "max_pool" in name) and any(value is True for value in (*others, *node.kwargs.values())):
        return False  # `as_tuple`, `return_indices`, of which the operators know nothing
    if node.op == "call_method" and name in CONVERSIONS:
        return True
    if not is_torchs(node):
        return False
    return getattr(node.target, "__annotations__", {}).get("return") is Tensor or _maps_to_tensor(name)


def _splits(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    """Whether a value is a tuple of the parts of a tensor."""
    known = isinstance(value, fx.Node) and function_name(value) in SPLITS and is_torchs(value)
    return known and bool(value.args) and is_tensor(value.args[0])


@functools.cache
def _maps_to_tensor(name: str) -> bool:
    """Whether operators of that name give one tensor wherever they take a tensor, or a list of them, first."""
    given = [
        [str(value.type) for value in schema.returns]
        for schema in schemas(name)
        if schema.arguments and str(schema.arguments[0].type) in ("Tensor", "List[Tensor]")
    ]
    return bool(given) and all(types == ["Tensor"] for types in given)
