"""Running layers in float64 while their weights stay as they are: a few rows of a weight are widened at a time.

`Widening` is a mode, under which any module or function takes float64 inputs: whatever is narrower than an operand
beside it is widened, as numpy would. Convolutions and linear layers, which hold nearly all numbers of a model, are
matrix products with the rows of their weight, a block of rows in the cache; everything else is widened whole.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from elc_fx.affine import Geometry, Ints, flat_padding, row_blocks, same_padding

WIDE = {torch.float64, torch.complex128}


class Widening(TorchFunctionMode):
    """While it is active, float64 (complex128) operands make all others of an operation so."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        dtypes = {t.dtype for t in _tensors((*args, *kwargs.values())) if _is_inexact(t)}
        if len(dtypes) < 2 or not dtypes & WIDE:
            return func(*args, **kwargs)
        if (by_rows := BY_ROWS.get(func)) is not None:
            return by_rows(*args, **kwargs)
        dtype = torch.complex128 if any(d.is_complex for d in dtypes) else torch.float64
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if _is_inexact(t) else t, (args, kwargs))
        return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in the data type of `input`: [..., in_channels] → [..., out_channels]."""
    output = _times_rows(input.reshape(1, -1, input.shape[-1]), weight.unsqueeze(0))
    output = output.view(*input.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(output.dtype)


def _convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv1d, F.conv2d or F.conv3d in the data type of `input`: [N, in_channels, *spatial]."""
    stride, dilation = _per_axis(stride, dims), _per_axis(dilation, dims)
    sides = tuple((p, p) for p in _per_axis(0 if isinstance(padding, str) else padding, dims))
    geometry = Geometry(len(weight), input.shape[1], tuple(weight.shape[2:]), stride, dilation, sides, groups)
    if padding == "same":
        geometry = replace(geometry, padding=same_padding(geometry.extent))
    if any(d > 1 for d in dilation):
        output = _by_taps(input, weight, geometry)
    else:
        windows = F.pad(input, flat_padding(geometry.padding))
        for axis, (e, s) in enumerate(zip(geometry.extent, stride, strict=True)):
            windows = windows.unfold(2 + axis, e, s)  # [N, in_channels, *output positions, *window]
        output = _of_windows(windows, weight, groups)
    return output if bias is None else output + bias.to(output.dtype).view(-1, *[1] * dims)


def _by_taps(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Tap after tap, at the output positions where it reads no padding: with a wide dilation, those are few."""
    sizes = input.shape[2:]
    positions = geometry.output_size(sizes)
    output = input.new_zeros(len(input), len(weight), *positions)
    steps = list(zip(sizes, geometry.dilation, geometry.stride, geometry.padding, positions, strict=True))
    for tap in itertools.product(*map(range, geometry.kernel_size)):
        read: list[Any] = [...]
        written: list[Any] = [...]
        for u, (n, d, s, (low, _), count) in zip(tap, steps, strict=True):
            offset = d * u - low  # output position t reads s·t + offset
            first, last = max(-(offset // s), 0), min((n - 1 - offset) // s, count - 1)
            written.append(slice(first, max(last + 1, first)))
            read.append(slice(s * first + offset, max(s * last + offset + 1, 0), s))
        values = input[tuple(read)]
        windows = values.view(*values.shape, *[1] * len(tap))
        if windows.numel():
            at: list[Any] = [..., *(slice(u, u + 1) for u in tap)]
            output[tuple(written)] += _of_windows(windows, weight[tuple(at)], geometry.groups)
    return output


def _of_windows(windows: Tensor, weight: Tensor, groups: int) -> Tensor:
    """[N, in_channels, *positions, *window] → [N, out_channels, *positions], for a weight of that window."""
    dims = weight.dim() - 2
    positions = windows.shape[2 : 2 + dims]
    rows = windows.movedim(1, 1 + dims).reshape(len(windows) * math.prod(positions), groups, -1)
    output = _times_rows(rows.transpose(0, 1), weight.flatten(1).unflatten(0, (groups, -1)))
    return output.view(len(windows), *positions, -1).movedim(-1, 1)


def _times_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ of each group: [groups, positions, width], [groups, rows, width] → [positions, groups · rows]."""
    groups, rows, width = weight.shape
    at_once = row_blocks(rows, width)
    together = []
    for g in _slices(groups, row_blocks(groups, rows * width)):
        blocks = weight[g].split(at_once, dim=1)
        together.append(torch.cat([x[g] @ block.to(x.dtype).transpose(1, 2) for block in blocks], dim=2))
    return torch.cat(together).transpose(0, 1).flatten(1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def _per_axis(value: int | Sequence[int], dims: int) -> Ints:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


BY_ROWS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    **{function: functools.partial(_convolution, 1 + i) for i, function in enumerate((F.conv1d, F.conv2d, F.conv3d))},
}
