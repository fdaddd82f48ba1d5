"""What modules store on themselves while they run, undone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass
class Attributes:
    """The attributes of every submodule before its forward runs, so that what that stores on them can be undone.

    Of tensors, the values of all but parameters are kept too.
    """

    root: nn.Module
    saved: list[tuple[str, nn.Module, dict[str, Any], dict[str, Any]]] = field(init=False)
    tensors: list[tuple[str, nn.Module, Tensor, int, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.saved, self.tensors = [], []
        for name, module in self.root.named_modules():
            attributes = dict(vars(module))
            containers = {k: _shallow(v) for k, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)}
            self.saved.append((name, module, attributes, containers))
            held = [value for key, values in containers.items() if key != "_parameters" for value in _items(values)]
            for value in (*attributes.values(), *held):
                if isinstance(value, Tensor) and not is_lazy(value) and not value.is_inference():
                    self.tensors.append((name, module, value, value._version, value.detach().clone()))

    def restore(self) -> list[tuple[str, nn.Module]]:
        """Undoes all changes, and returns the modules that had any."""
        changed = []
        for name, module, attributes, containers in self.saved:
            now = vars(module)
            others = {k: v for k, v in attributes.items() if now.get(k, self) is not v}
            more = [k for k in now if k not in attributes]
            same = not others and not more
            now.update(others)  # and nothing else: another thread may be running the module
            for key in more:
                now.pop(key, None)
            for key, before in containers.items():
                container = attributes[key]
                if not _same(container, before):
                    container.clear()
                    (container.extend if isinstance(container, list) else container.update)(before)
                    same = False
            if not same:
                changed.append((name, module))
        for name, module, tensor, version, values in self.tensors:
            # Batch norm updates its statistics without a new version.
            if not tensor.is_meta and (tensor._version != version or not _equal(tensor, values)):
                with torch.no_grad():
                    tensor.copy_(values)
                changed.append((name, module))
        return changed


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undoes what forwards store on the module and its submodules."""
    before = Attributes(module)
    try:
        yield
    finally:
        before.restore()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaN equals NaN. Sparse tensors are taken as unchanged."""
    if a.layout is not torch.strided:
        return True
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _shallow(container: Any) -> Any:
    return type(container)(container)


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(container.get(k, before) is v for k, v in before.items())
    if isinstance(container, set):
        return {id(item) for item in container} == {id(item) for item in before}
    return all(a is b for a, b in zip(container, before, strict=True))
