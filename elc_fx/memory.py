"""What a network takes in memory, and an error that says so where there is too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from elc_fx.errors import OutOfMemoryError

REFUSED = "can't allocate memory"  # what torch's CPU allocator says, in a plain RuntimeError


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory, on a CPU or a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or REFUSED in str(error)


@contextmanager
def within_memory(model: nn.Module) -> Iterator[None]:
    """Raises OutOfMemoryError where memory ends while this is open. model: what another network is made of."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tensors = [*model.parameters(), *model.buffers()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
        raise OutOfMemoryError(
            f"there is not enough memory for another network beside this one, which takes {size:,.0f} MiB: the result "
            "takes as much again, and its largest layer once more in float64. Free some, load the weights in half "
            "precision, or move the model to a device with more"
        ) from error
