"""Small networks in the structure of the published designs, and the measures by which the tests judge a result.

Every block here is affine in eval mode unless it says otherwise: whatever its branches, it is one convolution.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

CONV: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

# --- random weights and inputs ---------------------------------------------------------------------------------------


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and batch-norm statistics in place: freshly initialised ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 4
            parameter.normal_(std=fan_in**-0.5, generator=generator)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.normal_(std=0.5, generator=generator)
                elif name == "running_var":
                    buffer.uniform_(0.5, 2.0, generator=generator)
    return model


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, with random weights and statistics."""
    return randomize_(model.double(), seed).eval()


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- measures --------------------------------------------------------------------------------------------------------


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal structure, types and shapes, and values to `tolerance` times the largest expected value."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(largest, 1e-30))
    elif isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key], tolerance)
    elif isinstance(expected, list | tuple):
        assert type(actual) is type(expected) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, tolerance)
    else:
        assert actual == expected


def layers(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The layers of one kind that a result calls; of an ordinary module, those that it holds."""
    if isinstance(model, fx.GraphModule):
        called = [model.get_submodule(str(n.target)) for n in model.graph.nodes if n.op == "call_module"]
    else:
        called = [model]
    return [module for root in called for module in root.modules() if isinstance(module, kind)]


def convolutions(model: nn.Module) -> list[nn.Module]:
    return layers(model, _ConvNd)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return layers(model, _BatchNorm)


class _Counting(TorchDispatchMode):
    """Counts the operators that run, by name; views and allocations compute nothing and are left out."""

    FREE = ("view", "slice", "select", "expand", "permute", "alias", "detach", "empty", "unsqueeze", "t", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.").strip("_")
        if name not in self.FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, *inputs: Any) -> Counter[str]:
    """How often each operator runs, whatever the model looks like: `convolution`, `native_batch_norm`, `add`, …"""
    with torch.no_grad(), _Counting() as counting:
        model(*inputs)
    return counting.count


def flops(model: nn.Module, *inputs: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops())


def assert_one_convolution(model: nn.Module, *inputs: Tensor) -> None:
    """Nothing runs but a single convolution, held by a single module, and padding in front of it."""
    running = operators(model, *inputs)
    running.pop("constant_pad_nd", None)
    assert running == {"convolution": 1}, f"{dict(running)}\n{model}"
    assert len(convolutions(model)) == 1 and not batch_norms(model)


# --- pieces ----------------------------------------------------------------------------------------------------------


class Formula(nn.Module):
    """A module that computes `formula(self, *args, **kwargs)`; its parts become attributes, tensors become buffers."""

    def __init__(self, formula: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.formula = formula
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.formula(self, *args, **kwargs)


class Unary(Formula):
    """A `Formula` of one tensor. Its `forward` has no `*args`, so that nothing about it resists tracing."""

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int | tuple[int, ...] = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    dims: int = 2,
    padding: int | tuple[int, ...] | None = None,
    bias: bool = False,
) -> nn.Sequential:
    """Convolution (by default padded so that stride 1 keeps the size) and batch norm."""
    if padding is None:
        padding = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
    convolution = CONV[dims](in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)
    return nn.Sequential(convolution, BATCH_NORM[dims](out_channels))


def per_channel(channels: int, dims: int = 2) -> nn.Parameter:
    """One number a channel, shaped to broadcast over a batch of feature maps."""
    return nn.Parameter(torch.ones(channels, *[1] * dims))


# --- published blocks ------------------------------------------------------------------------------------------------


class RepVGGBlock(nn.Module):
    """RepVGG (2021): 3×3 + batch norm, 1×1 + batch norm, and batch norm alone where the shape allows it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dims: int = 2) -> None:
        super().__init__()
        self.dense = conv_bn(in_channels, out_channels, 3, stride=stride, groups=groups, dims=dims)
        self.point = conv_bn(in_channels, out_channels, 1, stride=stride, groups=groups, dims=dims)
        self.identity = BATCH_NORM[dims](in_channels) if in_channels == out_channels and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = 0 if self.identity is None else self.identity(x)
        return self.dense(x) + self.point(x) + shortcut


class ACBlock(nn.Module):
    """ACNet (2019): square, horizontal and vertical kernels, each with its batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.square = conv_bn(in_channels, out_channels, kernel, stride=stride)
        self.horizontal = conv_bn(in_channels, out_channels, (1, kernel), stride=stride)
        self.vertical = conv_bn(in_channels, out_channels, (kernel, 1), stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.horizontal(x) + self.vertical(x)


class BatchNormThenPad(nn.Module):
    """Batch norm, padded with its own response to zero: as if the zeros had been there before the convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(x)
        if self.width == 0:
            return out
        scale = self.bn.weight.detach() / torch.sqrt(self.bn.running_var + self.bn.eps)
        border = (self.bn.bias.detach() - self.bn.running_mean * scale).view(1, -1, 1, 1)
        out = F.pad(out, [self.width] * 4)
        out[:, :, 0 : self.width, :] = border
        out[:, :, -self.width :, :] = border
        out[:, :, :, 0 : self.width] = border
        out[:, :, :, -self.width :] = border
        return out


class NearIdentity(nn.Module):
    """The pointwise convolution of the Diverse Branch Block: identity plus a learned difference."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(channels, channels // groups, 1, 1))
        rows = torch.arange(channels)
        unit = torch.zeros_like(self.weight.data)
        unit[rows, rows % (channels // groups)] = 1
        self.register_buffer("unit", unit)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.unit, None, stride=1, padding=0, groups=self.groups)


class DiverseBranchBlock(nn.Module):
    """Diverse Branch Block (2021): k×k, 1×1 → k×k and 1×1 → average pooling (and, not depthwise, 1×1), then the sum."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        width, depthwise = kernel // 2, groups == out_channels
        point = partial(nn.Conv2d, in_channels, out_channels, 1, groups=groups, bias=False)
        self.origin = conv_bn(in_channels, out_channels, kernel, stride=stride, groups=groups)
        self.serial = nn.Sequential(
            NearIdentity(in_channels, groups),
            BatchNormThenPad(in_channels, width),
            *conv_bn(in_channels, out_channels, kernel, stride=stride, groups=groups, padding=0),
        )
        before_pool = [] if depthwise else [point(), BatchNormThenPad(out_channels, width)]
        pool = nn.AvgPool2d(kernel, stride, padding=width if depthwise else 0)
        self.average = nn.Sequential(*before_pool, pool, nn.BatchNorm2d(out_channels))
        self.point = None if depthwise else nn.Sequential(point(stride=stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        if self.point is not None:
            out += self.point(x)
        out += self.average(x)
        out += self.serial(x)
        return out


class MobileOneBlock(nn.Module):
    """MobileOne (2022): several k×k branches, a 1×1 one and batch norm alone, summed in a loop."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, branches: int = 3
    ) -> None:
        super().__init__()
        same = in_channels == out_channels and stride == 1
        self.skip = nn.BatchNorm2d(in_channels) if same else None
        self.scale = conv_bn(in_channels, out_channels, 1, stride=stride, groups=groups) if kernel > 1 else None
        self.branches = nn.ModuleList(
            conv_bn(in_channels, out_channels, kernel, stride=stride, groups=groups) for _ in range(branches)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = 0 if self.skip is None else self.skip(x)
        if self.scale is not None:
            out = out + self.scale(x)
        for branch in self.branches:
            out = out + branch(x)
        return out


class RepViTMixer(nn.Module):
    """RepViT's token mixer (2023): depthwise 3×3 + batch norm, depthwise 1×1, identity, and batch norm over the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels, 3, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.point(x)) + x)


class YoloConv(nn.Module):
    """YOLO's basic layer: convolution, batch norm, activation (none by default here)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, 1, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class RepConv(nn.Module):
    """YOLO's re-parameterised convolution: 3×3, 1×1 and, on request, batch norm alone."""

    def __init__(self, in_channels: int, out_channels: int, identity: bool = False) -> None:
        super().__init__()
        self.conv1 = YoloConv(in_channels, out_channels, 3)
        self.conv2 = YoloConv(in_channels, out_channels, 1)
        self.bn = nn.BatchNorm2d(in_channels) if identity else None
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        id_out = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + id_out)


class UNetDecoder(nn.Module):
    """Not affine. Upsampling, an optional feature map of the encoder beside it, and two convolutions."""

    def __init__(self, channels: int, skip_channels: int) -> None:
        super().__init__()
        self.up = conv_bn(channels, channels, 3)
        self.join = conv_bn(channels + skip_channels, channels, 3)
        self.last = conv_bn(channels, channels, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.up(F.interpolate(x, scale_factor=2.0))
        if skip is not None:
            x = F.relu(self.join(torch.cat([x, skip], dim=1)))
        return self.last(x)


class OptionA(nn.Module):
    """A shortcut without parameters: every second position, the new channels zero on either side."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.side = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))


class BasicBlock(nn.Module):
    """Not affine. He et al. (2015): two 3×3 convolutions and a shortcut, option A where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        grows = in_channels != out_channels
        self.first = conv_bn(in_channels, out_channels, 3, stride=2 if grows else 1)
        self.second = conv_bn(out_channels, out_channels, 3)
        self.shortcut = OptionA(in_channels, out_channels) if grows else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet20(classes: int = 10) -> nn.Sequential:
    """ResNet-20 for 32×32 images: [N, 3, H, W] → [N, classes]."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [BasicBlock(a, b) for a, b in itertools.pairwise(widths)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    return nn.Sequential(*conv_bn(3, 16), nn.ReLU(inplace=True), *blocks, *head)


# --- hand-made mixtures ----------------------------------------------------------------------------------------------


def pair(formula: Callable[[Any, Tensor], Any], **parts: Any) -> nn.Module:
    """A formula of two branches of four channels: `a` is 3×3 + batch norm, `b` 1×1 + batch norm."""
    return Unary(formula, **({"a": conv_bn(4, 4, 3), "b": conv_bn(4, 4, 1, bias=True)} | parts))


@dataclass(frozen=True)
class Block:
    """What makes a block, and the feature maps that it takes."""

    make: Callable[[], nn.Module]
    channels: int = 4
    dims: int = 2

    def inputs(self) -> list[Tensor]:
        """Feature maps as small as the kernel, and of sizes that no stride divides."""
        sizes = {1: [(3,), (4,), (9,)], 2: [(3, 3), (4, 5), (9, 6), (7, 12)], 3: [(3, 3, 3), (4, 5, 6)]}
        return [image(2, self.channels, *size, seed=i) for i, size in enumerate(sizes[self.dims])]


PUBLISHED: dict[str, Block] = {
    "RepVGG": Block(lambda: RepVGGBlock(4, 4)),
    "RepVGG, stride 2": Block(lambda: RepVGGBlock(4, 6, stride=2)),
    "RepVGG, groups": Block(lambda: RepVGGBlock(4, 4, groups=2)),
    "RepVGG, 1-d": Block(lambda: RepVGGBlock(4, 4, dims=1), dims=1),
    "RepVGG, 3-d": Block(lambda: RepVGGBlock(4, 4, dims=3), dims=3),
    "ACNet": Block(lambda: ACBlock(4, 6)),
    "ACNet, 5×5, stride 2": Block(lambda: ACBlock(4, 4, kernel=5, stride=2)),
    "DBB": Block(lambda: DiverseBranchBlock(4, 6)),
    "DBB, 5×5": Block(lambda: DiverseBranchBlock(4, 4, kernel=5)),
    "DBB, groups, stride 2": Block(lambda: DiverseBranchBlock(4, 6, stride=2, groups=2)),
    "DBB, depthwise": Block(lambda: DiverseBranchBlock(4, 4, groups=4)),
    "MobileOne, depthwise": Block(lambda: MobileOneBlock(4, 4, groups=4)),
    "MobileOne, depthwise, stride 2": Block(lambda: MobileOneBlock(4, 4, stride=2, groups=4)),
    "MobileOne, pointwise": Block(lambda: MobileOneBlock(4, 6, kernel=1)),
    "MobileOne, pointwise with skip": Block(lambda: MobileOneBlock(4, 4, kernel=1, branches=4)),
    "RepViT": Block(lambda: RepViTMixer(4)),
    "RepConv": Block(lambda: RepConv(4, 6)),
    "RepConv, identity": Block(lambda: RepConv(4, 4, identity=True)),
}

MIXTURES: dict[str, Block] = {
    "branch in branch": Block(lambda: pair(lambda s, x: s.a(x) + s.c(x), c=RepVGGBlock(4, 4))),
    "serial blocks in a branch": Block(lambda: pair(lambda s, x: s.a(s.b(x) - x), b=nn.Conv2d(4, 4, 1, bias=False))),
    "sum of sums under a batch norm": Block(
        lambda: pair(
            lambda s, x: s.bn(s.a(x) + s.c(x)) + s.d(x), bn=nn.BatchNorm2d(4), c=ACBlock(4, 4), d=RepViTMixer(4)
        )
    ),
    "DBB inside MobileOne": Block(
        lambda: Unary(lambda s, x: s.d(x) + s.m(x), d=DiverseBranchBlock(4, 4), m=MobileOneBlock(4, 4))
    ),
    "scaled branch": Block(lambda: pair(lambda s, x: s.a(x) + 0.5 * s.b(x))),
    "subtraction": Block(lambda: pair(lambda s, x: s.a(x) - s.b(x) - x)),
    "negation": Block(lambda: pair(lambda s, x: -s.a(x) + x)),
    "division": Block(lambda: pair(lambda s, x: (s.a(x) + s.b(x)) / 2)),
    "add with alpha": Block(lambda: pair(lambda s, x: torch.add(s.a(x), s.b(x), alpha=2))),
    "sub with alpha": Block(lambda: pair(lambda s, x: torch.sub(x, s.a(x), alpha=-0.25))),
    "Python's sum": Block(lambda: pair(lambda s, x: sum([s.a(x), s.b(x), x]))),
    "x + x": Block(lambda: pair(lambda s, x: s.a(x) + x + x)),
    "one branch twice": Block(lambda: pair(lambda s, x: torch.add(*[s.a(x)] * 2))),
    "constants": Block(lambda: pair(lambda s, x: 1 - s.a(x) * 3 + 2.5)),
    "constant after a border": Block(lambda: pair(lambda s, x: s.a(x) + torch.full((1, 4, 1, 1), 0.5).double())),
    "k×1 then 1×k": Block(
        lambda: pair(
            lambda s, x: s.a(x) + s.row(s.column(x)),
            column=nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False),
            row=conv_bn(4, 4, (1, 3)),
        )
    ),
    "average pooling": Block(lambda: pair(lambda s, x: s.a(x) + s.pool(x), pool=nn.AvgPool2d(3, 1, 1))),
    "functional average pooling": Block(lambda: pair(lambda s, x: s.a(x) + F.avg_pool2d(x, 3, 1, 1))),
    "average-pool shortcut": Block(
        lambda: Unary(
            lambda s, x: s.a(x) + s.b(s.pool(x)),
            a=conv_bn(4, 6, 3, stride=2),
            b=conv_bn(4, 6, 1),
            pool=nn.AvgPool2d(3, 2, 1),
        )
    ),
    "average-pool shortcut, 2×2": Block(
        lambda: Unary(lambda s, x: s.a(x) + F.avg_pool2d(x, 2), a=conv_bn(4, 4, 4, stride=2, padding=1))
    ),
    "projection shortcut": Block(
        lambda: Unary(lambda s, x: s.a(x) + s.b(x), a=conv_bn(4, 6, 3, stride=2), b=conv_bn(4, 6, 1, stride=2))
    ),
    "option A shortcut": Block(
        lambda: Unary(lambda s, x: s.a(x) + s.b(x), a=conv_bn(4, 8, 3, stride=2), b=OptionA(4, 8))
    ),
    "strided slice": Block(lambda: Unary(lambda s, x: s.a(x) + x[..., ::2, ::2], a=conv_bn(4, 4, 3, stride=2))),
    "cropped shortcut": Block(lambda: Unary(lambda s, x: s.a(x) + x[:, :, 1:-1, 1:-1], a=conv_bn(4, 4, 3, padding=0))),
    "padding of its own": Block(lambda: pair(lambda s, x: s.c(F.pad(x, (1, 1, 1, 1))) + s.b(x), c=nn.Conv2d(4, 4, 3))),
    "ZeroPad2d": Block(lambda: pair(lambda s, x: s.c(s.pad(x)) + s.a(x), c=nn.Conv2d(4, 4, 3), pad=nn.ZeroPad2d(1))),
    "LayerScale": Block(lambda: pair(lambda s, x: x + s.gamma * s.a(x), gamma=per_channel(4))),
    "scale and shift": Block(
        lambda: pair(lambda s, x: s.a(x) * s.gamma + s.beta, gamma=per_channel(4), beta=per_channel(4))
    ),
    "dropout in a branch": Block(lambda: pair(lambda s, x: s.drop(s.a(x)) + s.b(x), drop=nn.Dropout2d(0.5))),
    "drop path": Block(lambda: pair(lambda s, x: x + s.drop(s.a(x)), drop=StochasticDepth(0.5, "row"))),
    "dilations": Block(
        lambda: pair(
            lambda s, x: s.a(x) + s.c(x) + s.d(x),
            c=nn.Conv2d(4, 4, 5, padding=2),
            d=nn.Conv2d(4, 4, 3, dilation=2, padding=2),
        )
    ),
    "groups of different numbers": Block(
        lambda: Unary(lambda s, x: s.a(x) + s.b(x) + x, a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 3, groups=2))
    ),
    "'same' padding": Block(lambda: pair(lambda s, x: s.a(x) + s.c(x), c=nn.Conv2d(4, 4, 2, padding="same"))),
}

BLOCKS = PUBLISHED | MIXTURES


def quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call whose warnings are not the matter of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def small_net(channels: Sequence[int] = (3, 4, 4)) -> nn.Sequential:
    """Not affine. Convolution, batch norm and ReLU, twice: what most tests of a promise need and no more."""
    return nn.Sequential(
        *conv_bn(channels[0], channels[1], 3, bias=True),
        nn.ReLU(),
        *conv_bn(channels[1], channels[2], 3),
        nn.ReLU(),
    )


# --- models that are hard to read -------------------------------------------------------------------------------------


class Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Tensor, scale: float = 2.0, *, flip: bool = False, other: Tensor | None = None) -> Tensor:
        x = self.block(x) * scale
        return x.flip(-1) if flip else x


class Gate(nn.Module):
    """Cannot be traced: its control flow depends on data."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.block = RepVGGBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.block(x)
        return -x


class Frozen:
    """Not a tensor, not a container: an output that torch.fx has no word for."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.difference = first - second


class Named(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Record:
    first: Tensor
    second: Tensor


SHARED: dict[str, Callable[[Any, Tensor], Any]] = {
    "convolution in a row": lambda s, x: s.c(s.c(x)),
    "convolution and batch norm in a row": lambda s, x: s.bn(s.c(s.bn(s.c(x)))),
    "convolution on two paths": lambda s, x: F.relu(s.bn(s.c(x))) + F.relu(s.c(-x)),
    "batch norm on one path only": lambda s, x: s.bn(s.c(x)) + F.relu(s.c(x)),
    "batch norm after two convolutions": lambda s, x: F.relu(s.bn(s.c(x))) + F.relu(s.bn(s.a(x))),
    "block twice": lambda s, x: s.block(F.relu(s.block(x))),
    "block as branch and as trunk": lambda s, x: s.block(x) + s.block(F.relu(x)),
    "tied weights": lambda s, x: s.bn(s.c(x)) + F.relu(s.tied(x)),
    "weight read by a function": lambda s, x: s.bn(s.c(x)) + F.relu(F.conv2d(x, s.c.weight, padding=1)),
    "weight in the output": lambda s, x: (s.bn(s.c(x)), s.c.weight),
    "statistics in the output": lambda s, x: (s.bn(s.c(x)), s.bn.running_mean * 2),
    "value read by two": lambda s, x: (lambda y: F.relu(y) + s.bn(y))(s.c(x)),
    "value read by two batch norms": lambda s, x: (lambda y: F.relu(s.bn(y)) + s.other(y))(s.c(x)),
    "value read and returned": lambda s, x: (lambda y: (y, s.bn(y)))(s.c(x)),
    "value read inside and outside a region": lambda s, x: (lambda y: (s.a(x) + y, F.relu(y)))(s.c(x)),
    "one name for two modules": lambda s, x: s.again(F.relu(s.c(x))) + s.c(x),
}


def sharing(formula: Callable[[Any, Tensor], Any]) -> nn.Module:
    convolution = nn.Conv2d(4, 4, 3, padding=1)
    tied = nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = convolution.weight
    return Unary(
        formula,
        c=convolution,
        again=convolution,
        tied=tied,
        a=conv_bn(4, 4, 1),
        bn=nn.BatchNorm2d(4),
        other=nn.BatchNorm2d(4),
        block=RepVGGBlock(4, 4),
    )


class Remembers(nn.Module):
    """Keeps what it has seen, which during tracing is a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.seen = RepVGGBlock(4, 4), []

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.append(x)
        return self.block(x) + torch.ones(4, 1, 1)


class Standardised(nn.Conv2d):
    """Weights normalised with each call."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)
