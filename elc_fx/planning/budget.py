"""Budgets and costs: what a network may cost, and what it does cost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from elc_fx.errors import InvalidInputError

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_UNITS = {"flops": "flops?", "params": "(?:params?|parameters)", "depth": "layers?"}
_EXAMPLES = {
    "flops": '0.45 or "30 MFLOPs"',
    "params": '0.5 or "1.2 M"',
    "depth": '0.5 or "20 layers"',
    "latency": '0.5 or "12 ms"',
}


@dataclass(frozen=True)
class Costs:
    """What a network costs. flops: two per multiply-add, for the example inputs. depth: layers on the longest path.

    latency: seconds for the example inputs, where it was asked for.
    """

    flops: int
    params: int
    depth: int
    latency: float | None = None


@dataclass(frozen=True)
class Budget:
    """What a network may cost; every limit that is given holds.

    Each is a fraction of the original (a number above 0, up to 1), or an absolute value: a text with a unit
    ("30 MFLOPs", "1.2 M", "20 layers", "12 ms"), or, but for the latency, a whole number above 1. A text that spells a
    number is that number. A depth of 1 could be one layer or all of them, and is refused: "1 layer", or 1.0.

    Raises:
        InvalidInputError: nothing is given, or a value is neither.
    """

    flops: float | int | str | None = None
    params: float | int | str | None = None
    depth: float | int | str | None = None
    latency: float | str | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise InvalidInputError("a budget limits at least one of flops, params, depth and latency")
        for name in self.names:
            _limit_of(name, getattr(self, name))

    @property
    def names(self) -> tuple[str, ...]:
        """What is limited."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From "flops=0.45,depth=20". Raises `InvalidInputError`."""
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in _EXAMPLES or name in given:
                raise InvalidInputError(
                    f"a budget is {text!r}, expected limits like flops=0.45,depth=20, each of {', '.join(_EXAMPLES)} "
                    "at most once"
                )
            given[name] = _spelled(value)
        return cls(**given)

    def limits(self, original: Costs) -> dict[str, float]:
        """The absolute limits for a network with these costs."""
        return {name: _limit_of(name, getattr(self, name))(getattr(original, name)) for name in self.names}


def _limit_of(name: str, value: Any) -> Callable[[float], float]:
    """From the original's cost to the limit."""
    problem = InvalidInputError(
        f"{name} of a budget is {value!r}, expected a fraction or an absolute value, such as {_EXAMPLES[name]}"
    )
    if isinstance(value, str):
        value = _spelled(value.strip())
    if isinstance(value, str):
        absolute = _absolute(name, value)
        if absolute is None or not 0 < absolute < math.inf:
            raise problem
        return lambda _: absolute
    number = real_number(value)
    if not number > 0:
        raise problem
    if name == "depth" and number == 1 and isinstance(value, Integral):
        raise InvalidInputError('depth of a budget is 1: give "1 layer", or 1.0 for all that there are')
    if number <= 1:
        share = Fraction(repr(number))  # as it is written: 0.29 of 100 layers are 29, not 28.999
        return lambda original: float(share * Fraction(original))
    if not number.is_integer() or name == "latency":
        raise problem
    return lambda _: number


def _spelled(text: str) -> float | int | str:
    """The number that a text spells, or the text."""
    if not re.fullmatch(_NUMBER, text, re.IGNORECASE):
        return text
    number = float(text)
    return int(number) if number.is_integer() and "." not in text else number


def real_number(value: Any) -> float:
    """A number of any kind, numpy's too; NaN for what is none, or too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _absolute(name: str, text: str) -> float | None:
    if name == "latency":
        match = re.fullmatch(rf"({_NUMBER})\s*({'|'.join(_SECONDS)})", text.strip().lower())
        return None if match is None else float(match[1]) * _SECONDS[match[2]]
    match = re.fullmatch(rf"({_NUMBER})\s*([kmgt]?)\s*(?:{_UNITS[name]})?", text.strip().lower())
    return None if match is None else float(match[1]) * _PREFIXES[match[2]]


def cost_text(name: str, value: float) -> str:
    """A cost with its unit, for people. name: as the field of `Costs`."""
    if name == "latency":
        return f"{float(f'{1000 * value:.3g}'):,g} ms"
    if name == "depth":
        return f"{value:,.4g} layers"
    return f"{math.floor(value):,} {'parameters' if name == 'params' else 'FLOPs'}"  # a limit of 192.6 is one of 192
