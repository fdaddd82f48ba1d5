"""The public functions: a few lines each, stringing the stages together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from elc_fx.compiled import REPORT
from elc_fx.errors import InvalidInputError, TrainingModeError
from elc_fx.inputs import ExampleInputs
from elc_fx.lossless import LosslessCompilation
from elc_fx.report import Report


def compile(  # as torch.compile
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    mode: Literal["lossless"] = "lossless",
    verify: bool = True,
) -> nn.Module:
    """A copy of `model` in which everything that merges exactly is merged; the model itself is not changed.

    Args:
        model: any module, in eval mode.
        example_inputs: a tensor, a sequence of positional arguments or a mapping of keyword arguments of `forward`.
            With them, costs are those of the real shapes, and the outputs are compared end to end. The result takes
            any batch size and spatial size all the same.
        mode: "lossless" merges what is exact up to the rounding of the weights.
        verify: compare each merged region with its layers, on random inputs in float64.

    Returns:
        A `torch.fx.GraphModule`; where the root cannot be traced, a copy of it whose children are compiled.

    Raises:
        TrainingModeError: the model is in training mode.
        InvalidInputError: an argument is of the wrong type, or the model does not run on `example_inputs`.
        VerificationError: a merge does not compute what its layers compute.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if mode != "lossless":
        raise InvalidInputError(f"mode is {mode!r}, expected 'lossless'")
    if model.training:
        raise TrainingModeError(
            "the model is in training mode, in which batch norm and dropout cannot be merged; call model.eval() first"
        )
    examples = None if example_inputs is None else ExampleInputs.of(model, example_inputs)
    return LosslessCompilation(examples, verify=verify).run(model)


def report_of(module: nn.Module) -> Report:
    """What `compile` did to a module that it returned. Raises `InvalidInputError` for any other module."""
    report = getattr(module, REPORT, None)
    if not isinstance(report, Report):
        raise InvalidInputError(f"this {type(module).__name__} was not returned by elc_fx.compile: it has no report")
    return report
