"""Decoupling: the regions of a plan get their decoupling nodes. At gate 1 the network is what it was, in training too.

The model is copied first; the copy's modules are then replaced where a node needs more than they do, under the same
names, so that parameters keep theirs.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from elc_fx.affine import Padding, moved
from elc_fx.capturing.copying import clone
from elc_fx.capturing.graph import (
    constants,
    erase_unread,
    function_name,
    label,
    module_of,
    overwritten_argument,
    owners,
    put_attribute,
)
from elc_fx.capturing.identity import names_and_shapes
from elc_fx.capturing.inputs import (
    NO_CALIBRATION,
    batch_values,
    batches_of,
    check_model,
    fresh,
    number_type,
    of_type,
    running,
)
from elc_fx.capturing.origins import origins_of, remember
from elc_fx.capturing.randomness import randomness_of_the_caller
from elc_fx.capturing.tidying import caller_of
from elc_fx.decoupling.decoupled import DecoupledModule
from elc_fx.decoupling.nodes import (
    DecoupledActivation,
    DecoupledConvolution,
    DecoupledPadding,
    DecoupledPooling,
    InteriorBatchNorm,
    LineFit,
    RegionInput,
    RegionOutput,
    RingPad,
    Rings,
    difference,
)
from elc_fx.errors import InvalidInputError, warn
from elc_fx.matching.activations import activation_of, line_for_gaussian
from elc_fx.matching.interpret import Operation
from elc_fx.matching.pooling import max_pooling_of
from elc_fx.matching.regions import Join, Part, operations_of
from elc_fx.matching.serial import (
    KeptWindows,
    Region,
    RingStep,
    SerialGraph,
    decouples_padding,
    has_size,
    pads,
    rings,
    serial_capture,
)
from elc_fx.planning.candidates import Candidate
from elc_fx.planning.plan import Plan
from elc_fx.workarounds import without_autocast

IN_PLACE = {
    **{f"i{name}": name for name in ("add", "sub", "mul")},
    **{f"{name}_": name for name in ("add", "sub", "mul", "div", "neg", "subtract", "multiply", "divide")},
    "itruediv": "div",
}


def decouple(model: nn.Module, plan: Plan, calibration: Iterable[Any] | None = None) -> DecoupledModule:
    """A trainable copy of `model` in which nothing but gates keeps the plan's regions from being one convolution each.

    With all gates at 1, as they are at first, it computes what the model computes, in training mode too (but for
    methods that branch on `self.training`, of which a warning tells). Close the gates with `set_gate` or a
    `GateSchedule` while it is trained, then `merge` it. The model itself is not changed.

    Args:
        model: the module that the plan was made for, in eval mode.
        plan: which regions.
        calibration: batches (tensors, sequences that begin with the model's inputs, as a loader gives them, or mappings
            that have them by name; or one tensor) from which the line that replaces each activation is fitted. Without
            them, it is the least-squares line for what the batch norm before the activation gives, else for a standard
            normal.

    Raises:
        TrainingModeError: the model is in training mode.
        PlanError: the plan is for another model.
        InvalidInputError: an argument is of the wrong type, or a calibration batch does not fit the model.
        CaptureError: the model's `forward` cannot be traced.
    """
    check_model(model)
    if not isinstance(plan, Plan):
        raise InvalidInputError(f"plan is a {type(plan).__name__}, expected an elc_fx.Plan")
    with torch.inference_mode(False):  # what is made in that mode could not be trained
        own = clone(model, {})
        chosen = {name for candidate in plan.candidates for name in candidate.nodes}
        captured = serial_capture(own, dict.fromkeys(plan.inputs, torch.empty(0)) or None, chosen)
        graph = SerialGraph(captured)
        located = plan.locate(graph)
        for candidate in plan.candidates:
            if not candidate.saves:
                before, after = candidate.flops
                warn(
                    f"merging `{candidate.name}` into {candidate.result} costs more than it saves: "
                    f"{before:,} FLOPs become {after:,}"
                )
        captured.warn_of_eval_only()
        read, constant = _attributes_read(captured.graph_module), _constants_read(captured.graph_module)
        rewriter = _Rewriter(graph)
        for candidate, region, windows in located:
            rewriter.rewrite(candidate, region, windows)
        for node in constant:  # such as code that computed a weight
            erase_unread(node, constant)
        for path in read - _attributes_read(captured.graph_module):
            _delete_parameter(captured.graph_module, path)
        decoupled = DecoupledModule(captured.graph_module, captured.graph_module.graph, type(model).__name__)
        decoupled.elc_fx_plan = plan
        decoupled.delete_all_unused_submodules()
        decoupled.eval()
        decoupled.graph.lint()
        if calibration is not None:
            fit_activations(decoupled, calibration)
        return decoupled


def _calls(graph_module: fx.GraphModule) -> Counter[str]:
    """How often each module is called: by the graph, and maybe inside of others that the graph calls as a whole."""
    calls = Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    modules = {path: graph_module.get_submodule(path) for path in calls}
    inside = Counter(part for module in modules.values() for part in module.modules() if part is not module)
    return Counter({path: count + inside[modules[path]] for path, count in calls.items()})


def _attributes_read(graph_module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr" and node.users}


def _constants_read(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Constants that somebody reads; but for what is written for its own sake, too."""
    found = {node for node in constants(graph_module.graph) if node.users or node.op == "get_attr"}
    return {node for node in found if overwritten_argument(graph_module, node) is None}


def _delete_parameter(graph_module: fx.GraphModule, path: str) -> None:
    """What a function was given as its weight is now the weight of a module."""
    owner, _, name = path.rpartition(".")
    holder = graph_module.get_submodule(owner)
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    if name in holder._parameters and not called & owners(path):
        del holder._parameters[name]


class _Rewriter:
    """Puts the decoupling nodes of one region after the other into the graph."""

    def __init__(self, serial: SerialGraph) -> None:
        self.graph_module = serial.graph_module
        self.graph = self.graph_module.graph
        self.model = names_and_shapes(self.graph_module)
        self.activations, self.poolings = serial.activations, serial.poolings
        self.position = {node: index for index, node in enumerate(self.graph.nodes)}
        self.calls = _calls(self.graph_module)
        self.ends: dict[fx.Node, fx.Node] = {}  # of regions that are done: the node that gives the last one's value now
        # Of the region at hand:
        self.windows: KeptWindows = {}
        self.steps: dict[fx.Node, RingStep] = {}
        self.rings = Rings()
        self.begin: fx.Node | None = None
        self.like = torch.empty(0)  # a tensor of its data type and device

    def rewrite(self, candidate: Candidate, region: Region, windows: KeptWindows) -> None:
        """The region, between a node that marks its input and one that marks its output."""
        parts, output = region.parts, region.output
        source = self.ends.get(region.source, region.source)
        first_layer = next(op for op in operations_of(parts) if op.convolves and op.dtype is not None)
        nothing: Padding = ((0, 0),) * first_layer.geometry.dims
        self.windows, self.steps, self.rings = windows, {}, Rings()
        self.like = torch.empty(0, dtype=first_layer.dtype, device=first_layer.device)
        rings(parts, windows, nothing, self.steps)
        inside, readers = region.nodes(), list(output.users)
        entered = [user for user in source.users if user in inside]
        with self.graph.inserting_before(min(entered, key=self.position.__getitem__)):
            read = RegionInput(candidate.full_name, region.geometry(windows).in_channels, region.dims)
            self.begin = self._call(read, f"{entered[0].name}_region_input", source)
        for node in entered:
            node.replace_input_with(source, self.begin)
        end, _ = self._rewrite_parts(parts, self.begin, nothing)
        with self.graph.inserting_after(end):
            marked = RegionOutput(candidate.full_name, output.name, self.model)
            marker = self._call(marked, f"{output.name}_region_output", end)
        for node in readers:
            node.replace_input_with(end, marker)
        self.ends[output] = marker

    def _rewrite_parts(self, parts: Sequence[Part], value: fx.Node, ring: Padding) -> tuple[fx.Node, Padding]:
        """value, ring: what the parts read, and the ring that it has. Returns what they give."""
        for part in parts:
            if isinstance(part, Join):
                value, ring = self._rewrite_join(part, value, ring)
            else:
                value, ring = self._rewrite_operation(part, value, ring)
        return value, ring

    def _rewrite_join(self, join: Join, source: fx.Node, ring: Padding) -> tuple[fx.Node, Padding]:
        ends = [self._rewrite_parts(branch.chain.parts, source, ring) for branch in join.branches]
        wanted = self.steps[join.node].ring_out
        for node in (join.node, *join.inner):
            self._make_functional(node)
            for value, end in dict(ends).items():
                if value in node.all_input_nodes and end != wanted:
                    self._ring_operands(node, value, end, wanted)
        return join.node, wanted

    def _ring_operands(self, node: fx.Node, value: fx.Node, ring: Padding, wanted: Padding) -> None:
        """Each operand that is this value gets a ring of its own, as each is a branch of its own."""

        def ringed(operand: fx.Node) -> fx.Node:
            return self._ring_pad(value, ring, wanted, node) if operand is value else operand

        with self.graph.inserting_before(node):
            node.args, node.kwargs = fx.map_arg(node.args, ringed), fx.map_arg(node.kwargs, ringed)

    def _make_functional(self, node: fx.Node) -> None:
        """x += y as x + y: what a decoupling node gives may be needed for its gradient."""
        if function_name(node) in IN_PLACE:
            node.target = getattr(torch, IN_PLACE[function_name(node)])
            node.op = "call_function"
        elif node.op == "call_module" and hasattr(module := module_of(self.graph_module, node), "inplace"):
            module.__dict__["inplace"] = False  # an attribute of torch's activations and dropouts

    def _rewrite_operation(self, op: Operation, source: fx.Node, ring: Padding) -> tuple[fx.Node, Padding]:
        """One operation, and before it what makes its input what it needs."""
        node, step, geometry, value = op.node, self.steps[op.node], op.geometry, source
        self._make_functional(node)
        at_source = source is self.begin
        splits = decouples_padding(op, step, at_source=at_source)
        # A convolution pads the region's source itself, and so does a padding.
        needed = ring if at_source and not splits and (op.convolves or pads(op)) else step.ring_in
        with self.graph.inserting_before(node):
            if needed != ring:
                value = self._ring_pad(value, ring, needed, node)
            if splits:
                padding = DecoupledPadding(
                    needed, geometry.padding, geometry.padding_mode, self.rings, pads_itself=op.convolves
                )
                value = self._call(padding, f"{self._path(node)}_padding", value)
        if pads(op) and splits:  # what stands before it now pads
            remember(padding, origins_of(self.graph_module, [node]))
            node.replace_all_uses_with(value)
            self.graph.erase_node(node)
            return value, step.ring_out
        node.replace_input_with(source, value)
        if pads(op):
            return self._with_ring(node, step.ring_out), step.ring_out
        if op.convolves:
            self._rewrite_convolution(op, step, needed)
        elif node in self.poolings:
            self._rewrite_pooling(op, step)
        elif node in self.activations:
            self._rewrite_activation(op)
        elif has_size(step.ring_in) and self._is_batch_norm(node):
            norm: Any = self._own_module(node)
            if isinstance(norm, nn.SyncBatchNorm):
                warn(
                    f"`{label(node)}` stands between layers whose borders are decoupled: while their gates are below "
                    "1, each process normalises with the statistics of its own batch"
                )
            self._put(node, InteriorBatchNorm(norm, step.ring_in, self.rings))
        return node, step.ring_out

    def _is_batch_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(
            module_of(self.graph_module, node), nn.modules.batchnorm._BatchNorm
        )

    def _rewrite_convolution(self, op: Operation, step: RingStep, ring: Padding) -> None:
        """Replaced where its kernel shrinks, or its input or output has a ring; others stay as they are."""
        geometry = op.geometry
        if op.node not in self.windows and not has_size(step.ring_out) and not has_size(ring):
            return
        weight, bias = self._parameters(op)
        module = DecoupledConvolution(
            weight,
            bias,
            stride=geometry.stride,
            dilation=geometry.dilation,
            groups=geometry.groups,
            padding=geometry.padding,
            mode=geometry.padding_mode,
            window=self.windows.get(op.node, geometry.kernel_size),
            ring_padding=difference(moved(geometry.padding, geometry.stride, step.ring_out), ring),
            rings=self.rings,
        )
        self._put(op.node, module.to(weight.device))

    def _parameters(self, op: Operation) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The layer's own parameters; of a function or a parametrized layer, its weights as they are now."""
        if op.node.op == "call_module":
            module = self._own_module(op.node)
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if isinstance(weight, nn.Parameter) and not module._forward_pre_hooks:
                return weight, bias  # type: ignore[return-value]
        loaded = op.load()
        dtype = op.dtype or torch.float32
        new_bias = None if loaded.bias is None else nn.Parameter(loaded.bias.to(dtype, copy=True))
        return nn.Parameter(loaded.kernel.to(dtype, copy=True)), new_bias

    def _rewrite_activation(self, op: Operation) -> None:
        activation = activation_of(self.graph_module, op.node)
        assert activation is not None
        if op.node.op == "call_module":
            activation = self._own_module(op.node)
        channels, dims = op.geometry.out_channels, op.geometry.dims
        mean, std = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
        norm: Any = module_of(self.graph_module, op.source) if self._is_batch_norm(op.source) else None
        if norm is not None:
            mean = mean if norm.bias is None else norm.bias
            std = std if norm.weight is None else norm.weight.abs()
        device, dtype = self.like.device, self.like.dtype
        slope, offset = line_for_gaussian(activation, mean.to(device), std.to(device), dims)
        line = DecoupledActivation(activation, slope.to(dtype), offset.to(dtype), dims).to(device)
        if isinstance(norm, InteriorBatchNorm) and list(op.source.users) == [op.node]:
            norm.line, line.norm = [line], [norm]
        self._put(op.node, line)

    def _rewrite_pooling(self, op: Operation, step: RingStep) -> None:
        """Until it is fitted, the line is the mean itself."""
        pooling = max_pooling_of(self.graph_module, op.node)
        one = self.like.new_ones(op.geometry.out_channels)
        node = DecoupledPooling(pooling, one, torch.zeros_like(one), op.geometry, step, self.rings)
        self._put(op.node, node.to(self.like.device))

    def _with_ring(self, node: fx.Node, ring: Padding) -> fx.Node:
        """A value in the place of `node`'s that has a ring of zeros."""
        if not has_size(ring):
            return node
        with self.graph.inserting_after(node):
            around = self._ring_pad(node, ((0, 0),) * len(ring), ring, node)
        node.replace_all_uses_with(around, delete_user_cb=lambda user: user is not around)
        return around

    # Modules and nodes.

    def _own_module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls; if others call it too, a copy."""
        module = module_of(self.graph_module, node)
        if self.calls[str(node.target)] == 1:
            return module
        if next(module.parameters(), None) is not None:
            warn(
                f"`{node.target}` is called more than once; inside of a region the call `{node.name}` gets weights of "
                "its own, which train apart from the others"
            )
        return copy.deepcopy(module)

    def _put(self, node: fx.Node, module: nn.Module) -> None:
        """Makes a node call a module of its own, in the place of the one that it called if nobody else calls that."""
        remember(module, origins_of(self.graph_module, [node]))
        value = node.args[0]
        path = self._path(node)
        if node.op != "call_module":
            path = self._free(path)
        elif self.calls[path] > 1:
            self.calls[path] -= 1
            path = self._free(f"{path}_{node.name.rpartition('_')[2]}")
        put_attribute(self.graph_module, path, module)
        node.op, node.target, node.args, node.kwargs = "call_module", path, (value,), {}
        self.calls[path] = 1

    def _path(self, node: fx.Node) -> str:
        """Of the module that a node calls; for a function, in the module whose `forward` calls it."""
        if node.op == "call_module":
            return str(node.target)
        owner = caller_of(node)
        try:
            self.graph_module.get_submodule(owner)
        except AttributeError:  # it has no modules and no parameters
            return node.name
        return f"{owner}.{node.name}" if owner else node.name

    def _free(self, path: str) -> str:
        """The path, or one like it that nobody has, and that is not inside of a module that is called as a whole."""
        if self.calls.keys() & owners(path):
            path = path.replace(".", "_")
        owner, _, name = path.rpartition(".")
        holder = self.graph_module.get_submodule(owner)
        free = next(n for i in itertools.count() if not hasattr(holder, n := f"{name}_{i}" if i else name))
        return f"{owner}.{free}" if owner else free

    def _call(self, module: nn.Module, path: str, source: fx.Node) -> fx.Node:
        path = self._free(path)
        put_attribute(self.graph_module, path, module.to(self.like.device))
        self.calls[path] = 1
        return self.graph.call_module(path, (source,))

    def _ring_pad(self, value: fx.Node, ring: Padding, wanted: Padding, reader: fx.Node) -> fx.Node:
        """The value with another ring than it has."""
        return self._call(RingPad(difference(wanted, ring), self.rings), f"{reader.name}_ring", value)


def fit_activations(decoupled: DecoupledModule, calibration: Iterable[Any]) -> None:
    """Fits the line of every decoupled activation to what it does on the batches, with all gates at 1.

    Raises `InvalidInputError` where there is no batch, or one does not fit the model.
    """
    nodes = [module for module in decoupled.modules() if isinstance(module, DecoupledActivation)]
    count = 0
    for node in nodes:
        node.fit = LineFit(len(node.slope), node.dims)
    try:
        with torch.no_grad(), randomness_of_the_caller(), without_autocast(decoupled):
            for batch in batches_of(calibration):
                _run(decoupled, batch)
                count += 1
        if not count:
            raise InvalidInputError("calibration has no batches")
        for node in nodes:
            assert node.fit is not None
            if not node.fit.count:
                raise InvalidInputError("the calibration batches have no samples")
            slope, offset = node.fit.line()
            if not bool((slope.isfinite() & offset.isfinite()).all()):
                raise InvalidInputError("the calibration batches give activations that are not finite")
            node.slope.data.copy_(slope)
            node.offset.data.copy_(offset)
    finally:
        for node in nodes:
            node.fit = None


def _run(decoupled: DecoupledModule, batch: Any) -> None:
    values = of_type(batch_values(decoupled, batch), number_type(decoupled))
    with running(NO_CALIBRATION):
        decoupled(*fresh(values))
