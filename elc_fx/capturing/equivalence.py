"""Equivalence: what two networks give for the same inputs agrees, as far as they computed it."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from elc_fx.affine import wide
from elc_fx.capturing.capture import Capture
from elc_fx.capturing.shapes import Value, run_recording_values
from elc_fx.errors import CaptureError, VerificationError
from elc_fx.memory import is_out_of_memory


def verify_trace(captured: Capture, expected: Any) -> dict[fx.Node, Value]:
    """The shapes and types of all values on the example inputs, on which the model gives `expected`.

    Both compute with the same weights, so half the digits of the output's own type agree. Raises `CaptureError` where
    the graph gives something else: tracing recorded what the model does for other inputs.
    """
    try:
        output, values = run_recording_values(captured)
        verify_outputs(expected, output)
    except Exception as error:  # whatever it is, the model itself ran
        if is_out_of_memory(error):
            raise
        raise CaptureError(f"the traced graph does not compute what the model computes: {error}") from error
    return values


def rounding_of(*values: Any) -> float:
    """The eps of the coarsest type among types and those of tensors, in containers of any kind; 0 without.

    Those of one byte only store numbers.
    """
    leaves = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor | torch.dtype))
    dtypes = {leaf.dtype if isinstance(leaf, Tensor) else leaf for leaf in leaves}
    inexact = (dtype for dtype in dtypes if (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1)
    return max((torch.finfo(dtype).eps for dtype in inexact), default=0.0)


def verify_outputs(expected: Any, actual: Any, rounding: float = 0.0, name: str = "the compiled model") -> float:
    """Compares the outputs of the original and the compiled model; returns the largest relative error.

    Weights that were rounded again move the output by rounding errors, which deep networks amplify. Half the digits
    must agree, relative to the largest value of each output: those of its data type, or of the coarser one that it was
    computed with. rounding: the eps of that. name: of what gave the actual ones. Raises `VerificationError`.
    """
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(actual)
    if len(left) != len(right) or left_spec != right_spec:
        raise VerificationError(f"{name} returns {right_spec}, the original {left_spec}")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, Tensor) or a.is_meta:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"{name} returns {b.dtype} {tuple(b.shape)}, the original {a.dtype} {tuple(a.shape)}"
            )
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            worst = max(worst, relative_error(a, b))
            if worst > max(torch.finfo(a.dtype).eps, rounding) ** 0.5:
                raise VerificationError(f"{name}'s output differs by {worst:.3g} of its largest value")
    return worst


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Largest difference over the largest finite value of `expected`; NaN and infinities must stand at equal places."""
    a, b = wide(expected), wide(actual)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = a[finite].abs().max().item()
    difference = (a - b)[finite].abs().max().item()
    return difference / scale if scale else difference
