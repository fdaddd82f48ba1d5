"""Example inputs: how a caller gives them, and how a module is called with them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
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
            examples.bound(model)
        except TypeError as error:
            raise InvalidInputError(
                f"forward of {type(model).__name__} does not take the example_inputs: {error}"
            ) from None
        return examples

    def bound(self, model: nn.Module) -> dict[str, Any]:
        """The given arguments by parameter name of `model.forward`; by position where it has no Python signature.

        Raises `TypeError` where `forward` does not take them.
        """
        try:
            signature = inspect.signature(model.forward)
        except ValueError:  # TorchScript
            return {**{str(i): value for i, value in enumerate(self.args)}, **self.kwargs}
        return dict(signature.bind(*self.args, **self.kwargs).arguments)


@contextmanager
def reproducibly() -> Iterator[None]:
    """Without gradients, and with the same random numbers each time; the generators are put back afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    state = random.getstate()
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


def fresh(inputs: Any) -> Any:
    """The same inputs with tensors of their own, since a model may overwrite what it is given."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(memory_format=torch.preserve_format), inputs)
