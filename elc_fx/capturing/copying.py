"""Copies of networks: of all that has one, and no storage shared."""

from __future__ import annotations

import copy
import pickle
from collections import ChainMap
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

# What deepcopy raises, and code that it calls.
UNCOPYABLE = (TypeError, AttributeError, RuntimeError, NotImplementedError, pickle.PicklingError)


def clone(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that shares no storage with the original. memo: what was copied already, or is to be kept, by id.

    Tensors that a hook computed (old-style weight norm) are no leaves of autograd, which deepcopy refuses: their
    values are copied. So it does buffers of lazy layers, which have none yet.
    """
    for module in value.modules() if isinstance(value, nn.Module) else ():
        for tensor in (*vars(module).values(), *module._buffers.values()):
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            if isinstance(tensor, UninitializedBuffer):
                kind: Any = type(tensor)
                memo[id(tensor)] = kind(device=tensor.device, dtype=tensor.dtype)
            elif tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    new: dict[int, Any] = {}  # a copy that fails leaves halves in its memo
    trial = ChainMap(new, memo)
    try:
        copied = copy.deepcopy(value, trial)  # type: ignore[arg-type]
    except UNCOPYABLE:
        _keep_what_has_no_copy(value, memo)
        return copy.deepcopy(value, memo)
    alive = new.pop(id(trial), [])  # what deepcopy keeps, so that no id in the memo is used again
    memo.update(new)
    memo.setdefault(id(memo), []).extend(alive)
    return copied


def _keep_what_has_no_copy(value: Any, memo: dict[int, Any]) -> None:
    """Locks, generators and the like, which attributes of modules may hold, are shared with the original."""
    for module in value.modules() if isinstance(value, nn.Module) else ():
        for name, attribute in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(attribute, dict(memo))
                except UNCOPYABLE:
                    memo[id(attribute)] = attribute
