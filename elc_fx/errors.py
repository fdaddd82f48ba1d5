"""The errors that elc_fx raises on purpose. All derive from `ElcError`."""

from __future__ import annotations

from collections.abc import Iterable


class ElcError(Exception):
    """Base class of every error that elc_fx raises on purpose."""


class InvalidInputError(ElcError, ValueError):
    """An argument is of the wrong type or value; the message says what was found and what was expected."""


class MissingPackageError(ElcError, ImportError):
    """A package that only some functions need cannot be imported; the message says how to install it."""


class TrainingModeError(ElcError, ValueError):
    """The model is in training mode, where batch norm and dropout do not compute what they compute in eval."""


class NotAffineError(ElcError):
    """A composition, sum or concatenation is not one affine map; the message is the reason, for people to read."""


class VerificationError(ElcError):
    """A merged region does not compute what the original region computes; the message names the first that differs."""


class PlanError(ElcError, ValueError):
    """A plan names what the model does not have, or overlaps with itself, or a budget cannot be met."""


class GateNotClosedError(ElcError, RuntimeError):
    """A merge was asked for while gates are open; the message lists them."""


class TrainingError(ElcError, RuntimeError):
    """Training cannot go on: the loss is not finite, or a checkpoint is of another run or damaged."""


def listed(items: Iterable[str], most: int = 3) -> str:
    """The first ones, and how many more there are, for a message."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more or "none"
