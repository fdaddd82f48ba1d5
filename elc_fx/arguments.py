"""Checks of arguments that are numbers. Each raises `InvalidInputError`, and says which one was not what it must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from elc_fx.errors import InvalidInputError


def check_whole(least: int, **given: Any) -> None:
    """Whole numbers, none below `least`."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInputError(f"{name} is {value!r}, expected a whole number from {least} on")


def check_share(**given: Any) -> None:
    """Numbers from 0 to 1."""
    _check(given, lambda value: 0 <= value <= 1, "from 0 to 1")


def check_from_zero(**given: Any) -> None:
    """Numbers from 0 on, not infinite."""
    _check(given, lambda value: 0 <= value < math.inf, "from 0 on")


def check_positive(**given: Any) -> None:
    """Numbers above 0, not infinite."""
    _check(given, lambda value: 0 < value < math.inf, "above 0")


def _check(given: dict[str, Any], fits: Callable[[Any], bool], wanted: str) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise InvalidInputError(f"{name} is {value!r}, expected a number {wanted}")
