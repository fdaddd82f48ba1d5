"""How far an output is from the one that is wanted: what planning measures, and what training makes small."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from elc_fx.errors import InvalidInputError

LEAST_SQUARE = {torch.float32: 1e-12, torch.float64: 1e-30}  # by which squared errors are divided


def of_classes(output: Any) -> bool:
    """Whether it is [N, classes], of two classes at least."""
    return isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1


def distance(output: Any, wanted: Any, temperature: float | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """How far an output is from the one that is wanted. dtype: what is computed in.

    With a temperature, both [N, classes]: the Kullback–Leibler divergence of the distributions at it, times its square
    (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015); else the mean squared error over the mean
    square, of all tensors of floating point numbers. Raises `InvalidInputError` where they differ in shape, or there is
    none.
    """
    if temperature is not None:
        if not isinstance(wanted, Tensor) or wanted.shape != output.shape:
            shape = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
            raise InvalidInputError(f"the network gives {list(output.shape)}, and the teacher {shape}")
        given, expected = (F.log_softmax(t.to(dtype) / temperature, 1) for t in (output, wanted))
        return F.kl_div(given, expected, reduction="batchmean", log_target=True) * temperature**2
    pairs = [
        (a.to(dtype), b.to(dtype))
        for a, b in zip(pytree.tree_leaves(output), pytree.tree_leaves(wanted), strict=True)
        if isinstance(b, Tensor) and b.is_floating_point()
    ]
    if not pairs:
        raise InvalidInputError(
            "the model gives no tensor of floating point numbers by which outputs could be compared; wrap it in a "
            'module that gives some, or do without: plan(..., loss="uniform"), FinetuneConfig(distillation=0)'
        )
    return relative_square(pairs)


def relative_square(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over the pairs of the squared error over the mean square of the second."""
    errors = [(a - b).square().mean() / b.square().mean().clamp_min(LEAST_SQUARE[b.dtype]) for a, b in pairs]
    return torch.stack(errors).mean()
