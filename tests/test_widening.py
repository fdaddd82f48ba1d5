"""Layers in float64 with narrow weights: what torch computes with wide weights, whatever the geometry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elc_fx.merging import widening
from elc_fx.merging.widening import Widening

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_convolutions_are_those_of_torch(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    groups, inputs, outputs = (data.draw(st.integers(1, 3)) for _ in range(3))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = per_axis(1, 3), per_axis(1, 3), per_axis(1, 4)
    padding = per_axis(0, 5)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(e - 2 * p, 1) + data.draw(st.integers(0, 4)) for e, p in zip(extent, padding, strict=True)]
    torch.manual_seed(0)
    x = torch.randn(2, groups * inputs, *size, dtype=torch.float64)
    weight, bias = torch.randn(groups * outputs, inputs, *kernel), torch.randn(groups * outputs)
    expected = CONV[dims](x, weight.double(), bias.double(), stride, padding, dilation, groups)
    with Widening():
        actual = CONV[dims](x, weight, bias, stride, padding, dilation, groups)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_named_paddings(padding: str, kernel: int) -> None:
    conv = nn.Conv2d(3, 4, kernel, padding=padding, dilation=(1, 2))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        with Widening():
            actual = conv(x)
        torch.testing.assert_close(actual, conv.double()(x), rtol=0, atol=1e-12)


def test_blocks_of_rows_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elc_fx.affine.BLOCK", 7)
    linear, conv = nn.Linear(5, 6), nn.Conv2d(6, 9, 2, groups=3)
    x, y = torch.randn(4, 2, 5, dtype=torch.float64), torch.randn(2, 6, 3, 3, dtype=torch.float64)
    assert widening.row_blocks(6, 5) == 1
    with torch.no_grad():
        with Widening():
            actual = linear(x), conv(y)
        expected = linear.double()(x), conv.double()(y)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_other_layers_are_widened_and_left_as_they_were() -> None:
    layers = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4)).eval()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad(), Widening():
        actual = torch.cat([layers(x), torch.ones(2, 4, 7, 7)])
    assert actual.dtype == torch.float64
    torch.testing.assert_close(layers.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(actual[:2], layers.double()(x), rtol=0, atol=1e-12)


def test_complex_weights() -> None:
    conv = nn.Conv1d(2, 3, 3, dtype=torch.complex64)
    x = torch.randn(2, 2, 5, dtype=torch.complex128)
    with torch.no_grad():
        with Widening():
            actual = conv(x)
        torch.testing.assert_close(actual, conv.to(torch.complex128)(x), rtol=0, atol=1e-12)
