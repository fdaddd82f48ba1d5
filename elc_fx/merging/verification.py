"""Verification: a merged convolution computes what its region computed, shown on random inputs in float64.

One region at a time: only the weights of the region at hand are ever held in float64. The tolerance is not a number
of taste: rounding a kernel to its data type changes the output by at most eps · (|K| ∗ |x| + |b|) at each position,
and that is what may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.affine import AffineMap, Geometry, row_blocks, wide
from elc_fx.capturing.graph import unknown
from elc_fx.capturing.shapes import PlainInterpreter
from elc_fx.errors import VerificationError
from elc_fx.matching.interpret import weight_of
from elc_fx.matching.regions import Join, Merge
from elc_fx.merging.widening import Widening

SLACK = 64 * torch.finfo(torch.float64).eps  # of the float64 arithmetic itself, relative to the sum of magnitudes


def verify_merge(
    captured: fx.GraphModule,
    merge: Merge,
    source: fx.Node,
    nodes: Sequence[fx.Node],
    merged: Callable[[Tensor], Tensor],
    stored: AffineMap,
) -> None:
    """Compares a merge with the nodes that it replaces, which read `source`, in the order of the graph.

    merged: what is to stand in their place. stored: its map, with the numbers as stored. Raises `VerificationError`,
    naming the region.
    """
    if stored.kernel.is_meta:
        return
    x = _random_input(merge.geometry, stored.kernel, merge.counted_axes)
    with torch.no_grad(), Widening():
        expected, actual = _run_region(captured, merge, source, nodes, x.clone()), merged(x)
    if actual.shape != expected.shape:
        difference = f"its output has shape {tuple(actual.shape)}, the region's {tuple(expected.shape)}"
    else:
        info = torch.finfo(stored.kernel.dtype)
        rounding = info.eps * _largest_outputs(stored) + info.tiny * info.eps * (stored.kernel[0].numel() + 2)
        if _agree(actual, expected, rounding):
            return
        # Intermediate results may be larger than the merged map shows, and cancel.
        rounding += SLACK * _largest_outputs(merge.affine_map(magnitude=True).settled())
        if _agree(actual, expected, rounding):
            return
        error = (actual - expected).abs()
        difference = f"largest difference {error.max().item():.3g}, allowed {rounding.max().item():.3g}"
    raise VerificationError(
        f"merged region `{merge.name}` ({merge.geometry}) does not compute what its layers compute: {difference}"
    )


def _agree(actual: Tensor, expected: Tensor, rounding: Tensor) -> bool:
    within = (actual - expected).abs() <= rounding
    return bool((within | (~expected.isfinite() & ~actual.isfinite())).all())


def _random_input(geometry: Geometry, kernel: Tensor, axes: int | None) -> Tensor:
    """Values in [−1, 1] at a size so small that borders matter most, yet large enough for every layer of the region.

    axes: how many there are, if that matters.
    """
    size = []
    for e, s, sides in zip(geometry.extent, geometry.stride, geometry.padding, strict=True):
        low, high = sides
        every_tap = max(e - max(low, 0) - max(high, 0), e // 2 + 1) - min(low, 0) - min(high, 0)
        second = s if e > 1 and min(low, high) <= 0 else s - 1  # so that there are two output positions
        unpadded = e if geometry.dims == 3 else 0  # torch's avg_pool3d does not count the padding of what is too small
        size.append(max(every_tap, low + 1, high + 1, unpadded) + second)
    while geometry.transposed and min(geometry.output_size(tuple(size))) < 2:
        size = [length + 1 for length in size]
    for axis, a, b, stride in geometry.sizes:
        while (size[axis] + a) // stride != (size[axis] + b) // stride:
            size[axis] += 1
    between = [] if axes is None else [1] * (axes - geometry.dims - 2)
    shape = (1 if size else 2, *between, geometry.in_channels, *size)
    generator = torch.Generator("cpu").manual_seed(0)
    x = 2 * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") - 1
    return wide(x.to(kernel.device, kernel.dtype))


def _largest_outputs(affine: AffineMap) -> Tensor:
    """Σ|K| + |b| per output channel, which bounds the output for inputs in [−1, 1]: [out_channels, 1, …]."""
    rows = affine.kernel.flatten(1)
    blocks = rows.split(row_blocks(*rows.shape))
    half = affine.kernel.dtype in (torch.float16, torch.bfloat16, torch.complex32)
    bound = wide(torch.cat([block.abs().sum(1, dtype=torch.float32 if half else None) for block in blocks]))
    for constant in (affine.bias, affine.ones):
        if constant is not None:
            bound = bound + constant.reshape(len(bound), -1).abs().sum(1)
    return bound.view(-1, *[1] * affine.geometry.dims)


class _RegionRunner(PlainInterpreter):
    """Runs single nodes of a graph, without the hooks of the modules that they call."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _without_hooks(self.fetch_attr(target))(*args, **kwargs)


def _run_region(captured: fx.GraphModule, merge: Merge, source: fx.Node, nodes: Sequence[fx.Node], x: Tensor) -> Tensor:
    """The region's own nodes on x."""
    runner = _RegionRunner(captured, garbage_collect_values=False)
    values = runner.env = {source: x, merge.source: x}
    for last in nodes:
        for node in unknown(last, values):  # constants on the way, as the model computes them
            values[node] = runner.run_node(node)
    if (output := merge.output) is not None:
        return values[output]  # type: ignore[no-any-return]
    return _join_branches(merge, values)


def _join_branches(merge: Merge, values: dict[fx.Node, Any]) -> Tensor:
    (join,) = merge.parts
    assert isinstance(join, Join)
    outputs = [branch.coefficient * values[branch.value] for branch in join.branches]
    if join.concatenates:
        return torch.cat(outputs, dim=1 if merge.geometry.dims else -1)
    return torch.stack(outputs).sum(0)


def _without_hooks(module: nn.Module) -> nn.Module:
    """The same module; with old-style weight norm, whose hook changes its module, one that has the weight already."""
    if not module._forward_pre_hooks:
        return module
    plain = type(module).__new__(type(module))
    plain.__dict__.update({**vars(module), "_forward_pre_hooks": {}, "weight": weight_of(module)})
    return plain
