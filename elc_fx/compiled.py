"""What `compile` returns: a GraphModule that keeps its report through `deepcopy` and pickling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from elc_fx.report import Report

REPORT = "elc_fx_report"


class CompiledModule(fx.GraphModule):
    """A GraphModule with a report. GraphModule's own attributes are lost in a copy, its `meta` in a pickle."""

    elc_fx_report: Report | None = None  # a compiled part of a model that cannot be traced has none of its own

    def __copy__(self) -> fx.GraphModule:
        copied = CompiledModule(self, self.graph, type(self).__name__)
        copied.training = self.training
        setattr(copied, REPORT, self.elc_fx_report)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        copied.training = self.training
        setattr(copied, REPORT, self.elc_fx_report)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()
        return _rebuild, (function, arguments, self.training, self.elc_fx_report)


def _rebuild(
    function: Callable[..., Any], arguments: tuple[Any, ...], training: bool, report: Report | None
) -> CompiledModule:
    plain = function(*arguments)
    module = CompiledModule(plain, plain.graph, type(plain).__name__)
    module.training = training
    setattr(module, REPORT, report)
    return module
