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
RIDGES = (1e-5, 1e-3, 1e-2, 1e-1)  # of the weights' mean diagonal in the normal equations, added to it
FITTED = 0.75  # of the windows, in the choice of a ridge; the others judge
GAIN = 0.03  # of the error, which a larger ridge must be worth
ROUNDING = 1e-6  # of the squared targets
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

    count: how many of each batch. rows: [groups, windows, weights], with a further column of ones for a bias. normals:
    the normal equations of the windows before `cut`, and of the others, in float64. factors: theirs, of those before
    the cut or of all, by ridge (Cholesky).
    """

    geometry: Geometry
    count: int
    rows: Tensor
    cut: int
    normals: tuple[Tensor, Tensor]
    factors: dict[tuple[float, bool], Tensor]

    @classmethod
    def of(cls, sources: Sequence[Tensor], geometry: Geometry) -> Windows:
        """sources: batches of the region's input, [N, in_channels, *size] each (linear: [..., in_channels])."""
        weights = geometry.weights // geometry.out_channels
        count = math.ceil(max(FEWEST_ROWS, ROWS_PER_WEIGHT * weights) / len(sources))
        rows = torch.cat([_windows(x, geometry, count) for x in sources], dim=1).float()
        if geometry.bias:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        cut = int(FITTED * rows.shape[1])
        normals = _products(rows[:, :cut], rows[:, :cut]), _products(rows[:, cut:], rows[:, cut:])
        if not all(normal.isfinite().all() for normal in normals):
            raise InvalidInputError("the calibration batches give activations that are not finite")
        return cls(geometry, count, rows, cut, normals, {})

    def fit(self, targets: Sequence[Tensor], flat: tuple[float, float] = (-math.inf, math.inf)) -> AffineMap:
        """The map whose outputs are closest to `targets`, the region's output for the same batches.

        flat: below and above what the activation behind the region is constant.
        """
        g = self.geometry
        places = Geometry.pointwise(g.out_channels, g.out_channels, g.dims, groups=g.groups)
        goal = torch.cat([_windows(y, places, self.count) for y in targets], dim=1).float()
        factor = self._factor(self._best_ridge(goal), judge=False)
        solution = self._solve(goal, factor)
        for _ in range(ROUNDS if any(math.isfinite(side) for side in flat) else 0):
            reached = self.rows @ solution
            moved = torch.where(goal <= flat[0], reached.clamp_max(flat[0]), goal)
            moved = torch.where(goal >= flat[1], reached.clamp_min(flat[1]), moved)
            solution = self._solve(moved, factor)
        weight, bias = (solution[:, :-1], solution[:, -1].reshape(-1)) if g.bias else (solution, None)
        kernel = weight.mT.reshape(g.out_channels, g.in_channels // g.groups, *g.kernel_size)
        return AffineMap(g, kernel.contiguous(), bias)

    def _best_ridge(self, goal: Tensor) -> float:
        """The smallest with which a fit to the windows before the cut predicts those behind it nearly as well as any.

        Where windows are plenty, or the region is one convolution, that is the smallest of all.
        """
        rows, cut = self.rows, self.cut
        given, judged = _products(rows[:, :cut], goal[:, :cut]), _products(rows[:, cut:], goal[:, cut:])
        squares = float(goal[:, cut:].double().square().sum())
        errors = []
        for ridge in RIDGES:
            solution = torch.cholesky_solve(given, self._factor(ridge, judge=True))
            errors.append(squares + float((solution * (self.normals[1] @ solution - 2 * judged)).sum()))
        most = min(errors) + GAIN * abs(min(errors)) + ROUNDING * squares
        return next(ridge for ridge, error in zip(RIDGES, errors, strict=True) if not error > most)

    def _factor(self, ridge: float, *, judge: bool) -> Tensor:
        """Of the windows before the cut, to be judged, or of all."""
        if (ridge, judge) not in self.factors:
            before, behind = self.normals
            self.factors[ridge, judge] = _factor(before if judge else before + behind, ridge, bias=self.geometry.bias)
        return self.factors[ridge, judge]

    def _solve(self, goal: Tensor, factor: Tensor) -> Tensor:
        return torch.cholesky_solve(_products(self.rows, goal), factor).to(goal.dtype)


def _products(rows: Tensor, values: Tensor) -> Tensor:
    return (rows.mT @ values).double()


def _factor(normal: Tensor, ridge: float, *, bias: bool) -> Tensor:
    """The Cholesky factor, with a larger ridge where the products' rounding in float32 needs it.

    A bias, the last weight, has none: else the fit would depend on the unit in which the input is given.
    """
    tiny = torch.finfo(torch.float32).tiny
    diagonal = normal.diagonal(dim1=1, dim2=2)
    weights = diagonal[:, :-1] if bias else diagonal
    scale = weights.mean(1, keepdim=True).clamp_min(tiny).expand_as(diagonal).clone()
    if bias:
        scale[:, -1] = tiny
    while True:
        factor, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge * scale))
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
    drawn = torch.randperm(math.prod(positions), generator=generator, device="cpu")[:count]
    drawn = drawn.sort().values.to(x.device)  # by samples: windows of one overlap, and are not to judge each other
    rows = x[torch.unravel_index(drawn, positions)]  # [windows, channels, *taps]
    return rows.reshape(len(drawn), groups, -1).movedim(1, 0)
