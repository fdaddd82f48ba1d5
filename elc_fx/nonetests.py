"""Which code asks `is None` of its values, found in its bytecode.

A stand-in for a tensor is never None, so symbolic tracing would take the wrong side of `if skip is None` where the
value may be None when the graph runs. Neither stand-in nor tracer can see the question. So the code that a module may
run is looked through for such tests, once; where there are any, a trace function looks at the tested values.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Note = Callable[[str, str, Any], None]  # function, variable, value
_tests: dict[int, tuple[frozenset[str], types.CodeType]] = {}  # by identity: a code object hashes all that it holds
_classes: dict[type, bool] = {}


class Watch:
    """While active, reports the values that functions compare with None, when they are entered and left."""

    def __init__(self, note: Note) -> None:
        self.note = note

    def __enter__(self) -> None:
        self.previous = sys.gettrace()  # a debugger's or a coverage tool's, which goes on seeing what it saw
        sys.settrace(self._enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.previous)

    def _enter(self, frame: types.FrameType, event: Any, argument: object) -> Any:
        theirs = self.previous(frame, event, argument) if self.previous is not None else None
        names = tested_for_none(frame.f_code)
        if not names:
            return theirs
        self._look(frame, names)
        if theirs is None:
            frame.f_trace_lines = False

        def leave(frame: types.FrameType, event: Any, argument: object) -> Any:
            nonlocal theirs
            if theirs is not None:
                theirs = theirs(frame, event, argument)
            if event == "return":
                self._look(frame, names)
            return leave

        return leave

    def _look(self, frame: types.FrameType, names: frozenset[str]) -> None:
        values = frame.f_locals
        for name in names:
            for value in values.values() if name == "*" else (values.get(name),):
                self.note(frame.f_code.co_name, name, value)


def may_ask_for_none(module: nn.Module) -> bool:
    """Whether a test for None stands anywhere in the code that the module's `forward` may run by itself.

    Errs on the side of yes. What torch's own functions ask does not count, nor what is asked of `self`'s attributes.
    """
    own = [value for value in vars(module).values() if not isinstance(value, str | int | float | dict | list | tuple)]
    functions = [f for value in own for f in _functions_of(value)]
    cls = type(module)
    if cls not in _classes:
        _classes[cls] = _any_asks([getattr(cls, "forward", None)], cls)
    return _classes[cls] or (bool(functions) and _any_asks(functions, cls))


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
    """Whether any of the functions, or of those that they name, has a test; `owner` has their methods."""
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
        if any(tested_for_none(code) - {"self"} for code in codes):
            return True
        names = {name for code in codes for name in code.co_names}
        for name in names:
            named = function.__globals__.get(name)
            if isinstance(named, types.ModuleType) and not named.__name__.startswith("torch."):
                queue.extend(f for n in names for f in _functions_of(vars(named).get(n)))
            queue.extend(_functions_of(named))
            queue.extend(_functions_of(getattr(owner, name, None)))
    return False


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
    return "/torch/" in code.co_filename.replace("\\", "/")


def tested_for_none(code: types.CodeType) -> frozenset[str]:
    """Names of the local variables that a function compares with None by `is`; "*" for anything less plain."""
    if id(code) not in _tests:
        _tests[id(code)] = (frozenset() if _is_torch(code) else _tested_for_none(code), code)
    return _tests[id(code)][0]


def _tested_for_none(code: types.CodeType) -> frozenset[str]:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    names = set()
    for index, instruction in enumerate(instructions):
        if instruction.opname.startswith("POP_JUMP") and instruction.opname.endswith("NONE"):
            names.add(_origin(instructions[:index]))
        elif instruction.opname == "IS_OP":
            rest = instructions[:index]
            nones = [o for o in rest[-2:] if o.opname == "LOAD_CONST" and o.argval is None]
            if nones:
                rest.remove(nones[-1])
                names.add(_origin(rest))
    return frozenset(name for name in names if name)


def _origin(instructions: list[dis.Instruction]) -> str:
    """The variable whose value, or attribute, the last of the instructions leaves on the stack."""
    for instruction in reversed(instructions):
        name = instruction.opname
        if name in ("LOAD_ATTR", "COPY", "DUP_TOP", "TO_BOOL"):
            continue
        if name.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST")):
            value = instruction.argval
            return str(value[-1] if isinstance(value, tuple) else value)
        return "" if name in ("LOAD_GLOBAL", "LOAD_NAME") else "*"
    return "*"
