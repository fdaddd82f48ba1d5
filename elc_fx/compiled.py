"""What `compile` returns: a GraphModule that keeps its report."""

from __future__ import annotations

from elc_fx.annotated import AnnotatedModule
from elc_fx.report import Report

REPORT = "elc_fx_report"


class CompiledModule(AnnotatedModule):
    """An ordinary GraphModule with a report."""

    elc_fx_kept = REPORT
    elc_fx_report: Report | None = None  # a compiled part of a model that cannot be traced has none of its own
