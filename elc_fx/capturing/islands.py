"""Modules that cannot be traced: what of them can be compiled all the same.

A child of such a module may be replaced by its compiled form only if all its parent does with it is to call it. That
is read off the source of the parent's class; where the source is not clear, the child stays as it is.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elc_fx.capturing.graph import has_hooks, is_leaf
from elc_fx.errors import Refusal

# What hands out children by other ways than their name.
REFLECTION = frozenset(
    (
        "children",
        "named_children",
        "modules",
        "named_modules",
        "_modules",
        "__dict__",
        "parameters",
        "named_parameters",
        "get_submodule",
        "get_parameter",
        "state_dict",
        "apply",
        "items",
        "values",
        "keys",
        "__getattr__",
        "__iter__",
    )
)
# What sets weights up.
SETUP = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "_")
    for name in ("init_weights", "initialize_weights", "init_parameters", "reset_parameters", "reset_weights")
)

_WITHOUT_MODULES = (str, bytes, int, float, torch.Tensor, type, types.ModuleType, types.FunctionType, types.CodeType)


def replaceable_children(module: nn.Module) -> tuple[dict[str, nn.Module], list[Refusal]]:
    """The children, and children of child lists, that may be replaced by another callable; why others may not.

    By path from the module. Layers of torch's own stay as they are; of what has no parameters it is not said why.
    """
    found, refusals = dict[str, nn.Module](), list[Refusal]()
    if reason := _reason_for_all(module):
        if any(not is_leaf(child) and _has_parameters(child) for child in module.children()):
            refusals.append(Refusal("", f"its children stay as they are: {reason}"))
        return found, refusals
    for path, child, called in _children(module):
        if is_leaf(child):
            continue
        reason = _reason_for(child) if called else _not_shown(module, "that it is only called")
        if reason is None:
            found[path] = child
        elif _has_parameters(child):
            refusals.append(Refusal(path, reason))
    return found, refusals


def modules_held(model: nn.Module) -> Iterator[nn.Module]:
    """Those that other attributes of modules hold, besides children: in containers of Python's, and in objects.

    No code of theirs is run for that.
    """
    own = ("_parameters", "_buffers", "_modules")
    pending = [value for module in model.modules() for name, value in vars(module).items() if name not in own]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        kind = type(value)
        if id(value) in seen or issubclass(kind, _WITHOUT_MODULES):
            continue
        seen.add(id(value))
        if issubclass(kind, nn.Module):
            yield value
        elif issubclass(kind, dict):
            pending.extend(dict.values(value))
        elif builtin := next((each for each in (list, tuple, set, frozenset, deque) if issubclass(kind, each)), None):
            pending.extend(builtin.__iter__(value))
        elif kind is types.MethodType:
            pending.append(value.__self__)
        elif issubclass(kind, functools.partial):
            pending.extend((value.func, value.args, value.keywords))
        else:
            pending.extend(_attributes(value).values())


def _attributes(value: Any) -> dict[str, Any]:
    """What an object keeps, but for slots."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return attributes if type(attributes) is dict else {}


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Path, child, and whether the module does no more than call it; of a list the elements, if that is so of them."""
    uses = _uses_of_children(module) or {}
    for name, child in module.named_children():
        if type(child) is nn.ModuleList and uses.get(name) == "elements called":
            yield from ((f"{name}.{i}", element, True) for i, element in child.named_children())
        else:
            yield name, child, uses.get(name) == "called"


def _uses_of_children(module: nn.Module) -> dict[str, str] | None:
    """As `called_only` of its class."""
    cls: Any = type(module)
    return dict.fromkeys(module._modules, "called") if cls.forward is nn.Sequential.forward else called_only(cls)


def _not_shown(module: nn.Module, what: str) -> str:
    return f"the source of `{type(module).__name__}` does not show {what}"


def _has_parameters(child: nn.Module) -> bool:
    return any(True for _ in child.parameters())


def _reason_for_all(module: nn.Module) -> str | None:
    """Why no child of the module may be replaced."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if has_hooks(module):
        return "it has hooks, which may read them"
    if "forward" in vars(module):
        return "it has a `forward` of its own, whose source is not that of its class"
    if _has_code_from_outside(module):
        return f"code that may read them is not in the source of `{type(module).__name__}`"
    return _not_shown(module, "what becomes of them") if _uses_of_children(module) is None else None


def _reason_for(child: nn.Module) -> str | None:
    if isinstance(child, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        return f"it is a `{type(child).__name__}`"
    return "it has hooks" if has_hooks(child) else None


def _has_code_from_outside(module: nn.Module) -> bool:
    """Whether methods of it, or functions that hold modules among its attributes, are not in its class's source."""
    sources = [_source_of(cls) for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    values = [value for cls in type(module).__mro__ if cls is not nn.Module for value in vars(cls).values()]
    methods = [_code_of(value) for value in values if not isinstance(value, staticmethod)]  # which is not given it
    own = [_code_of(value) for value in vars(module).values() if _holds_modules(value)]
    # What dataclasses and the like make has no file.
    foreign = [code for code in (*methods, *own) if code is not None and not code.co_filename.startswith("<string")]
    return not all(any(source is not None and source.has(code) for source in sources) for code in foreign)


def _holds_modules(value: Any) -> bool:
    """Whether a function is bound to modules, which are copied along; what a closure reaches is not."""
    held: list[Any] = []
    if isinstance(value, types.MethodType):
        held = [value.__self__]
    elif isinstance(value, functools.partial):
        held = [*value.args, *value.keywords.values(), value.func]
    return any(isinstance(item, nn.Module) or _holds_modules(item) for item in held)


def _code_of(value: Any) -> types.CodeType | None:
    for wrapper in ("__func__", "fget", "func"):  # of methods, properties, partials and cached properties
        value = getattr(value, wrapper, value)
    code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
    return code if isinstance(code, types.CodeType) else None


@dataclass(frozen=True)
class _Source:
    """Where a class is written, and what."""

    file: str
    lines: range
    text: str

    def has(self, code: types.CodeType) -> bool:
        return code.co_firstlineno in self.lines and Path(code.co_filename).name == Path(self.file).name


@functools.cache
def _source_of(cls: type) -> _Source | None:
    try:
        lines, first = inspect.getsourcelines(cls)
        return _Source(inspect.getfile(cls), range(first, first + len(lines)), "".join(lines))
    except (OSError, TypeError):
        return None


@functools.cache
def _definition(cls: type) -> ast.AST | None:
    source = _source_of(cls)
    try:
        tree = ast.parse(textwrap.dedent("" if source is None else source.text))
    except SyntaxError:
        return None
    return tree.body[0] if tree.body else None


@functools.cache
def called_only(cls: Any) -> dict[str, str] | None:
    """Attributes of `self` that the class's methods only call ("called"), or whose elements they only call.

    None where the source is missing, or uses `self` in ways that say nothing about its children.
    """
    uses: dict[str, set[str]] = {}
    ignored = _setup_alone(cls)
    for owner in cls.__mro__:
        if owner in (nn.Module, object) or owner.__module__.startswith("typing"):
            continue
        if owner.__module__.startswith("torch.nn."):
            return None
        if (definition := _definition(owner)) is None:
            return None
        for method, me, code in _code_with_self(definition):
            if method not in ignored:
                for name, use in _uses_of(me, code):
                    uses.setdefault(name, set()).add(use)
    if "*" in uses or REFLECTION & set(uses):
        return None
    return {name: next(iter(kinds)) for name, kinds in uses.items() if len(kinds) == 1 and kinds != {"other"}}


def _setup_alone(cls: Any) -> set[str]:
    """Methods that set weights up when a module is made, and that its classes do not name elsewhere.

    They may go through its children: a call of the module does not run them.
    """
    named, called = Counter[str](), Counter[str]()
    for owner in cls.__mro__:
        if owner not in (nn.Module, object) and (definition := _definition(owner)) is not None:
            named.update(map(_name_of, ast.walk(definition)))
            for function in _functions(definition):
                if function.name in SETUP or function.name == "__init__":
                    called.update(_name_of(node.func) for node in _run_at_once(function) if isinstance(node, ast.Call))
    return {name for name in SETUP if named[name] == called[name]}


def _name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _run_at_once(code: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, but not in functions inside of it."""
    for node in ast.iter_child_nodes(code):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from _run_at_once(node)


def _code_with_self(definition: ast.AST) -> Iterator[tuple[str, str, ast.AST]]:
    """The methods of a class: name, what `self` is called there, and code; of `__init__`, what may run after it."""
    for function in _functions(definition):
        static = any(isinstance(by, ast.Name) and by.id == "staticmethod" for by in function.decorator_list)
        if static or not function.args.args:
            continue
        inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        for code in inner[1:] if function.name == "__init__" else inner[:1]:
            yield function.name, function.args.args[0].arg, code


def _functions(definition: ast.AST) -> Iterator[ast.FunctionDef]:
    """Those of a class itself, not those inside of them."""
    for node in ast.iter_child_nodes(definition):
        if isinstance(node, ast.FunctionDef):
            yield node
        elif not isinstance(node, ast.ClassDef | ast.Lambda):
            yield from _functions(node)


def _uses_of(me: str, code: ast.AST) -> Iterator[tuple[str, str]]:
    """(attribute, how it is used) for each `self.attribute` in code; ("*", …) where self itself is handed on."""
    parents = {child: parent for parent in ast.walk(code) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(code):
        if not (isinstance(node, ast.Name) and node.id == me):
            continue
        parent = parents[node]
        if isinstance(parent, ast.Attribute):
            yield parent.attr, _use(parent, parents, code)
        elif not _is_super(parent):
            yield "*", "other"


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _use(attribute: ast.Attribute, parents: dict[ast.AST, ast.AST], code: ast.AST) -> str:
    parent = parents[attribute]
    if isinstance(parent, ast.Call) and parent.func is attribute:
        return "called"
    if isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops):
        return "called"  # `self.downsample is not None` stays true
    if isinstance(parent, ast.Subscript) and parent.value is attribute:
        grandparent = parents[parent]
        return "elements called" if isinstance(grandparent, ast.Call) and grandparent.func is parent else "other"
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "len":
        return "elements called"
    if (element := _loop_variable(attribute, parent, parents)) is not None:
        return "elements called" if _only_called(element, code, parents) else "other"
    return "other"


def _loop_variable(attribute: ast.Attribute, parent: ast.AST, parents: dict[ast.AST, ast.AST]) -> str | None:
    """The variable of `for v in self.attribute` or `for i, v in enumerate(self.attribute)`."""
    if isinstance(parent, ast.For) and parent.iter is attribute and isinstance(parent.target, ast.Name):
        return parent.target.id
    counted = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "enumerate"
    loop = parents.get(parent)
    if counted and isinstance(loop, ast.For) and loop.iter is parent and isinstance(loop.target, ast.Tuple):
        element = loop.target.elts[-1]
        return element.id if isinstance(element, ast.Name) else None
    return None


def _only_called(name: str, code: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    uses = [node for node in ast.walk(code) if isinstance(node, ast.Name) and node.id == name]
    loads = [node for node in uses if isinstance(node.ctx, ast.Load)]
    return all(isinstance(p := parents[node], ast.Call) and p.func is node for node in loads)
