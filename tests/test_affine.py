"""The algebra against the convolutions that it stands for, in float64, at sizes where borders matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elc_fx.affine import AffineMap, Geometry, regroup, transposed_weight
from elc_fx.errors import NotAffineError

EXACT = {"rtol": 1e-10, "atol": 1e-10}
MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")


def random_map(geometry: Geometry, seed: int) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    g = geometry
    kernel = torch.randn(g.out_channels, g.in_channels // g.groups, *g.kernel_size, generator=generator).double()
    bias = torch.randn(g.out_channels, generator=generator).double() if g.bias else None
    ones = torch.randn(g.out_channels, *g.kernel_size, generator=generator).double() if g.ones else None
    return AffineMap(geometry, kernel, bias, ones)


@st.composite
def geometries(draw: st.DrawFn, dims: int, in_channels: int, out_channels: int | None = None) -> Geometry:
    out_channels = out_channels or draw(st.sampled_from((1, 2, 4, 6)))
    divisors = [g for g in (1, 2, 3, 4, 6) if in_channels % g == 0 and out_channels % g == 0]
    axis = st.integers(1, 3)
    return Geometry(
        out_channels,
        in_channels,
        kernel_size=tuple(draw(axis) for _ in range(dims)),
        stride=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        dilation=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        padding=tuple((draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(dims)),
        groups=draw(st.sampled_from(divisors)),
        padding_mode=draw(st.sampled_from(MODES)),
        bias=draw(st.booleans()),
    )


def random_input(geometry: Geometry, extra: list[int], seed: int = 0) -> Tensor:
    size = [n + e - 1 for n, e in zip(extra, geometry.extent, strict=True)]
    torch.manual_seed(seed)
    return torch.randn(2, geometry.in_channels, *size, dtype=torch.float64)


def run(steps: list[AffineMap], x: Tensor) -> Tensor | None:
    """The maps one after the other, or None where the input is too small for them."""
    try:
        for step in steps:
            x = step(x)
            if 0 in x.shape:
                return None
    except RuntimeError:
        return None
    return x


@settings(deadline=None, max_examples=400)
@given(data=st.data(), dims=st.integers(1, 3), seed=st.integers(0, 99))
def test_composition_equals_running_both(data: st.DataObject, dims: int, seed: int) -> None:
    first = data.draw(geometries(dims, in_channels=4))
    second = data.draw(geometries(dims, first.out_channels))
    try:
        composed = random_map(first, seed).then(random_map(second, seed + 1))
    except NotAffineError:
        assume(False)
    extra = [data.draw(st.integers(1, 6)) for _ in range(dims)]
    x = random_input(first, extra, seed)
    expected = run([random_map(first, seed), random_map(second, seed + 1)], x)
    assume(expected is not None)
    assert composed.geometry == first.then(second)
    torch.testing.assert_close(composed(x), expected, **EXACT)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), dims=st.integers(1, 2), seed=st.integers(0, 99))
def test_unpadded_composition_never_refuses(data: st.DataObject, dims: int, seed: int) -> None:
    first = replace(data.draw(geometries(dims, in_channels=4)), padding_mode="zeros")
    second = replace(data.draw(geometries(dims, first.out_channels)), padding=((0, 0),) * dims, padding_mode="zeros")
    composed = random_map(first, seed).then(random_map(second, seed + 1))
    x = random_input(composed.geometry, [3] * dims, seed)
    expected = run([random_map(first, seed), random_map(second, seed + 1)], x)
    assume(expected is not None)
    torch.testing.assert_close(composed(x), expected, **EXACT)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), dims=st.integers(1, 3), bias=st.booleans(), seed=st.integers(0, 99))
def test_pointwise_before_zero_padding_is_exact_at_the_border(
    data: st.DataObject, dims: int, bias: bool, seed: int
) -> None:
    """DiverseBranchBlock issue 9: at the border the second convolution sees zeros, not the bias of the first."""
    stride = tuple(data.draw(st.integers(1, 2)) for _ in range(dims))
    first = Geometry.pointwise(6, 4, dims, stride=stride, bias=bias)
    second = replace(data.draw(geometries(dims, 6)), padding_mode="zeros")
    composed = random_map(first, seed).then(random_map(second, seed + 1))
    third = Geometry.pointwise(2, second.out_channels, dims, bias=True)
    x = random_input(composed.geometry, [data.draw(st.integers(1, 4)) for _ in range(dims)], seed)
    maps = [random_map(first, seed), random_map(second, seed + 1), random_map(third, seed + 2)]
    expected = run(maps, x)
    assume(expected is not None)
    torch.testing.assert_close(composed.then(maps[2])(x), expected, **EXACT)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), dims=st.integers(1, 2), seed=st.integers(0, 99))
def test_sums_and_concatenations_equal_running_all_branches(data: st.DataObject, dims: int, seed: int) -> None:
    stride = tuple(data.draw(st.integers(1, 2)) for _ in range(dims))
    branches = []
    for index in range(data.draw(st.integers(2, 3))):
        geometry = data.draw(geometries(dims, in_channels=4, out_channels=4))
        low = [data.draw(st.integers(-1, e)) for e in geometry.extent]
        padding = tuple((a, e - 1 - a) for a, e in zip(low, geometry.extent, strict=True))  # the output keeps its size
        ones = data.draw(st.booleans()) and geometry.padding_mode == "zeros"
        branches.append(random_map(replace(geometry, stride=stride, padding=padding, ones=ones), seed + index))
    x = torch.randn(2, 4, *[data.draw(st.integers(3, 8)) for _ in range(dims)], dtype=torch.float64)
    try:
        total = branches[0] + branches[1]
        beside = branches[0].beside(branches[1])
        for branch in branches[2:]:
            total, beside = total + branch, beside.beside(branch)
    except NotAffineError:
        assume(False)
    outputs = [run([branch], x) for branch in branches]
    assume(all(y is not None for y in outputs))
    torch.testing.assert_close(total(x), sum(outputs), **EXACT)
    torch.testing.assert_close(beside(x), torch.cat(outputs, dim=1), **EXACT)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), dims=st.integers(1, 3), seed=st.integers(0, 99))
def test_pointwise_maps_around_a_transposed_convolution(data: st.DataObject, dims: int, seed: int) -> None:
    groups = data.draw(st.sampled_from((1, 2)))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    stride = tuple(data.draw(st.integers(1, 2)) for _ in range(dims))
    geometry = Geometry(
        4,
        6,
        kernel,
        stride,
        (1,) * dims,
        ((0, 0),) * dims,
        groups,
        bias=True,
        transposed=True,
        output_padding=(0,) * dims,
    )
    before = random_map(Geometry.pointwise(6, 2, dims), seed)
    after = random_map(Geometry.pointwise(6, 4, dims, groups=2, bias=True), seed + 1)
    middle = random_map(geometry, seed + 2)
    x = torch.randn(2, 2, *[3] * dims, dtype=torch.float64)
    torch.testing.assert_close(before.then(middle).then(after)(x), after(middle(before(x))), **EXACT)
    torch.testing.assert_close((middle + middle)(x.repeat(1, 3, *[1] * dims)), 2 * middle(x.repeat(1, 3, *[1] * dims)))


@settings(deadline=None)
@given(groups=st.sampled_from((2, 4, 6, 12)), data=st.data())
def test_regrouping_keeps_the_function(groups: int, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from([g for g in (1, 2, 3, 4, 6, 12) if groups % g == 0]))
    kernel = torch.randn(24, 12 // groups, 3, dtype=torch.float64)
    x = torch.randn(1, 12, 7, dtype=torch.float64)
    expected = nn.functional.conv1d(x, kernel, groups=groups)
    torch.testing.assert_close(
        nn.functional.conv1d(x, regroup(kernel, groups, target), groups=target), expected, **EXACT
    )


def test_transposed_weight_is_its_own_inverse() -> None:
    kernel = torch.randn(6, 2, 3, 3)
    assert torch.equal(transposed_weight(transposed_weight(kernel, 2), 2), kernel)


def test_a_strided_pointwise_before_a_kernel_is_dilated_not_full_of_zeros() -> None:
    first = Geometry.pointwise(4, 4, 2, stride=(2, 2))
    second = Geometry(4, 4, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert first.then(second) == Geometry(4, 4, (3, 3), (2, 2), (2, 2), ((2, 2), (2, 2)))


def test_groups_of_a_composition_are_the_greatest_common_divisor() -> None:
    first = Geometry.pointwise(12, 12, 1, groups=4)
    assert first.then(Geometry.pointwise(12, 12, 1, groups=6)).groups == 2


def test_flops_equal_torchs_own_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for conv in (
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2),
    ):
        transposed = isinstance(conv, nn.ConvTranspose2d)
        with FlopCounterMode(display=False) as counter:
            conv(torch.randn(1, 4, 9, 7))
        padding = tuple((p, p) for p in conv.padding)
        geometry = Geometry(
            8, 4, (3, 3), (2, 2), (1, 1), padding, 2, transposed=transposed, output_padding=(0, 0) if transposed else ()
        )
        assert geometry.flops((9, 7)) == counter.get_total_flops()
        assert math.prod(geometry.output_size((9, 7))) == conv(torch.randn(1, 4, 9, 7))[0, 0].numel()


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (
            Geometry(4, 4, (3,), (1,), (1,), ((1, 1),)),
            Geometry(4, 4, (3,), (1,), (1,), ((1, 1),)),
            "border would differ",
        ),
        (Geometry.pointwise(4, 4, 1, padding=((-1, 0),)), Geometry.pointwise(4, 4, 1, padding=((1, 0),)), "crop"),
        (
            Geometry(4, 4, (3,), (1,), (1,), ((0, 0),)),
            Geometry(4, 4, (3,), (1,), (1,), ((1, 1),), padding_mode="reflect"),
            "commutes with pointwise maps only",
        ),
        (
            Geometry(4, 4, (3,), (1,), (1,), ((1, 1),), padding_mode="reflect"),
            Geometry(4, 4, (3,), (1,), (1,), ((-1, 0),)),
            "no single padding",
        ),
    ],
)
def test_refusals_say_why(first: Geometry, second: Geometry, reason: str) -> None:
    with pytest.raises(NotAffineError, match=reason):
        first.then(second)
