"""What training and planning have to be kept from in torch: the caller's autocast, and a faulty kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Inside of the caller's autocast too, each call casts the weights of now.

    Its cache holds what it has cast until the outermost context ends, so that weights could change without effect.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


@contextmanager
def without_autocast(network: nn.Module) -> Iterator[None]:
    """Inside of the caller's autocast too, the network computes in its own type."""
    devices = {value.device.type for value in (*network.parameters(), *network.buffers())}
    with ExitStack() as stack:
        for device in filter(torch.amp.is_autocast_available, devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class SoundConvolutions(TorchFunctionMode):
    """A context in which no strided 1×1 convolution of 2 to 7 channels has its channels last.

    In torch 2.14 the backward of one that has writes beyond its memory, on CPUs with AVX2.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        known = func in (torch.conv2d, torch.ops.aten.conv2d.default)
        return (_conv2d if known else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, *rest: Any, **options: Any
) -> Tensor:
    """Named as torch's own, which is called either way."""
    strided = max(stride if isinstance(stride, tuple | list) else [stride]) > 1
    few = weight.dim() == 4 and max(weight.shape[2:]) == 1 < weight.shape[1] < 8
    if not (strided and few and input.device.type == "cpu"):
        return torch.conv2d(input, weight, bias, stride, *rest, **options)
    # Copies, since of sizes of 1 the strides are anything, and torch goes by them.
    plain, kernel = (value.clone(memory_format=torch.contiguous_format) for value in (input, weight))
    output = torch.conv2d(plain, kernel, bias, stride, *rest, **options)
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return output.contiguous(memory_format=torch.channels_last) if last else output
