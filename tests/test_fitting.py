"""The fitted convolution: finds the one that made the targets, and clipped targets do not mislead it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import elc_fx
from elc_fx.affine import AffineMap, Geometry
from elc_fx.matching.activations import flat_beyond
from elc_fx.merging.fusion import padded
from elc_fx.planning.fitting import RIDGES, Substitute, Windows, _ByWeights, _ByWindows

GEOMETRIES = {
    "grouped, strided, dilated": Geometry(6, 4, (3, 3), (2, 1), (1, 2), ((1, 1), (2, 1)), groups=2),
    "cropped": Geometry(5, 3, (3,), (1,), (1,), ((-1, 0),)),
    "volume": Geometry(4, 2, (1, 2, 3), (1, 1, 1), (1, 1, 1), ((0, 0), (1, 0), (1, 1))),
    "linear": Geometry(5, 3, (), (), (), ()),
}


@pytest.mark.parametrize("flat", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_convolution_that_made_the_targets_is_found(name: str, flat: tuple[float, float]) -> None:
    geometry = replace(GEOMETRIES[name], bias=True)
    torch.manual_seed(0)
    kernel = torch.randn(geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    made = AffineMap(geometry, kernel, torch.randn(geometry.out_channels))
    region = Substitute(made, torch.float32)
    sources = [torch.randn(32, geometry.in_channels, *[9] * geometry.dims) for _ in range(3)]
    with torch.no_grad():
        found = Windows.of(sources, geometry).fit([region(x) for x in sources], flat)
        assert torch.allclose(found.kernel, kernel, atol=1e-3) and torch.allclose(found.bias, made.bias, atol=1e-3)
        assert torch.allclose(Substitute(found, torch.float32)(sources[0]), region(sources[0]), atol=1e-2)


def test_rounds_after_a_relu_make_the_error_smaller() -> None:
    """The targets are not those of one convolution."""
    torch.manual_seed(0)
    region = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    geometry = Geometry(4, 3, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), bias=True)
    x = torch.randn(64, 3, 10, 10)
    with torch.no_grad():
        y = region(x) - 0.3
        windows, errors = Windows.of([x], geometry), []
        for flat in ((-math.inf, math.inf), (0.0, math.inf)):
            fitted = Substitute(windows.fit([y], flat), torch.float32)
            errors.append(float((fitted(x).relu() - y.relu()).square().mean()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-20, 1e15])
def test_fewer_windows_than_weights(scale: float) -> None:
    """Singular normal equations, of which rounding makes indefinite ones."""
    torch.manual_seed(0)
    geometry = Geometry(4, 64, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), bias=True)
    x = scale * torch.randn(2, 64, 6, 6).relu() * torch.logspace(-6, 3, 64).view(-1, 1, 1)
    y = torch.randn(2, 4, 6, 6)
    fitted = Windows.of([x], geometry).fit([y], (0.0, math.inf))
    assert fitted.kernel.isfinite().all() and fitted.bias is not None and fitted.bias.isfinite().all()
    with pytest.raises(elc_fx.InvalidInputError, match="not finite"):
        Windows.of([x / 0], geometry)


@pytest.mark.parametrize("windows", [30, 60])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("bias", [True, False])
def test_both_systems_of_equations_have_the_same_solution(bias: bool, unit: float, windows: int) -> None:
    """Of 40 weights; in float64, where neither loses digits."""
    torch.manual_seed(0)
    rows, goal = unit * (torch.randn(2, windows, 40) + 0.5).double(), torch.randn(2, windows, 3).double() + 2
    by_weights, by_windows = _ByWeights(rows, bias=bias), _ByWindows(rows, bias=bias)
    assert by_windows.errors(goal) == pytest.approx(by_weights.errors(goal), rel=1e-6)
    for ridge in RIDGES:
        solutions = by_weights.solve(goal, ridge), by_windows.solve(goal, ridge)
        (weight, offset), (found, found_offset) = by_weights.weights(solutions[0]), by_windows.weights(solutions[1])
        torch.testing.assert_close(unit * found, unit * weight, rtol=1e-6, atol=1e-8)
        reached = by_windows.reached(solutions[1])
        torch.testing.assert_close(reached, by_weights.reached(solutions[0]), rtol=1e-6, atol=1e-8)
        if offset is None or found_offset is None:
            assert offset is None and found_offset is None
            torch.testing.assert_close(rows @ found, reached, rtol=1e-6, atol=1e-8)
        else:
            torch.testing.assert_close(found_offset, offset, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(rows @ found + found_offset.view(2, 1, 3), reached, rtol=1e-6, atol=1e-8)


def test_what_is_next_to_nothing_has_no_huge_weights() -> None:
    """A channel that is nearly dead in the calibration batches may live in others."""
    torch.manual_seed(0)
    geometry = Geometry(2, 2, (9, 9), (1, 1), (1, 1), ((4, 4), (4, 4)), groups=2, bias=True)
    x = torch.randn(2, 2, 5, 5) * torch.tensor([1.0, 1e-35]).view(-1, 1, 1)
    fitted = Windows.of([x], geometry).fit([torch.randn(2, 2, 5, 5)])
    assert float(fitted.kernel.abs().max()) < 1e6


def test_windows_are_factorised_once_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    calls: list[object] = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (calls.append(0), cholesky(matrix))[1])
    for count in (2, 64):  # fewer windows than weights, and more
        x = [torch.randn(count, 16, 4, 4)]
        windows = Windows.of(x, Geometry(4, 16, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), bias=True))
        calls.clear()
        for _ in range(3):
            windows.fit([torch.randn(count, 4, 4, 4)])
        assert len(RIDGES) < len(calls) <= 2 * len(RIDGES)


def test_a_wide_layer_with_few_samples_is_fitted_in_no_time() -> None:
    """By its weights that would be 25,088 equations: 5 GB each of four times."""
    torch.manual_seed(0)
    region = nn.Linear(25088, 16)
    x = [torch.rand(64, 25088) for _ in range(4)]
    with torch.no_grad():
        found = Substitute(
            Windows.of(x, Geometry(16, 25088, (), (), (), (), bias=True)).fit([region(y) for y in x]), torch.float32
        )
        torch.testing.assert_close(found(x[0]), region(x[0]), rtol=0, atol=1e-3)


def test_a_region_without_a_bias_gets_none() -> None:
    """Else the fitted network would have more parameters than were counted."""
    torch.manual_seed(0)
    geometry = Geometry(4, 3, (1, 3), (1, 1), (1, 1), ((0, 0), (1, 1)))
    x = torch.randn(64, 3, 10, 10)
    region = nn.Conv2d(3, 4, (1, 3), padding=(0, 1), bias=False)
    with torch.no_grad():
        fitted = Substitute(Windows.of([x], geometry).fit([region(x)]), torch.float32)
        fitted.normalise([region(x)])
        torch.testing.assert_close(fitted(x), region(x), rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in fitted.parameters()) == region.weight.numel()


def test_flat_sides() -> None:
    assert flat_beyond(nn.ReLU()) == (0.0, math.inf)
    assert flat_beyond(nn.ReLU6()) == (0.0, 6.0)
    assert flat_beyond(nn.Hardtanh(-2.0, 3.0)) == (-2.0, 3.0)
    assert flat_beyond(nn.GELU()) == (-math.inf, math.inf)
    for activation in (nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(-2.0, 3.0)):
        low, high = flat_beyond(activation)
        assert activation(torch.tensor(low - 1.0)) == activation(torch.tensor(low))
        if math.isfinite(high):
            assert activation(torch.tensor(high + 1.0)) == activation(torch.tensor(high))


def test_a_region_that_gives_nothing() -> None:
    geometry = Geometry(2, 3, (3,), (1,), (1,), ((1, 1),), bias=True)
    fitted = Windows.of([torch.randn(4, 3, 9)], geometry).fit([torch.zeros(4, 2, 9)])
    assert not fitted.kernel.any()


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 100.0])
def test_the_unit_of_the_input_does_not_matter(scale: float) -> None:
    """Nor does that of the ones that a bias is for: small inputs had no weights left, large ones no bias."""
    torch.manual_seed(0)
    geometry = Geometry(4, 8, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), bias=True)
    region = Substitute(AffineMap(geometry, torch.randn(4, 8, 3, 3) / scale, torch.randn(4)), torch.float32)
    x = scale * torch.rand(64, 8, 8, 8)
    with torch.no_grad():
        found = Substitute(Windows.of([x], geometry).fit([region(x)]), torch.float32)
        torch.testing.assert_close(found(x), region(x), rtol=1e-3, atol=1e-3)


def test_windows_of_one_image_do_not_choose_a_ridge_for_each_other() -> None:
    """They overlap, so that a fit to some of them knows the others, whatever it is worth elsewhere."""
    torch.manual_seed(0)
    geometry = Geometry(8, 64, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), bias=True)
    region = nn.Sequential(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, 8, 1))
    x = nn.functional.interpolate(torch.randn(8, 64, 3, 3), size=(16, 16), mode="bilinear")
    with torch.no_grad():
        together, apart = ([*x.split(size)] for size in (8, 1))
        found = [Windows.of(batches, geometry).fit([region(y) for y in batches]) for batches in (together, apart)]
    torch.testing.assert_close(found[0].kernel, found[1].kernel, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalising_changes_nothing_but_lengths(dtype: torch.dtype) -> None:
    """Filters of many lengths, one that is zero, and one whose bias is all that it gives; outputs of several sizes."""
    torch.manual_seed(0)
    geometry = Geometry(5, 4, (3, 1), (1, 1), (1, 1), ((1, 1), (0, 0)), groups=1, bias=True)
    lengths = torch.tensor([100.0, 1.0, 1e-3, 0.0, 1e-9])
    kernel = torch.randn(5, 4, 3, 1, dtype=dtype) * lengths.view(-1, 1, 1, 1)
    bias = torch.tensor([1.0, -2.0, 0.0, 3.0, 50.0], dtype=dtype)
    layer = Substitute(AffineMap(geometry, kernel, bias), dtype)
    inputs = [torch.randn(4, 4, 8, 8, dtype=dtype), torch.randn(5, 4, 2, 3, dtype=dtype) + 2]
    with torch.no_grad():
        outputs = [layer(x) for x in inputs]
        layer.normalise(outputs)
        rounding = 1e-5 if dtype == torch.float32 else 1e-12
        for x, y in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(layer(x), y, rtol=rounding, atol=rounding)
    reached = layer.layer.weight.flatten(1).norm(dim=1)
    wanted = torch.full((5,), math.sqrt(2), dtype=dtype)
    wanted[3] = 0
    torch.testing.assert_close(reached, wanted)
    everything = torch.cat([layer.layer(padded(geometry, x)).transpose(0, 1).flatten(1) for x in inputs], dim=1)
    for found, moment in ((layer.norm.running_mean, everything.mean(1)), (layer.norm.running_var, everything.var(1))):
        torch.testing.assert_close(found[:3], moment[:3], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2e-5, 2e-2])
def test_normalising_in_half_precision_changes_nothing(dtype: torch.dtype, size: float) -> None:
    """Of inputs so large that longer filters would give a variance that float16 cannot hold, or these do."""
    torch.manual_seed(0)
    geometry = Geometry(4, 3, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), bias=True)
    made = AffineMap(geometry, size * torch.randn(4, 3, 3, 3), torch.randn(4))
    layer, x = Substitute(made, dtype), (1e4 * torch.randn(8, 3, 6, 6)).to(dtype)
    with torch.no_grad():
        y = layer(x)
        layer.normalise([y])
        torch.testing.assert_close(layer(x), y, rtol=1e-2, atol=1e-2 * float(y.float().std()))
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert isinstance(layer.norm, nn.Identity) == (dtype == torch.float16 and size > 1e-3)


def test_what_trains_does_not_depend_on_the_length_of_a_fitted_filter() -> None:
    """The same region, written with a batch norm or with long filters: one step of training leads to the same."""
    torch.manual_seed(0)
    geometry = Geometry(3, 2, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), bias=True)
    kernel, bias, x = torch.randn(3, 2, 3, 3).double(), torch.randn(3).double(), torch.randn(16, 2, 6, 6).double()
    towards, steps = torch.randn(16, 3, 6, 6).double(), []
    for scale in (1.0, 30.0):
        layer = Substitute(AffineMap(geometry, scale * kernel, scale * bias), torch.float64)
        with torch.no_grad():
            layer.normalise([layer(x)])
        layer.train()
        (towards * layer(x) / scale).sum().backward()
        steps.append(layer.layer.weight.grad)
    assert float(steps[0].norm()) > 1
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-4)  # but for the batch norm's eps
