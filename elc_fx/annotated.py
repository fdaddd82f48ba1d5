"""Graph modules that keep what is noted about them through copies and pickling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import fx

from elc_fx.capturing.rereading import Rereader


class AnnotatedModule(fx.GraphModule):
    """A GraphModule with an attribute of its own. A copy loses those of GraphModule, and a pickle its `meta`.

    elc_fx_kept: its name. None of these may be one that a submodule of the caller has.
    """

    elc_fx_kept: ClassVar[str]

    def __copy__(self) -> AnnotatedModule:
        return _annotated(_class_of(self), self, self.training, getattr(self, self.elc_fx_kept))

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied: fx.GraphModule = super().__deepcopy__(memo)
        copied.training = self.training
        setattr(copied, self.elc_fx_kept, getattr(self, self.elc_fx_kept))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()
        arguments[0]["_tracer_cls"] = Rereader  # which the graph of what was unpickled itself does not name
        noted = getattr(self, self.elc_fx_kept)
        return _unpickled, (_class_of(self), function, arguments, self.training, noted)


def _class_of(module: AnnotatedModule) -> type[AnnotatedModule]:
    """The one that it was made of: fx gives every GraphModule a class of its own."""
    return next(cls for cls in type(module).__mro__ if "elc_fx_kept" in vars(cls))


def _unpickled(
    cls: type[AnnotatedModule], function: Callable[..., Any], arguments: tuple[Any, ...], training: bool, noted: Any
) -> AnnotatedModule:
    return _annotated(cls, function(*arguments), training, noted)


def _annotated(cls: type[AnnotatedModule], plain: fx.GraphModule, training: bool, noted: Any) -> AnnotatedModule:
    module = cls(plain, plain.graph, type(plain).__name__)
    module.training = training
    setattr(module, cls.elc_fx_kept, noted)
    return module
