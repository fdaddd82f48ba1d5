"""The best cheap fit: the convolution that comes closest to what a region computes on calibration data.

Least squares over windows of the region's input, in closed form. Where an activation follows that is flat on a side, as
ReLU is below 0, only its output matters there: a target on the flat side is met by any prediction on that side. So the
target there is moved to the prediction, and the same system is solved again; no round makes the error larger, since
each minimises over the targets and the weights in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elc_fx.affine import AffineMap, Geometry, pad_zeros
from elc_fx.errors import InvalidInputError
from elc_fx.fusion import layer_of, padded

ROWS_PER_WEIGHT = 12  # windows that a fit looks at, for each weight of an output channel
FEWEST_ROWS = 16384
RIDGE = 1e-5  # of the mean diagonal of the normal equations, added to it; more where they are singular
BATCH_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ROUNDS = 8  # of moving the targets on a flat side


class Substitute(nn.Module):
    """One convolution in the place of a region. Input and output as the region's.

    norm: a batch norm behind it, for training; nothing until `normalise`. original: the node of the captured model
    whose value this stands for.
    """

    def __init__(self, fitted: AffineMap, dtype: torch.dtype, original: str = "") -> None:
        super().__init__()
        self.original = original
        self.geometry = fitted.geometry
        self.layer = layer_of(fitted, dtype)
        self.norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(padded(self.geometry, x)))
        return y

    def normalise(self, outputs: Sequence[Tensor]) -> None:
        """Puts a batch norm behind the convolution, with the moments of its outputs, that changes nothing in eval."""
        if not self.geometry.dims or not self.geometry.bias:  # what has no bias shall not get one
            return
        if any(y.dim() != 2 + self.geometry.dims for y in outputs):  # nor does a batch norm take a sample without batch
            return
        values = torch.cat([y.transpose(0, 1).flatten(1) for y in outputs], dim=1).float()  # sizes may differ
        variance, mean = torch.var_mean(values, 1, correction=0)
        norm: Any = BATCH_NORMS[self.geometry.dims](self.geometry.out_channels, device=values.device)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.data.copy_((variance + norm.eps).sqrt())
        norm.bias.data.copy_(mean)
        self.norm = norm.to(outputs[0]).eval()


@dataclass(frozen=True)
class Windows:
    """Windows of a region's input, and how to solve for weights on them. They do not depend on the target.

    count: how many of each batch. rows: [groups, windows, weights], with a further column of ones for a bias. factor:
    of the normal equations (Cholesky), in float64.
    """

    geometry: Geometry
    count: int
    rows: Tensor
    factor: Tensor

    @classmethod
    def of(cls, sources: Sequence[Tensor], geometry: Geometry) -> Windows:
        """sources: batches of the region's input, [N, in_channels, *size] each (linear: [..., in_channels])."""
        weights = geometry.weights // geometry.out_channels
        count = math.ceil(max(FEWEST_ROWS, ROWS_PER_WEIGHT * weights) / len(sources))
        rows = torch.cat([_windows(x, geometry, count) for x in sources], dim=1).float()
        if geometry.bias:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        normal = (rows.mT @ rows).double()
        return cls(geometry, count, rows, _factor(normal))

    def fit(self, targets: Sequence[Tensor], flat: tuple[float, float] = (-math.inf, math.inf)) -> AffineMap:
        """The map whose outputs are closest to `targets`, the region's output for the same batches.

        flat: below and above what the activation behind the region is constant.
        """
        g = self.geometry
        places = Geometry.pointwise(g.out_channels, g.out_channels, g.dims, groups=g.groups)
        goal = torch.cat([_windows(y, places, self.count) for y in targets], dim=1).float()
        solution = self._solve(goal)
        for _ in range(ROUNDS if any(math.isfinite(side) for side in flat) else 0):
            reached = self.rows @ solution
            moved = torch.where(goal <= flat[0], reached.clamp_max(flat[0]), goal)
            moved = torch.where(goal >= flat[1], reached.clamp_min(flat[1]), moved)
            solution = self._solve(moved)
        weight, bias = (solution[:, :-1], solution[:, -1].reshape(-1)) if g.bias else (solution, None)
        kernel = weight.mT.reshape(g.out_channels, g.in_channels // g.groups, *g.kernel_size)
        return AffineMap(g, kernel.contiguous(), bias)

    def _solve(self, goal: Tensor) -> Tensor:
        return torch.cholesky_solve((self.rows.mT @ goal).double(), self.factor).to(goal.dtype)


def _factor(normal: Tensor) -> Tensor:
    """The Cholesky factor, with a larger ridge where the products' rounding in float32 needs it."""
    if not normal.isfinite().all():
        raise InvalidInputError("the calibration batches give activations that are not finite")
    mean = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = mean[:, None, None] * torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    ridge = RIDGE
    while True:
        factor, failed = torch.linalg.cholesky_ex(normal + ridge * scaled)
        if not failed.any():
            return factor
        ridge *= 10


def _windows(x: Tensor, geometry: Geometry, count: int) -> Tensor:
    """About `count` windows, evenly drawn, as [groups, windows, in_channels // groups · taps]."""
    dims, groups = geometry.dims, geometry.groups
    if dims:
        x = pad_zeros(x if x.dim() == dims + 2 else x.unsqueeze(0), geometry.padding)
        for axis, (extent, stride) in enumerate(zip(geometry.extent, geometry.stride, strict=True)):
            x = x.unfold(2 + axis, extent, stride)
        taps: Any = (..., *(slice(None, None, d) for d in geometry.dilation))
        x = x[taps].movedim(1, 1 + dims)  # [N, *positions, channels, *taps]
    else:
        x = x.flatten(0, -2)
    positions = tuple(x.shape[: 1 + dims])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(math.prod(positions), generator=generator, device="cpu")[:count].to(x.device)
    rows = x[torch.unravel_index(drawn, positions)]  # [windows, channels, *taps]
    return rows.reshape(len(drawn), groups, -1).movedim(1, 0)
