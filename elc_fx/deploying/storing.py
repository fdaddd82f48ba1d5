"""A compiled network as one file, that is read without running anything that is in it.

The file is a safetensors file: weights, and beside them the graph, the layers, the report and versions as JSON. A graph
is stored as the names of operators and layers of torch, and only what is in the tables here is looked up by name: so a
file can make a network that computes something else, but no code. Pickles (and torch.export's files, whose reader
unpickles tensors where the file asks it to) could.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib.metadata
import json
import keyword
import math
import operator
import pkgutil
import sys
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.nn.utils.parametrize import is_parametrized

from elc_fx.capturing import answers, capture
from elc_fx.capturing.graph import attribute_of, has_hooks, module_of, put_attribute
from elc_fx.capturing.identity import add_tensor
from elc_fx.compiled import REPORT, CompiledModule
from elc_fx.errors import InvalidInputError, StorageError
from elc_fx.files import write_whole
from elc_fx.report import Report

FORMAT = 2
KEY = "elc_fx"  # of the JSON in the file's metadata
PACKAGES = ("elc_fx", "torch", "safetensors")  # whose versions are noted
NAMESPACES = (torch, torch.functional, torch.nn.functional, torch.linalg, torch.fft, torch.special)
# What is asked of a tensor that is not a method.
OF_TENSORS = ("shape", "ndim", "dtype", "device", "layout", "T", "mT", "H", "mH", "real", "imag", "itemsize", "data")
ATTRIBUTES = frozenset((*OF_TENSORS, "values", "indices"))  # the last two are of what max, sort and topk return
# Functions and methods for tensors that torch does not list among those that may be overridden.
FURTHER = frozenset(
    ("arange", "eye", "full", "hardsigmoid", "hardswish", "linspace", "ones", "rand_like", "randn_like", "zeros")
)
FURTHER_METHODS = frozenset(("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "stride", "unflatten"))
# Methods that take functions, change what other tensors of the process are, or give a storage (which imports what
# its `type` is given the name of).
REFUSED_METHODS = frozenset(
    (
        *("apply_", "map_", "map2_", "backward", "register_hook", "register_post_accumulate_grad_hook"),
        *("set_", "module_load", "share_memory_", "pin_memory"),
        *("storage", "storage_type", "untyped_storage"),
    )
)
OWN: dict[str, Callable[..., Any]] = {
    "assign": capture.ASSIGN,
    "is_none": capture._is_none,
    "is_tensor": capture._is_tensor,
    "equals": capture._equals,
    **{function.__name__: function for function in (answers.HAS_PARTS, *answers.EXTREMES)},
}
CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def save(module: nn.Module, file: str | Path) -> None:
    """Writes what `compile` or `merge` returned, whole or not at all: graph, weights, plan, report, origins, versions.

    `elc_fx.load` reads it again, without the model's source.

    Raises:
        StorageError: a layer is of a class that is not torch.nn's, a function is not torch's, or the file cannot be
            written. Nothing is written then.
        InvalidInputError: the module was not returned by `compile` or `merge`.
    """
    file, content = Path(file), to_bytes(module)
    try:
        write_whole({file: content})
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}") from error


def to_bytes(module: nn.Module) -> bytes:
    """What `save` writes. Raises as that does."""
    if not isinstance(module, CompiledModule):
        if isinstance(getattr(module, REPORT, None), Report):
            raise StorageError(
                f"a {type(module).__name__} is more than a graph of layers, and cannot be saved without its code; use "
                "torch.save or torch.export (of a network in a backend, `save` takes what compile returns without one)"
            )
        raise InvalidInputError(f"this {type(module).__name__} was not returned by elc_fx.compile or elc_fx.merge")
    return _Writer(module).content()


@torch.inference_mode(False)  # what is made in that mode could not be trained
def load(file: str | Path) -> fx.GraphModule:
    """The network that `save` wrote, on the CPU, in eval mode. Nothing of the file is run or unpickled.

    Raises `StorageError` for a file that is missing, damaged, cut off, or asks for what is no operator of torch.
    """
    file = Path(file)
    if not file.is_file():
        raise StorageError(f"there is no file {file}")
    try:
        with safe_open(file, "pt") as stored:
            text = (stored.metadata() or {}).get(KEY)
            if text is None:
                raise StorageError(f"{file} holds weights, but no network that elc_fx saved")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no mapping)
        described = json.loads(text)
        if (found := described["format"]) != FORMAT:
            raise StorageError(f"{file} is of format {found}, this elc_fx reads {FORMAT}: {described.get('versions')}")
        digest = described.pop("digest")
        if digest != _digest(described, tensors):
            raise StorageError(f"{file} is damaged: its content is not what was written")
        return _Reader(described, tensors).network()
    except StorageError:
        raise
    except _UnknownError as error:
        raise StorageError(f"{file} was not written by elc_fx: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error}") from error
    except (
        *(SafetensorError, ArithmeticError, AttributeError, LookupError),
        *(RuntimeError, TypeError, ValueError, SyntaxError, MemoryError),  # the last two: nested too deeply
    ) as error:
        raise StorageError(f"{file} is no network that elc_fx saved, or it is damaged: {error}") from error


class _UnknownError(Exception):
    """A file names what is in no table."""


# What a name in a file may stand for.


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """The functions that a graph may call: torch's for tensors, Python's operators, and a few of elc_fx."""
    found: dict[str, Callable[..., Any]] = {"torch._assert": torch._assert, "builtins.getattr": builtins.getattr}
    found["collections.OrderedDict"] = OrderedDict
    overridable = torch.overrides.get_overridable_functions()
    for namespace in NAMESPACES:
        known = {id(function) for function in overridable[namespace]}
        named = {name: value for name, value in vars(namespace).items() if not name.startswith("_")}
        for name, value in named.items():
            base = name.removesuffix("_")  # relu_ is relu in place
            if id(value) in known or name in FURTHER or (base != name and id(named.get(base)) in known):
                found[f"{namespace.__name__}.{name}"] = value
    names = {"abs", *fx.graph.magic_methods, *fx.graph.inplace_methods, *fx.graph.reflectable_magic_methods}
    for name in sorted(name for name in names if hasattr(operator, name)):
        found[f"operator.{name}"] = getattr(operator, name)
    for name in ("floor", "ceil", "trunc", "sqrt", "prod", "gcd"):
        found[f"math.{name}"] = getattr(math, name)
    return {**found, **{f"elc_fx.{name}": function for name, function in OWN.items()}}


@functools.cache
def methods() -> frozenset[str]:
    """The methods of tensors that a graph may call."""
    names = {getattr(method, "__name__", "") for method in torch.overrides.get_overridable_functions()[Tensor]}
    return FURTHER_METHODS | {n for n in names if n and not n.startswith("_") and n not in REFUSED_METHODS}


@functools.cache
def classes() -> dict[str, type[nn.Module]]:
    """The layers of torch.nn."""
    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(nn.modules.__path__, "torch.nn.modules."):
        here = [v for v in vars(sys.modules.get(info.name, nn)).values() if isinstance(v, type)]
        found.update({c.__name__: c for c in here if issubclass(c, nn.Module) and c.__module__ == info.name})
    return found


@functools.cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(functions().items())}


class _Writer:
    """Describes one network. Raises StorageError."""

    def __init__(self, module: CompiledModule) -> None:
        self.module = module
        self.tensors: dict[str, Tensor] = {}
        self.described: dict[str, Any] = {}  # tensors by name
        self.known: dict[int, str] = {}  # the name of a tensor, by identity

    def content(self) -> bytes:
        if type(self.module.graph._codegen) is not CodeGen:
            raise StorageError("its graph takes its arguments in a way of its own; compile it with elc_fx.compile")
        if has_hooks(self.module):
            raise StorageError("the network itself has hooks, which cannot be stored; remove them")
        report = getattr(self.module, REPORT)
        described = {
            "format": FORMAT,
            "versions": {name: _version(name) for name in PACKAGES},
            "name": type(self.module).__name__,
            "nodes": [self._node(node) for node in self.module.graph.nodes],
            "modules": self._modules(),
            "attributes": self._attributes(),
            "transient": sorted(set(self._transient())),
            "tensors": self.described,
            "report": None if report is None else report.to_dict(),
        }
        stored = {name: _in_order(tensor.detach().cpu()) for name, tensor in self.tensors.items()}
        described = json.loads(json.dumps(described))  # tuples as lists, as the digest will find them
        described["digest"] = _digest(described, stored)
        try:
            _Reader(described, stored).network()  # what could not be read is not written
            return to_safetensors(stored, {KEY: json.dumps(described)})
        except _UnknownError as error:
            raise StorageError(f"it cannot be stored: {error}, which could not be read again") from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"its weights cannot be stored: {error}") from error

    def _node(self, node: fx.Node) -> dict[str, Any]:
        target = node.target
        if node.op == "call_function":
            if id(target) not in _names():
                raise StorageError(
                    f"`{node.name}` calls {_home(target)}, which is none of torch's operators that can be stored; only "
                    "its code could say what it computes, so use torch.export or torch.save"
                )
            target = _names()[id(target)]
        elif node.op == "call_method" and target not in methods():
            raise StorageError(f"`{node.name}` calls the method `{target}`, which is no operator of torch")
        described: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
        described["args"] = _encoded(node.args, node.name)
        described["kwargs"] = {name: _encoded(value, node.name) for name, value in node.kwargs.items()}
        if node.meta.get("is_wrapped"):
            described["wrapped"] = True
        return described

    def _modules(self) -> dict[str, Any]:
        described: dict[str, Any] = {}
        paths: dict[int, str] = {}
        for node in self.module.graph.find_nodes(op="call_module"):
            path, module = str(node.target), module_of(self.module, node)
            if path not in described:
                shared = paths.setdefault(id(module), path)
                described[path] = self._layer(module, path) if shared == path else {"same": shared}
        return described

    def _layer(self, module: nn.Module, path: str) -> dict[str, Any]:
        cls = type(module)
        if is_parametrized(module):
            raise StorageError(
                f"`{path}` has parametrizations, whose code cannot be stored; call "
                "torch.nn.utils.parametrize.remove_parametrizations before compiling"
            )
        if classes().get(cls.__name__) is not cls:
            raise StorageError(
                f"`{path}` is a {_home(cls)}, whose code cannot be stored; use torch.export or torch.save, or make it "
                "traceable (see `opaque` of elc_fx.report_of)"
            )
        if has_hooks(module):
            raise StorageError(f"`{path}` has hooks, which cannot be stored; remove them before compiling")
        own, names = vars(nn.Module()), {id(p): name for name, p in module._parameters.items()}
        state: dict[str, Any] = getattr(module, "__getstate__", lambda: vars(module))()  # without what is made again
        own |= {"__overloads__": None}  # which torch.jit.script leaves on what it has seen
        plain = {name: _encoded(value, path, names) for name, value in state.items() if name not in own}
        return {
            "class": cls.__name__,
            "training": module.training and not self.module.training,  # `load` gives a network in eval mode
            "plain": plain,
            "parameters": {n: self._tensor(p, f"{path}.{n}") for n, p in module._parameters.items()},
            "buffers": {n: self._tensor(b, f"{path}.{n}") for n, b in module._buffers.items()},
            "transient": sorted(module._non_persistent_buffers_set),
            "modules": {n: None if m is None else self._layer(m, f"{path}.{n}") for n, m in module._modules.items()},
        }

    def _attributes(self) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for node in self.module.graph.find_nodes(op="get_attr"):
            value = attribute_of(self.module, node)
            if not isinstance(value, Tensor):
                raise StorageError(f"`{node.target}` is a {type(value).__name__}, expected a tensor")
            described[str(node.target)] = self._tensor(value, str(node.target))
        return described

    def _transient(self) -> Iterator[str]:
        """The buffers among the attributes that are left out of the state dict."""
        for node in self.module.graph.find_nodes(op="get_attr"):
            holder, _, name = str(node.target).rpartition(".")
            if name in self.module.get_submodule(holder)._non_persistent_buffers_set:
                yield str(node.target)

    def _tensor(self, tensor: Tensor | None, path: str) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in self.known:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout is not torch.strided:
                raise StorageError(f"`{path}` is a {type(tensor).__name__} on {tensor.device}, not a plain tensor")
            self.known[id(tensor)] = path
            self.tensors[path] = tensor
            self.described[path] = {
                "parameter": isinstance(tensor, nn.Parameter),
                "requires_grad": tensor.requires_grad,
                "order": _order(tensor),
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
            }
        return self.known[id(tensor)]


class _Reader:
    """Makes the network that a file describes. Raises _UnknownError for what is in no table."""

    def __init__(self, described: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.described = described
        self.tensors = {name: self._restored(name, tensor) for name, tensor in tensors.items()}

    def network(self) -> fx.GraphModule:
        root, layers, read = nn.Module(), dict[str, nn.Module](), dict[str, nn.Module | Tensor]()
        for path, description in self.described["modules"].items():
            shared = description.get("same")
            layers[path] = layers[shared] if shared is not None else self._layer(description)
            _put(root, path, layers[path])
        for path, name in self.described["attributes"].items():
            read[path] = self.tensors[name]
            if not _has(root, path):
                _put(root, path, read[path])
        read.update(layers)
        _check(root, read)
        graph, nodes = fx.Graph(), dict[str, fx.Node]()
        for description in self.described["nodes"]:
            node = self._node(graph, description, nodes)
            if node.op in ("get_attr", "call_module") and node.target not in read:
                raise _UnknownError(f"it reads {node.target!r:.80}, which is no layer and no tensor of it")
            nodes[description["name"]] = node
        graph.lint()
        result = CompiledModule(root, graph, _identifier(self.described["name"]))
        _check(result, read)
        for path in self.described.get("transient", ()):  # which files of before do not tell
            holder, _, name = str(path).rpartition(".")
            if path not in read or name not in (home := result.get_submodule(holder))._buffers:
                raise _UnknownError(f"it has no buffer {path!r:.80}")
            home._non_persistent_buffers_set.add(name)
        for module in result.modules():
            if type(module) is nn.Module or module is result:
                module.training = False
        report = self.described["report"]
        setattr(result, REPORT, None if report is None else Report.from_dict(report))
        return result

    def _restored(self, name: str, stored: Tensor) -> Tensor:
        described = self.described["tensors"][name]
        order = described["order"]
        shape = [stored.shape[i] for i in _inverse(order)]
        value = torch.empty_permuted(shape, order, dtype=stored.dtype, device=stored.device)
        value.permute(order).copy_(stored)
        if described["parameter"]:
            return nn.Parameter(value, bool(described["requires_grad"]))
        return value.requires_grad_(bool(described["requires_grad"]))

    def _layer(self, described: Mapping[str, Any]) -> nn.Module:
        if described["class"] not in classes():
            raise _UnknownError(f"it has a layer of class {described['class']!r:.80}, and torch.nn has none")
        cls = classes()[described["class"]]
        module, state = cls.__new__(cls), vars(nn.Module())
        parameters = {n: self._optional(t) for n, t in described["parameters"].items()}
        for name, value in described["plain"].items():
            if name in state or name.startswith("__") or callable(getattr(cls, _identifier(name), None)):
                raise _UnknownError(f"a layer has an attribute {name!r:.80}")
            state[name] = _decoded(value, {}, parameters)
        state["training"] = bool(described["training"])
        state["_parameters"] = parameters
        state["_buffers"] = {n: self._optional(t) for n, t in described["buffers"].items()}
        state["_non_persistent_buffers_set"] = {str(name) for name in described["transient"]}
        state["_modules"] = {n: None if d is None else self._layer(d) for n, d in described["modules"].items()}
        for name in (*state["_parameters"], *state["_buffers"], *state["_modules"]):
            _path_part(name)
        module.__setstate__(state)  # which adds what later releases of torch expect
        return module

    def _optional(self, name: str | None) -> Tensor | None:
        return None if name is None else self.tensors[name]

    def _node(self, graph: fx.Graph, described: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> fx.Node:
        """What is written into the code of a graph as it stands has to be a name, and nothing but a name."""
        op, target = described["op"], described["target"]
        args = _decoded(described["args"], nodes)
        kwargs = {_identifier(name): _decoded(value, nodes) for name, value in described["kwargs"].items()}
        if op == "placeholder":
            _identifier(target)
        elif op == "call_method":
            if target not in methods():
                raise _UnknownError(f"it calls the method {target!r:.80}, and torch has no such operator")
        elif op == "call_function":
            if target not in functions():
                raise _UnknownError(f"it calls {target!r:.80}, and torch has no such operator")
            target = functions()[target]
            if target is getattr and (len(args) != 2 or args[1] not in ATTRIBUTES or kwargs):
                raise _UnknownError(f"it asks for the attribute {args[1:]!r:.80}")
        elif op not in ("get_attr", "call_module", "output"):
            raise _UnknownError(f"it has a node that is a {op!r:.80}")
        if not isinstance(args, tuple):
            raise _UnknownError("it has a node whose arguments are no tuple")
        node = graph.create_node(op, target, args, kwargs, _identifier(described["name"]))
        if described.get("wrapped") is True:
            node.meta["is_wrapped"] = True
        return node


# Values: what JSON has no word for is an object of one key, which says what it is.


def _encoded(value: Any, where: str, parameters: Mapping[int, str] = MappingProxyType({})) -> Any:
    """parameters: those of the layer that the value is of, by identity."""

    def encoded(item: Any) -> Any:
        return _encoded(item, where, parameters)

    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encoded(item) for item in value]}
    if isinstance(value, list):
        return {"list": [encoded(item) for item in value]}
    if isinstance(value, dict) and type(value) is not OrderedDict:
        return {"dict": [[encoded(key), encoded(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encoded(item) for item in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": None}
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if id(value) in parameters:
        return {"parameter": parameters[id(value)]}
    if callable(value) and id(value) in _names():  # the activation of a layer
        return {"function": _names()[id(value)]}
    raise StorageError(
        f"`{where}` has a {_home(type(value))} among its arguments or attributes, which cannot be stored; use "
        "torch.export or torch.save"
    )


def _decoded(value: Any, nodes: Mapping[str, fx.Node], parameters: Mapping[str, Any] | None = None) -> Any:
    """parameters: those of the layer that the value is of; None where it is an argument."""

    def decoded(item: Any) -> Any:
        return _decoded(item, nodes, parameters)

    if not isinstance(value, dict):
        if value is not None and type(value) not in (bool, int, float, str):
            raise _UnknownError(f"it has a value {value!r:.80}")
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind in ("tuple", "list", "slice"):
        items = [decoded(item) for item in content]
        return slice(*items) if kind == "slice" else tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {decoded(key): decoded(item) for key, item in content}
    if kind == "ellipsis":
        return ...
    if kind == "complex":
        return complex(*content)
    if kind == "device":
        return torch.device(content)
    if kind == "parameter" and parameters is not None:
        return parameters[content]
    if kind == "function" and parameters is not None and content in functions():
        return functions()[content]
    if kind in CONSTANTS and isinstance(found := getattr(torch, content, None), CONSTANTS[kind]):
        return found
    raise _UnknownError(f"it has a value of kind {kind!r:.80}")


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or not _is_as_python_reads(name):
        raise _UnknownError(f"it has a name {name!r:.80}")
    return name


def _is_as_python_reads(name: str) -> bool:
    """Python normalises what is written in code: another name would be looked up than the one that was checked."""
    return unicodedata.normalize("NFKC", name) == name


def _path_part(name: str) -> str:
    """A name, or one that begins with a digit, as those of layers in a list do, or has hyphens or spaces."""
    plain = isinstance(name, str) and f"_{name}".replace("-", "_").replace(" ", "_").isidentifier()
    return name if plain and name and _is_as_python_reads(name) else _identifier(name)


def _put(root: nn.Module, path: str, value: Any) -> None:
    for part in path.split("."):
        _path_part(part)
    put_attribute(root, path, value)


def _has(root: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(root)
    except AttributeError:
        return False
    return True


def _check(root: nn.Module, read: Mapping[str, nn.Module | Tensor]) -> None:
    """Attributes of a class go before layers and tensors: a path through one would reach code."""
    for path, value in read.items():
        if operator.attrgetter(path)(root) is not value:
            raise _UnknownError(f"it has a layer or a tensor {path!r:.80}, which is something else")


def _order(tensor: Tensor) -> list[int]:
    """The axes from the outermost to the innermost in memory, such as those of channels last.

    Those of size 1 are innermost among axes of one stride: so they have it again when they are read.
    """
    order = sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride()[axis], tensor.shape[axis] == 1, axis))
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


def _in_order(tensor: Tensor) -> Tensor:
    """In memory as it is, with the axes in the order of memory; safetensors stores nothing else."""
    return tensor.permute(_order(tensor)).contiguous()


def _inverse(order: list[int]) -> list[int]:
    if sorted(order) != list(range(len(order))):
        raise _UnknownError(f"it has axes {order!r:.80}")
    return sorted(range(len(order)), key=lambda axis: order[axis])


def _digest(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of everything in the file."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        add_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def _home(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
