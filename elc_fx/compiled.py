"""What `compile` returns: a GraphModule that keeps its report, and how to read that."""

from __future__ import annotations

from typing import cast

from torch import nn

from elc_fx.annotated import AnnotatedModule
from elc_fx.errors import InvalidInputError
from elc_fx.report import Report

REPORT = "elc_fx_report"


class CompiledModule(AnnotatedModule):
    """An ordinary GraphModule with a report."""

    elc_fx_kept = REPORT
    # Of a compiled part of a model that cannot be traced, which has none of its own. TorchScript asks for the types of
    # what is annotated.
    elc_fx_report = cast("Report | None", None)


def report_of(module: nn.Module) -> Report:
    """What `compile` did to a module that it returned. Raises `InvalidInputError` for any other module."""
    report = getattr(module, REPORT, None)
    if not isinstance(report, Report):
        raise InvalidInputError(f"this {type(module).__name__} was not returned by elc_fx.compile: it has no report")
    return report
