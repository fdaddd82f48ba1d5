"""How the tests judge what `compile` gives, and that it leaves its argument alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from networks import assert_same
from torch import Tensor, nn

import elc_fx


def check(model: nn.Module, *inputs: Tensor, tolerance: float = 1e-9) -> nn.Module:
    """Compiles without and with example inputs; either result equals the model. Returns the first."""
    with_examples = elc_fx.compile(model, tuple(x.clone() for x in inputs))
    compiled = elc_fx.compile(model)
    for result in (with_examples, compiled):
        ours, theirs = [x.clone() for x in inputs], [x.clone() for x in inputs]
        assert_same(result(*ours), model(*theirs), tolerance)
        for mine, original, given in zip(ours, theirs, inputs, strict=True):
            assert torch.equal(mine, original) or torch.equal(mine, given), "an argument was overwritten"
    return compiled


def assert_same_or_refused(compiled: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """A call that is unlike the example inputs is answered rightly or not at all."""
    expected = model(*args, **kwargs)
    try:
        actual = compiled(*args, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, elc_fx.ElcError):
        return
    assert_same(actual, expected)


def opaque_reasons(compiled: nn.Module) -> str:
    return "\n".join(f"{refusal.where}: {refusal.reason}" for refusal in elc_fx.report_of(compiled).opaque)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that could have been changed: attributes of every module, flags, hooks, and the bits of every tensor."""
    attributes = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes[name] = {
            k: (id(v), copy.copy(v) if isinstance(v, dict | list | set) else None) for k, v in vars(module).items()
        }
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    state = {n: (id(t), t.requires_grad, t.grad, t.detach().clone() if not t.is_meta else None) for n, t in tensors}
    return {"attributes": attributes, "state": state}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    assert now["attributes"] == before["attributes"]
    assert list(now["state"]) == list(before["state"])
    for name, (identity, requires_grad, grad, value) in before["state"].items():
        other = now["state"][name]
        assert other[:3] == (identity, requires_grad, grad) and torch.equal(other[3], value), name


def storages(model: nn.Module) -> set[int]:
    """Addresses of the memory of every tensor that a module holds, registered or not."""
    held = [*model.parameters(), *model.buffers()]
    held += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return {t.untyped_storage().data_ptr() for t in held if t.numel()}
