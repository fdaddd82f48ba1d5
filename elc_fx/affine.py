"""The algebra: convolutions as values that compose, add and concatenate.

`Geometry` is the shape of an affine map (what it costs, what it may be merged with, why not); `AffineMap` adds the
numbers. Every operation exists for both under one name, so a plan is made on geometries alone, and the map that is
computed afterwards has exactly the geometry that was planned.

Along one spatial axis, output position t of a map with stride s, dilation d and padding (lo, hi) reads its input at
s·t + d·u − lo for each tap u. Positions outside the input read zero, or what `padding_mode` says. This module knows
nothing of graphs or modules. Formulas: docs/algebra.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from elc_fx.errors import NotAffineError

Ints: TypeAlias = tuple[int, ...]
Padding: TypeAlias = tuple[tuple[int, int], ...]
SizeCondition: TypeAlias = tuple[int, int, int, int]  # (axis, a, b, stride): (n + a) // stride == (n + b) // stride

BLOCK = 1 << 17  # numbers of a kernel that are widened at a time: 1 MiB, which stay in the cache
FILL_TOLERANCE = 64  # roundings with which the constants of a padding were computed from a batch norm's numbers

CONV: dict[int, Any] = {0: F.linear, 1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Geometry:
    """The shape of an affine map of one feature map; all per-axis fields have one entry a spatial axis (none: linear).

    padding: (low, high) per axis, signed: a negative entry crops. bias: a constant is added at every output position.
    ones: a further input channel, one everywhere inside the input and padded like it, carries a constant that must
    stop at the border. transposed: a transposed convolution, which composes with pointwise maps only. fill: the padding
    holds a constant per channel, the one that the map before gives for zero input. sizes: conditions on the size of
    the input, without which branches that were added differ in size.
    """

    out_channels: int
    in_channels: int
    kernel_size: Ints
    stride: Ints
    dilation: Ints
    padding: Padding
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    ones: bool = False
    transposed: bool = False
    output_padding: Ints = ()
    fill: bool = False
    sizes: tuple[SizeCondition, ...] = ()

    def __post_init__(self) -> None:
        if self.padding_mode != "zeros" and not self.padded:
            object.__setattr__(self, "padding_mode", "zeros")  # what reads no padding has no mode
        dilation = tuple(1 if k == 1 else d for k, d in zip(self.kernel_size, self.dilation, strict=True))
        object.__setattr__(self, "dilation", dilation)  # one tap has no distance to another

    @classmethod
    def pointwise(
        cls,
        out_channels: int,
        in_channels: int,
        dims: int,
        *,
        groups: int = 1,
        stride: Ints | None = None,
        padding: Padding | None = None,
        bias: bool = False,
    ) -> Geometry:
        """A 1×…×1 map over `dims` spatial axes."""
        one = (1,) * dims
        return cls(
            out_channels,
            in_channels,
            kernel_size=one,
            stride=stride or one,
            dilation=one,
            padding=padding or ((0, 0),) * dims,
            groups=groups,
            bias=bias,
        )

    @classmethod
    def identity(cls, channels: int, dims: int) -> Geometry:
        return cls.pointwise(channels, channels, dims, groups=channels)

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @functools.cached_property
    def extent(self) -> Ints:
        """Input positions from the first tap to the last, per axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    @functools.cached_property
    def padded(self) -> bool:
        return any(low > 0 or high > 0 for low, high in self.padding)

    @functools.cached_property
    def is_pointwise(self) -> bool:
        """One tap, stride 1, no padding: what happens at a position depends on that position alone."""
        return (
            all(k == 1 for k in self.kernel_size)
            and all(s == 1 for s in self.stride)
            and all(p == (0, 0) for p in self.padding)
        )

    @property
    def is_scale(self) -> bool:
        """Pointwise, and every channel for itself."""
        return self.is_pointwise and self.groups == self.in_channels == self.out_channels and not self.transposed

    def output_size(self, size: Sequence[int]) -> Ints:
        """Spatial output size for a spatial input size. Entries below one mean that the input is too small."""
        if self.transposed:
            return tuple(
                (n - 1) * s - low - high + e + o
                for n, s, (low, high), e, o in zip(
                    size, self.stride, self.padding, self.extent, self.output_padding, strict=True
                )
            )
        return tuple(
            (n + low + high - e) // s + 1
            for n, s, (low, high), e in zip(size, self.stride, self.padding, self.extent, strict=True)
        )

    def flops(self, size: Sequence[int]) -> int:
        """FLOPs (two per multiply-add, bias not counted) for one sample of spatial input size `size`."""
        positions = math.prod(size) if self.transposed else math.prod(max(n, 0) for n in self.output_size(size))
        inputs = self.in_channels // self.groups + self.ones
        return 2 * positions * self.out_channels * inputs * math.prod(self.kernel_size)

    @property
    def weights(self) -> int:
        """Number of elements of the kernel."""
        inputs = self.in_channels // self.groups + self.ones
        return self.out_channels * inputs * math.prod(self.kernel_size)

    def then(self, second: Geometry) -> Geometry:
        """The geometry of `second` after this one: kernel taps at s₁·d₂·v + d₁·u, stride s₁·s₂, padding p₁ + s₁·p₂.

        Raises `NotAffineError` where the composition is not one affine map.
        """
        if self.out_channels != second.in_channels or self.dims != second.dims:
            raise NotAffineError(f"{self} gives what {second} does not take")
        bias, ones = self.bias or second.bias, self.ones or second.ones
        if second.sizes:
            raise NotAffineError("the sizes of its branches agree for some inputs only")
        if self.transposed or second.transposed:
            return _compose_transposed(self, second)
        if self.confines_before(second):
            bias, ones = second.bias, self.bias or ones
        step = [s * d for s, d in zip(self.stride, second.dilation, strict=True)]
        kernel_size, dilation = [], []
        for k1, k2, d1, d2 in zip(self.kernel_size, second.kernel_size, self.dilation, step, strict=True):
            unit = math.gcd(d1 if k1 > 1 else 0, d2 if k2 > 1 else 0) or 1
            dilation.append(unit)
            kernel_size.append((d1 * (k1 - 1) + d2 * (k2 - 1)) // unit + 1)
        return Geometry(
            second.out_channels,
            self.in_channels,
            kernel_size=tuple(kernel_size),
            stride=tuple(s * t for s, t in zip(self.stride, second.stride, strict=True)),
            dilation=tuple(dilation),
            padding=moved(self.padding, self.stride, second.padding),
            groups=math.gcd(self.groups, second.groups),
            padding_mode=self.padding_mode if self.padding_mode != "zeros" else second.padding_mode,
            bias=bias,
            ones=ones,
            sizes=self.sizes,
        )

    def confines_before(self, second: Geometry) -> bool:
        """Whether the bias of this map has to stop at the border that `second` pads.

        Raises `NotAffineError` where what `second` sees in its padding is not what this map gives there.
        """
        if self.fill or (second.fill and (self.ones or self.padded)):
            raise NotAffineError("a padding with constants merges with a pointwise map before it only")
        if second.padding_mode != "zeros":
            if not self.is_pointwise or self.ones:
                raise NotAffineError(
                    f"{second.padding_mode} padding commutes with pointwise maps only, not with {self}"
                )
            return False
        if self.padding_mode != "zeros":
            if any(p != (0, 0) for p in second.padding):
                raise NotAffineError(f"{self.padding_mode} padding, then other padding or a crop, is no single padding")
            return False
        if not second.padded:
            if second.ones:
                raise NotAffineError("a bias that stops at an inner border is not affine in the outer input")
            return False
        for extent, inner, outer in zip(self.extent, self.padding, second.padding, strict=True):
            if any(q > 0 for q in outer):
                if extent > 1:
                    raise NotAffineError(
                        f"zero padding {_sides(outer)} follows a kernel of extent {extent}: the border would differ"
                    )
                if any(q > 0 and p < 0 for p, q in zip(inner, outer, strict=True)):
                    raise NotAffineError("a crop is followed by zero padding: what was cropped would come back")
        if not (self.bias or second.ones) or second.fill:
            return False
        if self.interior_tap(second) is None:
            raise NotAffineError("a bias stands before zero padding, and no tap of its map stays inside the input")
        return True

    def interior_tap(self, second: Geometry) -> Ints | None:
        """A tap that reads inside the input at every output position, and outside it where `second` pads."""
        tap = []
        for axis, (k, d, (low, high)) in enumerate(zip(self.kernel_size, self.dilation, self.padding, strict=True)):
            if any(q > 0 for q in second.padding[axis]) and (low, high) != (0, 0):
                return None
            inside = [u for u in range(k) if low <= d * u <= self.extent[axis] - 1 - high]
            if not inside:
                return None
            tap.append(inside[len(inside) // 2])
        return tuple(tap)

    def __add__(self, other: Geometry) -> Geometry:
        """The geometry of the sum of two maps of one input: the smallest grid of taps that holds both kernels.

        Raises `NotAffineError` where the sum is not one affine map.
        """
        if (self.out_channels, self.in_channels, self.dims) != (other.out_channels, other.in_channels, other.dims):
            raise NotAffineError(f"{self} and {other} do not add")
        return _overlay(self, other, self.out_channels, math.gcd(self.groups, other.groups))

    def beside(self, other: Geometry) -> Geometry:
        """The geometry of both maps of one input, concatenated along the channels.

        Raises `NotAffineError` where that is not one affine map.
        """
        if (self.in_channels, self.dims) != (other.in_channels, other.dims):
            raise NotAffineError(f"{self} and {other} do not read one input")
        if self.transposed or other.transposed:
            raise NotAffineError("transposed convolutions are not concatenated")
        return _overlay(self, other, self.out_channels + other.out_channels, groups=1)

    def __str__(self) -> str:
        kind = "linear" if self.dims == 0 else "×".join(map(str, self.kernel_size))
        text = f"{kind} {self.in_channels}→{self.out_channels}"
        if any(s != 1 for s in self.stride):
            text += f" stride {_short(self.stride)}"
        if any(d != 1 for d in self.dilation):
            text += f" dilation {_short(self.dilation)}"
        if any(p != (0, 0) for p in self.padding):
            text += f" padding {_short(tuple(_sides(p) for p in self.padding))}"
            text += "" if self.padding_mode == "zeros" else f" {self.padding_mode}"
        text += f" groups {self.groups}" if self.groups > 1 else ""
        return text + (" transposed" if self.transposed else "") + (" + ones" if self.ones else "")


def moved(first: Padding, stride: Ints, second: Padding) -> Padding:
    """p₁ + s₁·p₂ on each side of each axis: what a layer must see of its input for p₂ more of its output."""
    return tuple((low + s * q, high + s * r) for (low, high), s, (q, r) in zip(first, stride, second, strict=True))


def _short(values: tuple[object, ...]) -> str:
    """One value where all axes agree, else all."""
    return str(values[0]) if len(set(values)) == 1 else "×".join(map(str, values))


def _sides(padding: tuple[int, int]) -> str:
    low, high = padding
    return str(low) if low == high else f"({low}, {high})"


def _compose_transposed(first: Geometry, second: Geometry) -> Geometry:
    """A transposed convolution takes a pointwise map after it, and before it one that maps zeros to zeros."""
    groups = math.gcd(first.groups, second.groups)
    if first.transposed and second.is_pointwise and not second.transposed and not second.ones:
        return replace(first, out_channels=second.out_channels, groups=groups, bias=first.bias or second.bias)
    if second.transposed and first.is_pointwise and not (first.transposed or first.bias or first.ones):
        return replace(second, in_channels=first.in_channels, groups=groups)
    raise NotAffineError("a transposed convolution merges with pointwise maps only (no bias before it)")


def _overlay(a: Geometry, b: Geometry, out_channels: int, groups: int) -> Geometry:
    """The smallest grid of taps that holds the taps of both maps at their places relative to the input."""
    if a.transposed or b.transposed:
        if replace(a, groups=1, bias=False) != replace(b, groups=1, bias=False):
            raise NotAffineError("transposed convolutions of different geometry do not add")
        return replace(a, groups=groups, bias=a.bias or b.bias)
    if a.stride != b.stride:
        raise NotAffineError(f"strides differ: {_short(a.stride)} and {_short(b.stride)}")
    if a.fill or b.fill:
        raise NotAffineError("a padding with constants merges with a pointwise map before it only")
    kernel_size, dilation, padding = [], [], []
    sizes = {*a.sizes, *b.sizes}
    for axis, (k1, k2, d1, d2, (low1, high1), (low2, high2)) in enumerate(
        zip(a.kernel_size, b.kernel_size, a.dilation, b.dilation, a.padding, b.padding, strict=True)
    ):
        last1, last2 = d1 * (k1 - 1) - low1, d2 * (k2 - 1) - low2
        beyond1, beyond2 = high1 - last1, high2 - last2  # the output has (n - 1 + beyond) // stride + 1 positions
        if beyond1 != beyond2:
            if abs(beyond1 - beyond2) >= a.stride[axis]:
                raise NotAffineError("the outputs of the branches differ in size")
            sizes.add((axis, min(beyond1, beyond2) - 1, max(beyond1, beyond2) - 1, a.stride[axis]))
        unit = math.gcd(d1 if k1 > 1 else 0, d2 if k2 > 1 else 0, low1 - low2) or 1
        low, last = max(low1, low2), max(last1, last2)
        kernel_size.append((last + low) // unit + 1)
        dilation.append(unit)
        padding.append((low, max(beyond1, beyond2) + last))
    return Geometry(
        out_channels,
        a.in_channels,
        kernel_size=tuple(kernel_size),
        stride=a.stride,
        dilation=tuple(dilation),
        padding=tuple(padding),
        groups=groups,
        padding_mode=_common_padding_mode(a, b),
        bias=a.bias or b.bias,
        ones=a.ones or b.ones,
        sizes=tuple(sorted(sizes)),
    )


def _common_padding_mode(a: Geometry, b: Geometry) -> str:
    """The mode of the map that reads padding; what reads none does not care."""
    modes = {g.padding_mode for g in (a, b) if g.padded}
    if len(modes) > 1:
        raise NotAffineError(f"padding modes differ: {' and '.join(sorted(modes))}")
    mode = modes.pop() if modes else "zeros"
    if mode != "zeros" and (a.ones or b.ones):
        raise NotAffineError(f"a bias that stops at the border meets {mode} padding")
    return mode


@dataclass(frozen=True)
class AffineMap:
    """A geometry with its numbers. Whatever is computed from them is float64 (complex128 for complex weights).

    kernel: [out_channels, in_channels // groups, *kernel_size], also where the map is transposed. bias: [out_channels]
    or None. ones: [out_channels, *kernel_size], the kernel of the channel of ones (see `Geometry`), or None. fill:
    [in_channels], what the padding holds (see `Geometry`), or None. gain: [out_channels], a factor that `kernel` still
    lacks, or None: so batch norm after a narrow kernel makes no wide one.
    """

    geometry: Geometry
    kernel: Tensor
    bias: Tensor | None = None
    ones: Tensor | None = None
    fill: Tensor | None = None
    gain: Tensor | None = None

    @classmethod
    def scale(cls, weight: Tensor, bias: Tensor | None, dims: int) -> AffineMap:
        """weight · x + bias, per channel. weight, bias: [channels]."""
        channels = weight.shape[0]
        geometry = replace(Geometry.identity(channels, dims), bias=bias is not None)
        return cls(geometry, weight.view(-1, *[1] * (dims + 1)), bias)

    @classmethod
    def identity(cls, channels: int, dims: int, like: Tensor) -> AffineMap:
        return cls.scale(like.new_ones(channels), None, dims)

    @property
    def out_channels(self) -> int:
        return self.geometry.out_channels

    def then(self, second: AffineMap) -> AffineMap:
        """`second` after this map. Raises `NotAffineError` as `Geometry.then` does."""
        geometry = self.geometry.then(second.geometry)
        if second.geometry.is_scale:
            return self._scaled(second, geometry)
        first, second = self.settled(), second.settled()
        if second.fill is not None and not self._gives_for_zeros(second.fill):
            raise NotAffineError("the constants of the padding are not what the map before it gives for zero input")
        transposes = first.geometry.transposed or second.geometry.transposed
        if not transposes and first.geometry.confines_before(second.geometry):
            first = first._confined(second)
        bias = second.bias
        if first.bias is not None:
            passed = _apply_to_constant(second, first.bias)
            bias = passed if bias is None else bias + passed
        return AffineMap(geometry, _compose(first, second, geometry), bias, _compose_ones(first, second, geometry))

    def _scaled(self, second: AffineMap, geometry: Geometry) -> AffineMap:
        """`second`, which scales and shifts every channel for itself, after this map."""
        factor = wide(second.settled().kernel).flatten()
        bias = second.bias
        if self.bias is not None:
            bias = self.bias * factor if bias is None else self.bias * factor + bias
        ones = None if self.ones is None else _per_output(factor, self.ones) * self.ones
        return AffineMap(geometry, self.kernel, bias, ones, gain=factor if self.gain is None else self.gain * factor)

    def settled(self) -> AffineMap:
        """The same map without a gain."""
        if self.gain is None:
            return self
        return replace(self, kernel=_per_output(self.gain, self.kernel) * wide(self.kernel), gain=None)

    def rounded(self, dtype: torch.dtype) -> AffineMap:
        """The same map with its numbers in `dtype`, rounded once. Raises `NotAffineError` on overflow.

        A kernel that lacks its gain gets it block by block, so that there is no float64 kernel.
        """
        bias, ones, fill = (None if t is None else _finite(t.to(dtype)) for t in (self.bias, self.ones, self.fill))
        if self.gain is None:
            return AffineMap(self.geometry, _finite(self.kernel.to(dtype)), bias, ones, fill)
        kernel = torch.empty_like(self.kernel, dtype=dtype)
        gain, rows = _per_output(self.gain, kernel), row_blocks(len(kernel), kernel[0].numel())
        for narrow, factor, block in zip(self.kernel.split(rows), gain.split(rows), kernel.split(rows), strict=True):
            _finite(block.copy_(wide(narrow) * factor))
        return AffineMap(self.geometry, kernel, bias, ones, fill)

    def _gives_for_zeros(self, fill: Tensor) -> bool:
        """Whether the bias is `fill`, up to the rounding of the data type that `fill` was computed in."""
        if fill.is_meta:
            return True
        rounding = FILL_TOLERANCE * torch.finfo(fill.dtype).eps
        fill = wide(fill)
        bias = torch.zeros_like(fill) if self.bias is None else self.bias
        return bool(((bias - fill).abs() <= rounding * torch.maximum(bias.abs().max(), fill.abs().max())).all())

    def _confined(self, second: AffineMap) -> AffineMap:
        """The same map with its bias carried by the channel of ones; where `second` uses ones, a row of ones below."""
        tap = self.geometry.interior_tap(second.geometry)
        assert tap is not None  # Geometry.confines_before refuses otherwise
        rows = self.geometry.out_channels + (second.ones is not None)
        ones = wide(self.kernel[:0]).new_zeros(rows, *self.geometry.kernel_size)
        if self.ones is not None:
            ones[: self.geometry.out_channels] += self.ones
        if self.bias is not None:
            at: tuple[int | slice, ...] = (slice(self.geometry.out_channels), *tap)
            ones[at] += self.bias
        if second.ones is not None:
            ones[(-1, *tap)] = 1
        return AffineMap(replace(self.geometry, bias=False, ones=True), self.kernel, None, ones)

    def __add__(self, other: AffineMap) -> AffineMap:
        """The sum of two maps of one input. Raises `NotAffineError` as `Geometry.__add__` does."""
        geometry = self.geometry + other.geometry
        kernel = _placed(self, geometry) + _placed(other, geometry)
        return AffineMap(
            geometry, kernel, _sum(self.bias, other.bias), _sum(_ones(self, geometry), _ones(other, geometry))
        )

    def beside(self, other: AffineMap) -> AffineMap:
        """Both maps of one input, concatenated along the channels. Raises as `Geometry.beside` does."""
        geometry = self.geometry.beside(other.geometry)
        bias = _stack(self.bias, other.bias, self, other) if geometry.bias else None
        ones = _stack(_ones(self, geometry), _ones(other, geometry), self, other) if geometry.ones else None
        return AffineMap(geometry, torch.cat([_placed(self, geometry), _placed(other, geometry)]), bias, ones)

    def dense(self) -> Tensor:
        """The kernel with all channels connected: [out_channels, in_channels, *kernel_size]."""
        return regroup(self.settled().kernel, self.geometry.groups, 1)

    def with_channel_of_ones(self) -> AffineMap:
        """The same map of the input with a channel of ones appended: dense, one more input channel, no `ones`."""
        assert self.ones is not None
        geometry = replace(self.geometry, in_channels=self.geometry.in_channels + 1, groups=1, ones=False)
        return AffineMap(geometry, torch.cat([self.dense(), self.ones.unsqueeze(1)], dim=1), self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The map of x: [N, in_channels, *spatial], in x's dtype. Defines what a map means; tests compare with it."""
        g = self.geometry
        if self.ones is not None:
            return self.with_channel_of_ones()(append_ones(x, g.dims))
        kernel = self.settled().kernel.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if g.dims == 0:
            return F.linear(x, regroup(kernel, g.groups, 1), bias)
        if g.transposed:
            weight = transposed_weight(kernel, g.groups)
            padding = tuple(low for low, _ in g.padding)
            convolution = CONV_TRANSPOSE[g.dims]
            return convolution(x, weight, bias, g.stride, padding, g.output_padding, g.groups, g.dilation)
        return CONV[g.dims](pad(x, g.padding, g.padding_mode), kernel, bias, g.stride, 0, g.dilation, g.groups)


def append_ones(x: Tensor, dims: int) -> Tensor:
    """x with a last channel of ones. x: [N, C, *spatial] → [N, C + 1, *spatial]."""
    return F.pad(x, [0, 0] * dims + [0, 1], value=1.0)


def same_padding(extent: Sequence[int]) -> Padding:
    """What torch's convolutions pad for padding='same': an odd number has one more behind."""
    return tuple(((e - 1) // 2, e - 1 - (e - 1) // 2) for e in extent)


def flat_padding(padding: Padding) -> Ints:
    """Padding per axis as `torch.nn.functional.pad` takes it: last axis first."""
    return tuple(side for sides in reversed(padding) for side in sides)


def pad(x: Tensor, padding: Padding, mode: str = "zeros") -> Tensor:
    """x padded around its last axes, or cropped where `padding` is negative.

    In two steps where one would crop what only the padding gives, or where the mode does not crop.
    """
    if mode == "zeros" and not any(low < 0 < high or high < 0 < low for low, high in padding):
        return F.pad(x, flat_padding(padding))
    grow = tuple((max(low, 0), max(high, 0)) for low, high in padding)
    x = F.pad(x, flat_padding(grow), "constant" if mode == "zeros" else mode)
    crop = tuple((min(low, 0), min(high, 0)) for low, high in padding)
    return F.pad(x, flat_padding(crop)) if any(map(any, crop)) else x


def regroup(kernel: Tensor, groups: int, target: int) -> Tensor:
    """A kernel of `groups` groups as one of `target` groups, a divisor, with zeros between the former groups.

    kernel: [out, in // groups, *k] → [out, in // target, *k].
    """
    if groups == target:
        return kernel
    out, width, *size = kernel.shape
    merged = groups // target
    blocks = kernel.new_zeros(target, merged, out // groups, merged, width, *size)
    diagonal = blocks.diagonal(dim1=1, dim2=3)  # [target, out // groups, width, *size, merged]
    diagonal.copy_(kernel.view(target, merged, out // groups, width, *size).movedim(1, -1))
    return blocks.view(out, merged * width, *size)


def transposed_weight(kernel: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution, from a kernel and back: [out, in // g, *k] ↔ [in, out // g, *k]."""
    out, width, *size = kernel.shape
    return (
        kernel.view(groups, out // groups, width, *size).transpose(1, 2).reshape(groups * width, out // groups, *size)
    )


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the data type that the algebra computes in."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def row_blocks(rows: int, width: int) -> int:
    """How many of the rows of a kernel are widened at a time: those of one BLOCK, at least one. width: of a row."""
    return max(1, min(rows, BLOCK // max(width, 1)))


def _per_output(factor: Tensor, kernel: Tensor) -> Tensor:
    """[out_channels] in the shape that multiplies a kernel's rows."""
    return factor.view(-1, *[1] * (kernel.dim() - 1))


def _finite(tensor: Tensor) -> Tensor:
    if not tensor.is_meta and not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
        raise NotAffineError(f"its merged weights are not finite, or do not fit into {tensor.dtype}")
    return tensor


def _compose(first: AffineMap, second: AffineMap, geometry: Geometry) -> Tensor:
    """The kernel of second ∘ first: one transposed convolution of the kernels, per group."""
    a, b = first.geometry, second.geometry
    if a.is_scale:  # scales each input channel
        scale = wide(first.kernel).view(b.groups, 1, -1, *[1] * b.dims)
        return (second.kernel.unflatten(0, (b.groups, -1)) * scale).flatten(0, 1)
    first, second = (replace(m, kernel=wide(m.kernel)) for m in (first, second))
    depthwise_first = a.groups == a.in_channels == a.out_channels
    depthwise_second = b.groups == b.in_channels == b.out_channels
    one_pointwise = geometry.dims == 0 or a.transposed or b.transposed
    if one_pointwise or not (depthwise_first or depthwise_second):
        inner = regroup(first.kernel, a.groups, geometry.groups)  # [mid, in / groups, *k₁]
        outer = regroup(second.kernel, b.groups, geometry.groups)  # [out, mid / groups, *k₂]
        if one_pointwise:
            return _compose_pointwise(inner, outer, geometry.groups)
    # One factor is the input of a transposed convolution, its batch what the other factor does not know of.
    step = [s * d for s, d in zip(a.stride, b.dilation, strict=True)]
    second_taps = [t // u if k > 1 else 1 for t, u, k in zip(step, geometry.dilation, b.kernel_size, strict=True)]
    first_taps = [d // u if k > 1 else 1 for d, u, k in zip(a.dilation, geometry.dilation, a.kernel_size, strict=True)]
    convolution = CONV_TRANSPOSE[geometry.dims]
    if depthwise_first or not depthwise_second:
        groups = geometry.groups
        if depthwise_first:
            inner, outer, groups = first.kernel, second.kernel, b.groups
        batch = outer.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # [out / groups, mid, *k₂]
        at_once = a.groups if depthwise_first else groups
        composed = convolution(batch, inner, stride=second_taps, dilation=first_taps, groups=at_once)
        return composed.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    batch = first.kernel.transpose(0, 1)  # [in / groups, mid, *k₁]
    return convolution(batch, second.kernel, stride=first_taps, dilation=second_taps, groups=b.groups).transpose(0, 1)


def _compose_pointwise(inner: Tensor, outer: Tensor, groups: int) -> Tensor:
    """The same where one of the kernels has a single tap. inner: [mid, in / g, *k₁], outer: [out, mid / g, *k₂]."""
    rows, columns = (t.unflatten(0, (groups, -1)) for t in (outer, inner))
    rows, columns = (t.reshape(*t.shape[:3], -1) for t in (rows, columns))
    size = inner.shape[2:] if inner[0, 0].numel() > 1 else outer.shape[2:]
    composed = torch.einsum("gomv,gmiu->goiuv", rows, columns).flatten(0, 1)
    return composed.reshape(*composed.shape[:2], *size)


def _compose_ones(first: AffineMap, second: AffineMap, geometry: Geometry) -> Tensor | None:
    """The kernel that second ∘ first has for the channel of ones: that channel is one more input of `first`."""
    if not geometry.ones:
        return None
    assert first.ones is not None
    kernel = second.dense()
    if second.ones is not None:
        kernel = torch.cat([kernel, second.ones.unsqueeze(1)], dim=1)
    middle = kernel.shape[1]
    inner = AffineMap(
        replace(first.geometry, out_channels=middle, in_channels=1, groups=1), first.ones[:middle].unsqueeze(1)
    )
    outer = AffineMap(replace(second.geometry, in_channels=middle, groups=1), kernel)
    return _compose(inner, outer, replace(geometry, in_channels=1, groups=1)).squeeze(1)


def _apply_to_constant(second: AffineMap, constant: Tensor) -> Tensor:
    """What `second`'s kernel makes of a constant feature map: Σᵥ K₂[·, ·, v] · constant, for [channels]."""
    groups = second.geometry.groups
    summed = wide(second.kernel.flatten(2).sum(2, dtype=constant.dtype) if second.geometry.dims else second.kernel)
    return (summed.unflatten(0, (groups, -1)) @ constant.view(groups, -1, 1)).flatten()


def _placed(operand: AffineMap, geometry: Geometry) -> Tensor:
    """The operand's kernel at its taps on the grid of `geometry`, zeros at the others."""
    kernel = wide(operand.settled().kernel)
    return _on_grid(regroup(kernel, operand.geometry.groups, geometry.groups), operand.geometry, geometry)


def _ones(operand: AffineMap, geometry: Geometry) -> Tensor | None:
    return None if operand.ones is None else _on_grid(operand.ones, operand.geometry, geometry)


def _on_grid(kernel: Tensor, geometry: Geometry, grid: Geometry) -> Tensor:
    if kernel.shape[kernel.dim() - grid.dims :] == grid.kernel_size:
        return kernel
    placed = kernel.new_zeros(*kernel.shape[: kernel.dim() - grid.dims], *grid.kernel_size)
    index: list[Any] = [...]
    for axis, (k, unit) in enumerate(zip(geometry.kernel_size, grid.dilation, strict=True)):
        start = (grid.padding[axis][0] - geometry.padding[axis][0]) // unit
        step = max(geometry.dilation[axis] // unit, 1)
        index.append(slice(start, start + step * (k - 1) + 1, step))
    placed[tuple(index)] = kernel
    return placed


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _stack(a: Tensor | None, b: Tensor | None, first: AffineMap, second: AffineMap) -> Tensor:
    """Both rows of constants one below the other, zeros for one that is missing."""
    template = a if a is not None else b
    assert template is not None
    rows = [
        t if t is not None else template.new_zeros(m.geometry.out_channels, *template.shape[1:])
        for t, m in ((a, first), (b, second))
    ]
    return torch.cat(rows)
