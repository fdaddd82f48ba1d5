"""What `compile` returns: a GraphModule that keeps its report through `deepcopy` and pickling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from elc_fx.report import Report

REPORT = "elc_fx_report"


class CompiledModule(fx.GraphModule):
    """A GraphModule with a report. GraphModule's own attributes are lost in a copy, its `meta` in a pickle."""

    elc_fx_report: Report

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        copied.training = self.training
        setattr(copied, REPORT, self.elc_fx_report)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()
        return _rebuild, (function, arguments, self.training, self.elc_fx_report)


def with_report(module: nn.Module, report: Report) -> nn.Module:
    """The module, which keeps the report from now on."""
    if isinstance(module, fx.GraphModule) and not isinstance(module, CompiledModule):
        training = module.training
        module = CompiledModule(module, module.graph, type(module).__name__)
        module.training = training
    setattr(module, REPORT, report)
    return module


def _rebuild(function: Callable[..., Any], arguments: tuple[Any, ...], training: bool, report: Report) -> nn.Module:
    module = function(*arguments)
    module.training = training
    return with_report(module, report)
