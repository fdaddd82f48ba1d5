"""Capture: a module becomes a graph that computes the same, or the reason why it cannot.

Symbolic tracing runs `forward` on stand-ins for tensors, and so would silently record one side of a branch that asks
what a stand-in cannot answer: `isinstance(x, Tensor)`, `x is None`, a random number, a counter kept on the module. The
tracer here notices these questions. A module that asks one, or that cannot be traced at all, stays a single opaque
node; tracing goes on around it. The captured graph shares its modules with the caller's model and is only read.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import operator
import sys
import threading
import traceback
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy, TraceError

from elc_fx.capturing.answers import (
    EXAMPLE,
    EXTREMES,
    FIXED,
    HAS_PARTS,
    Answers,
    examples_of_size,
    gives_tensor,
    number_of_parts,
)
from elc_fx.capturing.attributes import Attributes
from elc_fx.capturing.graph import (
    DROPOUT_MODULES,
    IN_PLACE_OPERATORS,
    KNOWN_PACKAGES,
    VIEW_MODULES,
    calls_differently,
    function_name,
    has_hooks,
    has_unknown_hooks,
    is_drop_path,
    is_identity,
    is_leaf,
    may_be_view,
    module_of,
    overwrites_unseen,
    overwritten_argument,
    package_of,
    signature_of,
)
from elc_fx.capturing.questions import (
    Calls,
    Question,
    Watch,
    branches_on_training,
    may_ask,
    needed_truth,
    reads_training,
)
from elc_fx.capturing.randomness import alone, generators, randomness_of_the_caller
from elc_fx.capturing.rereading import Rereader
from elc_fx.capturing.tidying import (
    caller_of,
    give_input_by_position,
    make_batch_norms_modules,
    make_dropouts_modules,
    tidy,
)
from elc_fx.errors import CaptureError, Refusal, first_line, warn

TRUSTED = ("torch", "elc_fx")  # packages: fx itself asks its stand-ins for their type
PASSES_TYPE_ON = {  # for others
    *("abc", "typing", "functools", "collections.abc", "_py_abc", "torch.utils._pytree", "torch.nn.parameter"),
    "elc_fx.capturing.answers",
}
ASKS_FOR_USER = {"is_tensor", "typename"}  # functions of torch


@dataclass(frozen=True)
class Capture:
    """The graph of a model, sharing its modules, and the submodules that stayed opaque.

    inputs: the example of each placeholder, in order; None where none were given. eval_only: what does something else
    in training mode, of which a trainable graph has recorded what it does in eval mode.
    """

    graph_module: fx.GraphModule
    opaque: tuple[Refusal, ...]
    inputs: tuple[Any, ...] | None
    eval_only: tuple[Refusal, ...]

    def warn_of_eval_only(self) -> None:
        """Warns where the graph will do in training mode what the model does in eval mode only."""
        for refusal in self.eval_only:
            where = f"`{refusal.where}`: " if refusal.where else ""
            warn(f"{where}{refusal.reason}; the network to train does in training, too, what that does in eval mode")


class _UntruthfulError(Exception):
    """A traced value was asked what only the real value knows."""


def capture(
    model: nn.Module,
    given: Mapping[str, Any] | None = None,
    *,
    bind_defaults: bool = True,
    trainable: bool = False,
    leaves: tuple[type[nn.Module], ...] = (),
) -> Capture:
    """The graph of `model`, which is in eval mode.

    given: example arguments by parameter name of `forward`; they decide which of its arguments are inputs. Others are
    bound to their defaults (a call with anything else is then an error), or, without `bind_defaults`, stay inputs that
    nothing is known about. trainable: dropout and drop path stay, as modules that follow `train()`. leaves: classes of
    modules that stay whole. Raises `CaptureError`.
    """
    refused: dict[nn.Module, Refusal] = {}
    root = model
    if (is_leaf(model) and not has_hooks(model)) or calls_differently(model):  # it needs somebody to call it
        root = nn.Sequential(model)
        root.training = model.training
        given = _for_sequential(given)
    for name, module in root.named_modules():
        if reason := _cannot_be_entered(module):
            refused[module] = Refusal(name, reason)
    if root in refused:
        raise CaptureError(refused[root].reason)
    cannot_be_entered, calls = dict(refused), None
    askers: dict[int, dict[str, Any]] = {}  # the globals of code that asks, by identity
    with alone(), randomness_of_the_caller():  # torch.fx changes `nn.Module` itself, for all threads
        while True:
            tracer = _Tracer(refused, given, bind_defaults, leaves, trainable, calls)
            before, state = Attributes(root), tracer.state()
            watch = Watch(tracer.note_question) if any(may_ask(m) for m in root.modules()) else nullcontext()
            try:
                with torch.no_grad(), watch, _no_question_of_grad_mode(tracer.threads):
                    with calls or nullcontext(), Answers(askers.values(), tracer.examples_of):
                        graph = tracer.trace(root)
                    tracer.check_truthful(state)
            except Exception as error:
                # Whatever user code raises when it meets a stand-in for a tensor means the same: it cannot be traced.
                if not tracer.askers.keys() - askers:
                    raise CaptureError(_reason(error)) from error
            finally:
                changed = before.restore()
            if tracer.askers.keys() - askers:
                # Again, with answers where the type is known, and, twice as slowly, knowing whether torch is who asks.
                refused, calls = dict(cannot_be_entered), calls or Calls()
                askers |= tracer.askers
                continue
            if all(module in refused for _, module in changed):
                break
            for name, module in changed:
                if module is root:
                    raise CaptureError("its forward changes attributes of the module")
                refused[module] = Refusal(name, "its forward changes attributes of the module")
    if unwritable := [name for name in map(str, _paths(graph)) if not all(map(_is_writable, name.split(".")))]:
        raise CaptureError(f"torch.fx cannot write code that reads {unwritable[0]!r}, for its name")
    if taken := {str(path).partition(".")[0] for path in _paths(graph)} & _names_of_graph_modules():
        raise CaptureError(f"what it has as `{min(taken)}` would be in the place of what torch.fx keeps by that name")
    tracer.require_tensors()
    graph._tracer_cls = Rereader  # which unpickles the result
    try:
        captured = fx.GraphModule(_with_constants(root, tracer.constants), graph, type(model).__name__)
    except KeyError as error:  # a tensor that is called as a method of modules is
        raise CaptureError(f"torch.fx cannot keep a tensor by the name that it has: {error}") from error
    except (SyntaxError, NameError) as error:
        written = "a default of its `forward`, or a constant in it, is nothing that torch.fx can write as code"
        raise CaptureError(f"{written}: {first_line(error)}") from error
    _mark_eval(captured, root)
    give_input_by_position(captured)
    follow: set[nn.Module] = set()  # that do in training what they do in training, whatever was recorded
    if trainable:
        make_dropouts_modules(captured)
        follow = make_batch_norms_modules(captured, root)
    tidy(captured, kept=DROPOUT_MODULES if trainable else ())
    opaque = tuple(refusal for module, refusal in refused.items() if tracer.used(module))
    entered = [(name, m) for name, m in root.named_modules() if m is root or tracer.entered(m)] if trainable else []
    eval_only = [
        Refusal(name, f"`{type(module).__name__}.{method}` branches on self.training")
        for name, module in entered
        if module not in follow and (method := branches_on_training(module))
    ]
    for node in captured.graph.nodes if trainable else ():
        fixed = function_name(node) == "batch_norm" and signature_of(node).get("training", False) is False
        if fixed and reads_training(module := root.get_submodule(caller_of(node))):
            reason = f"it normalises with fixed statistics, where `{type(module).__name__}` reads self.training"
            eval_only.append(Refusal(node.name, reason))
    return Capture(captured, opaque, None if given is None else tuple(tracer.examples.values()), tuple(eval_only))


def _paths(graph: fx.Graph) -> Iterator[Any]:
    """Of the modules that a graph calls and the attributes that it reads."""
    yield from (node.target for node in graph.nodes if node.op in ("call_module", "get_attr"))


@functools.cache
def _names_of_graph_modules() -> set[str]:
    """The attributes of a `GraphModule` that a module has not, and those that elc_fx adds."""
    return set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - set(dir(nn.Module())) | {"elc_fx_report", "elc_fx_plan"}


@functools.cache
def _is_writable(name: str) -> bool:
    """Whether the code that torch.fx writes for an attribute reads that attribute: it escapes nothing."""
    try:
        if name.isidentifier():
            read: Any = ast.parse(f"self.{name}", mode="eval").body
            return read.attr == name  # Python normalises it
        return ast.literal_eval(f'"{name}"') == name
    except (SyntaxError, ValueError):  # of Unicode, too
        return False


def _for_sequential(given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The example arguments of a module by the name that `nn.Sequential` has for them."""
    if given is None:
        return None
    if len(given) != 1:
        raise CaptureError("a class of it has a `__call__` of its own, and it takes more than one argument")
    return {"input": next(iter(given.values()))}


def _cannot_be_entered(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if has_unknown_hooks(module):
        return "it has hooks"
    keeps = isinstance(module, DROPOUT_MODULES) or any(True for _ in module.buffers(recurse=False))
    return "it is in training mode" if module.training and (keeps or not is_leaf(module)) else None


def _autocast_state() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


@contextmanager
def _no_question_of_grad_mode(threads: set[int]) -> Iterator[None]:
    """While tracing, `torch.is_grad_enabled()` has no answer for the model: the graph runs in either mode.

    threads: those that trace.
    """
    original = torch.is_grad_enabled

    def answer() -> bool:
        if threading.get_ident() not in threads:
            return original()
        asker = sys._getframe(1)
        if not _is_trusted(asker):
            raise _UntruthfulError(f"`{asker.f_code.co_name}` asks whether gradients are enabled")
        return original()

    torch.is_grad_enabled = answer
    try:
        yield
    finally:
        torch.is_grad_enabled = original


class _Text(str):
    """How a stand-in looks, to be part of messages: what the text of the value would be is not known."""

    tracer: _Tracer

    def _asked(self, *_: object) -> NoReturn:
        self.tracer.refuse(f"`{_asker().f_code.co_name}` asks what the text of a traced value is")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __hash__ = _asked  # type: ignore[assignment]
    startswith = endswith = find = index = count = _asked  # type: ignore[assignment]


class _StandIn(fx.Proxy):
    """Does not let user code ask what tells values apart by other means than torch's operators, nor for its type."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """Not for code that is not torch's: it would not be that of the value."""
        frame = _asker()
        asker, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        on_behalf_of_user = function in ASKS_FOR_USER or asker in ("torch._jit_internal", "torch.jit")
        if _is_trusted(frame) and not on_behalf_of_user:
            return type(self)
        tracer = cast(_Tracer, self.tracer)
        if tracer.calls is not None and tracer.calls.torchs(frame):  # such as `torch.where(x > 0, x, 0.0)`
            return type(self)
        tracer.askers[id(frame.f_globals)] = frame.f_globals
        value: fx.Proxy = self
        while type(value) is _Attribute:
            value = value.root
        told = tracer.given is not None or not tracer.inputs_behind([value.node])
        way_out = "" if told else "; give example_inputs if it is always a tensor"
        raise _UntruthfulError(f"`{function}` asks for the type of a traced value{way_out}")

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)

    def __len__(self) -> int:
        count = cast(_Tracer, self.tracer).count(self)
        return super().__len__() if count is None else count

    def __hash__(self) -> int:
        asker = _asker()
        if not _is_trusted(asker):
            self.tracer.refuse(f"`{asker.f_code.co_name}` looks up a traced value in a set or a dict, or hashes it")  # type: ignore[attr-defined]
        return id(self)

    def __repr__(self) -> str:
        text = _Text(super().__repr__())
        text.tracer = cast(_Tracer, self.tracer)
        return text


def _is_trusted(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in TRUSTED


def _asker() -> types.FrameType:
    """Who called the caller of this, but for functions that pass questions on."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in PASSES_TYPE_ON:
        frame = frame.f_back
    return frame


class _Proxy(_StandIn):
    """A stand-in that records what is written into its value."""

    def __setattr__(self, name: str, value: Any) -> None:
        """x.data = value cannot be recorded."""
        if name in ("data", "real", "imag"):
            cast(_Tracer, self.tracer).refuse(f"it sets `{name}` of a traced value")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        """x[index] = value, recorded; from here on this name stands for the tensor after the assignment."""
        assigned = self.tracer.create_proxy("call_function", ASSIGN, (self, index, value), {})
        assigned.node.meta["is_wrapped"] = True
        self.node = assigned.node


class _Attribute(_StandIn, fx.proxy.Attribute):
    """An attribute of a stand-in, such as `x.data`."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """x += y changes the tensor x, which torch.fx records as x = x + y. A number it cannot change becomes a new one."""

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        target = getattr(operator, f"__{name[1:]}__" if _is_number(self.node) else name)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in IN_PLACE_OPERATORS:
    setattr(_StandIn, f"__{_name}__", _in_place(_name))


class _ParameterProxy(ParameterProxy, _Proxy):
    """The same for a parameter, whose shape is known."""


@fx.wrap
def assign(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value` as an expression: changes tensor, and returns it."""
    tensor[index] = value
    return tensor


ASSIGN = assign  # while fx traces, it puts its own wrapper in the place of the name `assign`


class _Tracer(fx.Tracer):
    """Symbolic tracing that falls back to an opaque node at the innermost module that cannot be traced truthfully."""

    def __init__(
        self,
        refused: dict[nn.Module, Refusal],
        given: Mapping[str, Any] | None,
        bind_defaults: bool,
        leaves: tuple[type[nn.Module], ...],
        trainable: bool,
        calls: Calls | None,
    ) -> None:
        super().__init__()
        self.threads = {threading.get_ident()}  # that trace; what others run meanwhile is none of the tracer's business
        self.calls = calls
        self.askers: dict[int, dict[str, Any]] = {}  # by identity: the globals of code that asked for a value's type
        self.leaves = leaves
        self.trainable = trainable
        self.refused = refused
        self.given = given
        self.bind_defaults = bind_defaults
        self.autocast = _autocast_state()
        self.examples: dict[fx.Node, Any] = {}  # of the placeholders, in order
        self.constants: dict[str, Tensor] = {}
        self.uncertain: set[fx.Node] = set()  # values that may be None when the graph runs
        self.tensors: set[fx.Node] = set()  # values that are tensors for sure, if inputs are that were in the examples
        self.sizes: dict[fx.Node, tuple[Any, ...]] = {}  # what is computed from their sizes: examples of its types
        self.told: list[fx.Node] = []  # those of which code was told so
        self.untruthful: str | None = None  # the last question that a traced value could not answer
        self._called: set[nn.Module] = set()
        self._parameters: dict[str, fx.Proxy] = {}
        self._frozen: dict[fx.Node, str] = {}  # what shares memory with tensors for which there are no stand-ins
        self._recorded: list[tuple[Tensor, int]] = []  # the constants, with their versions

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        """Path of every parameter, buffer and plain tensor attribute, by identity."""
        named: dict[int, str] = {}
        for prefix, module in self.root.named_modules():
            for attributes in (vars(module), module._buffers, module._parameters):
                for name, value in attributes.items():
                    if type(value) is not _Proxy and isinstance(value, Tensor):
                        named.setdefault(id(value), f"{prefix}.{name}".lstrip("."))
        return named

    def used(self, module: nn.Module) -> bool:
        return module in self._called

    def entered(self, module: nn.Module) -> bool:
        return self.used(module) and not self.is_leaf_module(module, "")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.trainable and is_drop_path(m):
            return True
        return m in self.refused or isinstance(m, self.leaves) or is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if self._may_be_none(node):
            self.uncertain.add(node)
        if (node.target is ASSIGN and node.args[0] in self.tensors) or gives_tensor(self.root, node, self.tensors):
            self.tensors.add(node)
        if examples := examples_of_size(node, self.tensors, self.sizes):
            self.sizes[node] = examples
        return _Proxy(node, self)

    def examples_of(self, value: Any) -> tuple[Any, ...]:
        """For `Answers`: something of each type that a stand-in's value may be of."""
        if type(value) is _ParameterProxy:
            return (value.param,)
        if type(value) is not _Attribute:
            found = (EXAMPLE,) if value.node in self.tensors else self.sizes.get(value.node, ())
            self.told.extend([value.node] if found else [])
            return found
        owner = next(iter(self.examples_of(value.root)), None)
        return (getattr(owner, value.attr),) if isinstance(owner, Tensor) and value.attr in FIXED else ()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if (thread := threading.get_ident()) not in self.threads:
            if not any(issubclass(type(value), fx.Proxy) for value in pytree.tree_leaves((args, kwargs))):
                return forward(*args, **kwargs)
            self.threads.add(thread)  # the traced code hands work to threads of its own
            try:
                return self.call_module(m, forward, args, kwargs)
            finally:
                self.threads.discard(thread)
        self._called.add(m)
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        last, stack = next(iter(reversed(self.graph.nodes)), None), dict(self.module_stack)
        state, told = self.state(), len(self.told)
        asked_outside, self.untruthful = self.untruthful, None
        try:
            result = super().call_module(m, forward, args, kwargs)
            self.check_truthful(state)
            self.untruthful = asked_outside
            return result
        except Exception as error:
            if calls_differently(m):  # what its `__call__` adds is recorded around it, and would be done twice
                raise
            self.untruthful = asked_outside
            self.module_stack.clear()
            self.module_stack.update(stack)
            self._forget_after(last)
            del self.told[told:]
            for constant, _ in self._recorded[state[1] :]:
                del self._names[id(constant)]
            del self._recorded[state[1] :]
            self.refused[m] = Refusal(self.path_of_module(m), _reason(error))
            return super().call_module(m, forward, args, kwargs)

    def note_question(self, function: str, question: Question, value: Any) -> None:
        """`function` asks something of `value` that a stand-in answers wrongly, or may."""
        what = "a value" if question.variable == "*" else f"`{question.variable}`"
        asked = list(_stand_ins(value))
        may_be_none = any(type(a) is _Proxy and a.node in self.uncertain for a in asked)
        if question.kind == "None" and may_be_none:
            self.untruthful = f"`{function}` asks whether {what} is None; give example_inputs if it never is"
        elif question.kind == "constant" and may_be_none:
            self.untruthful = (
                f"`{function}` asks whether {what} is a particular object; give example_inputs if it never is"
            )
        elif type(value) is _Attribute and question.kind in ("constant", "identity"):
            self.untruthful = f"`{function}` asks whether {what} is a particular object"
        elif type(value) in (_Proxy, _ParameterProxy) and question.kind == "identity":
            self.untruthful = f"`{function}` asks whether {what} is the same object as something else"
        elif question.kind == "type" and asked:
            self.untruthful = f"`{function}` asks for the type or the attributes of {what}"
        elif question.kind == "exception" and asked:
            self.untruthful = f"`{function}` handles exceptions, which tracing does not raise"

    def state(self) -> tuple[Any, int]:
        """What must not change, of which no traced value knows: random generators; and how many constants there are."""
        return generators(), len(self._recorded)

    def check_truthful(self, state: tuple[Any, int]) -> None:
        """Raises if something was recorded since `state` that the code would not always do."""
        random, known = state
        if self.untruthful is None and generators() != random:
            self.untruthful = "it draws random numbers that tracing would freeze"
        if self.untruthful is None and any(tensor._version != seen for tensor, seen in self._recorded[known:]):
            self.untruthful = "it changes a tensor after using it, which tracing would freeze as it is in the end"
        if self.untruthful is not None:
            raise _UntruthfulError(self.untruthful)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Only where the code would raise an error otherwise; the graph does so, too."""
        frame = sys._getframe(2)  # that of the code, behind that of `__bool__`
        needed = needed_truth(frame)
        if needed is None:
            self._note_extremes(frame)
            return super().to_bool(obj)
        holds = obj if needed else self.create_proxy("call_function", operator.eq, (obj, False), {})
        place = _source(frame.f_code.co_filename, frame.f_lineno)
        message = f"`{frame.f_code.co_name}` raises an error for such inputs ({place})"
        self.create_proxy("call_function", torch._assert, (holds, message), {})
        return needed

    def _note_extremes(self, frame: types.FrameType) -> None:
        """Code that may have asked by `max` or `min`, which can be recorded."""
        if {"max", "min"}.intersection(frame.f_code.co_names):
            self.askers[id(frame.f_globals)] = frame.f_globals

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """As of `list(x.chunk(2, 1))`; what is unpacked (`a, b = x.chunk(2, 1)`) does not come here."""
        count = self.count(obj)
        if count is None:
            self._note_extremes(sys._getframe(2))
            way_out = "unpack it (`a, b = …`), or take its parts by index"
            raise TraceError(f"it iterates over a value, and the number of its parts is not known; {way_out}")
        return iter([operator.getitem(cast(Any, obj), i) for i in range(count)])

    def count(self, obj: fx.Proxy) -> int | None:
        """How many parts a value has, or None. The graph checks it."""
        example: Any = self.examples.get(obj.node)
        count = len(example) if type(example) in (list, tuple) else number_of_parts(obj.node)
        if type(example) is list and any(user.op == "call_method" for user in obj.node.users):
            return None  # which may have changed it
        of_shape = obj.node.target is operator.getitem  # an index beyond it is an error by itself
        if count is not None and not of_shape and not any(user.target is HAS_PARTS for user in obj.node.users):
            holds = self.create_proxy("call_function", HAS_PARTS, (obj, count), {})
            holds.node.meta["is_wrapped"] = True
            many = f"another number of parts than the {count} that elc_fx traced"
            message = f"`{obj.node.name}` has {many}; give it such example_inputs"
            self.create_proxy("call_function", torch._assert, (holds, message), {})
        return count

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.autocast != _autocast_state():
            raise _UntruthfulError("it switches autocast, which a graph does not record")
        node = super().create_node(*args, **kwargs)
        self._check_writes(node)
        return node

    def _check_writes(self, node: fx.Node) -> None:
        """Refuses a write into a tensor that is read as it is now wherever no traced value is involved."""
        frozen = [value for value in node.all_input_nodes if value in self._frozen]
        if not frozen or node.op not in ("call_function", "call_method", "call_module"):
            return
        same = is_identity(self.root, node)
        written = frozen if overwrites_unseen(node) else [overwritten_argument(self.root, node)]
        for value in written:
            if value in self._frozen and not same:
                self.refuse(f"it writes into {self._frozen[value]}, which tracing would freeze")
        module = module_of(self.root, node) if node.op == "call_module" else None
        if same or (may_be_view(node) if module is None else isinstance(module, VIEW_MODULES)):
            self._frozen[node] = self._frozen[frozen[0]]

    def refuse(self, reason: str) -> NoReturn:
        """Raises, and remembers why, since the traced code may catch everything."""
        self.untruthful = reason
        raise _UntruthfulError(reason)

    def _forget_after(self, last: fx.Node | None) -> None:
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
            self.uncertain.discard(node)
            self.tensors.discard(node)
            self.sizes.pop(node, None)
        self._parameters = {n: p for n, p in self._parameters.items() if not p.node._erased}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        known = isinstance(attr_val, nn.Parameter) and id(attr_val) in self._names
        if not known or threading.get_ident() not in self.threads:
            return attr_val
        name = self._names[id(attr_val)]
        if name not in self._parameters:
            self._parameters[name] = self.create_proxy(
                "get_attr", name, (), {}, proxy_factory_fn=lambda node: _ParameterProxy(self, node, name, attr_val)
            )
        return self._parameters[name]

    def create_arg(self, a: Any) -> Any:
        """As torch.fx does, but constants are kept here and never stored on the caller's model."""
        if type(a) in (_Proxy, _ParameterProxy):
            return a.node
        if type(a) is _Text:
            return str.__str__(a)
        if isinstance(a, Tensor):
            name = self._names.get(id(a))
            if name is None:
                name = next(n for i in itertools.count() if not self._has(n := f"_tensor_constant{i}"))
                self.constants[name] = a
                self._names[id(a)] = name
                if not a.is_inference():
                    self._recorded.append((a, a._version))
            node = self.create_node("get_attr", name, (), {})
            self._frozen[node] = f"`{name}`" if name not in self.constants else "a tensor that is not the model's"
            return node
        if isinstance(a, dict) and type(a) is not dict:  # torch.fx would make it a plain one
            if type(a) is not OrderedDict:
                raise NotImplementedError(f"a {type(a).__name__} made of traced values")
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)

    def _has(self, name: str) -> bool:
        return name in self.constants or hasattr(self.root, name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder for each input; arguments that are not given are bound to their defaults."""
        forward = self.root.forward
        given = dict(self.given or {})
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in inspect.signature(forward).parameters.items():
            for key, value in self._inputs(name, parameter, given):
                if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
                    kwargs[key] = value
                else:
                    args.append(value)
        self._check_order()
        if "forward" in vars(self.root):  # a forward that was put on the instance
            return lambda *_: forward(*args, **kwargs), []
        return lambda *_: root_fn(self.root, *args, **kwargs), []

    def _check_order(self) -> None:
        """A graph takes its inputs by position, where none without a default can follow one with a default."""
        defaulted = None
        for node in self.graph.find_nodes(op="placeholder"):
            if node.args:
                defaulted = defaulted or node
            elif defaulted is not None:
                raise _UntruthfulError(
                    f"its input `{node.target}` has no default and comes after `{defaulted.target}`, which has one; "
                    f"give example_inputs with `{defaulted.target}`"
                )

    def _inputs(self, name: str, parameter: inspect.Parameter, given: dict[str, Any]) -> list[tuple[str, Any]]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            if name not in given and self.given is None:
                raise _UntruthfulError(f"it takes *{name}, whose number is not known; give example_inputs")
            return [self._placeholder(f"{name}_{i}", value) for i, value in enumerate(given.get(name, ()))]
        if parameter.kind is parameter.VAR_KEYWORD:
            return [self._placeholder(key, value) for key, value in given.get(name, {}).items()]
        if name in given:
            return [self._placeholder(name, given[name])]
        if parameter.default is inspect.Parameter.empty:
            return [self._placeholder(name, None)]
        if not self.bind_defaults:
            return [self._placeholder(name, None, (parameter.default,))]
        self._bind_default(name, parameter.default)
        return [(name, parameter.default)]

    def _placeholder(self, name: str, example: Any, default: tuple[Any, ...] = ()) -> tuple[str, Any]:
        proxy = self.create_proxy("placeholder", name, default, {})
        self.examples[proxy.node] = example
        if isinstance(example, Tensor):
            self.uncertain.discard(proxy.node)
        if type(example) is Tensor:
            self.tensors.add(proxy.node)
        return name, proxy

    def _bind_default(self, name: str, default: Any) -> None:
        """An input that is accepted only with its default value, which the traced code has seen."""
        node = self.create_node("placeholder", name, (default,), {})
        self.examples[node] = default
        message = f"`{name}` was bound to its default {default!r} by elc_fx; give it in the example_inputs"
        check, arguments = (_is_none, (node,)) if default is None else (_equals, (node, default))
        compared = self.create_node("call_function", check, arguments, {})
        compared.meta["is_wrapped"] = True
        self.create_node("call_function", torch._assert, (compared, message), {})

    def inputs_behind(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Those on which it depends whether values are tensors: what layers give is one, whatever they read."""
        queue, seen = list(nodes), set[fx.Node]()
        while queue:
            node = queue.pop()
            if node in seen or (node.op == "call_module" and gives_tensor(self.root, node, ())):
                continue
            seen.add(node)
            queue.extend(node.all_input_nodes)
        return {node for node in seen if node.op == "placeholder"}

    def require_tensors(self) -> None:
        """What code was told of values holds where inputs are tensors that were so in the examples."""
        behind = self.inputs_behind(self.told)
        inputs = [node for node in self.graph.find_nodes(op="placeholder") if node in behind and node in self.tensors]
        if not inputs:
            return
        with self.graph.inserting_before(next(node for node in self.graph.nodes if node.op != "placeholder")):
            for node in inputs:
                message = (
                    f"`{node.target}` was a tensor in the example_inputs of elc_fx, and the code asks whether it is"
                )
                asked = self.graph.call_function(_is_tensor, (node,))
                asked.meta["is_wrapped"] = True
                self.graph.call_function(torch._assert, (asked, message))

    def _may_be_none(self, node: fx.Node) -> bool:
        """Whether the value may be None when the graph runs, as far as the graph tells."""
        if node.op == "placeholder":
            return True
        if node.op == "call_module":
            return not is_leaf(module := self.root.get_submodule(str(node.target))) or isinstance(
                module, nn.MultiheadAttention | nn.RNNBase
            )
        unsure = not self.uncertain.isdisjoint(node.all_input_nodes)
        if node.op == "call_method":
            return unsure and not hasattr(Tensor, str(node.target))
        if node.op == "call_function":
            if node.target is getattr or function_name(node) == "getitem":
                return unsure
            return package_of(node) not in (*KNOWN_PACKAGES, "elc_fx")
        return False


@fx.wrap
def _is_none(value: Any) -> bool:
    return value is None


@fx.wrap
def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@fx.wrap
def _equals(value: Any, expected: Any) -> bool:
    return value is expected or bool(value == expected)


def _stand_ins(value: Any) -> Iterator[_StandIn]:
    """A variable's value if it is one, and those among the elements of containers."""
    if issubclass(type(value), _StandIn):
        yield value
    elif type(value) in (tuple, list, dict):
        for item in value.values() if type(value) is dict else value:
            yield from _stand_ins(item)


def _is_number(node: fx.Node) -> bool:
    """Whether a value is a Python number that was computed from sizes."""
    if node.op == "call_method":
        return node.target in (
            "size",
            "dim",
            "numel",
            "nelement",
            "stride",
            "storage_offset",
            "element_size",
            "item",
            "__len__",
        )
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "itemsize", "nbytes")
    home = getattr(node.target, "__module__", None)
    plain = home in ("_operator", "math") or node.target in EXTREMES
    return plain and all(_is_number(source) for source in node.all_input_nodes)


def _reason(error: Exception) -> str:
    if isinstance(error, _UntruthfulError):
        return str(error)
    return f"{first_line(error)}{_place(error)}"


def _place(error: Exception) -> str:
    """The line of the model's own code that the error comes from, if there is one."""
    own = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "torch").partition(".")[0] not in ("torch", "elc_fx", "contextlib")
    ]
    if not own:
        return ""
    return f" ({_source(*own[-1])})"


def _source(file: str, line: int) -> str:
    code = linecache.getline(file, line).strip()
    return f"{Path(file).name}, line {line}{f': `{code}`' if code else ''}"


def _with_constants(root: nn.Module, constants: dict[str, Tensor]) -> nn.Module:
    """A module with root's attributes and the constants that tracing met, for GraphModule to take them from."""
    holder = nn.Module()
    vars(holder).update(vars(root))
    holder._buffers = {**root._buffers, **constants}
    return holder


def _mark_eval(captured: fx.GraphModule, root: nn.Module) -> None:
    """Containers that GraphModule made are in eval mode, as the model is; the model's own modules are left alone."""
    own = set(root.modules())
    for module in captured.modules():
        if module not in own:
            module.training = False
