"""What `compile` returns: a GraphModule that keeps its report."""

from __future__ import annotations

from typing import cast

from elc_fx.annotated import AnnotatedModule
from elc_fx.report import Report

REPORT = "elc_fx_report"


class CompiledModule(AnnotatedModule):
    """An ordinary GraphModule with a report."""

    elc_fx_kept = REPORT
    # Of a compiled part of a model that cannot be traced, which has none of its own. TorchScript asks for the types of
    # what is annotated.
    elc_fx_report = cast("Report | None", None)
