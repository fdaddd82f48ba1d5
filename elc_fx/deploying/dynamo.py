"""`torch.compile(model, backend="elc_fx")`: the graph that dynamo captured, merged, and handed on to Inductor.

Dynamo hands over a graph of functions whose parameters and buffers are inputs like any other, and calls what it gets
with whatever tensors the model has then. So numbers that were merged once may be out of date: they are remembered with
the parameters that they were made of, and made again when those have changed. The graph that was handed on stays as it
is, since the merged weights are inputs of it, too.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.weak import WeakIdKeyDictionary

from elc_fx.capturing.graph import constants, function_name, module_of, signature_of
from elc_fx.capturing.shapes import Value
from elc_fx.capturing.tidying import tidy
from elc_fx.errors import ElcError, InvalidInputError, NotAffineError
from elc_fx.matching.interpret import Interpreter
from elc_fx.merging.lossless import merge_all

LOG = logging.getLogger("elc_fx")
Compiled: TypeAlias = Callable[..., Any]
Compiler: TypeAlias = Callable[[fx.GraphModule, list[Any]], Compiled]

MOST_WASTED = 3  # merges in a row of which each served one call
PROBES = 16  # numbers of each parameter, and of each buffer all, that are looked at with every call
SWITCHES = ("_enter_", "_exit_", "_set_", "_saved_tensors_hooks", "_vmap_")  # functions that change what others do


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """What `torch.compile(model, backend="elc_fx")` calls with each graph.

    Merges what is exact in inference, and hands the graph on; with gradients or in training mode, unchanged.

    Args:
        graph_module, example_inputs: as dynamo gives them.
        mode: for Inductor.
        options: {"backend": name} hands on to another backend than Inductor; what else is there is for that backend.
    """
    compiler = _next_compiler(mode, dict(options or {}))
    inputs = list(example_inputs)
    reason = _why_not(graph_module, inputs)
    if reason is None:
        try:
            return MergedGraph(graph_module, inputs, compiler)
        except ElcError as error:
            reason = str(error)
    LOG.warning("elc_fx hands a graph on unchanged: %s", reason)
    return compiler(graph_module, inputs)


@dataclass
class Served:
    """How many calls merged weights have served."""

    calls: int = 0


@dataclass(frozen=True)
class Merged:
    """The merged weights of one network, and what they were made of."""

    weights: list[Tensor]
    state: State
    served: Served


class MergedGraph:
    """A compiled merged graph and its merged weights, kept up to date. Raises ElcError where nothing can be merged.

    Dynamo gives networks of one class the same graph, and threads may call it: each network has its own weights here.
    """

    def __init__(self, original: fx.GraphModule, inputs: list[Any], compiler: Compiler) -> None:
        self.original, self.compiler = original, compiler
        self.static = [i for i, node in enumerate(_placeholders(original)) if _is_static(node, inputs[i])]
        self.merged, weights, self.read = self._merge(inputs)
        self.shapes = [weight.shape for weight in weights]
        fake = torch._guards.detect_fake_mode(inputs)
        extra = weights if fake is None else [fake.from_tensor(w, static_shapes=True) for w in weights]
        self.call = compiler(self.merged, [*inputs, *extra])
        self.lock = threading.Lock()
        self.networks = WeakIdKeyDictionary()  # Merged, by the first parameter, with which it is forgotten
        self.wasted = 0
        self._remember([inputs[i] for i in self.read], weights)

    def __call__(self, *inputs: Any) -> Any:
        with self.lock:
            merged = None if self.wasted >= MOST_WASTED else self._up_to_date(inputs)
            call = self.call
        return call(*inputs, *([] if merged is None else merged.weights))

    def _up_to_date(self, inputs: Sequence[Any]) -> Merged | None:
        """For the network that calls; None where from now on all run unmerged."""
        parameters = [inputs[i] for i in self.read]
        merged: Merged | None = self.networks.get(self._key(parameters))
        if merged is None or merged.state.differs(parameters):
            merged = self._made_again(inputs, parameters, merged)
        if merged is not None:
            merged.served.calls += 1
        return merged

    def _made_again(self, inputs: Sequence[Any], parameters: list[Tensor], before: Merged | None) -> Merged | None:
        """before: what the network had; for a new one, what the last one had if that is gone."""
        served = None if before is None else before.served
        if before is None and self.latest_key() is None:
            served = self.latest
        if served is not None:
            self.wasted = self.wasted + 1 if served.calls < 2 else 0
        reason = "its parameters change with every call"
        if self.wasted < MOST_WASTED:
            try:
                merged, weights, read = self._merge(inputs)
                same = merged.code == self.merged.code and [weight.shape for weight in weights] == self.shapes
                if same and read == self.read:
                    return self._remember(parameters, weights)
                reason = "its new parameters merge in another way"
            except ElcError as error:
                reason = str(error)
        LOG.warning("elc_fx runs a graph unmerged from now on: %s", reason)
        self.wasted = MOST_WASTED
        self.networks.clear()
        # Dynamo captures it once more, since only dynamo knows which sizes are not to be taken for constants.
        self.call = torch.compile(self.original, backend=self.compiler)
        return None

    def _remember(self, parameters: list[Tensor], weights: list[Tensor]) -> Merged:
        key = self._key(parameters)
        merged = self.networks[key] = Merged(weights, State(parameters), Served())
        self.latest, self.latest_key = merged.served, weakref.ref(key)  # not the weights, which go with their network
        return merged

    def _key(self, parameters: Sequence[Tensor]) -> object:
        """What a network is known by."""
        return next(iter(parameters), self.original)

    def _merge(self, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Tensor], list[int]]:
        """The merged graph, with further inputs; what these are now; and the inputs that they were made of."""
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            bound = _with_attributes(self.original, {i: inputs[i] for i in self.static})
            tidy(bound)
            readers = _readers(bound.graph)
            values = {node: value for node in bound.graph.nodes if (value := _value(node)) is not None}
            fusion, _ = merge_all(Interpreter(bound, values), verify=True)
            if not fusion.merged:
                raise NotAffineError("nothing in it merges exactly")
            merged = {
                attribute.meta["elc_fx_input"] for attribute, nodes in readers.items() if any(n._erased for n in nodes)
            }
            read = [i for i, node in enumerate(_placeholders(bound)) if node in merged]
            weights = _with_inputs(bound, fusion.made)
        return fx.GraphModule(bound, bound.graph), weights, read


class State:
    """What parameters and buffers are at a moment, as far as can be told without reading all of them.

    Writes of autograd's and identities are seen all, and so are those that autograd does not count (batch norm's, and
    through `.data`) as long as they change one of the numbers that are looked at.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.marks = [_mark(tensor) for tensor in tensors]
        self.tensors = [weakref.ref(tensor) for tensor in tensors]
        self.views: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))  # in memory
            numbers = tensor.detach().as_strided((span if tensor.numel() else 0,), (1,))  # a view in any memory format
            counted = isinstance(tensor, nn.Parameter) and not tensor.is_inference()  # whose writes nobody counts
            step = max(1, -(-len(numbers) // PROBES)) if counted else 1
            self.views.setdefault((tensor.dtype, tensor.device), []).append(numbers[::step])
        self.numbers = self._numbers()

    def differs(self, tensors: Sequence[Tensor]) -> bool:
        if any(known() is not tensor for known, tensor in zip(self.tensors, tensors, strict=True)):
            return True
        if any(_mark(tensor) != mark for tensor, mark in zip(tensors, self.marks, strict=True)):
            return True
        return not all(torch.equal(a, b) for a, b in zip(self._numbers(), self.numbers, strict=True))

    def _numbers(self) -> list[Tensor]:
        return [torch.cat(views).view(torch.uint8) for views in self.views.values()]  # since NaN is not NaN


def _mark(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _why_not(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """Why a graph is not for inference, or not to be changed."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return "gradients are enabled; call the model under torch.no_grad()"
    for node in graph_module.graph.nodes:
        arguments = signature_of(node)
        of_weights = function_name(node) == "batch_norm" and arguments.get("running_mean") is None  # in any mode
        if arguments.get("training", arguments.get("train")) is True and not of_weights:
            return f"`{node.name}` is in training mode; call model.eval()"
        if function_name(node).startswith(SWITCHES):
            return f"`{node.name}` changes what the nodes after it do"
    return None


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return list(graph_module.graph.find_nodes(op="placeholder"))


def _is_static(node: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter or a buffer of a module."""
    kind = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return kind is not None and type(value) in (Tensor, nn.Parameter) and not value.is_meta


def _value(node: fx.Node) -> Value | None:
    """The shape and type that dynamo saw; of sizes that may change, the one that it happened to see."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return None
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return None if None in sizes else Value(tuple(sizes), value.dtype)


def _with_attributes(original: fx.GraphModule, values: Mapping[int, Tensor]) -> fx.GraphModule:
    """A copy in which inputs that are parameters are attributes; the inputs stay, unused. values: by position."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(original.graph, {}))
    for node in graph.nodes:  # with dynamic=True, numbers are inputs; dynamo notes which of them were read
        for number in [signature_of(node).get(name) for name in ("eps", "momentum")]:
            if isinstance(number, fx.Node) and isinstance(value := number.meta.get("example_value"), torch.SymFloat):
                node.replace_input_with(number, float(value))
    bound = fx.GraphModule(original, graph)
    for i, node in enumerate(_placeholders(bound)):
        if i in values:
            name = next(n for k in itertools.count() if not hasattr(bound, n := f"{node.name}_{k}"))
            if isinstance(values[i], nn.Parameter):
                bound.register_parameter(name, values[i])  # type: ignore[arg-type]
            else:
                bound.register_buffer(name, values[i])
            with graph.inserting_after(node):
                attribute = graph.get_attr(name)
            attribute.meta = {**node.meta, "elc_fx_input": node}
            node.replace_all_uses_with(attribute)
    return bound


def _readers(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """The nodes that read each attribute that was an input, as it is or as constants that are computed from it."""
    constant, readers = constants(graph), dict[fx.Node, set[fx.Node]]()
    for attribute in graph.find_nodes(op="get_attr"):
        if "elc_fx_input" in attribute.meta:
            found, pending = readers.setdefault(attribute, set()), [attribute]
            while pending:
                new = set(pending.pop().users) - found
                found |= new
                pending += new & constant
    return readers


def _with_inputs(bound: fx.GraphModule, made: set[nn.Module]) -> list[Tensor]:
    """Attributes that were inputs are inputs again, and so are the weights of the layers that were made; in place."""
    graph, weights = bound.graph, list[Tensor]()
    last = _placeholders(bound)[-1]
    for node in list(graph.nodes):
        if node.op == "get_attr" and "elc_fx_input" in node.meta:
            node.replace_all_uses_with(node.meta["elc_fx_input"])
            graph.erase_node(node)
        elif node.op == "call_module" and (layer := module_of(bound, node)) in made:
            own = _graph_of(layer)
            values: dict[fx.Node, Any] = {next(iter(own.nodes)): node.args[0]}
            for read in own.find_nodes(op="get_attr"):
                with graph.inserting_after(last):
                    last = values[read] = graph.placeholder(f"elc_fx_weight_{len(weights)}")
                weights.append(layer.get_parameter(str(read.target)).detach())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph_copy(own, values))  # type: ignore[arg-type]
            graph.erase_node(node)
    graph.lint()
    return weights


def _graph_of(layer: Any) -> fx.Graph:
    """What a merged layer computes, by functions. By hand: while fx traces, other threads cannot call any module."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    bias = None if layer.bias is None else graph.get_attr("bias")
    if isinstance(layer, nn.Linear):
        graph.output(graph.call_function(F.linear, (x, weight, bias)))
        return graph
    transposed, dims, padding = isinstance(layer, _ConvTransposeNd), len(layer.kernel_size), layer.padding
    if layer.padding_mode != "zeros":
        x = graph.call_function(F.pad, (x, tuple(layer._reversed_padding_repeated_twice), layer.padding_mode))
        padding = 0
    function = getattr(F, f"conv_transpose{dims}d" if transposed else f"conv{dims}d")
    groups = (layer.output_padding, layer.groups, layer.dilation) if transposed else (layer.dilation, layer.groups)
    graph.output(graph.call_function(function, (x, weight, bias, layer.stride, padding, *groups)))
    return graph


def _next_compiler(mode: str | None, options: dict[str, Any]) -> Compiler:
    """The backend that a graph is handed on to. Raises `InvalidInputError` where it is elc_fx itself."""
    name = options.pop("backend", "inductor")
    if name == "elc_fx":
        raise InvalidInputError("options['backend'] is 'elc_fx', expected the backend that elc_fx hands on to")
    if name == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(mode) if mode else {}), **options}
        inductor: Callable[..., Any] = compile_fx
        return lambda graph_module, inputs: inductor(graph_module, inputs, config_patches=patches)
    found = torch._dynamo.lookup_backend(name)
    further = {**({"mode": mode} if mode else {}), **({"options": options} if options else {})}
    return lambda graph_module, inputs: found(graph_module, inputs, **further)
