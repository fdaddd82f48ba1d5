"""What `decouple` returns: a GraphModule that knows its plan, also after `deepcopy` and pickling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from elc_fx.planning.plan import Plan


class DecoupledModule(fx.GraphModule):
    """An ordinary GraphModule with the plan that it was decoupled for."""

    elc_fx_plan: Plan  # no name that a submodule of the caller may have

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoupledModule:
        plain = super().__deepcopy__(memo)
        return _rebuilt(plain, self.training, self.elc_fx_plan)

    def __copy__(self) -> DecoupledModule:
        return _rebuilt(self, self.training, self.elc_fx_plan)

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()
        return _unpickled, (function, arguments, self.training, self.elc_fx_plan)


def _unpickled(function: Callable[..., Any], arguments: tuple[Any, ...], training: bool, plan: Plan) -> DecoupledModule:
    return _rebuilt(function(*arguments), training, plan)


def _rebuilt(plain: fx.GraphModule, training: bool, plan: Plan) -> DecoupledModule:
    module = DecoupledModule(plain, plain.graph, type(plain).__name__)
    module.training = training
    module.elc_fx_plan = plan
    return module
