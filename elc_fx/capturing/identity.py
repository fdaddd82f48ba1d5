"""By what a network is known again: what it consists of, the names and shapes of its tensors, and their numbers."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

_PLAIN = (bool, int, float, str, tuple, type(None))  # attributes that a module computes with, such as a slope


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Its `state_dict`, without what modules keep there that is no tensor, which training does not change."""
    return {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}


def described(module: nn.Module) -> str:
    """What a module is, but for the values of its tensors: classes, plain attributes and shapes, of all in it."""
    parts = []
    for name, part in module.named_modules():
        kind = "" if isinstance(part, fx.GraphModule) else f"{type(part).__module__}.{type(part).__qualname__}"
        attributes = {key: value for key, value in vars(part).items() if kind and key != "training"}
        own = sorted((key, value) for key, value in attributes.items() if _is_plain(value))
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        parts.append((name, kind, own, [(key, tuple(value.shape), value.dtype) for key, value in tensors]))
    return repr(parts)


def _is_plain(value: object) -> bool:
    """Whether what is written of it is the same in every process: that of functions and objects is not."""
    return isinstance(value, _PLAIN) and (not isinstance(value, tuple) or all(map(_is_plain, value)))


def structure_of(network: nn.Module | None) -> str:
    """All that it is but for the values of its tensors."""
    graph = network.graph if isinstance(network, fx.GraphModule) else ""
    return "" if network is None else f"{described(network)} {graph}"


def names_and_shapes(network: nn.Module) -> str:
    """A digest of those of all tensors of a network, by which it is known again after training and copying."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return hashlib.sha256(repr([(name, tuple(value.shape)) for name, value in tensors]).encode()).hexdigest()


def fingerprint(network: nn.Module | None) -> str:
    """A digest of all parameters and buffers that it keeps."""
    digest = hashlib.sha256()
    for name, value in ({} if network is None else tensors_of(network)).items():
        add_tensor(digest, name, value)
    return digest.hexdigest()


class Digest(Protocol):
    """One of `hashlib`."""

    def update(self, data: Any, /) -> None: ...


def add_tensor(digest: Digest, name: str, tensor: Tensor) -> None:
    """Goes on with a tensor: its name, its type and shape, its numbers."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)  # as it lies in memory
