"""The errors that elc_fx raises on purpose, which all derive from `ElcError`; and its warnings."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

PASSED_BY = ("elc_fx", "torch", "contextlib")  # on the way from the code of a user to what a warning is about


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


class CaptureError(ElcError):
    """The module's own `forward` cannot be traced truthfully; the message is the reason."""


class ExportError(ElcError):
    """torch.export refuses the model, or its file cannot be written or read."""


class StorageError(ElcError):
    """A network cannot be saved, or a file is no network that elc_fx saved; the message says what is in the way."""


class RuntimeFailedError(ElcError, RuntimeError):
    """A runtime does not take a network, or not these inputs; the message has the runtime's own reason."""


class LatencyError(ElcError, RuntimeError):
    """A layer or network cannot be run by the backend whose latency is asked for."""


class OutOfMemoryError(ElcError, MemoryError):
    """There is not enough memory for a network beside the one that it is made of, which is left as it was."""


class DataError(ElcError, ValueError):
    """A data set is missing, in an unknown layout, damaged, or does not fit the model."""


class LoadingError(ElcError):
    """A model or its weights cannot be had; the message says what was looked for, and what is there instead."""


@dataclass(frozen=True)
class Refusal:
    """What did not happen at a place, and why, for people to read."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def warn(message: str) -> None:
    """A warning that points to the line that called elc_fx, however deep inside of it the warning is raised."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED_BY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def first_line(error: Exception) -> str:
    """What an error of others says, as a reason."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()  # without colours
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def listed(items: Iterable[str], most: int = 3) -> str:
    """The first ones, and how many more there are, for a message."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more or "none"
