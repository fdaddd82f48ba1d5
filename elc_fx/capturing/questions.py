"""Questions that code asks of its values without the values noticing, found in its bytecode.

A stand-in for a tensor is never None, never a `Tensor` and never the same object as another, so symbolic tracing would
take the wrong side of `if skip is None`, `if type(x) is Tensor` or `if x.dtype is torch.half`; and it raises errors of
its own, which `except` would swallow. Neither stand-in nor tracer can see these questions. So the code that a module
may run is looked through for them, once; where there are any, a trace function looks at the values that are asked.
"""

from __future__ import annotations

import dis
import functools
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class Question:
    """kind: "None", "constant", "identity", "type" or "exception".

    variable: whose value is asked; "*" for any, where that is less plain.
    """

    kind: str
    variable: str


Note = Callable[[str, Question, Any], None]  # function, question, value
_questions: dict[
    int, tuple[frozenset[Question], types.CodeType]
] = {}  # by identity: a code object hashes all that it holds


class Watch:
    """While active, reports the values that functions ask, when they are entered and left."""

    def __init__(self, note: Note) -> None:
        self.note = note

    def __enter__(self) -> None:
        self.previous = sys.gettrace()  # a debugger's or a coverage tool's, which goes on seeing what it saw
        sys.settrace(self._enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.previous)

    def _enter(self, frame: types.FrameType, event: Any, argument: object) -> Any:
        theirs = self.previous(frame, event, argument) if self.previous is not None else None
        questions = questions_of(frame.f_code)
        if not questions:
            return theirs
        self._look(frame, questions)
        if theirs is None:
            frame.f_trace_lines = False

        def leave(frame: types.FrameType, event: Any, argument: object) -> Any:
            nonlocal theirs
            if theirs is not None:
                theirs = theirs(frame, event, argument)
            if event == "return":
                self._look(frame, questions)
            return leave

        return leave

    def _look(self, frame: types.FrameType, questions: frozenset[Question]) -> None:
        values = frame.f_locals
        for question in questions:
            asked = list(values.values()) if question.variable == "*" else [values.get(question.variable)]
            for value in asked:
                self.note(frame.f_code.co_name, question, value)


class Calls:
    """While active, knows which C function a Python function is calling; nothing where a profiler is at work."""

    def __init__(self) -> None:
        self._running: list[tuple[types.FrameType, Any]] = []

    def __enter__(self) -> None:
        self._free = sys.getprofile() is None
        if self._free:
            sys.setprofile(self._note)

    def __exit__(self, *_: object) -> None:
        if self._free:
            sys.setprofile(None)
        self._running.clear()  # of this very call, whose frame would stay, and with it those of all callers

    def _note(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            self._running.append((frame, argument))
        elif event in ("c_return", "c_exception") and self._running:
            self._running.pop()

    def torchs(self, frame: types.FrameType) -> bool:
        """Whether that function is torch's."""
        if not self._running or self._running[-1][0] is not frame:
            return False
        function = self._running[-1][1]
        module = getattr(function, "__module__", None) or getattr(getattr(function, "__self__", None), "__name__", None)
        return isinstance(module, str) and module.partition(".")[0] == "torch"


def may_ask(module: nn.Module) -> bool:
    """Whether a question stands anywhere in the code that the module's `forward` may run by itself.

    Errs on the side of yes. What torch's own functions ask does not count, nor what is asked of `self`'s attributes.
    """
    cls: Any = type(module)
    return _class_asks(cls) or _any_asks(_own_functions(module), cls)


@functools.cache
def _class_asks(cls: Any) -> bool:
    return _any_asks([getattr(cls, "forward", None)], cls)  # which a class of TorchScript has not


def _own_functions(module: nn.Module) -> list[types.FunctionType]:
    """Those among its attributes, and of the objects there."""
    own = [value for value in vars(module).values() if not isinstance(value, str | int | float | dict | list | tuple)]
    return [f for value in own for f in _functions_of(value)]


def branches_on_training(module: nn.Module) -> str | None:
    """The name of a method in which the module's own code decides by `self.training`, if there is one."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.") or cls is object:
            continue
        for function in _functions_of(cls):
            if function.__name__ not in ("__init__", "train", "eval") and _decides_by_training(function.__code__):
                return function.__name__
    return None


def reads_training(module: nn.Module) -> bool:
    """Whether `training` is read, or a `forward` called, in code that the module's `forward` may run by itself.

    Errs on the side of yes.
    """
    cls = type(module)
    code = getattr(cls.forward, "__code__", None)
    if code is None or _is_torch(code):  # which reads it, or runs a `forward` that it decorates
        return True
    codes = _codes([cls.forward, *_own_functions(module)], cls)
    return any(word in (*code.co_names, *code.co_consts) for code in codes for word in ("training", "forward"))


def _decides_by_training(code: types.CodeType) -> bool:
    """Whether an attribute `training` is read right before a jump or a `not`."""
    if "training" not in code.co_names:
        return False
    instructions = list(dis.get_instructions(code))
    return any(
        read.opname.startswith("LOAD_ATTR")
        and read.argval == "training"
        and ("JUMP" in then.opname or then.opname in ("UNARY_NOT", "TO_BOOL", "COPY"))
        for read, then in itertools.pairwise(instructions)
    )


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, functools.partial):
        yield from _functions_of(value.func)
    elif isinstance(value, types.MethodType):
        yield from _functions_of(value.__func__)
    elif isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, type) and not value.__module__.startswith(("torch.", "builtins", "typing", "enum")):
        yield from (f for f in vars(value).values() if isinstance(f, types.FunctionType))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | types.ModuleType | type):
        yield from _functions_of(type(value))


def _any_asks(functions: list[Any], owner: type) -> bool:
    """Whether any of the functions, or of those that they name, asks; `owner` has their methods."""
    return any(q.variable != "self" for code in _codes(functions, owner) for q in questions_of(code))


def _codes(functions: list[Any], owner: type) -> Iterator[types.CodeType]:
    """Of functions and those that they name, but torch's; `owner` has their methods."""
    queue = [f for value in functions for f in _functions_of(value)]
    seen: set[int] = set()
    while queue:
        function = queue.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for cell in function.__closure__ or ():
            queue.extend(_functions_of(_content(cell)))
        if _is_torch(function.__code__):
            continue
        codes = list(_nested(function.__code__))
        yield from codes
        names = {name for code in codes for name in code.co_names}
        for name in names:
            named = function.__globals__.get(name)
            if isinstance(named, types.ModuleType) and not named.__name__.startswith("torch."):
                queue.extend(f for n in names for f in _functions_of(vars(named).get(n)))
            queue.extend(_functions_of(named))
            queue.extend(_functions_of(getattr(owner, name, None)))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not set yet
        return None


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _is_torch(code: types.CodeType) -> bool:
    return code.co_filename.startswith(TORCH)


def questions_of(code: types.CodeType) -> frozenset[Question]:
    """What a function asks of its local variables."""
    if id(code) not in _questions:
        own = _is_torch(code) or code.co_filename.startswith(OWN)
        _questions[id(code)] = (frozenset() if own else frozenset(_find_questions(code)), code)
    return _questions[id(code)][0]


class _Step(NamedTuple):
    """An instruction, or a half of one that does two things. effect: by how many values the stack grows."""

    opname: str
    argval: Any
    effect: int


def _steps(code: types.CodeType) -> Iterator[_Step]:
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in SKIPPED:
            continue
        if isinstance(value, tuple) and name.count("_FAST") == 2:  # such as LOAD_FAST_LOAD_FAST, from Python 3.13 on
            halves = name.partition("_FAST_")
            for half, variable in zip((f"{halves[0]}_FAST", halves[2]), value, strict=True):
                yield _Step(half, variable, 1 if half.startswith("LOAD") else -1)
        else:
            yield _Step(name, value, dis.stack_effect(instruction.opcode, instruction.arg, jump=False))


def _find_questions(code: types.CodeType) -> Iterator[Question]:
    exact = list(_steps(code))
    steps = [step for step in exact if step.opname != "PUSH_NULL"]
    for index, step in enumerate(steps):
        name, before = step.opname, steps[:index]
        if name.startswith("POP_JUMP") and name.endswith("NONE"):
            yield from _about("None", _origin(before))
        elif name == "IS_OP" and (nones := [o for o in before[-2:] if o.opname == "LOAD_CONST" and o.argval is None]):
            before.remove(nones[-1])
            yield from _about("None", _origin(before))
        elif name in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in ("type", "hasattr", "getattr", "callable"):
            yield from _about("type", _origin(steps[index + 1 : index + 2]))
        elif (
            name in EXCEPTS
            or [i.opname for i in steps[index - 1 : index + 1]] == BARE_EXCEPT
            or (name.startswith("LOAD_") and step.argval == "suppress")  # of contextlib
        ):
            yield Question("exception", "*")
    for index, step in enumerate(exact):
        if step.opname == "IS_OP":
            yield from _about_identity(exact[:index])


def _about_identity(before: list[_Step]) -> Iterator[Question]:
    """Which of two values, or values that they are attributes of, may be known by identity; None has its own question.

    A variable that is compared with a constant, a global name or an attribute of `self` is only then the same where it
    may be something else than a tensor.
    """
    second = _last_value(before)
    first = _last_value(before[: len(before) - len(second)])
    for operand, other in ((first, second), (second, first)):
        if any(step.opname == "LOAD_CONST" and step.argval is None for step in (*first[-1:], *second[-1:])):
            continue
        variable = _origin(operand).replace("*", "")
        yield from _about("constant" if len(operand) == 1 and _is_constant(other) else "identity", variable)


def _is_constant(operand: list[_Step]) -> bool:
    first, *attributes = operand or [_Step("", None, 0)]
    named = first.opname in ("LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME") or first.argval == "self"
    return named and all(step.opname == "LOAD_ATTR" for step in attributes)


def _last_value(steps: list[_Step]) -> list[_Step]:
    """Those that put the last value on the stack."""
    wanted = 1
    for index in reversed(range(len(steps))):
        wanted -= steps[index].effect
        if wanted <= 0:
            return steps[index:]
    return steps


def needed_truth(frame: types.FrameType) -> bool | None:
    """The truth of the value that a function is asking for it, if with the other it does nothing but raise an error.

    As in `assert x.shape[1] == 3`, or `if x.shape[1] != 3: raise ValueError(…)`; None for any other question.
    """
    steps = list(dis.get_instructions(frame.f_code))
    positions = {step.offset: index for index, step in enumerate(steps)}
    index = positions[frame.f_lasti]
    negated = False
    while steps[index].opname in ("TO_BOOL", "UNARY_NOT"):  # the first from Python 3.13 on
        negated ^= steps[index].opname == "UNARY_NOT"
        index += 1
    jump = steps[index]
    if not jump.opname.startswith("POP_JUMP") or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    jumps_if = jump.opname.endswith("TRUE") ^ negated
    ends = [_only_raises(steps, positions, first) for first in (positions[jump.argval], index + 1)]
    if ends[0] == ends[1]:
        return None
    return jumps_if ^ ends[0]


def _only_raises(steps: list[dis.Instruction], positions: dict[int, int], first: int) -> bool:
    """Whether all ways from a step on end in an error that is raised there."""
    queue, seen = [first], set[int]()
    while queue:
        index = queue.pop()
        step = steps[index]
        if step.opname.startswith(("RETURN", "YIELD")):
            return False
        if index in seen or step.opname in ("RAISE_VARARGS", "RERAISE"):
            continue
        seen.add(index)
        if step.opcode in JUMPS:
            queue.append(positions[step.argval])
        if step.opname not in UNCONDITIONAL:
            queue.append(index + 1)
    return True


def _about(kind: str, variable: str) -> Iterator[Question]:
    if variable:
        yield Question(kind, variable)


def _origin(steps: list[_Step]) -> str:
    """The variable whose value, or attribute, the last of the steps leaves on the stack."""
    for step in reversed(steps):
        name = step.opname
        if name in ("LOAD_ATTR", "COPY", "DUP_TOP", "TO_BOOL"):
            continue
        if name.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST")):
            return str(step.argval)
        return "" if name in ("LOAD_GLOBAL", "LOAD_NAME") else "*"
    return "*"


OWN, TORCH = (os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
EXCEPTS = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH", "CHECK_EG_MATCH")
BARE_EXCEPT = ["PUSH_EXC_INFO", "POP_TOP"]  # from Python 3.11 on
JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
UNCONDITIONAL = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE")
SKIPPED = ("CACHE", "EXTENDED_ARG", "NOP")
