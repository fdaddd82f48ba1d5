"""Decoupling nodes: modules that blend what keeps layers apart with what lets them merge.

Each computes gate · original + (1 − gate) · mergeable. At gate 1 it computes just the original, at gate 0 just what is
mergeable, so nothing that would be multiplied by 0 is computed. What a region needs beyond its inner borders (its
rings) is computed only while one of its paddings is not fully original; `Rings` tells its modules.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elc_fx.affine import CONV, Geometry, Ints, Padding, flat_padding, pad
from elc_fx.matching.serial import RingStep, window_padding, window_start

ORIGINAL, BLENDED, MERGEABLE = "original", "blended", "mergeable"
AVERAGE: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Rings:
    """Whether the modules of one region compute the rings around their outputs. Shared by them."""

    def __init__(self) -> None:
        self.paddings: list[DecouplingNode] = []  # and max poolings that pad

    @property
    def on(self) -> bool:
        return any(padding.state != ORIGINAL for padding in self.paddings)


class DecouplingNode(nn.Module):
    """A module with a gate. gate: a scalar buffer in [0, 1], which `set_gate` changes."""

    gate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.ones(()))
        # The gate and its version when it was last read, and what it said; no tuple, which would count as a setting.
        self._read: list[Any] = [None, -1, ORIGINAL]

    @property
    def has_gate(self) -> bool:
        """Whether the gate changes anything."""
        return True

    @property
    def state(self) -> str:
        """What the gate says to compute.

        On a device that one waits for, it is read again only after a change, as torch counts them.
        """
        gate, (seen, version, state) = self.gate, self._read
        if torch.compiler.is_compiling() or gate.is_meta:
            return state
        waits = gate.device.type != "cpu"
        if not waits or gate is not seen or gate.is_inference() or gate._version != version:
            value = float(gate)
            state = ORIGINAL if value == 1 else MERGEABLE if value == 0 else BLENDED
            self._read = [gate, -1 if gate.is_inference() else gate._version, state]
        return state

    def set_gate(self, value: float) -> None:
        self.gate.fill_(value)
        _ = self.state  # for code that torch.compile made, which does not read the gate

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        _ = self.state

    def blend(self, original: Tensor, mergeable: Tensor) -> Tensor:
        gate = self.gate.to(original.dtype)
        return gate * original + (1 - gate) * mergeable

    def extra_repr(self) -> str:
        return f"gate={self.gate.item():g}"


class DecoupledActivation(DecouplingNode):
    """gate · act(x) + (1 − gate) · (slope · x + offset), per channel. slope, offset: [channels], trainable.

    fit: collects what the least-squares line needs, while there is one. norm: the batch norm before it, where that can
    take the line into its own scale and shift (in a list, since it is no submodule).
    """

    def __init__(self, activation: nn.Module, slope: Tensor, offset: Tensor, dims: int) -> None:
        super().__init__()
        self.activation = activation
        self.slope = nn.Parameter(slope)
        self.offset = nn.Parameter(offset)
        self.dims = dims
        self.fit: LineFit | None = None
        self.norm: list[InteriorBatchNorm] = []

    def forward(self, x: Tensor) -> Tensor:
        if any(norm.takes_line for norm in self.norm):
            return x
        if self.state == ORIGINAL:
            y = self._original(x)
            if self.fit is not None:
                self.fit.add(self._linear(x), y)
            return y
        slope, offset = self.slope.to(x.dtype), self.offset.to(x.dtype)
        if self.state == MERGEABLE:
            return self._line(self._linear(x), slope, offset)
        gate = self.gate.to(x.dtype)
        line = self._line(self._linear(x), (1 - gate) * slope, (1 - gate) * offset)
        return torch.addcmul(line, gate, self._original(x))

    def _original(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(x)
        return y

    def _linear(self, x: Tensor) -> Tensor:
        """What the line is of."""
        return x

    def _line(self, x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        """slope · x + offset. Batch norm with mean 0 and variance 1 is that: one kernel, and one for the gradient."""
        if not self.dims:
            return torch.addcmul(offset, slope, x)
        if x.dim() == self.dims + 1:  # no batch; batch norm would take the first spatial axis for the channels
            return self._line(x[None], slope, offset)[0]
        return F.batch_norm(x, torch.zeros_like(offset), torch.ones_like(offset), slope, offset, False, eps=0.0)


class DecoupledPooling(DecoupledActivation):
    """gate · max(x) + (1 − gate) · (slope · mean(x) + offset), per channel, over the windows of a max pooling.

    pooling: where it pads, the maximum is that of what is inside of the border alone, while the mean is that of the
    ring, too, once rings are computed; without them, of zeros. ring_in, ring_out: of x, and of what this gives.
    """

    def __init__(
        self, pooling: nn.Module, slope: Tensor, offset: Tensor, geometry: Geometry, step: RingStep, rings: Rings
    ) -> None:
        super().__init__(pooling, slope, offset, geometry.dims)
        self.kernel_size, self.stride, self.padding = geometry.kernel_size, geometry.stride, geometry.padding
        self.ring_in, self.ring_out, self.rings = step.ring_in, step.ring_out, rings
        if geometry.padded:
            rings.paddings.append(self)

    def _original(self, x: Tensor) -> Tensor:
        if not any(map(any, self.padding)) or not self.rings.on:
            return super()._original(x)
        return pad(super()._original(pad(x, negative(self.ring_in))), self.ring_out)

    def _linear(self, x: Tensor) -> Tensor:
        padded = x if self.rings.on else pad(x, self.padding)  # avg_pool3d takes no input below its kernel
        # torch has no avg_pool3d in half precision on the CPU, and autocast may give another data type.
        wide = padded.float() if self.dims == 3 and x.dtype.itemsize < 4 else padded
        mean: Tensor = AVERAGE[self.dims](wide, self.kernel_size, self.stride)
        return mean.to(x.dtype)


class LineFit:
    """Sums from which the least-squares line of y over x follows, per channel, in float64."""

    def __init__(self, channels: int, dims: int) -> None:
        self.dims = dims
        self.count = 0
        self.sums = torch.zeros(4, channels, dtype=torch.float64)  # of x, y, x², x·y

    def add(self, x: Tensor, y: Tensor) -> None:
        rows, others = (self._rows(t) for t in (x, y))
        self.count += len(rows)
        self.sums += torch.stack([rows.sum(0), others.sum(0), (rows * rows).sum(0), (rows * others).sum(0)]).cpu()

    def _rows(self, t: Tensor) -> Tensor:
        """[values, channels]"""
        t = t.detach().double()
        return t.movedim(-1 - self.dims, -1).flatten(0, -2)

    def line(self) -> tuple[Tensor, Tensor]:
        """Slope and offset, [channels] each. Where x never varies, the line is flat, through the mean of y."""
        x, y, xx, xy = self.sums / max(self.count, 1)
        variance = xx - x * x
        varies = variance > 1e-12 * xx.clamp_min(torch.finfo(torch.float64).tiny)
        slope = torch.where(varies, (xy - x * y) / torch.where(varies, variance, 1), 0)
        return slope, y - slope * x


class DecoupledPadding(DecouplingNode):
    """gate · pad(crop(z)) + (1 − gate) · z, for z with a ring.

    ring: how far z reaches beyond the original's border, per axis and side. padding, mode: what the original pads
    there; beyond that, zeros. While no ring is computed, z goes through: the convolution behind it pads
    (`pads_itself`), or else this does.
    """

    def __init__(self, ring: Padding, padding: Padding, mode: str, rings: Rings, *, pads_itself: bool) -> None:
        super().__init__()
        self.ring = ring
        self.padding = padding
        self.mode = mode
        self.rings = rings
        self.pads_itself = pads_itself
        rings.paddings.append(self)

    def forward(self, z: Tensor) -> Tensor:
        if not self.rings.on:
            return z if self.pads_itself else self._pad(z, self.padding)
        if self.state == MERGEABLE:
            return z
        interior = pad(z, negative(self.ring))
        original = self._pad(interior, self.ring)
        return original if self.state == ORIGINAL else self.blend(original, z)

    def _pad(self, interior: Tensor, ring: Padding) -> Tensor:
        """The original padding as far as it reaches, zeros beyond."""
        if self.mode == "zeros":
            return pad(interior, ring)
        padded = F.pad(interior, flat_padding(self.padding), self.mode)
        return pad(padded, difference(ring, self.padding))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ring={self.ring}, padding={self.padding}, mode={self.mode}"


class RingPad(nn.Module):
    """Adds a ring of zeros to a value, or crops its ring, while rings are computed. change: per axis, side; signed."""

    def __init__(self, change: Padding, rings: Rings) -> None:
        super().__init__()
        self.change = change
        self.rings = rings

    def forward(self, x: Tensor) -> Tensor:
        return pad(x, self.change) if self.rings.on else x

    def extra_repr(self) -> str:
        return f"change={self.change}"


class DecoupledConvolution(DecouplingNode):
    """A convolution of which gate 0 leaves the window `window`: the taps outside of it are multiplied by the gate.

    weight: [out_channels, in_channels // groups, *kernel_size]. window: what is left, per axis; the whole kernel if
    nothing shrinks. padding, mode: of the original. ring_padding: zeros that are still missing when the input has a
    ring, whatever the original's mode.
    """

    mask: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        stride: Ints,
        dilation: Ints,
        groups: int,
        padding: Padding,
        mode: str,
        window: Ints,
        ring_padding: Padding,
        rings: Rings,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding, self.mode, self.ring_padding = padding, mode, ring_padding
        self.rings = rings
        self.window = window
        self.starts = tuple(map(window_start, weight.shape[2:], window))
        if not self.shrinks:
            self.set_gate(0)  # nothing to decouple: the kernel is what it was
        mask = torch.zeros(weight.shape[2:])  # of floats, of which there are averages
        mask[self._slices()] = 1
        self.register_buffer("mask", mask, persistent=False)

    @property
    def has_gate(self) -> bool:
        return self.shrinks

    @property
    def shrinks(self) -> bool:
        return self.window != tuple(self.weight.shape[2:])

    def set_gate(self, value: float) -> None:
        super().set_gate(value if self.shrinks else 0.0)

    def _slices(self) -> tuple[Any, ...]:
        return (..., *(slice(start, start + w) for start, w in zip(self.starts, self.window, strict=True)))

    @property
    def closed_weight(self) -> Tensor:
        """The window of the weight that is left at gate 0."""
        return self.weight[self._slices()]

    def around_window(self, padding: Padding) -> Padding:
        return window_padding(padding, tuple(self.weight.shape[2:]), self.window, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        padding, mode = (self.ring_padding, "zeros") if self.rings.on else (self.padding, self.mode)
        if self.state == MERGEABLE and self.shrinks:
            padding = self.around_window(padding)
            if mode != "zeros" and any(side > 0 for sides in padding for side in sides):
                # Of what the original pads, the window sees the inner part.
                x = F.pad(x, flat_padding(self.padding), mode)
                padding = self.around_window(((0, 0),) * len(padding))
            return self._convolve(x, self.closed_weight, padding, "zeros")
        weight: Tensor = self.weight
        if self.state == BLENDED:
            weight = weight * torch.where(self.mask > 0, 1, self.gate).to(weight.dtype)
        return self._convolve(x, weight, padding, mode)

    def _convolve(self, x: Tensor, weight: Tensor, padding: Padding, mode: str) -> Tensor:
        own: Ints = tuple(low for low, _ in padding)
        if mode != "zeros" or any(low != high or low < 0 for low, high in padding):
            x = pad(x, padding, mode)
            own = (0,) * len(padding)
        output: Tensor = CONV[len(padding)](x, weight, self.bias, self.stride, own, self.dilation, self.groups)
        return output

    def extra_repr(self) -> str:
        out_channels, width, *size = self.weight.shape
        text = f"{width * self.groups}, {out_channels}, kernel_size={tuple(size)}, stride={self.stride}"
        return f"{text}, window={self.window}, {super().extra_repr()}"


class InteriorBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of a value with a ring: the statistics of a training batch are those of the interior alone.

    While no ring is computed, it does what the original's class does. line: the activation behind it; where only its
    line is left of it, this multiplies and adds for both (in a list, since it is no submodule).
    """

    def __init__(self, original: nn.modules.batchnorm._BatchNorm, ring: Padding, rings: Rings) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(original))
        self.original_class: Any = type(original)
        self.ring = ring
        self.rings = rings
        self.line: list[DecoupledActivation] = []

    @property
    def takes_line(self) -> bool:
        """Whether its output is that of the activation behind it."""
        return self.training and self.rings.on and any(line.state == MERGEABLE for line in self.line)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != len(self.ring) + 2:
            raise ValueError(f"expected {len(self.ring) + 2} axes, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not (self.training and self.rings.on):
            return self.original_class.forward(self, input)
        interior = [n - low - high for n, (low, high) in zip(input.shape[2:], self.ring, strict=True)]
        if input.shape[0] * math.prod(interior) == 1:
            raise ValueError(
                f"batch norm in training needs more than 1 value per channel, got an input of {tuple(input.shape)} "
                f"with a ring of {self.ring}"
            )
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        running = (self.running_mean, self.running_var)
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        for line in self.line if self.takes_line else ():
            bias = line.offset if bias is None else torch.addcmul(line.offset, line.slope, bias)
            weight = line.slope if weight is None else line.slope * weight
        output: Tensor = _NormaliseByInterior.apply(input, weight, bias, self.ring, running, momentum or 0.0, self.eps)
        return output


class _NormaliseByInterior(torch.autograd.Function):
    """y = (x − mean) / √(var + eps) · weight + bias with the mean and variance of x's interior, and its gradient.

    With x̂ = (x − mean) / √(var + eps) and sums over all positions, of which m are interior, the gradient is
    dx = weight / √(var + eps) · (dy − [interior] (Σ dy + x̂ Σ dy·x̂) / m).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        ring: Padding,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        mean, variance = torch.batch_norm_update_stats(_interior(x, ring), *running, momentum)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.ring, ctx.eps = ring, eps
        return F.batch_norm(x, mean, variance, weight, bias, False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, mean, variance = ctx.saved_tensors
        scale = torch.rsqrt(variance + ctx.eps)
        ones = torch.ones_like(mean) if weight is None else weight
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, ones, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        interior = _interior(x, ctx.ring)
        count = interior.numel() // interior.shape[1]
        by_x = -ones * scale * scale * dweight / count
        constant = -ones * scale * dbias / count - by_x * mean
        shape = (1, -1, *[1] * len(ctx.ring))
        _interior(dx, ctx.ring).addcmul_(by_x.view(shape).to(x.dtype), interior).add_(constant.view(shape).to(x.dtype))
        return (
            dx,
            None if weight is None else dweight,
            dbias if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )


def _interior(x: Tensor, ring: Padding) -> Tensor:
    """The view of x without its ring."""
    inside: list[Any] = [..., *(slice(low, x.shape[2 + axis] - high) for axis, (low, high) in enumerate(ring))]
    return x[tuple(inside)]


class RegionMarker(nn.Module):
    """Where a region begins or ends: the value goes through."""

    def __init__(self, candidate: str) -> None:
        super().__init__()
        self.candidate = candidate

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return self.candidate


class RegionInput(RegionMarker):
    """channels, dims: those of the value, as the layers of the region read it."""

    def __init__(self, candidate: str, channels: int, dims: int) -> None:
        super().__init__(candidate)
        self.channels, self.dims = channels, dims


class RegionOutput(RegionMarker):
    """original: the node of the captured model whose value this is. model: its `names_and_shapes`."""

    def __init__(self, candidate: str, original: str, model: str) -> None:
        super().__init__(candidate)
        self.original, self.model = original, model


def negative(ring: Padding) -> Padding:
    return tuple((-low, -high) for low, high in ring)


def difference(a: Padding, b: Padding) -> Padding:
    return tuple((p - r, q - s) for (p, q), (r, s) in zip(a, b, strict=True))
