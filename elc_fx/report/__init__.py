"""The report of a compilation: what was merged into what, what was not and why, and what it saves."""

from __future__ import annotations

from elc_fx.report.table import Report, Totals

__all__ = ["Report", "Totals"]
