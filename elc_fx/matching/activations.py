"""Activations: which nodes of a graph are one, and the straight line that stands closest to it.

An activation is a function of one tensor, element by element, that keeps the shape. torch's own are known; a user's
are registered, and then stay one node when a model is captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from elc_fx.capturing.graph import function_name, has_hooks, is_torchs, module_of
from elc_fx.errors import InvalidInputError

MODULES: set[type[nn.Module]] = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Threshold, nn.RReLU),
}
NAMES = frozenset(
    name + suffix
    for name in (
        *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign"),
        *("hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "tanhshrink", "sigmoid", "log_sigmoid"),
        # F.threshold is called _threshold.
        *("tanh", "threshold", "_threshold", "clamp", "clamp_min", "clamp_max", "clip", "special_expit", "expit"),
    )
    for suffix in ("", "_")
)
FUNCTIONS: set[Callable[..., Any]] = set()  # the user's

OTHER_LAYERS = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd),
    *(nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.Softmax, nn.LogSoftmax),
)
FLAT_BEYOND = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, math.inf),
    "hardsigmoid": (-3.0, 3.0),
}
RISING = frozenset(("relu", "relu6", "hardtanh"))
RISING_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
POINTS = 2049  # of the quadrature; its error is about 1e-5 for an activation with a kink
REACH = 8.0  # standard deviations to both sides


def register_activation(activation: type[nn.Module] | Callable[[Tensor], Tensor]) -> Any:
    """Makes a module class or a function known as an activation; can be used as a decorator.

    It must act element by element and keep the shape. A function has to be one node of a captured graph, so a Python
    function needs `torch.fx.wrap` too. Raises `InvalidInputError` for anything else, as far as one can tell.
    """
    if isinstance(activation, type) and issubclass(activation, OTHER_LAYERS):
        raise InvalidInputError(f"{activation.__name__} does not act element by element")
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        MODULES.add(activation)
    elif callable(activation):
        FUNCTIONS.add(activation)
    else:
        raise InvalidInputError(f"{activation!r} is neither a module class nor a function")
    return activation


def is_activation(captured: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node computes an activation of its only tensor."""
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return False
    if node.op == "call_module":
        return type(module_of(captured, node)) in MODULES and len(node.args) == 1 and not node.kwargs
    if node.op == "call_method":
        return node.target in NAMES
    return node.op == "call_function" and (
        (function_name(node) in NAMES and is_torchs(node)) or node.target in FUNCTIONS
    )


def activation_of(captured: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The activation that a node computes of its only tensor, as a module of its own, or None."""
    if not is_activation(captured, node):
        return None
    if node.op == "call_module":
        return module_of(captured, node)
    function = str(node.target).removesuffix("_") if node.op == "call_method" else node.target
    return Elementwise(function, node.args[1:], {**node.kwargs})


class Elementwise(nn.Module):
    """A function or method of one tensor, with its other arguments, as a module."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        name = getattr(function, "__name__", "")
        plain = name.removesuffix("_")
        # In place, it would overwrite what others still read.
        out_of_place = next((getattr(home, plain) for home in (torch, F) if hasattr(home, plain)), function)
        self.function = out_of_place if name != plain else function
        self.args = args
        self.kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.function, str):
            return getattr(x, self.function)(*self.args, **self.kwargs)  # type: ignore[no-any-return]
        return self.function(x, *self.args, **self.kwargs)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", str(self.function))


def flat_beyond(activation: nn.Module) -> tuple[float, float]:
    """Below the first and above the second number, the activation is constant, as far as is known."""
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
        return activation.min_val, activation.max_val
    return FLAT_BEYOND.get(activation_name(activation).lower(), (-math.inf, math.inf))


def never_falls(captured: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node computes an activation of which it is known that a larger value never gives a smaller one.

    And that the slope is 0 or 1, and 0 where it bends, so that gradients are the same to the bit on both sides of a
    maximum (`clamp` has had another slope there in some versions of torch). Not said of a user's own.
    """
    activation = activation_of(captured, node)
    if isinstance(activation, Elementwise):
        return node.target not in FUNCTIONS and function_name(node).removesuffix("_") in RISING
    return activation is not None and type(activation) in RISING_MODULES and not has_hooks(activation)


def activation_name(activation: nn.Module) -> str:
    if isinstance(activation, Elementwise):
        return activation.extra_repr()
    return type(activation).__name__


def line_for_gaussian(activation: nn.Module, mean: Tensor, std: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The line a·x + c with the least E[(act(x) − a·x − c)²] for x ~ N(mean, std²), per channel, in float64.

    a = Cov(act(x), x) / Var(x) and c = E[act(x)] − a·E[x], by the trapezoidal rule. mean, std, a, c: [channels]. A
    channel with std = 0 is constant: there, the line is act(mean), with slope 0.
    """
    z = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64, device=mean.device)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    weight = (density / density.sum()).unsqueeze(1)
    mean, std = mean.detach().double(), std.detach().double()
    x = mean + std * z.unsqueeze(1)  # [POINTS, channels]
    y = apply_per_channel(activation, x, dims)
    expected = (weight * y).sum(0)
    covariance = (weight * (y - expected) * (x - mean)).sum(0)
    slope = torch.where(std > 0, covariance / torch.where(std > 0, std * std, 1), 0)
    return slope, expected - slope * mean


def apply_per_channel(activation: nn.Module, x: Tensor, dims: int) -> Tensor:
    """The activation of [points, channels], as it treats a feature map with `dims` spatial axes, in float64."""
    with torch.no_grad():
        shaped = x.view(*x.shape, *[1] * dims)
        parameter = next(activation.parameters(), None)
        narrow = shaped if parameter is None else shaped.to(parameter.dtype)
        return activation(narrow).detach().double().view_as(x)
