"""What the processes of one job have to agree on: one of them finds it out, and the others are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from elc_fx.errors import ElcError

T = TypeVar("T")


def of_the_first(call: Callable[[], T]) -> T:
    """What the call gives in the first process, in all of them; an error, too. All have to ask for it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return call()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = call()
        except Exception as error:  # whatever it is, the others wait to be told
            told[1] = error if isinstance(error, ElcError) else ElcError(f"the first process failed: {error!r}")
            dist.broadcast_object_list(told)
            raise
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]  # type: ignore[no-any-return]
