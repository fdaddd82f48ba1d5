"""Random graphs of affine and other layers: the compiled graph computes the same, to 1e-9 in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elc_fx

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")


class Scale(nn.Module):
    """x · gamma + beta, per channel, as an expression."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, *[1] * dims))
        self.beta = nn.Parameter(torch.randn(1, channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


class Sum(nn.Module):
    """Branches of one value, added with coefficients, in the spelling that is drawn."""

    def __init__(self, branches: list[nn.Module], spelling: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        total, *others = [branch(x) for branch in self.branches]
        for other in others:
            if self.spelling == "+":
                total = total + other
            elif self.spelling == "alpha":
                total = torch.add(total, other, alpha=-2)
            elif self.spelling == "-":
                total = other.sub(total)
            else:
                total = total.mul(1.5)
                total += other
        return total


class Concatenation(nn.Module):
    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Slice(nn.Module):
    def __init__(self, dims: int, step: int) -> None:
        super().__init__()
        self.index = (slice(None), slice(None), *[slice(None, None, step)] * dims)

    def forward(self, x: Tensor) -> Tensor:
        return x[self.index]


def convolution(draw: st.DrawFn, dims: int, channels: int, out: int, *, keeps_size: bool = False) -> nn.Module:
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0 and out % g == 0]))
    if keeps_size:
        return CONV[dims](channels, out, kernel, padding="same", groups=groups, bias=draw(st.booleans()))
    return CONV[dims](
        channels,
        out,
        kernel,
        stride=[draw(st.integers(1, 2)) for _ in range(dims)],
        padding=[draw(st.integers(0, k - 1)) for k in kernel],
        dilation=[draw(st.integers(1, 2)) for _ in range(dims)],
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
    )


def branch(draw: st.DrawFn, dims: int, channels: int) -> nn.Module:
    """Keeps the size and the channels, so that branches add."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(("conv", "norm", "scale", "pool", "relu")))
        if kind == "conv":
            layers.append(convolution(draw, dims, channels, channels, keeps_size=True))
        elif kind == "norm":
            layers.append(NORM[dims](channels))
        elif kind == "scale":
            layers.append(Scale(channels, dims))
        elif kind == "pool":
            layers.append(POOL[dims](3, 1, 1, count_include_pad=draw(st.booleans())))
        else:
            layers.append(nn.ReLU(inplace=len(layers) > 0))
    return nn.Sequential(*layers)


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, int, int]:
    """A random network, its number of spatial axes and of input channels."""
    dims, channels = draw(st.sampled_from((1, 2, 2, 3))), draw(st.sampled_from((2, 4)))
    width, layers = channels, []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(("conv", "conv", "norm", "scale", "sum", "sum", "cat", "slice", "relu", "again")))
        if kind == "conv":
            out = draw(st.sampled_from((2, 4)))
            layers.append(convolution(draw, dims, width, out))
            width = out
        elif kind == "norm":
            layers.append(NORM[dims](width))
        elif kind == "scale":
            layers.append(Scale(width, dims))
        elif kind == "sum":
            branches = [branch(draw, dims, width) for _ in range(draw(st.integers(2, 4)))]
            layers.append(Sum(branches, draw(st.sampled_from(("+", "alpha", "-", "+=")))))
        elif kind == "cat" and width <= 4:
            layers.append(Concatenation([branch(draw, dims, width) for _ in range(2)]))
            width *= 2
        elif kind == "slice":
            layers.append(Slice(dims, draw(st.integers(1, 2))))
        elif kind == "relu":
            layers.append(nn.ReLU(inplace=len(layers) > 0))
        elif kind == "again" and layers and width == channels:
            layers.extend(layers[-2:] if draw(st.booleans()) and len(layers) < 4 else [])
    return nn.Sequential(*layers), dims, channels


def randomise(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model


def output_of(model: nn.Module, x: Tensor) -> Tensor | None:
    """The output, or None where the model does not take an input this small."""
    try:
        with torch.no_grad():
            y: Tensor = model(x.clone())
    except RuntimeError:
        return None
    return y if y.numel() else None


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(drawn=models(), seed=st.integers(0, 9), size=st.integers(1, 9), given_examples=st.booleans())
def test_compiled_graphs_compute_the_same(
    drawn: tuple[nn.Module, int, int], seed: int, size: int, given_examples: bool
) -> None:
    model, dims, channels = drawn
    randomise(model, seed)
    torch.manual_seed(seed)
    x = torch.randn(2, channels, *[size + axis for axis in range(dims)], dtype=torch.float64)
    expected = output_of(model, x)
    assume(expected is not None)
    compiled = elc_fx.compile(model, x if given_examples else None)
    with torch.no_grad():
        actual = compiled(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    other = torch.randn(1, channels, *[size + 3 - axis for axis in range(dims)], dtype=torch.float64)
    if (expected := output_of(model, other)) is not None:
        torch.testing.assert_close(compiled(other), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    if given_examples:
        before, after = elc_fx.report_of(compiled).totals.flops
        assert after <= before
