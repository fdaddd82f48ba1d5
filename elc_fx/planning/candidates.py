"""Candidates: every region that one convolution could replace after decoupling, with the kernels that it could have."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from torch import Tensor, fx, nn

from elc_fx.affine import Ints
from elc_fx.arguments import check_whole
from elc_fx.capturing.graph import label, module_of
from elc_fx.capturing.inputs import ExampleInputs, check_model
from elc_fx.errors import InvalidInputError, NotAffineError
from elc_fx.matching.activations import activation_name, activation_of
from elc_fx.matching.interpret import Operation
from elc_fx.matching.regions import operations_of
from elc_fx.matching.serial import KeptWindows, Region, RingStep, SerialGraph, decouples_padding, rings

LONGEST = 12  # layers or blocks in a row that one candidate may replace
LARGEST_KERNEL = 7  # of a merged convolution, per axis


@dataclass(frozen=True)
class Candidate:
    """A region, and the convolution that could replace it.

    name: of the region. layers: its convolutions and linear layers. operations: all that it computes. removed: how many
    layers go; of one that is used several times, each use counts. kernels: what is left of the kernels that shrink, by
    node. kernel_size, result: of the merged convolution. own_kernel: the largest kernel among its layers and average
    poolings, as max poolings widen it. activations (max poolings too), paddings: what has to be decoupled besides the
    kernels. poolings: those of the activations that are max poolings. ring: how many positions beyond its border the
    inner layers have to compute. flops, parameters: before and after (FLOPs for the batch of the example inputs).
    nodes: of the captured graph, which tell the region again.
    """

    name: str
    layers: tuple[str, ...]
    operations: tuple[str, ...]
    removed: int
    kernels: tuple[tuple[str, Ints], ...]
    kernel_size: Ints
    own_kernel: int
    result: str
    activations: tuple[str, ...]
    poolings: tuple[str, ...]
    paddings: tuple[str, ...]
    ring: int
    flops: tuple[int, int]
    parameters: tuple[int, int]
    nodes: tuple[str, ...]

    @property
    def full_name(self) -> str:
        """The name with the kernel size, which tells the candidates of one region apart."""
        return f"{self.name}:{kernel_text(self.kernel_size)}"

    @property
    def saves(self) -> bool:
        """Whether the merge costs less FLOPs than what it replaces."""
        return self.flops[1] < self.flops[0]

    @property
    def merges(self) -> bool:
        """Whether something merges, a pooling too; else it is a layer by itself, whose kernel shrinks."""
        return self.removed > 0 or bool(self.activations) or not self.kernels

    def windows(self, region: Region) -> dict[fx.Node, Ints]:
        """What is left of the kernels that shrink, by the nodes of its region in a graph."""
        kept = dict(self.kernels)
        return {node: kept[node.name] for node in region.layers if node.name in kept}

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_dict`, also after JSON. Raises `InvalidInputError` where fields are missing or unknown."""
        if not isinstance(data, Mapping) or set(data) != set(FIELDS):
            raise InvalidInputError(f"a candidate has the fields {', '.join(FIELDS)}, got {data!r:.200}")
        fields = {key: _tuples(value) for key, value in data.items()}
        for key, value in fields.items():
            if not FIELDS[key](value):
                raise InvalidInputError(f"`{key}` of a candidate cannot be {data[key]!r:.200}")
        return cls(**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are(check: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, tuple) and all(map(check, v)) and (length is None or len(v) == length)


def _is_kernel(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_text(value[0]) and _are(_is_count)(value[1])


# What the fields of a candidate can be.
FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "result"), _is_text),
    **dict.fromkeys(("layers", "operations", "activations", "poolings", "paddings", "nodes"), _are(_is_text)),
    "kernels": _are(_is_kernel),
    "kernel_size": _are(_is_count),
    **dict.fromkeys(("removed", "own_kernel", "ring"), _is_count),
    **dict.fromkeys(("flops", "parameters"), _are(_is_count, 2)),
}


def kernel_text(kernel_size: Ints) -> str:
    return "x".join(map(str, kernel_size)) or "linear"


class Candidates(list[Candidate]):
    """A list of candidates that prints as a table."""

    def to_json(self) -> str:
        """All candidates, as a list of what `Candidate.to_dict` gives."""
        return json.dumps([candidate.to_dict() for candidate in self], indent=1)

    def __str__(self) -> str:
        return candidate_table(self)


def candidate_table(candidates: Sequence[Candidate], losses: Sequence[float] | None = None) -> str:
    """One line a candidate, those of one region below each other. losses: what each is predicted to lose."""
    rows = [
        [
            c.full_name,
            len(c.layers),
            c.result,
            f"{c.flops[0]:,}",
            f"{c.flops[1]:,}",
            f"{100 * (c.flops[1] / c.flops[0] - 1):+.1f} %" if c.flops[0] else "",
            f"{len(c.activations)} / {len(c.kernels)} / {len(c.paddings)}",
            *([] if losses is None else [f"{losses[i]:.4g}"]),
        ]
        for i, c in enumerate(candidates)
    ]
    headers: tuple[str, ...] = (
        "candidate",
        "layers",
        "becomes",
        "FLOPs before",
        "after",
        "change",
        "activations / kernels / paddings",
    )
    if not rows:
        return "No candidates."
    align = ["left", "right", "left", *["right"] * (len(rows[0]) - 3)]
    headers = headers if losses is None else (*headers, "loss")
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def candidates(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    longest: int = LONGEST,
    largest_kernel: int = LARGEST_KERNEL,
) -> Candidates:
    """Every region of the model that one convolution could replace after decoupling, with every kernel size for it.

    Args:
        model: any module in eval mode whose own `forward` can be traced.
        example_inputs: as for `compile`; costs are those of these shapes.
        longest: how many layers or residual blocks in a row one candidate may replace.
        largest_kernel: the largest kernel of a merged convolution, per axis.

    Raises:
        TrainingModeError: the model is in training mode.
        InvalidInputError: an argument is of the wrong type, or out of its range.
        CaptureError: the model's `forward` cannot be traced, or its trace computes something else on the inputs.
    """
    graph = serial_graph(model, example_inputs)
    check_whole(1, largest_kernel=largest_kernel)
    return Candidates(candidate for _, candidate in CandidateFinder(graph, longest).all(largest_kernel))


def serial_graph(model: nn.Module, example_inputs: Any) -> SerialGraph:
    """The serial graph of a caller's model. Raises as `candidates` does."""
    check_model(model)
    return SerialGraph.of(model, ExampleInputs.of(model, example_inputs))


def check_computes(network: nn.Module) -> None:
    """Raises `InvalidInputError` for a network without numbers."""
    if any(parameter.is_meta for parameter in network.parameters()):
        raise InvalidInputError(
            "the model is on the meta device, where nothing is computed: losses and latencies cannot be measured; "
            "move it to a real one, or pass loss='uniform' and a budget without latency"
        )


def operation_texts(graph: SerialGraph, region: Region) -> tuple[str, ...]:
    """What each operation of a region does, for people, and to tell regions of different models apart."""
    return tuple(f"{label(op.node)}{_operation_text(graph, op)}" for op in operations_of(region.parts))


def _operation_text(graph: SerialGraph, op: Operation) -> str:
    if op.node in graph.poolings:
        geometry = op.geometry
        sizes = [geometry.kernel_size, geometry.stride, tuple(low for low, _ in geometry.padding)]
        kernel, stride, padding = ("×".join(map(str, size)) for size in sizes)
        return f": max pooling {kernel} stride {stride}" + (f" padding {padding}" if geometry.padded else "")
    activation = activation_of(graph.graph_module, op.node) if op.node in graph.activations else None
    return f": {op.geometry if activation is None else activation_name(activation)}"


class CandidateFinder:
    """Makes candidates of the regions of one graph; their names are the same for the same graph."""

    def __init__(self, graph: SerialGraph, longest: int = LONGEST) -> None:
        check_whole(1, longest=longest)
        self.graph = graph
        self.regions = list(graph.regions(longest))
        layers = [label(op.node) for op in graph.interpreter.operations.values() if op.convolves]
        self.names = _names(self.regions, layers, graph.poolings)
        # What the kernels do not change is asked once for each region.
        self._operations = functools.cache(functools.partial(operation_texts, graph))
        self._read: dict[fx.Node, list[nn.Parameter]] = {}
        for parameter, readers in readers_of_parameters(graph).items():
            for node in readers:
                self._read.setdefault(node, []).append(parameter)
        self._parameters = functools.cache(self._count_parameters)

    def all(self, largest_kernel: int) -> Iterator[tuple[Region, Candidate]]:
        for region in self.regions:
            for candidate in self.of_region(region, largest_kernel):
                yield region, candidate

    def of_region(self, region: Region, largest_kernel: int) -> Iterator[Candidate]:
        """One candidate for each kernel size that the region can have, small ones first."""
        seen = set()
        for windows in region.windows:
            candidate = self.candidate(region, windows)
            if candidate is None or max(candidate.kernel_size, default=1) > largest_kernel:
                return
            if candidate.kernel_size not in seen:
                seen.add(candidate.kernel_size)
                yield candidate

    def candidate(self, region: Region, windows: KeptWindows) -> Candidate | None:
        """The candidate with these windows, or None where it is not one affine map."""
        try:
            geometry = region.geometry(windows)
        except NotAffineError:
            return None
        shapes = self.graph.shapes
        size = _spatial(shapes, region.source, geometry.dims)
        operations = list(operations_of(region.parts))
        layers = [op for op in operations if op.convolves]
        pools = [op for op in operations if op.node in self.graph.poolings]
        positions = _positions(shapes, region.source, geometry.dims)
        before = sum(
            op.geometry.flops(_spatial(shapes, op.source, geometry.dims)) * _positions(shapes, op.source, geometry.dims)
            for op in layers
        )
        steps: dict[fx.Node, RingStep] = {}
        rings(region.parts, windows, ((0, 0),) * geometry.dims, steps)
        padded = [
            op for op in operations if decouples_padding(op, steps[op.node], at_source=op.source is region.source)
        ]
        return Candidate(
            name=self.names[region],
            layers=tuple(dict.fromkeys(label(op.node) for op in layers)),
            operations=self._operations(region),
            removed=len(layers) - 1,
            kernels=tuple((node.name, kept) for node, kept in windows.items()),
            kernel_size=geometry.kernel_size,
            own_kernel=_own_kernel(operations, pools),
            result=str(geometry),
            activations=tuple(label(op.node) for op in operations if op.node in self.graph.barriers),
            poolings=tuple(label(op.node) for op in pools),
            paddings=tuple(label(op.node) for op in padded),
            ring=max((side for step in steps.values() for sides in step.ring_out for side in sides), default=0),
            flops=(before, geometry.flops(size) * positions),
            parameters=(self._parameters(region), geometry.weights + geometry.bias * geometry.out_channels),
            nodes=tuple(sorted(node.name for node in region.nodes())),
        )

    def _count_parameters(self, region: Region) -> int:
        found: dict[nn.Parameter, None] = {}
        for op in operations_of(region.parts):
            found |= dict.fromkeys(self._read.get(op.node, ()))
        return sum(parameter.numel() for parameter in found)


def readers_of_parameters(graph: SerialGraph) -> dict[nn.Parameter, set[fx.Node]]:
    """The nodes that compute with each parameter, or with what is made of it and of constants alone."""
    readers: dict[nn.Parameter, set[fx.Node]] = {}
    for node in graph.graph_module.graph.nodes:
        if node.op == "call_module":
            for parameter in module_of(graph.graph_module, node).parameters():
                readers.setdefault(parameter, set()).add(node)
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = graph.graph_module.get_submodule(owner)._parameters.get(name)
            if value is not None:
                readers.setdefault(value, set()).update(_readers(graph, node))
    return readers


def _readers(graph: SerialGraph, constant: fx.Node) -> set[fx.Node]:
    found, seen, pending = set[fx.Node](), {constant}, [constant]
    while pending:
        new = set(pending.pop().users) - seen
        seen |= new
        pending += (computed := [user for user in new if user in graph.interpreter.constants])
        found |= new.difference(computed)
    return found


def _own_kernel(operations: Sequence[Operation], pools: Sequence[Operation]) -> int:
    sizes = {op.node: max(op.geometry.kernel_size, default=1) for op in operations}
    wider = [sizes.pop(op.node) - 1 for op in pools]
    return max(sizes.values()) + sum(wider)


def _spatial(shapes: Mapping[fx.Node, Ints], node: fx.Node, dims: int) -> Ints:
    shape = shapes[node]
    return tuple(shape[len(shape) - dims :])


def _positions(shapes: Mapping[fx.Node, Ints], node: fx.Node, dims: int) -> int:
    """How often a map is applied for one example: the batch, and for linear layers all axes but the last."""
    return math.prod(shapes[node][: -dims - 1])


def _names(regions: Sequence[Region], everywhere: Sequence[str], poolings: Set[fx.Node]) -> dict[Region, str]:
    """A name for each region: the module that holds just its layers, else its first and last layer.

    One with a max pooling is called by its first and last layer or pooling in any case. Where several regions have the
    same layers, as a block with and without its shortcut, the largest gets the module's name.
    """
    names: dict[Region, str] = {}
    taken: set[str] = set()
    for region in sorted(regions, key=lambda r: -len(r.nodes())):
        named = [op for op in operations_of(region.parts) if op.convolves or op.node in poolings]
        labels = list(dict.fromkeys(label(op.node) for op in named))
        if all(op.convolves for op in named):
            options = [*_holders(labels, everywhere), _span(labels)]
        else:  # a module that pools is often called several times
            options = [f"{labels[0]}..{label(named[-1].node)}"]
        options.append(f"{options[-1]}@{region.output.name}")
        name = next(option for option in options if option not in taken or option is options[-1])
        taken.add(name)
        names[region] = name
    return names


def _holders(labels: Sequence[str], everywhere: Sequence[str]) -> list[str]:
    """The smallest module that holds all of the labels, if it holds no other layer."""
    paths = [name.split(".") for name in labels]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    prefix = ".".join(paths[0][:shared])
    if not prefix or sum(name.startswith(f"{prefix}.") for name in set(everywhere)) != len(labels):
        return []
    return [prefix]


def _span(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]}..{labels[-1]}"
