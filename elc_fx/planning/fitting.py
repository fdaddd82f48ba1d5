"""The best cheap fit: the convolution that comes closest to what a region computes on calibration data.

Least squares over windows of the region's input, in closed form. Where an activation follows that is flat on a side, as
ReLU is below 0, only its output matters there: a target on the flat side is met by any prediction on that side. So the
target there is moved to the prediction, and the same system is solved again; no round makes the error larger, since
each minimises over the targets and the weights in turn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elc_fx.affine import AffineMap, Geometry, pad
from elc_fx.errors import InvalidInputError
from elc_fx.merging.fusion import BATCH_NORM_MODULES, layer_of, padded

ROWS_PER_WEIGHT = 12  # windows that a fit looks at, for each weight of an output channel
FEWEST_ROWS = 16384
RIDGES = (1e-5, 1e-3, 1e-2, 1e-1)  # of the weights' mean diagonal in the normal equations, added to it
FITTED = 0.75  # of the windows, in the choice of a ridge; the others judge
GAIN = 0.03  # of the error, which a larger ridge must be worth
ROUNDING = 1e-6  # of the squared targets
PART = 4096  # weights at a time, of which rows are needed in float64
TINY = torch.finfo(torch.float32).tiny
FILTER_LENGTH = math.sqrt(2)  # of weights of variance 2 / fan-in (He et al., "Delving Deep into Rectifiers", 2015)
SHORTEST = 1e-12  # scale of a filter, which may be zero
ROUNDS = 8  # of moving the targets on a flat side


class Substitute(nn.Module):
    """One convolution in the place of a region. Input and output as the region's.

    norm: a batch norm behind it, for training; nothing until `normalise`. original: the node of the captured model
    whose value this stands for. model: `names_and_shapes` of that.
    """

    def __init__(self, fitted: AffineMap, dtype: torch.dtype, original: str = "", model: str = "") -> None:
        super().__init__()
        self.original, self.model = original, model
        self.geometry = fitted.geometry
        self.layer = layer_of(fitted, dtype)
        self.norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(padded(self.geometry, x)))
        return y

    @torch.no_grad()
    def normalise(self, outputs: Sequence[Tensor]) -> None:
        """Puts a batch norm behind the convolution, with the moments of its outputs, that changes nothing in eval.

        Then the length of a filter does not matter either, but to training: the longer it is, the less a step turns it
        (van Laarhoven, "L2 Regularization versus Batch and Weight Normalization", 2017). Fitted filters are as long as
        the batch norms that they stand for have made them, each another length. Here all get the same, but those of
        zeros, and those in half precision, which may not hold the moments of what longer filters give.
        """
        if not self.geometry.dims or not self.geometry.bias:  # what has no bias shall not get one
            return
        if any(y.dim() != 2 + self.geometry.dims for y in outputs):  # nor does a batch norm take a sample without batch
            return
        layer: Any = self.layer
        values = torch.cat([y.transpose(0, 1).flatten(1) for y in outputs], dim=1).float()  # sizes may differ
        variance, mean = (moment.double() for moment in torch.var_mean(values, 1, correction=0))
        length = torch.linalg.vector_norm(layer.weight.flatten(1), dim=1, dtype=torch.float64)
        scale, bias = (length / FILTER_LENGTH).clamp_min(SHORTEST), layer.bias.double()
        if layer.weight.dtype.itemsize < 4:
            scale, bias = torch.ones_like(scale), torch.zeros_like(bias)
        variance = variance / scale.square()
        if variance.isfinite().all() and variance.max() > torch.finfo(outputs[0].dtype).max:
            return  # half precision may not hold that either
        norm: Any = BATCH_NORM_MODULES[self.geometry.dims](self.geometry.out_channels, device=values.device)
        norm = norm.to(outputs[0])
        norm.running_mean.copy_((mean - bias) / scale)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt() * scale)
        norm.bias.copy_(mean)
        layer.weight.div_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.sub_(bias)  # the batch norm's does the same
        self.norm = norm.eval()


@dataclass(frozen=True)
class Windows:
    """Windows of a region's input, and how to solve for weights on them. They do not depend on the target.

    count: how many of each batch.
    """

    geometry: Geometry
    count: int
    equations: _ByWeights | _ByWindows

    @classmethod
    def of(cls, sources: Sequence[Tensor], geometry: Geometry) -> Windows:
        """sources: batches of the region's input, [N, in_channels, *size] each (linear: [..., in_channels])."""
        weights = geometry.weights // geometry.out_channels
        count = math.ceil(max(FEWEST_ROWS, ROWS_PER_WEIGHT * weights) / len(sources))
        rows = torch.cat([_windows(x, geometry, count) for x in sources], dim=1).float()
        equations = _ByWindows if rows.shape[1] < rows.shape[2] else _ByWeights
        return cls(geometry, count, equations(rows, bias=geometry.bias))

    def fit(self, targets: Sequence[Tensor], flat: tuple[float, float] = (-math.inf, math.inf)) -> AffineMap:
        """The map whose outputs are closest to `targets`, the region's output for the same batches.

        flat: below and above what the activation behind the region is constant.
        """
        g, equations = self.geometry, self.equations
        places = Geometry.pointwise(g.out_channels, g.out_channels, g.dims, groups=g.groups)
        goal = torch.cat([_windows(y, places, self.count) for y in targets], dim=1).float()
        ridge = _best_ridge(equations.errors(goal), goal[:, equations.cut :])
        solution = equations.solve(goal, ridge)
        for _ in range(ROUNDS if any(math.isfinite(side) for side in flat) else 0):
            reached = equations.reached(solution)
            moved = torch.where(goal <= flat[0], reached.clamp_max(flat[0]), goal)
            moved = torch.where(goal >= flat[1], reached.clamp_min(flat[1]), moved)
            solution = equations.solve(moved, ridge)
        weight, bias = equations.weights(solution)
        kernel = weight.mT.reshape(g.out_channels, g.in_channels // g.groups, *g.kernel_size)
        return AffineMap(g, kernel.contiguous(), bias)


def _best_ridge(errors: Sequence[float], judged: Tensor) -> float:
    """The smallest with which a fit to the windows before the cut predicts those behind it nearly as well as any.

    Where windows are plenty, or the region is one convolution, that is the smallest of all.
    """
    most = min(errors) + GAIN * abs(min(errors)) + ROUNDING * float(judged.double().square().sum())
    return next(ridge for ridge, error in zip(RIDGES, errors, strict=True) if not error > most)


class _ByWeights:
    """Ridge regression of targets [groups, windows, channels] on windows by the normal equations: as many as weights.

    rows: [groups, windows, weights], with a further column of ones for a bias. normals: the normal equations of the
    windows before `cut`, and of the others, in float64. factors: theirs, of those before the cut or of all, by ridge.
    """

    def __init__(self, rows: Tensor, *, bias: bool) -> None:
        self.rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2) if bias else rows
        self.bias, self.cut = bias, int(FITTED * rows.shape[1])
        before, behind = self.rows[:, : self.cut], self.rows[:, self.cut :]
        self.normals = _checked(_products(before, before)), _checked(_products(behind, behind))
        self.factors: dict[tuple[float, bool], Tensor] = {}

    def errors(self, goal: Tensor) -> list[float]:
        """Squared errors behind the cut of what is fitted before it, for each of `RIDGES`."""
        rows, cut = self.rows, self.cut
        given, judged = _products(rows[:, :cut], goal[:, :cut]), _products(rows[:, cut:], goal[:, cut:])
        squares = float(goal[:, cut:].double().square().sum())
        solutions = (torch.cholesky_solve(given, self._factor(ridge, judge=True)) for ridge in RIDGES)
        return [squares + float((found * (self.normals[1] @ found - 2 * judged)).sum()) for found in solutions]

    def solve(self, goal: Tensor, ridge: float) -> Tensor:
        """What all windows lead to."""
        factor = self._factor(ridge, judge=False)
        return torch.cholesky_solve(_products(self.rows, goal), factor).to(goal.dtype)

    def reached(self, solution: Tensor) -> Tensor:
        return self.rows @ solution

    def weights(self, solution: Tensor) -> tuple[Tensor, Tensor | None]:
        """[groups, weights, channels], and the bias."""
        return (solution[:, :-1], solution[:, -1].reshape(-1)) if self.bias else (solution, None)

    def _factor(self, ridge: float, *, judge: bool) -> Tensor:
        if (ridge, judge) not in self.factors:
            before, behind = self.normals
            normal = before if judge else before + behind
            diagonal = normal.diagonal(dim1=1, dim2=2)
            weights = diagonal[:, :-1] if self.bias else diagonal
            scale = weights.mean(1, keepdim=True).clamp_min(TINY).expand_as(diagonal).clone()
            if self.bias:  # which has no ridge: else the fit would depend on the unit in which the input is given
                scale[:, -1] = TINY
            self.factors[ridge, judge] = _cholesky(normal, scale, ridge)
        return self.factors[ridge, judge]


class _ByWindows:
    """The same fits by their dual, with as many equations as windows: for fewer windows than weights.

    The weights are a combination of windows (Saunders et al., "Ridge Regression Learning Algorithm in Dual Variables",
    1998), with a bias of the windows less their mean. rows: [groups, windows, weights], divided by `unit`, less `mean`.
    products: of the rows with each other, in float64, as they are for all of them, and for those before the cut, whose
    mean is another. squares: of each window, by weight. factors: by ridge, of those before the cut or of all.
    """

    def __init__(self, rows: Tensor, *, bias: bool) -> None:
        self.bias, self.cut = bias, int(FITTED * rows.shape[1])
        squares = torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64).square() / rows.shape[2]
        self.unit = squares.mean(1).sqrt().clamp_min(TINY**0.5).view(-1, 1, 1)  # weights of less would be infinite
        self.squares = squares / self.unit[..., 0].square()
        rows = (rows / self.unit).to(rows.dtype)
        self.mean = rows.mean(1, keepdim=True)
        self.rows = rows - self.mean if bias else rows
        parts = (part.double() for part in self.rows.split(PART, dim=2))
        self.products = _checked(functools.reduce(torch.add, (part @ part.mT for part in parts)))
        before = self.products[:, :, : self.cut]
        if bias:
            before = before - before.mean(2, keepdim=True)
            before = before - before[:, : self.cut].mean(1, keepdim=True)
        self.before = before
        self.factors: dict[tuple[float, bool], Tensor] = {}

    def errors(self, goal: Tensor) -> list[float]:
        """Squared errors behind the cut of what is fitted before it, for each of `RIDGES`."""
        cut, goal = self.cut, goal.double()
        given, judged = goal[:, :cut], goal[:, cut:]
        middle = given.mean(1, keepdim=True) if self.bias else goal.new_zeros(())
        solutions = (torch.cholesky_solve(given - middle, self._factor(ridge, judge=True)) for ridge in RIDGES)
        return [float((self.before[:, cut:] @ found + middle - judged).square().sum()) for found in solutions]

    def solve(self, goal: Tensor, ridge: float) -> Tensor:
        """What all windows lead to: how they are combined, and the mean target for a bias."""
        factor, goal = self._factor(ridge, judge=False), goal.double()
        if not self.bias:
            return torch.cholesky_solve(goal, factor)
        middle = goal.mean(1, keepdim=True)
        return torch.cat([torch.cholesky_solve(goal - middle, factor), middle], dim=1)

    def reached(self, solution: Tensor) -> Tensor:
        count = self.rows.shape[1]
        reached = self.products @ solution[:, :count]
        return (reached + solution[:, count:] if self.bias else reached).to(self.rows.dtype)

    def weights(self, solution: Tensor) -> tuple[Tensor, Tensor | None]:
        """[groups, weights, channels], and the bias."""
        count = self.rows.shape[1]
        weight = self.rows.mT @ solution[:, :count].to(self.rows.dtype)
        bias = (solution[:, count:] - self.mean @ weight).reshape(-1).to(weight.dtype) if self.bias else None
        return (weight / self.unit).to(weight.dtype), bias

    def _factor(self, ridge: float, *, judge: bool) -> Tensor:
        if (ridge, judge) not in self.factors:
            cut = self.cut if judge else None
            products, squares = (self.before if judge else self.products)[:, :cut], self.squares[:, :cut]
            scale = squares.sum(1, keepdim=True).clamp_min(1).expand_as(squares)
            self.factors[ridge, judge] = _cholesky(products, scale, ridge)
        return self.factors[ridge, judge]


def _products(rows: Tensor, values: Tensor) -> Tensor:
    return (rows.mT @ values).double()


def _checked(products: Tensor) -> Tensor:
    if not products.isfinite().all():
        raise InvalidInputError("the calibration batches give activations that are not finite")
    return products


def _cholesky(matrix: Tensor, scale: Tensor, ridge: float) -> Tensor:
    """The factor, with a larger ridge where the products' rounding in float32 needs it."""
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge * scale))
        if not failed.any():
            return factor
        ridge *= 10


def _windows(x: Tensor, geometry: Geometry, count: int) -> Tensor:
    """About `count` windows, evenly drawn, as [groups, windows, in_channels // groups · taps]."""
    dims, groups = geometry.dims, geometry.groups
    if dims:
        x = pad(x if x.dim() == dims + 2 else x.unsqueeze(0), geometry.padding)
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
