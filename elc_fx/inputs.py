"""Example inputs: how a caller gives them, and how a module is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elc_fx.errors import InvalidInputError


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of `forward`, by position and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, given: Tensor | Sequence[Any] | Mapping[str, Any]) -> ExampleInputs:
        """A tensor is the only argument; a sequence gives arguments by position, a mapping by name.

        Raises `InvalidInputError` where `model.forward` does not take them.
        """
        if isinstance(given, Tensor):
            examples = cls((given,), {})
        elif isinstance(given, Mapping):
            examples = cls((), dict(given))
        elif isinstance(given, list | tuple):
            examples = cls(tuple(given), {})
        else:
            raise InvalidInputError(
                f"example_inputs is a {type(given).__name__}, expected a tensor, a sequence of arguments or a mapping"
            )
        try:
            inspect.signature(model.forward).bind(*examples.args, **examples.kwargs)
        except TypeError as error:
            raise InvalidInputError(
                f"forward of {type(model).__name__} does not take the example_inputs: {error}"
            ) from None
        return examples

    def bound(self, model: nn.Module) -> dict[str, Any]:
        """The given arguments by parameter name of `model.forward`."""
        return dict(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)

    def call(self, module: nn.Module) -> Any:
        """The module's output, without gradients and with the same random numbers each time."""
        devices = list({p.device for p in module.parameters() if p.device.type == "cuda"})
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return module(*self.args, **self.kwargs)
