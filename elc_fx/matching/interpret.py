"""What a node of a captured graph means in the algebra: which operations are affine maps, and which.

`Interpreter` reads nodes, in any spelling (module, function, method, operator), as affine maps of one feature map. The
geometry of one is known at once; its numbers are loaded when a merge needs them, those of convolutions and linear
layers in their own type, others in float64.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from elc_fx.affine import AffineMap, Geometry, Ints, Padding, same_padding, transposed_weight, wide
from elc_fx.capturing.answers import EXTREMES
from elc_fx.capturing.attributes import Attributes
from elc_fx.capturing.capture import assign
from elc_fx.capturing.graph import (
    allocates,
    erase_unread,
    function_name,
    has_unknown_hooks,
    is_leaf,
    is_torchs,
    module_of,
    signature_of,
)
from elc_fx.capturing.randomness import generators, randomness_of_the_caller
from elc_fx.capturing.shapes import Value
from elc_fx.errors import first_line
from elc_fx.matching.activations import MODULES, is_activation
from elc_fx.matching.constants import Constants
from elc_fx.matching.dtypes import DType, Sort, settled_dtypes

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
TRANSPOSED = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
BATCH_NORMS = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
AVERAGE_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
AVERAGE_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")  # arguments
TENSORS = ("input", "weight", "bias", "running_mean", "running_var")  # arguments that are no settings
PADS = {
    f"{kind}Pad{n}d": mode
    for kind, mode in {
        "Zero": "zeros",
        "Constant": "zeros",
        "Reflection": "reflect",
        "Replication": "replicate",
        "Circular": "circular",
    }.items()
    for n in (1, 2, 3)
}
PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
ADDS = frozenset(("add", "iadd", "add_", "sub", "isub", "sub_", "subtract", "subtract_", "rsub"))
SCALES = frozenset(("mul", "imul", "mul_", "multiply", "multiply_"))
QUOTIENTS = frozenset(("div", "truediv", "itruediv", "div_", "divide", "true_divide"))
CONCATENATIONS = frozenset(("cat", "concat", "concatenate"))
CPU = torch.device("cpu")  # where numbers are made that have no device of their own, whatever torch's default is


@dataclass(frozen=True)
class Feature:
    """What is known of a value: channels, and spatial axes (0: the channels are last, as for linear layers)."""

    channels: int | None = None
    dims: int | None = None

    @property
    def is_known(self) -> bool:
        return self.channels is not None and self.dims is not None

    def known(self, other: Feature) -> Feature:
        """This, completed by what the other knows."""
        return Feature(
            self.channels if self.channels is not None else other.channels,
            self.dims if self.dims is not None else other.dims,
        )


@dataclass(frozen=True)
class Operation:
    """One node as an affine map of `source`. dtype, device: of its weights, None where it has none.

    convolves: it is a convolution or linear layer, which costs FLOPs; elementwise operations count none. computes: its
    weights too, with each call. inner: further nodes that it stands for, between `source` and `node`.
    rank: the number of axes for which it is that map, if it would take others but be another map then.
    """

    node: fx.Node
    source: fx.Node
    geometry: Geometry
    load: Callable[[], AffineMap]
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    convolves: bool = False
    computes: bool = False
    inner: tuple[fx.Node, ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Term:
    """One summand: coefficient · value."""

    value: fx.Node
    coefficient: float = 1.0


class Interpreter:
    """Reads the nodes of one captured graph. values: what example inputs told of them.

    trusting: types and axes that are not known are those that fit, as they were where the examples of a plan told them.
    """

    trusting = False

    def __init__(self, captured: fx.GraphModule, values: Mapping[fx.Node, Value] | None = None) -> None:
        self.captured = captured
        self.values = values or {}
        self.shapes: dict[fx.Node, Ints] = {node: value.shape for node, value in self.values.items()}
        self.constants = Constants(captured)
        self.operations: dict[fx.Node, Operation] = {}
        self.refusals: dict[fx.Node, str] = {}  # operations that look affine but are not, with the reason
        self.features: dict[fx.Node, Feature] = {node: self._declared(node) for node in captured.graph.nodes}
        self.sizes = _sizes(captured.graph)
        recorded = {node: value.dtype for node, value in self.values.items()}
        self.dtypes = settled_dtypes(captured, self.constants, self.sizes, recorded)
        self.reads = Counter(source for node in captured.graph.nodes for source in self._computed_of(node))
        self._interpret()

    def _declared(self, node: fx.Node) -> Feature:
        """What a node itself says of its value."""
        return Feature()

    def _operation(self, node: fx.Node) -> Operation | None:
        """The node as an affine map, or None; `refusals` then has the reason where one is worth telling."""
        self.refusals.pop(node, None)
        try:
            if node.op == "call_module":
                return self._module(node)
            if node.op in ("call_function", "call_method"):
                return self._function(node)
        except _Refused as refused:
            self.refusals[node] = str(refused)
        return None

    # Modules.

    def _module(self, node: fx.Node) -> Operation | None:
        module = module_of(self.captured, node)
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        if has_unknown_hooks(module):
            return None
        if is_parametrized(module) and (reason := _computes_otherwise(module)):
            raise _Refused(reason)
        if self.constants.written and any(map(self.constants.may_change, (*module.parameters(), *module.buffers()))):
            return None
        source = node.args[0]
        readers: tuple[tuple[dict[Any, Any], Callable[..., Operation]], ...] = (
            (CONVOLUTIONS, self._convolution_module),
            (TRANSPOSED, self._convolution_module),
            (BATCH_NORMS, self._batch_norm_module),
            (AVERAGE_POOLS, self._average_pool_module),
            ({nn.Linear: 0}, self._linear_module),
        )
        for classes, read in readers:
            for cls, dims in classes.items():
                if _computes_as(module, cls):
                    return read(node, source, module, dims)
        if type(module).__name__ in PADS and type(module).__module__ == "torch.nn.modules.padding":
            return self._pad_module(node, source, module)
        return None

    def _linear_module(self, node: fx.Node, source: fx.Node, module: Any, dims: int) -> Operation:
        return self._linear(node, source, weight_of(module), module.bias)

    def _pad_module(self, node: fx.Node, source: fx.Node, module: Any) -> Operation:
        if getattr(module, "value", 0) != 0:
            raise _Refused(f"it pads with {module.value}, not with zeros")
        return self._pad(node, source, tuple(int(p) for p in module.padding), PADS[type(module).__name__])

    def _convolution_module(self, node: fx.Node, source: fx.Node, module: Any, dims: int) -> Operation:
        transposed = isinstance(module, _ConvTransposeNd)
        return self._convolution(
            node,
            source,
            weight_of(module),
            module.bias,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            output_padding=module.output_padding if transposed else None,
        )

    def _batch_norm_module(self, node: fx.Node, source: fx.Node, module: Any, dims: int | None) -> Operation:
        if module.training:
            raise _Refused("the batch norm is in training mode")
        return self._batch_norm(
            node, source, module.running_mean, module.running_var, module.weight, module.bias, module.eps, dims
        )

    def _average_pool_module(self, node: fx.Node, source: fx.Node, module: Any, dims: int) -> Operation:
        settings = {key: getattr(module, key) for key in AVERAGE_POOL if hasattr(module, key)}
        return self._average_pool(node, source, dims, **settings)

    # Functions, methods and operators.

    def _function(self, node: fx.Node) -> Operation | None:
        name, arguments = function_name(node), signature_of(node)
        if node.target is assign:
            return self._filled_padding(node)
        if not is_torchs(node) or node in self.constants:
            return None
        if name in ADDS | SCALES | QUOTIENTS | {"neg", "negative", "neg_"}:
            return self._elementwise(node, name, arguments)
        source = arguments.get("input")
        if not isinstance(source, fx.Node):
            return None
        convolves = name.startswith("conv") and name[-2:-1].isdigit()
        if convolves or name == "batch_norm" or name.startswith("avg_pool"):
            settings = [value for key, value in arguments.items() if key not in TENSORS]
            if any(isinstance(value, fx.Node) for value in tree_leaves(settings)):
                raise _Refused("its settings are computed while it runs")
        if convolves:
            return self._convolution_function(node, source, name, arguments)
        if name == "linear":
            weight, bias = self._weight(arguments["weight"]), self._weight(arguments.get("bias"))
            return self._linear(node, source, weight, bias)
        if name == "batch_norm":
            return self._batch_norm_function(node, source, arguments)
        if name.startswith("avg_pool"):
            given = {key: arguments[key] for key in AVERAGE_POOL if key in arguments}
            return self._average_pool(node, source, int(name[-2]), **given)
        if name == "pad":
            return self._pad_function(node, source, arguments)
        if name == "getitem":
            return self._slice(node, source, arguments["index"])
        return None

    def _weight(self, argument: Any) -> Tensor | None:
        if argument is None:
            return None
        value = self.constants.value(argument)
        if not isinstance(value, Tensor):
            constant = isinstance(argument, fx.Node) and argument in self.constants
            why = "random, overwritten, or made by what is not torch's" if constant else "computed from its input"
            raise _Refused(f"its weight is {why}")
        return value

    def _computes_alone(self, node: fx.Node) -> bool:
        """Whether a layer computes its weights with each call, of what no other does: each call would be a layer."""
        read = self._computed_of(node)
        return bool(read) and all(self.reads[source] == 1 for source in read)

    def _computed_of(self, node: fx.Node) -> set[Any]:
        """What a layer computes its weights of: a module its own, a function attributes, by other functions."""
        if node.op == "call_module":
            module = module_of(self.captured, node)
            return {module} if is_parametrized(module) or module._forward_pre_hooks else set()
        computed = [source for source in node.all_input_nodes if source in self.constants and source.op != "get_attr"]
        if node in self.constants or not computed:
            return set()
        seen, pending = set(computed), computed
        while pending:
            new = set(pending.pop().all_input_nodes) - seen
            seen |= new
            pending += new
        return {str(source.target) for source in seen if source.op == "get_attr"}

    def _convolution_function(self, node: fx.Node, source: fx.Node, name: str, arguments: dict[str, Any]) -> Operation:
        dims = int(name[-2])
        weight = self._weight(arguments.get("weight"))
        stride, dilation = (_per_axis(arguments.get(key, 1), dims) for key in ("stride", "dilation"))
        padding, groups = arguments.get("padding", 0), arguments.get("groups", 1)
        output = _per_axis(arguments.get("output_padding", 0), dims) if "transpose" in name else None
        return self._convolution(
            node,
            source,
            weight,
            self._weight(arguments.get("bias")),
            stride=stride,
            padding=padding if isinstance(padding, str) else _per_axis(padding, dims),
            dilation=dilation,
            groups=groups,
            padding_mode="zeros",
            output_padding=output,
        )

    def _batch_norm_function(self, node: fx.Node, source: fx.Node, arguments: dict[str, Any]) -> Operation | None:
        if arguments.get("training", False) is not False:
            raise _Refused("the batch norm normalises with the statistics of the batch")
        mean, variance, weight, bias = (
            self._weight(arguments.get(key)) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return self._batch_norm(node, source, mean, variance, weight, bias, arguments.get("eps", 1e-5), None)

    def _elementwise(self, node: fx.Node, name: str, arguments: dict[str, Any]) -> Operation | None:
        """x · c, x / c, x + c, c − x and the like, where c is a constant per channel."""
        left, right = arguments.get("input"), arguments.get("other")
        if name in ("neg", "negative", "neg_"):
            return self._scale(node, left, -1.0, None) if isinstance(left, fx.Node) else None
        if name == "rsub":  # other − alpha · input
            left, right = right, left
        alpha = arguments.get("alpha", 1)
        a, b = self.constants.value(left), self.constants.value(right)
        if (a is None) == (b is None) or not isinstance(alpha, int | float) or arguments.get("rounding_mode"):
            return None
        source, constant = (left, b) if a is None else (right, a)
        if not isinstance(source, fx.Node) or source in self.sizes:
            return None
        if name in SCALES:
            return self._scale(node, source, constant, None)
        if name in QUOTIENTS:
            if a is not None:
                return None
            return self._scale(node, source, constant, None, divide=True)
        sign = -alpha if "sub" in name else alpha
        if a is None:
            return self._scale(node, source, None, constant, shift=sign)
        return self._scale(node, source, float(sign) if sign != 1 else None, constant)

    def _scale(
        self, node: fx.Node, source: fx.Node, weight: Any, bias: Any, *, divide: bool = False, shift: float = 1
    ) -> Operation | None:
        feature = self.features[source]
        channels, dims = feature.channels, feature.dims
        known = self._told(source)
        if known is Sort.EXACT:
            raise _Refused("it makes floating-point numbers of others")
        if known is None and not self.trusting:
            raise _Refused("it may make floating-point numbers of others: the data type of its input is not known")
        if channels is None or dims is None:
            raise _Refused("the number of channels that it scales is not known")
        tensors = [value for value in (weight, bias) if isinstance(value, Tensor)]
        if not all(_is_per_channel(value, channels, dims) for value in tensors):
            raise _Refused("its constant is not one number per channel")
        dtypes = {value.dtype for value in tensors if value.dim() > 0}
        if dtypes and known is Sort.INEXACT:
            raise _Refused("its constant may change the data type")
        if isinstance(known, torch.dtype) and any(torch.promote_types(known, dtype) != known for dtype in dtypes):
            raise _Refused("its constant changes the data type")
        complex_number = any(
            isinstance(v, complex) or (isinstance(v, Tensor) and v.is_complex()) for v in (weight, bias)
        )
        if complex_number:
            raise _Refused("its constant changes the data type")
        geometry = replace(Geometry.identity(channels, dims), bias=bias is not None)
        adds_axes = dims > 0 and any(value.dim() == dims + 2 for value in tensors)
        if adds_axes and not self._may_be_batched(source, dims):
            raise _Refused("its input has no batch axis")
        rank = dims + 2 if adds_axes and source not in self.shapes else None
        devices = {value.device for value in tensors if value.dim() > 0}

        def load() -> AffineMap:
            scale = _vector(1.0 if weight is None else weight, channels)
            if divide:
                scale = 1 / scale
            offset = None if bias is None else shift * _vector(bias, channels)
            return AffineMap.scale(scale, offset, dims)

        dtype = known if dtypes and isinstance(known, torch.dtype) else None  # else that of the layer that it fits
        return Operation(node, source, geometry, load, dtype, next(iter(devices), None), rank=rank)

    def _told(self, value: fx.Node) -> DType | None:
        """What is known of its type."""
        known = self.dtypes.get(value)
        settled = not self.trusting or value in self.values or isinstance(known, torch.dtype)
        return known if settled else None

    # The operations themselves, however they were spelled.

    def _convolution(
        self,
        node: fx.Node,
        source: fx.Node,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        stride: Ints,
        padding: Ints | Padding | str,
        dilation: Ints,
        groups: int,
        padding_mode: str,
        output_padding: Ints | None,
    ) -> Operation:
        if not _usable(weight, bias):
            raise _Refused("its weights are not initialised, or of different data types")
        assert weight is not None
        transposed = output_padding is not None
        kernel_size = tuple(weight.shape[2:])
        if padding == "same":
            sides = same_padding([d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)])
        elif isinstance(padding, str):  # "valid"
            sides = ((0, 0),) * len(kernel_size)
        else:
            sides = tuple((p, p) if isinstance(p, int) else p for p in padding)
        out_channels, in_channels = weight.shape[0], weight.shape[1] * groups
        if transposed:
            out_channels, in_channels = weight.shape[1] * groups, weight.shape[0]
        geometry = Geometry(
            out_channels,
            in_channels,
            kernel_size=kernel_size,
            stride=tuple(stride),
            dilation=tuple(dilation),
            padding=sides,
            groups=groups,
            padding_mode=padding_mode,
            bias=bias is not None,
            transposed=transposed,
            output_padding=tuple(output_padding or ()),
        )

        def load() -> AffineMap:
            kernel = transposed_weight(weight.detach(), groups) if transposed else weight.detach()
            return AffineMap(geometry, kernel, None if bias is None else wide(bias.detach()))

        computes = self._computes_alone(node)
        return Operation(node, source, geometry, load, weight.dtype, weight.device, convolves=True, computes=computes)

    def _linear(self, node: fx.Node, source: fx.Node, weight: Tensor | None, bias: Tensor | None) -> Operation:
        if not _usable(weight, bias) or weight is None or weight.dim() != 2:
            raise _Refused("its weights are not initialised, or of different data types")
        out_channels, in_channels = weight.shape
        geometry = Geometry.pointwise(out_channels, in_channels, 0, bias=bias is not None)

        def load() -> AffineMap:
            return AffineMap(geometry, weight.detach(), None if bias is None else wide(bias.detach()))

        computes = self._computes_alone(node)
        return Operation(node, source, geometry, load, weight.dtype, weight.device, convolves=True, computes=computes)

    def _batch_norm(
        self,
        node: fx.Node,
        source: fx.Node,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dims: int | None,
    ) -> Operation:
        """(x − mean) / √(variance + eps) · weight + bias, per channel."""
        if mean is None or variance is None:
            raise _Refused("the batch norm keeps no running statistics: it normalises with those of the batch")
        if not _usable(mean, variance):
            raise _Refused("the batch norm is not initialised")
        axes = len(self.shapes.get(source, ()))
        dims = dims if dims is not None else self.features[source].dims
        if dims is None and axes:
            dims = axes - 2  # it normalises axis 1, whatever stands before it
        if dims is None:
            raise _Refused("the number of axes that it normalises is not known")
        geometry = replace(Geometry.identity(mean.shape[0], dims), bias=True)

        def load() -> AffineMap:
            scale = (wide(variance.detach()) + eps).rsqrt()
            if weight is not None:
                scale = scale * wide(weight.detach())
            offset = -wide(mean.detach()) * scale
            return AffineMap.scale(scale, offset if bias is None else offset + wide(bias.detach()), dims)

        if dims == 0 and axes not in (0, 2):
            raise _Refused(f"the batch norm normalises axis 1 of {axes}, not the last one")
        return Operation(node, source, geometry, load, None, mean.device, rank=2 if dims == 0 and not axes else None)

    def _average_pool(
        self,
        node: fx.Node,
        source: fx.Node,
        dims: int,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: Any = False,
        count_include_pad: Any = True,
        divisor_override: Any = None,
    ) -> Operation:
        """The arguments are torch's."""
        kernel = _per_axis(kernel_size, dims)
        step = kernel if stride is None or stride == () or stride == [] else _per_axis(stride, dims)
        sides = _per_axis(padding, dims)
        if ceil_mode and any(s != 1 for s in step):
            raise _Refused("average pooling with ceil_mode divides by fewer values at the border")
        if not count_include_pad and any(sides) and divisor_override is None:
            raise _Refused("average pooling that does not count its padding divides by fewer values at the border")
        channels, shape = self.features[source].channels, self.shapes.get(source, ())
        if channels is None and len(shape) == dims + 2:
            channels = shape[1]
        if channels is None:
            raise _Refused("the number of channels that it pools is not known")
        geometry = Geometry(
            channels,
            channels,
            kernel_size=kernel,
            stride=step,
            dilation=(1,) * dims,
            padding=tuple((p, p) for p in sides),
            groups=channels,
        )

        def load() -> AffineMap:
            size = divisor_override or math.prod(kernel)
            return AffineMap(geometry, torch.full((channels, 1, *kernel), 1 / size, dtype=torch.float64, device=CPU))

        return Operation(node, source, geometry, load)

    def _pad_function(self, node: fx.Node, source: fx.Node, arguments: dict[str, Any]) -> Operation | None:
        sides, mode, value = arguments["pad"], arguments.get("mode", "constant"), arguments.get("value")
        if mode not in PAD_MODES or not isinstance(sides, tuple | list) or any(not isinstance(s, int) for s in sides):
            raise _Refused("its padding is computed while it runs")
        if mode == "constant" and value not in (None, 0):
            raise _Refused(f"it pads with {value}, not with zeros")
        return self._pad(node, source, tuple(sides), PAD_MODES[mode])

    def _pad(self, node: fx.Node, source: fx.Node, flat: Ints, mode: str) -> Operation:
        """Padding of spatial axes is a pointwise map with padding; zero channels are a selection."""
        feature = self.features[source]
        dims = feature.dims
        if not dims or feature.channels is None:
            raise _Refused("the axes that it pads are not known")
        pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
        pairs += [(0, 0)] * (dims + 2 - len(pairs))
        *spatial, (before, after), batch = pairs
        if len(pairs) > dims + 2 or batch != (0, 0) or min(before, after) < 0:
            raise _Refused("it pads or crops the batch or the channels")
        if mode != "zeros" and ((before, after) != (0, 0) or any(p < 0 for sides in spatial for p in sides)):
            raise _Refused("it pads in a way that no convolution does")
        padding = tuple(reversed(spatial))
        if before or after:
            kept = range(before, before + feature.channels)
            return self._selection(node, source, feature.channels + before + after, kept, None, None, padding)
        return self._identity(node, source, padding=padding, padding_mode=mode)

    def _filled_padding(self, node: fx.Node) -> Operation | None:
        """pad(x) whose border is then assigned a constant per channel, side after side, until no zeros are left."""
        assigned = [node]
        while (padded := assigned[-1].args[0]).target is assign:  # type: ignore[union-attr]
            assigned.append(padded)  # type: ignore[arg-type]
        operation = self.operations.get(padded)  # type: ignore[arg-type]
        if operation is None or function_name(padded) != "pad" or operation.geometry.padding_mode != "zeros":  # type: ignore[arg-type]
            return None
        geometry, dims = operation.geometry, operation.geometry.dims
        if geometry.groups != geometry.out_channels or any(len(n.users) != 1 for n in (padded, *assigned[1:])):  # type: ignore[union-attr]
            return None
        written = {_border_side(n.args[1], geometry.padding) for n in assigned}
        expected = {(axis, side) for axis, sides in enumerate(geometry.padding) for side in (0, 1) if sides[side] > 0}
        values = [self.constants.value(n.args[2]) for n in assigned]
        if written != expected or any(p < 0 for sides in geometry.padding for p in sides):
            return None
        tensor = values[0]
        if not isinstance(tensor, Tensor) or not _is_per_channel(tensor, geometry.in_channels, dims):
            return None
        if any(
            value is not tensor and not (isinstance(value, Tensor) and torch.equal(value, tensor)) for value in values
        ):
            return None

        def load() -> AffineMap:
            plain = operation.load()
            filled = replace(plain.geometry, fill=True)
            return replace(plain, geometry=filled, fill=tensor.detach().reshape(-1).expand(geometry.in_channels))

        inner = (padded, *reversed(assigned[1:]))
        return replace(operation, node=node, geometry=replace(geometry, fill=True), load=load, inner=inner)  # type: ignore[arg-type]

    def _slice(self, node: fx.Node, source: fx.Node, index: Any) -> Operation | None:
        """x[:, a:b, ::s, c:-e] with bounds that count from the ends: a strided, cropped, pointwise map."""
        feature = self.features[source]
        dims, channels = feature.dims, feature.channels
        if not dims or channels is None or not self._may_be_batched(source, dims):
            return None
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = (*index[:at], *[slice(None)] * (dims + 3 - len(index)), *index[at + 1 :])
        if len(index) > dims + 2 or not all(isinstance(i, slice) for i in index):
            return None
        index = (*index, *[slice(None)] * (dims + 2 - len(index)))
        if any(isinstance(bound, fx.Node) for i in index for bound in (i.start, i.stop, i.step)):
            raise _Refused("its bounds are computed while it runs")
        if index[0] not in (slice(None), slice(0, None)):
            raise _Refused("it selects samples of the batch")
        stride, padding = [], []
        for i in index[2:]:
            start, stop = i.start or 0, i.stop
            if start < 0 or (stop is not None and stop >= 0):
                raise _Refused("its bounds select a part that depends on the size of the input")
            stride.append(i.step or 1)
            padding.append((-start, stop or 0))
        kept = range(channels)[index[1]]
        if not kept or 0 in self.shapes.get(node, ()):
            raise _Refused("it selects nothing")
        rank = dims + 2 if source not in self.shapes else None
        if kept == range(channels):
            strided = self._identity(node, source, stride=tuple(stride), padding=tuple(padding))
            return replace(strided, rank=rank)
        selection = self._selection(node, source, len(kept), None, kept, tuple(stride), tuple(padding))
        return replace(selection, rank=rank)

    def _identity(self, node: fx.Node, source: fx.Node, **settings: Any) -> Operation:
        """Each channel as it is. settings: of the geometry; the number of channels of `source` has to be known."""
        channels, dims = self.features[source].channels, self.features[source].dims
        assert channels is not None and dims is not None
        geometry = replace(Geometry.identity(channels, dims), **settings)

        def load() -> AffineMap:
            like = torch.empty(0, dtype=torch.float64, device=CPU)
            return replace(AffineMap.identity(channels, dims, like), geometry=geometry)

        return Operation(node, source, geometry, load)

    def _selection(
        self,
        node: fx.Node,
        source: fx.Node,
        out_channels: int,
        rows: range | None,
        columns: range | None,
        stride: Ints | None,
        padding: Padding,
    ) -> Operation:
        """Output channel rows[i] is input channel columns[i]; other output channels are zero."""
        feature = self.features[source]
        assert feature.channels is not None and feature.dims is not None
        channels, dims = feature.channels, feature.dims
        geometry = Geometry.pointwise(out_channels, channels, dims, stride=stride, padding=padding)

        def load() -> AffineMap:
            kernel = torch.zeros(out_channels, channels, dtype=torch.float64, device=CPU)
            kernel[
                list(range(out_channels) if rows is None else rows),
                list(range(channels) if columns is None else columns),
            ] = 1
            return AffineMap(geometry, kernel.view(out_channels, channels, *[1] * dims))

        return Operation(node, source, geometry, load)

    # Joins: several feature maps become one.

    def summands(self, node: fx.Node) -> tuple[Term, Term] | None:
        """The two summands of an addition or subtraction of feature maps, or None."""
        name = function_name(node)
        if name not in ADDS or not is_torchs(node):
            return None
        arguments = signature_of(node)
        left, right, alpha = arguments.get("input"), arguments.get("other"), arguments.get("alpha", 1)
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node) and isinstance(alpha, int | float)):
            return None
        if self.constants.value(left) is not None or self.constants.value(right) is not None:
            return None
        if name == "rsub":  # other − alpha · input
            left, right = right, left
        return Term(left), Term(right, -alpha if "sub" in name else alpha)

    def concatenated(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        """The feature maps that a node concatenates along the channels, or None."""
        if function_name(node) not in CONCATENATIONS or "out" in node.kwargs or not is_torchs(node):
            return None
        arguments = signature_of(node)
        tensors, axis = arguments.get("tensors"), arguments.get("dim", 0)
        if not isinstance(tensors, tuple | list) or not isinstance(axis, int):
            return None
        if not all(isinstance(t, fx.Node) for t in tensors):
            return None
        dims = next((d for t in tensors if (d := self.features[t].dims) is not None), None)
        if dims is None or len(tensors) < 2 or (axis > 0 and not self._may_be_batched(tensors[0], dims)):
            return None
        if dims == 0:
            rank = next((len(s) for t in tensors if (s := self.shapes.get(t))), 0)
            return tuple(tensors) if axis == -1 or (axis == rank - 1 if rank else axis > 0 and self.trusting) else None
        return tuple(tensors) if axis in (1, -dims - 1) else None

    def free_layers_of_questions(self) -> None:
        """Layers that are apart only since somebody asks for a size in between come to stand next to each other."""
        self._erase_settled_assertions()
        self._read_sizes_behind_scales()

    def _read_sizes_behind_scales(self) -> None:
        """The size of what a batch norm is given is read from its result, which has the same.

        The batch norm moves to its input for that, and the readers behind it, before anything can write into either.
        """
        for node, operation in self.operations.items():
            source = operation.source
            readers = [user for user in source.users if user in self.sizes and user.all_input_nodes == [source]]
            alone = readers and len(source.users) == len(readers) + 1 and allocates(self.captured, source)
            if alone and node.op == "call_module" and operation.geometry.is_scale:
                source.append(node)
                for reader in readers:
                    reader.replace_input_with(source, node)
                    node.append(reader)

    def _erase_settled_assertions(self) -> None:
        """Erases assertions on axes that the layers settle, and what only those read: they stand between layers."""
        nodes = self.captured.graph.nodes
        of_sizes = {node for node in nodes if node.target in (operator.eq, getattr, "dim")}
        for assertion in self._settled_assertions():
            erase_unread(assertion, of_sizes)

    def _settled_assertions(self) -> list[fx.Node]:
        """Assertions that a value has as many axes as the layer before it gives."""
        settled = []
        for node in self.captured.graph.nodes:
            compared = node.args[0] if node.target is torch._assert else None
            if not isinstance(compared, fx.Node) or compared.target is not operator.eq:
                continue
            counted, expected = compared.args
            if isinstance(counted, fx.Node) and (value := _whose_axes(counted)) is not None:
                dims = self.features[value].dims
                if dims and expected == dims + 2 and self._may_be_batched(value, dims):
                    settled.append(node)
        return settled

    # What is known of the values: channels and axes, from the layers before and behind them.

    def _interpret(self) -> None:
        """Reads all nodes, twice: what a later layer says of its input completes what the first pass did not know.

        What is left is completed by a guess from the shapes, and read a third time.
        """
        nodes = list(self.captured.graph.nodes)
        for guess in (False, False, True):
            for node in nodes:
                if node not in self.operations and (operation := self._operation(node)) is not None:
                    self.operations[node] = operation
                if node in self.operations:
                    geometry = self.operations[node].geometry
                    self.features[node] = Feature(geometry.out_channels, geometry.dims)
                else:
                    for source in self._passes_on(node):
                        self._learn(node, self.features[source])
                    if (joined := self.concatenated(node)) is not None:
                        self._learn(node, self._concatenation(joined))
                    self._complete_from_shape(node, guess)
            for node in reversed(nodes):
                if node in self.operations:
                    geometry = self.operations[node].geometry
                    self._learn(self.operations[node].source, Feature(geometry.in_channels, geometry.dims))
                else:
                    for source in self._passes_on(node):
                        self._learn(source, self.features[node])

    def _concatenation(self, values: Sequence[fx.Node]) -> Feature:
        features = [self.features[value] for value in values]
        channels = [feature.channels for feature in features if feature.channels is not None]
        dims = next((feature.dims for feature in features if feature.dims is not None), None)
        return Feature(sum(channels) if len(channels) == len(values) else None, dims)

    def _learn(self, node: fx.Node, feature: Feature) -> None:
        self.features[node] = self.features[node].known(feature)

    def _may_be_batched(self, node: fx.Node, dims: int) -> bool:
        """Whether a value has a batch axis, as far as is known: convolutions take one sample without it too."""
        return len(self.shapes.get(node, (0,) * (dims + 2))) == dims + 2 or not dims

    def _complete_from_shape(self, node: fx.Node, guess: bool) -> None:
        """guess: a value of two axes that nothing else is known of has its channels last."""
        shape, feature = self.shapes.get(node), self.features[node]
        if not shape or len(shape) < 2:
            return
        dims = feature.dims if feature.dims is not None else (0 if guess and len(shape) == 2 else None)
        if dims is not None:
            self.features[node] = feature.known(Feature(shape[1] if dims else shape[-1], dims))

    def _passes_on(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The inputs that have the channels and axes of the output."""
        name, inputs = function_name(node), node.all_input_nodes
        if is_activation(self.captured, node):
            return tuple(inputs)
        if node.op == "call_module":
            module = module_of(self.captured, node)
            kept = isinstance(module, KEEP_CHANNELS) or (isinstance(module, tuple(MODULES)) and is_leaf(module))
            return tuple(inputs[:1]) if kept else ()
        if name in ADDS | SCALES | QUOTIENTS:
            operands = [n for n in inputs if self.constants.value(n) is None]
            constants = [self.constants.value(n) for n in inputs if n not in operands]
            broadcast = any(isinstance(c, Tensor) and c.numel() > 1 for c in constants)
            if broadcast and not (operands and self.shapes.get(node, ()) == self.shapes.get(operands[0])):
                return ()  # it may make many channels of one
            return tuple(operands) if len(operands) == 1 or self.summands(node) else ()
        return tuple(inputs[:1]) if name in KEEP_CHANNELS_FUNCTIONS else ()


KEEP_CHANNELS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, _BatchNorm)  # besides activations
KEEP_CHANNELS_FUNCTIONS = frozenset(
    (
        *("neg", "clone", "contiguous", "batch_norm"),
        *tuple(f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)),
    )
)


def _sizes(graph: fx.Graph) -> set[fx.Node]:
    """Numbers that are computed from sizes."""
    sizes = set[fx.Node]()
    for node in graph.nodes:
        if node.target is getattr:
            is_size = node.args[1] in ("shape", "ndim")
        elif node.op == "call_method":
            is_size = node.target in ("size", "dim", "numel")
        else:
            inputs = node.all_input_nodes
            plain = getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")  # makes no tensors
            plain = plain or node.target in EXTREMES
            is_size = node.op == "call_function" and plain and bool(inputs) and sizes.issuperset(inputs)
        if is_size:
            sizes.add(node)
    return sizes


class _Refused(Exception):
    """An operation looks affine, but is not; the message is the reason."""


def _computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module computes what torch's class computes: the class, or a subclass that overrides nothing of it."""
    if not isinstance(module, cls) or "forward" in vars(module):
        return False
    own = type(module)
    return all(getattr(own, name, None) is getattr(cls, name, None) for name in ("forward", "_conv_forward"))


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight as its forward would see it, parametrizations and weight norm applied."""
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and hook.name == "weight":
                return hook.compute_weight(module)  # type: ignore[no-any-return]
            if isinstance(hook, SpectralNorm) and hook.name == "weight":
                return hook.compute_weight(module, do_power_iteration=False)  # type: ignore[no-any-return]
        return module.weight  # type: ignore[return-value]


def _computes_otherwise(module: nn.Module) -> str | None:
    """Why parameters that a module computes, each time that they are read, are no constants."""
    parametrized: Any = module.parametrizations
    before = Attributes(module)
    try:
        with torch.no_grad(), randomness_of_the_caller():
            drawn = generators()
            for name in parametrized:
                getattr(module, name)
            if generators() != drawn:
                return "its parametrization draws random numbers"
    except Exception as error:  # whatever code of the user raises
        return f"its parametrization cannot be computed: {first_line(error)}"
    finally:
        changed = before.restore()
    return "its parametrization changes when it is read" if changed else None


def _usable(*tensors: Tensor | None) -> bool:
    present = [t for t in tensors if t is not None]
    if not present or any(is_lazy(t) for t in present):
        return False
    dtypes = {t.dtype for t in present}
    return len(dtypes) == 1 and all(d.is_floating_point or d.is_complex for d in dtypes)


def _vector(value: Any, channels: int) -> Tensor:
    """A constant per channel as a vector. value: number, or a tensor of one or `channels` elements."""
    if isinstance(value, Tensor):
        return wide(value.detach()).reshape(-1).expand(channels)
    return torch.full((channels,), float(value), dtype=torch.float64, device=CPU)


def _is_per_channel(value: Tensor, channels: int, dims: int) -> bool:
    """Whether x + value adds one number per channel to x: [N, C, *spatial], or [..., C] where dims is 0."""
    axes = dims + 2 if dims else 1
    if value.numel() == 1:
        return value.dim() <= axes
    return value.dim() in (axes, dims + 1) and value.shape[-dims - 1] == channels == value.numel()


def _whose_axes(node: fx.Node) -> fx.Node | None:
    """The value whose number of axes a node is."""
    by_attribute = node.target is getattr and node.args[1:] == ("ndim",)
    by_method = node.op == "call_method" and node.target == "dim"
    value = node.args[0] if by_attribute or by_method else None
    return value if isinstance(value, fx.Node) else None


def _border_side(index: Any, padding: Padding) -> tuple[int, int] | None:
    """(axis, 0 or 1) of the border that x[index] is, for x padded so, or None."""
    if not isinstance(index, tuple):
        return None
    index = (*index, *[slice(None)] * (len(padding) + 2 - len(index)))
    restricted = [(axis - 2, i) for axis, i in enumerate(index) if i != slice(None)]
    if len(restricted) != 1 or len(index) != len(padding) + 2 or not isinstance(restricted[0][1], slice):
        return None
    axis, part = restricted[0]
    if axis < 0 or part.step not in (None, 1):
        return None
    low, high = padding[axis]
    if part.start in (None, 0) and part.stop == low > 0:
        return axis, 0
    return (axis, 1) if part.stop is None and high > 0 and part.start == -high else None


def _per_axis(value: Any, dims: int) -> Ints:
    if isinstance(value, tuple | list):
        return tuple(value) if len(value) == dims else tuple(value) * dims
    return (value,) * dims
