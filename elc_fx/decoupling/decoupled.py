"""What `decouple` returns: a GraphModule that knows its plan."""

from __future__ import annotations

from elc_fx.annotated import AnnotatedModule
from elc_fx.planning.plan import Plan


class DecoupledModule(AnnotatedModule):
    """An ordinary GraphModule with the plan that it was decoupled for."""

    elc_fx_kept = "elc_fx_plan"
    elc_fx_plan: Plan
