"""What must merge exactly: branches, chains, concatenations, in every spelling; and what stays as it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    BLOCKS,
    PUBLISHED,
    Unary,
    assert_one_convolution,
    assert_same,
    batch_norms,
    conv_bn,
    convolutions,
    flops,
    image,
    operators,
    per_channel,
    ready,
    resnet20,
)
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import elc_fx

# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_block_becomes_one_convolution(name: str) -> None:
    model, inputs = ready(BLOCKS[name].make()), BLOCKS[name].inputs()
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (inputs[-1],))):
        assert_one_convolution(compiled, inputs[-1])
        for x in inputs:
            assert_same(compiled(x), model(x))
            assert flops(compiled, x) <= flops(model, x)


@pytest.mark.parametrize("name", PUBLISHED)
def test_block_between_activations_becomes_one_convolution(name: str) -> None:
    """As networks use it: read through one ReLU, written through another, here in place."""
    block = BLOCKS[name]
    model = ready(nn.Sequential(nn.ReLU(), block.make(), nn.ReLU(inplace=True)))
    compiled, x = elc_fx.compile(model), block.inputs()[-1]
    assert_same(compiled(x.clone()), model(x.clone()))
    running = operators(compiled, x.clone())
    assert running["convolution"] == 1 and not batch_norms(compiled)
    assert running["relu"] + running["relu_"] == 2


def test_blocks_in_a_row_become_one_convolution_each() -> None:
    names = ["RepVGG", "DBB, 5×5", "MobileOne, depthwise", "RepViT", "RepConv, identity"]
    model = ready(nn.Sequential(*(layer for n in names for layer in (PUBLISHED[n].make(), nn.ReLU()))))
    compiled, x = elc_fx.compile(model), image(1, 4, 9, 8)
    assert_same(compiled(x), model(x))
    assert operators(compiled, x)["convolution"] == len(names) == len(convolutions(compiled))
    assert len(elc_fx.report_of(compiled).merged) == len(names)


def test_resnet20_loses_its_batch_norms_and_nothing_else() -> None:
    model, x = ready(resnet20()), image(2, 3, 32, 32)
    compiled = elc_fx.compile(model, (x,))
    assert_same(compiled(x), model(x))
    assert_same(compiled(image(1, 3, 17, 23)), model(image(1, 3, 17, 23)))
    assert len(convolutions(compiled)) == 19 and not batch_norms(compiled)
    assert operators(compiled, x)["relu"] == 19
    assert flops(compiled, x) == flops(model, x)


# --- where a merge would cost more -----------------------------------------------------------------------------------


def test_a_merge_that_costs_more_is_not_made() -> None:
    dearer = {
        "a wide depthwise after a 1×1": nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 5, groups=4)),
        "a bottleneck": nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)),
        "two 3×3": nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
        "groups of 2 and of 3": Unary(
            lambda s, x: s.a(x) + s.b(x), a=nn.Conv2d(6, 6, 3, groups=2), b=nn.Conv2d(6, 6, 3, groups=3)
        ),
        "k×1 then 1×k": nn.Sequential(nn.Conv2d(4, 4, (3, 1), bias=False), nn.Conv2d(4, 4, (1, 3))),
        "average pooling alone": nn.Sequential(nn.AvgPool2d(3)),
        "average pooling before a convolution": nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)),
    }
    for name, layers in dearer.items():
        model = ready(layers)
        x = image(1, 8 if name == "a bottleneck" else 6 if "groups" in name else 4, 11, 12)
        for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
            assert flops(compiled, x) == flops(model, x), name
            assert_same(compiled(x), model(x))


def test_branches_merge_where_it_pays_and_stay_where_not() -> None:
    """Dense 3×3 + dense 1×1 + depthwise 7×7: all in one is a dense 7×7; the best is a dense 3×3 and the depthwise."""
    model = ready(
        Unary(
            lambda s, x: s.a(x) + s.b(x) + s.c(x), a=conv_bn(8, 8, 3), b=conv_bn(8, 8, 1), c=conv_bn(8, 8, 7, groups=8)
        )
    )
    x = image(1, 8, 10, 10)
    compiled = elc_fx.compile(model, (x,))
    assert_same(compiled(x), model(x))
    assert not batch_norms(compiled)
    assert flops(compiled, x) == 2 * 100 * (9 * 8 * 8 + 49 * 8)


def test_bias_before_zero_padding_is_carried_by_a_channel_of_ones_where_that_saves_a_quarter() -> None:
    """1×1 with bias to W channels, then a padded 3×3. Merged: 9·(C + 1)·C; apart: C·W + 9·W·C."""
    for channels, width, merged in ((16, 16, False), (4, 5, False), (8, 12, True), (8, 16, True)):
        model = ready(nn.Sequential(nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 3, padding=1)))
        for size in ((1, 1), (3, 3), (6, 5)):
            x = image(2, channels, *size)
            for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
                assert_same(compiled(x), model(x))
                assert flops(compiled, x) <= flops(model, x)
        assert operators(compiled, x)["convolution"] == (1 if merged else 2), (channels, width)


def test_separable_convolution_stays_separable() -> None:
    layers = (*conv_bn(8, 8, 3, groups=8), *conv_bn(8, 16, 1))
    model, x = ready(nn.Sequential(*layers)), image(1, 8, 9, 9)
    compiled = elc_fx.compile(model)
    assert_same(compiled(x), model(x))
    assert flops(compiled, x) == flops(model, x) and not batch_norms(compiled)


# --- chains ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """One unpadded convolution of a chain, along one axis of a square feature map."""

    width: int
    taps: frozenset[int]
    stride: int

    def then(self, other: Link) -> Link:
        taps = frozenset(u + self.stride * v for u in self.taps for v in other.taps)
        return Link(other.width, taps, self.stride * other.stride)

    def cost(self, width: int, size: int) -> tuple[int, int]:
        """FLOPs on `size`² positions of `width` channels, and the size after it."""
        after = (size - max(self.taps) - 1) // self.stride + 1
        unit = math.gcd(*self.taps) or 1
        return 2 * after**2 * width * self.width * (max(self.taps) // unit + 1) ** 2, after


def partitions(links: Sequence[Link]) -> Iterator[list[Link]]:
    """Every way to cut the chain into runs, each run as the one convolution that it would be."""
    for cuts in itertools.product((False, True), repeat=len(links) - 1):
        runs = [[links[0]]]
        for link, cut in zip(links[1:], cuts, strict=True):
            if cut:
                runs.append([link])
            else:
                runs[-1].append(link)
        yield [reduce(Link.then, run) for run in runs]


def cost(links: Sequence[Link], width: int, size: int) -> int:
    total = 0
    for link in links:
        paid, size = link.cost(width, size)
        total, width = total + paid, link.width
    return total


def chain(kernels: Sequence[int], strides: Sequence[int], widths: Sequence[int]) -> tuple[nn.Sequential, list[Link]]:
    """The layers, and what they are for the count. widths: one more than kernels and strides."""
    layers = [nn.Conv2d(a, b, k, s) for a, b, k, s in zip(widths[:-1], widths[1:], kernels, strides, strict=True)]
    links = [Link(b, frozenset(range(k)), s) for b, k, s in zip(widths[1:], kernels, strides, strict=True)]
    return nn.Sequential(*layers), links


CHAINS = {
    "all": ((1, 3, 1), (1, 1, 1), (8, 8, 8, 8)),
    "none": ((1, 1, 1), (1, 1, 1), (8, 1, 8, 1)),
    "the first two would be greedy": ((1, 1, 1), (1, 1, 1), (4, 3, 8, 1)),
    "a bottleneck in the middle": ((1, 3, 1, 1, 3, 1), (1,) * 6, (4, 16, 16, 1, 16, 16, 4)),
    "strides": ((3, 1, 3, 1), (1, 2, 1, 1), (3, 8, 8, 4, 4)),
    "a strided 1×1 dilates what follows": ((1, 3, 1), (2, 1, 1), (8, 8, 8, 8)),
    "3×3 in a row, narrow in between": ((3, 3, 3), (1, 1, 1), (2, 16, 16, 2)),
}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("example", [True, False])
def test_random_chain_gets_the_cheapest_partition(seed: int, example: bool) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[int], count: int) -> list[int]:
        return [choices[i] for i in torch.randint(len(choices), (count,), generator=draw).tolist()]

    length = 5
    kernels = pick((1, 1, 1, 2, 3), length)
    strides = pick((1, 1, 2), length) if example else [1] * length
    check_partition(kernels, strides, pick((1, 2, 3, 4, 8, 16), length + 1), example)


@pytest.mark.parametrize("name", CHAINS)
def test_chain_gets_the_cheapest_partition(name: str) -> None:
    check_partition(*CHAINS[name], example=True)


def check_partition(kernels: Sequence[int], strides: Sequence[int], widths: Sequence[int], example: bool) -> None:
    """The result costs what the cheapest of all partitions costs, with the fewest convolutions that cost it."""
    layers, links = chain(kernels, strides, widths)
    size = 40 if 2 in strides else 20
    model, x = ready(layers), image(1, widths[0], size, size)
    compiled = elc_fx.compile(model, (x,) if example else None)
    assert_same(compiled(x), model(x))
    costs = [(cost(runs, widths[0], size), len(runs)) for runs in partitions(links)]
    assert flops(model, x) == cost(links, widths[0], size)
    if example or set(kernels) == {1}:  # else the sizes, which the costs depend on, are not known
        assert (flops(compiled, x), len(convolutions(compiled))) == min(costs)
    else:
        assert flops(compiled, x) <= flops(model, x)


def test_chain_of_batch_norms_scales_and_dropout_vanishes_into_its_convolution() -> None:
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(), nn.BatchNorm2d(4), nn.Dropout2d(), nn.BatchNorm2d(4))
    model, x = ready(nn.Sequential(*layers)), image(2, 3, 5, 5)
    compiled = elc_fx.compile(model)
    assert_one_convolution(compiled, x)
    assert_same(compiled(x), model(x))


def test_batch_norm_before_an_unpadded_convolution_merges() -> None:
    model = ready(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, stride=2)))
    compiled = elc_fx.compile(model)
    for x in (image(2, 3, 3, 3), image(1, 3, 8, 9)):
        assert_one_convolution(compiled, x)
        assert_same(compiled(x), model(x))


@pytest.mark.parametrize("example", [True, False])
def test_batch_norm_before_a_padded_convolution_keeps_the_border(example: bool) -> None:
    """The convolution pads the normalised map with zeros, not with what the batch norm makes of zeros."""
    model = ready(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
    compiled = elc_fx.compile(model, image(1, 3, 6, 6) if example else None)
    for x in (image(2, 3, 1, 1), image(2, 3, 3, 3), image(1, 3, 8, 9)):
        assert_same(compiled(x), model(x))
        assert flops(compiled, x) <= flops(model, x)
    assert len(batch_norms(compiled)) <= 1


@pytest.mark.parametrize(
    ("convolution", "norm", "size"),
    [
        (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (5,)),
        (nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(4), (3, 4)),
        (nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2, dilation=2), nn.BatchNorm2d(6), (4, 4)),
        (nn.ConvTranspose3d(3, 4, 2, stride=2), nn.BatchNorm3d(4), (2, 3, 2)),
    ],
    ids=["1-d", "2-d", "2-d groups", "3-d"],
)
def test_transposed_convolution_takes_its_batch_norm(convolution: nn.Module, norm: nn.Module, size: Any) -> None:
    model = ready(nn.Sequential(convolution, norm, nn.ReLU()))
    compiled, x = elc_fx.compile(model), image(2, int(convolution.in_channels), *size)
    assert_same(compiled(x), model(x))
    assert len(convolutions(compiled)) == 1 and not batch_norms(compiled)
    assert operators(compiled, x) == {"convolution": 1, "relu": 1}


def test_linear_chain_merges_where_it_is_cheaper() -> None:
    wide, narrow = (16, 64, 16), (16, 2, 16)
    for widths, count in ((wide, 1), (narrow, 2)):
        model = ready(nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths))))
        compiled, x = elc_fx.compile(model), image(3, 16)
        assert_same(compiled(x), model(x))
        assert operators(compiled, x)["addmm"] == count
        for shape in ((16,), (2, 5, 16), (2, 3, 5, 16)):
            assert_same(compiled(image(*shape)), model(image(*shape)))


def test_linear_takes_its_batch_norm() -> None:
    model = ready(nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Dropout(), nn.ReLU()))
    x = image(4, 6)
    compiled = elc_fx.compile(model, (x,))
    assert_same(compiled(x), model(x))
    assert operators(compiled, x) == {"addmm": 1, "relu": 1}


def test_residual_linear_layers_merge() -> None:
    model = ready(Unary(lambda s, x: s.a(x) + 0.5 * s.b(x) + x, a=nn.Linear(6, 6), b=nn.Linear(6, 6, bias=False)))
    compiled, x = elc_fx.compile(model), image(4, 6)
    assert_same(compiled(x), model(x))
    assert operators(compiled, x) == {"addmm": 1}


# --- concatenation ---------------------------------------------------------------------------------------------------

BESIDE: dict[str, Callable[[], nn.Module]] = {
    "two": lambda: Unary(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=conv_bn(4, 3), b=conv_bn(4, 5)),
    "three": lambda: Unary(
        lambda s, x: torch.cat((s.a(x), s.b(x), s.c(x)), dim=1),
        a=conv_bn(4, 3),
        b=conv_bn(4, 1, bias=True),
        c=conv_bn(4, 2),
    ),
    "negative axis": lambda: Unary(
        lambda s, x: torch.concat([s.a(x), s.b(x)], dim=-3), a=conv_bn(4, 3), b=conv_bn(4, 5)
    ),
    "concatenate": lambda: Unary(lambda s, x: torch.concatenate([s.a(x), s.b(x)], 1), a=conv_bn(4, 3), b=conv_bn(4, 5)),
    "nested": lambda: Unary(
        lambda s, x: torch.cat([torch.cat([s.a(x), s.b(x)], 1), s.c(x)], 1),
        a=conv_bn(4, 3),
        b=conv_bn(4, 1),
        c=conv_bn(4, 2),
    ),
    "of branching blocks": lambda: Unary(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=PUBLISHED["RepVGG"].make(), b=PUBLISHED["ACNet"].make()
    ),
    "batch norm over all": lambda: Unary(
        lambda s, x: s.bn(torch.cat([s.a(x), s.b(x)], 1)),
        a=nn.Conv2d(4, 3, 3),
        b=nn.Conv2d(4, 5, 3),
        bn=nn.BatchNorm2d(8),
    ),
    "strided and dilated": lambda: Unary(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1),
        a=nn.Conv2d(4, 3, 3, stride=2, dilation=2, padding=2),
        b=nn.Conv2d(4, 5, 3, stride=2, dilation=2, padding=2, bias=False),
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_parallel_convolutions_of_one_geometry_become_one(name: str) -> None:
    model = ready(BESIDE[name]())
    for x in (image(2, 4, 3, 3), image(1, 4, 6, 7)):
        for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
            assert_one_convolution(compiled, x)
            assert_same(compiled(x), model(x))


APART: dict[str, Callable[[], nn.Module]] = {
    "other kernel": lambda: Unary(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=conv_bn(4, 3, 1), b=conv_bn(4, 5, 3)),
    "other axis": lambda: Unary(lambda s, x: torch.cat([s.a(x), s.b(x)], 2), a=conv_bn(4, 3), b=conv_bn(4, 3)),
    "last axis": lambda: Unary(lambda s, x: torch.cat([s.a(x), s.b(x)], -1), a=conv_bn(4, 3), b=conv_bn(4, 3)),
    "groups": lambda: Unary(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=conv_bn(4, 4, groups=4), b=conv_bn(4, 4, groups=4)
    ),
    "the input itself": lambda: Unary(lambda s, x: torch.cat([x, s.a(x)], 1), a=conv_bn(4, 3)),
    "one convolution twice": lambda: Unary(lambda s, x: torch.cat([s.a(x)] * 2, 1), a=conv_bn(4, 3)),
    "one branch read elsewhere": lambda: Unary(
        lambda s, x: (lambda y: (torch.cat([y, s.b(x)], 1), F.relu(y)))(s.a(x)), a=conv_bn(4, 3), b=conv_bn(4, 3)
    ),
    "an activation on one side": lambda: Unary(
        lambda s, x: torch.cat([F.relu(s.a(x)), s.b(x)], 1), a=conv_bn(4, 3), b=conv_bn(4, 3)
    ),
}


@pytest.mark.parametrize("name", APART)
def test_concatenation_that_does_not_pay_stays(name: str) -> None:
    model, x = ready(APART[name]()), image(2, 4, 5, 6)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
        assert_same(compiled(x), model(x))
        assert flops(compiled, x) == flops(model, x)
        assert not batch_norms(compiled)


def inner_sum_first(s: Any, x: Tensor) -> Tensor:
    y = s.c(x).relu()
    z = s.a(y) + s.b(y)
    z += x
    return z


def inner_sum_in_place(s: Any, x: Tensor) -> Tensor:
    y = s.c(x).relu()
    z = s.a(y)
    z += s.b(y)
    return z + x


def inner_sum_is_added(s: Any, x: Tensor) -> Tensor:
    y = s.c(x).relu()
    z = s.d(x)
    z += s.a(y) + s.b(y)
    return z


@pytest.mark.parametrize("forward", [inner_sum_first, inner_sum_in_place, inner_sum_is_added])
def test_branches_merge_before_a_sum_in_place_with_something_else(forward: Callable[[Any, Tensor], Tensor]) -> None:
    parts = {name: conv_bn(4, 4, kernel) for name, kernel in (("a", 3), ("b", 1), ("c", 3), ("d", 1))}
    model, x = ready(Unary(forward, **parts)), image(2, 4, 5, 5)
    compiled = elc_fx.compile(model, x)
    assert_same(compiled(x), model(x))
    assert operators(compiled, x)["convolution"] == operators(model, x)["convolution"] - 1


# --- spellings -------------------------------------------------------------------------------------------------------


def in_place_sum(s: Any, x: Tensor) -> Tensor:
    out = s.a(x)
    out += s.b(x)
    return out


def in_place_scale(s: Any, x: Tensor) -> Tensor:
    out = s.a(x)
    out *= s.gamma
    out -= s.beta
    out /= 2
    return out


def in_place_methods(s: Any, x: Tensor) -> Tensor:
    return s.a(x).mul_(s.gamma).add_(s.b(x)).sub_(s.beta).div_(3.0).neg_()


def functional_batch_norm(s: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, s.training, 0.1, s.bn.eps)


def frozen_batch_norm(s: Any, x: Tensor) -> Tensor:
    scale = (s.bn.weight * (s.bn.running_var + s.bn.eps).rsqrt()).reshape(1, -1, 1, 1)
    return x * scale + (s.bn.bias - s.bn.running_mean * scale.flatten()).reshape(1, -1, 1, 1)


def spelled_out_batch_norm(s: Any, x: Tensor) -> Tensor:
    mean, var = s.bn.running_mean[None, :, None, None], s.bn.running_var[None, :, None, None]
    normal = (x - mean) / torch.sqrt(var + s.bn.eps)
    return normal * s.bn.weight.view(1, -1, 1, 1) + s.bn.bias.view(1, -1, 1, 1)


SPELLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    # convolutions
    "F.conv2d": lambda s, x: s.bn(F.conv2d(x, s.c.weight, s.c.bias, padding=1)),
    "F.conv2d by name": lambda s, x: s.bn(F.conv2d(input=x, weight=s.c.weight, padding=(1, 1), bias=None)),
    "F.conv2d 'same'": lambda s, x: s.bn(F.conv2d(x, s.c.weight, s.c.bias, 1, "same")),
    "torch.conv2d": lambda s, x: s.bn(torch.conv2d(x, s.c.weight, s.c.bias, 1, 1)),
    "computed weight": lambda s, x: s.bn(F.conv2d(x, s.c.weight * 2 + s.c.weight.flip(0), s.c.bias, padding=1)),
    # batch norms
    "F.batch_norm": lambda s, x: functional_batch_norm(s, s.c(x)),
    "F.batch_norm by name": lambda s, x: F.batch_norm(
        s.c(x), running_mean=s.bn.running_mean, running_var=s.bn.running_var, weight=None, bias=s.bn.bias, eps=1e-2
    ),
    "torch.batch_norm": lambda s, x: torch.batch_norm(
        s.c(x), s.bn.weight, s.bn.bias, s.bn.running_mean, s.bn.running_var, False, 0.1, 1e-3, False
    ),
    "FrozenBatchNorm2d": lambda s, x: s.frozen(s.c(x)),
    "frozen by hand": lambda s, x: frozen_batch_norm(s, s.c(x)),
    "spelled out": lambda s, x: spelled_out_batch_norm(s, s.c(x)),
    "SyncBatchNorm": lambda s, x: s.sync(s.c(x)),
    # sums
    "a + b": lambda s, x: s.a(x) + s.b(x),
    "torch.add": lambda s, x: torch.add(s.a(x), s.b(x)),
    "torch.add by name": lambda s, x: torch.add(input=s.a(x), other=s.b(x), alpha=3),
    "method add": lambda s, x: s.a(x).add(s.b(x), alpha=-0.5),
    "method add_": lambda s, x: s.a(x).add_(s.b(x)),
    "+=": in_place_sum,
    "a - b": lambda s, x: s.a(x) - s.b(x),
    "torch.sub": lambda s, x: torch.sub(s.a(x), s.b(x), alpha=2),
    "torch.subtract": lambda s, x: torch.subtract(s.a(x), s.b(x)),
    "method sub_": lambda s, x: s.a(x).sub_(s.b(x)),
    "torch.rsub": lambda s, x: torch.rsub(s.a(x), s.b(x)),
    # scales and shifts
    "x * gamma": lambda s, x: s.a(x) * s.gamma,
    "gamma * x": lambda s, x: s.gamma * s.a(x),
    "method mul": lambda s, x: s.a(x).mul(s.gamma),
    "torch.mul": lambda s, x: torch.mul(s.gamma, s.a(x)),
    "torch.multiply": lambda s, x: torch.multiply(s.a(x), s.gamma),
    "x / gamma": lambda s, x: s.a(x) / s.gamma,
    "torch.div": lambda s, x: torch.div(s.a(x), s.gamma),
    "torch.true_divide": lambda s, x: torch.true_divide(s.a(x), 4),
    "beta - x": lambda s, x: s.beta - s.a(x),
    "negation": lambda s, x: -s.a(x),
    "torch.neg": lambda s, x: torch.neg(s.a(x)) + torch.negative(s.b(x)),
    "gamma of one": lambda s, x: s.a(x) * s.scalar + s.scalar,
    "gamma viewed": lambda s, x: s.a(x) * s.gamma.view(1, -1, 1, 1) + s.beta[None],
    "gamma expanded": lambda s, x: s.a(x) * s.gamma.flatten().unsqueeze(-1).unsqueeze(-1),
    "in-place operators": in_place_scale,
    "in-place methods": in_place_methods,
    # what computes nothing
    "nn.Identity": lambda s, x: s.bn(s.identity(s.c(x))),
    "F.dropout": lambda s, x: s.bn(F.dropout(s.c(x), 0.5, s.training)),
    "F.dropout2d": lambda s, x: s.bn(F.dropout2d(s.c(x), p=0.5, training=False)),
    "F.alpha_dropout": lambda s, x: s.bn(F.alpha_dropout(s.c(x), 0.5, s.training, inplace=True)),
    "empty Sequential": lambda s, x: s.bn(s.empty(s.c(x))),
    # several at once
    "ModuleList": lambda s, x: sum(branch(x) for branch in s.branches),
    "ModuleDict": lambda s, x: s.named["one"](x) + s.named["two"](x),
}


def spelled(formula: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    parts: dict[str, Any] = {
        "a": conv_bn(4, 4, 3),
        "b": conv_bn(4, 4, 1, bias=True),
        "c": nn.Conv2d(4, 4, 3, padding=1),
        "bn": nn.BatchNorm2d(4),
        "sync": nn.SyncBatchNorm(4),
        "frozen": FrozenBatchNorm2d(4),
        "gamma": per_channel(4),
        "beta": per_channel(4),
        "scalar": nn.Parameter(torch.ones(1)),
        "identity": nn.Identity(),
        "empty": nn.Sequential(),
        "branches": nn.ModuleList([conv_bn(4, 4, 3), conv_bn(4, 4, 1), nn.BatchNorm2d(4)]),
        "named": nn.ModuleDict({"one": conv_bn(4, 4, 3), "two": conv_bn(4, 4, 1)}),
    }
    return Unary(formula, **parts)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_convolution(name: str) -> None:
    model = ready(spelled(SPELLINGS[name]))
    for x in (image(2, 4, 3, 3), image(1, 4, 5, 4)):
        compiled = elc_fx.compile(model)
        assert_one_convolution(compiled, x)
        assert_same(compiled(x), model(x))


ACTIVATED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.relu in place": lambda s, x: F.relu(s.a(x) + s.b(x), inplace=True),
    "F.relu_": lambda s, x: F.relu_(s.a(x) + s.b(x)),
    "torch.relu_": lambda s, x: torch.relu_(s.a(x) + s.b(x)),
    "method relu_": lambda s, x: (s.a(x) + s.b(x)).relu_(),
    "nn.ReLU in place": lambda s, x: s.act(s.a(x) + s.b(x)),
    "clamp_": lambda s, x: (s.a(x) + s.b(x)).clamp_(0, 6),
    "F.hardswish in place": lambda s, x: F.hardswish(s.a(x) + s.b(x), inplace=True),
    "after +=": lambda s, x: in_place_sum(s, x).relu_(),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_in_place_activation_after_a_region_stays(name: str) -> None:
    model = ready(Unary(ACTIVATED[name], a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1), act=nn.ReLU(inplace=True)))
    compiled, x = elc_fx.compile(model), image(2, 4, 5, 6)
    assert_same(compiled(x), model(x))
    assert operators(compiled, x)["convolution"] == 1
    assert sum(operators(compiled, x).values()) == 2


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_explicit_padding_joins_the_convolution_after_it(mode: str) -> None:
    model = ready(
        Unary(lambda s, x: s.c(F.pad(x, (1, 1, 1, 1), mode=mode)) + s.b(x), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 3))
    )
    compiled = elc_fx.compile(model)
    for x in (image(2, 4, 3, 3), image(1, 4, 6, 5)):
        assert_same(compiled(x), model(x))
        assert flops(compiled, x) <= flops(model, x)
