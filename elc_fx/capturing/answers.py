"""Answers: what `isinstance` says of a stand-in whose value is known to be a tensor.

A stand-in is of its own class, so `isinstance(x, list)` in the traced code must not look at it. Where the value is a
tensor for sure, a tensor is asked in its place. That is done in the files whose code asks, and only there: in torch's
own, written in C, what seems to be a tensor is taken for one.
"""

from __future__ import annotations

import abc
import builtins
import functools
import types
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from elc_fx.capturing.graph import function_name, has_unknown_hooks, is_leaf, is_torchs, module_of, schemas

UNKNOWN = object()
EXAMPLE = torch.empty(0)
FIXED = ("data", "device", "dtype", "layout", "ndim", "shape")  # attributes that are of one type, of any tensor
# How classes decide what is of them: by its class alone. Those of others may look at the value.
BY_CLASS = (type, abc.ABCMeta, type(Tensor), type(nn.Parameter), type(nn.Buffer))
CONVERSIONS = ("bfloat16", "bool", "cpu", "cuda", "double", "float", "half", "int", "long")  # methods of tensors alone
GIVE_OTHERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.AdaptiveLogSoftmaxWithLoss)


class Answers:
    """While active. namespaces: the globals of the files that ask. example_of: something of the type of a value."""

    def __init__(self, namespaces: Sequence[dict[str, Any]], example_of: Callable[[Any], Any]) -> None:
        self.namespaces = namespaces
        self.example_of = example_of

    def __enter__(self) -> None:
        for namespace in self.namespaces:
            namespace["isinstance"] = self._answer

    def __exit__(self, *_: object) -> None:
        for namespace in self.namespaces:
            namespace.pop("isinstance", None)
        self.example_of = lambda _: UNKNOWN  # for files that imported it from there meanwhile

    def _answer(self, value: Any, classes: Any) -> bool:
        if issubclass(type(value), fx.Proxy):
            example = self.example_of(value)
            if example is not UNKNOWN and all(_tells(cls, example) for cls in _classes(classes)):
                return builtins.isinstance(example, classes)
        return builtins.isinstance(value, classes)


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
        numbers = all(is_tensor(value) or isinstance(value, int | float | complex) for value in (first, *others))
        return is_tensor(first) if name == "getitem" else numbers and any(map(is_tensor, (first, *others)))
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


@functools.cache
def _maps_to_tensor(name: str) -> bool:
    """Whether operators of that name give one tensor wherever they take a tensor, or a list of them, first."""
    given = [
        [str(value.type) for value in schema.returns]
        for schema in schemas(name)
        if schema.arguments and str(schema.arguments[0].type) in ("Tensor", "List[Tensor]")
    ]
    return bool(given) and all(types == ["Tensor"] for types in given)
