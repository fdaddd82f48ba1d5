"""A network as a list of layers: what a diff compares and a page shows, whatever form the network comes in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from elc_fx.affine import Ints
from elc_fx.capturing.attributes import unchanged
from elc_fx.capturing.capture import capture
from elc_fx.capturing.graph import IN_PLACE_OPERATORS, function_name, module_of
from elc_fx.capturing.identity import add_tensor
from elc_fx.capturing.inputs import NO_EXAMPLES, ExampleInputs, batch_values, check_visible, fresh, running
from elc_fx.capturing.origins import ORIGIN, place_of, recorded_origin
from elc_fx.capturing.randomness import reproducibly
from elc_fx.capturing.shapes import PlainInterpreter, Value
from elc_fx.comparison import flop_counter
from elc_fx.deploying.exporting import Exported
from elc_fx.errors import CaptureError, InvalidInputError, TrainingModeError
from elc_fx.matching.activations import MODULES
from elc_fx.matching.interpret import Interpreter, Operation

Size = tuple[int | str, ...]  # an axis of a saved program that takes any size has a name


@dataclass(frozen=True)
class Layer:
    """One node of a graph. What is not known, for want of inputs, is None.

    name: of the node, once in its network. place: where it is in the model, for people. kind: "convolution", "linear",
    "normalisation", "activation", "pooling", "join", "input", "output" or "other". operation: what it computes, in the
    same words however it is spelled. settings: how it is spelled here, with its constants. sources: the layers that it
    reads, each once; reads: in the order of the arguments, as often as there. flops: two per multiply-add, for the
    inputs. origin: the places in the original that it stands for, where a pass noted them. state: tells its numbers
    apart from others; None where it has none.
    """

    name: str
    place: str
    kind: str
    operation: str
    sources: tuple[str, ...]
    shape: Size | None = None
    kernel: Ints = ()
    flops: int | None = None
    parameters: int = 0
    bias: bool = False
    settings: str = ""
    reads: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    state: str | None = None

    def does_as(self, other: Layer) -> bool:
        """Whether both do the same to what they read, but for their numbers.

        The constants of two spellings cannot be compared: a module has others than a function.
        """
        if (self.kind, self.operation, self.bias) != (other.kind, other.operation, other.bias):
            return False
        spelled = self.settings.partition("(")[0] == other.settings.partition("(")[0]
        return self.is_heavy or not spelled or self.settings == other.settings

    @property
    def is_heavy(self) -> bool:
        """Whether it is a convolution or linear layer."""
        return self.kind in ("convolution", "linear")


def flops_of(layers: Iterable[Layer]) -> int | None:
    """Of all of them, or None where those of one are not known."""
    counted = [layer.flops for layer in layers]
    return None if None in counted else sum(n for n in counted if n is not None)


@dataclass(frozen=True)
class Network:
    """The layers in the order in which they run."""

    name: str
    layers: tuple[Layer, ...]

    @cached_property
    def flops(self) -> int | None:
        return flops_of(self.layers)

    @cached_property
    def parameters(self) -> int:
        """Of all layers; what several of them share counts for each."""
        return sum(layer.parameters for layer in self.layers)

    @classmethod
    def of(cls, source: nn.Module | Exported | ExportedProgram, example_inputs: Any = None, name: str = "") -> Network:
        """The layers of a module in eval mode, of a graph as it stands, or of a saved program.

        example_inputs: as for `compile`; without them, shapes and FLOPs are known of saved programs only. Raises
        `InvalidInputError`, `TrainingModeError` or `CaptureError`.
        """
        if isinstance(source, Exported | ExportedProgram):
            return cls._of_program(source, example_inputs, name)
        if not isinstance(source, nn.Module):
            raise InvalidInputError(
                f"a network is a {type(source).__name__}, expected a torch.nn.Module or a program of torch.export"
            )
        check_visible(source)
        name = name or type(source).__name__
        examples = None if example_inputs is None else ExampleInputs.of(source, example_inputs)
        if isinstance(source, fx.GraphModule):  # traced again, it would show what its modules consist of
            values = None if examples is None else batch_values(source, examples.bound(source))
            return cls(name, tuple(_layers(source, values)))
        if source.training:
            raise TrainingModeError("the model is in training mode; call model.eval() first")
        try:
            captured = capture(source, None if examples is None else examples.bound(source))
        except CaptureError as error:
            raise CaptureError(
                f"the forward of {name} cannot be traced ({error}); give the part of it that can"
            ) from error
        return cls(name, tuple(_layers(captured.graph_module, captured.inputs)))

    @classmethod
    def _of_program(cls, source: Exported | ExportedProgram, example_inputs: Any, name: str) -> Network:
        program, origins = (source.program, source.origins) if isinstance(source, Exported) else (source, {})
        graph_module = _readable(program)
        given = stored_inputs(program) if example_inputs is None else example_inputs
        values = None if given is None else _by_placeholder(graph_module, given)
        return cls(name or "program", tuple(_layers(graph_module, values, origins)))


def stored_inputs(program: ExportedProgram) -> Any:
    """What a program was exported with, as arguments or by name; None where it is both or nothing."""
    args, kwargs = program.example_inputs or ((), {})
    return None if bool(args) == bool(kwargs) else args or kwargs


def _by_placeholder(graph_module: fx.GraphModule, given: Any) -> list[Any]:
    """The inputs of a program, whose graph has a placeholder for each tensor. Raises `InvalidInputError`."""
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    named = given if isinstance(given, Mapping) else dict(zip(names, tree_leaves(given), strict=False))
    if missing := [name for name in names if name not in named]:
        raise InvalidInputError(f"the program has an input `{missing[0]}`, which is not among the example_inputs")
    return [named[name] for name in names]


def _readable(program: ExportedProgram) -> fx.GraphModule:
    """The program with its convolutions spelled as in torch, and without the check of its inputs."""
    graph_module: Any = program.module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            spelled = node.target.overloadpacket.__name__
            if re.fullmatch(r"conv(_transpose)?[123]d", spelled):
                node.target = getattr(torch, spelled)
            elif spelled == "linear":
                node.target = F.linear
    graph_module.recompile()
    return graph_module  # type: ignore[no-any-return]


def _layers(graph_module: fx.GraphModule, inputs: Any, origins: Mapping[str, Any] | None = None) -> list[Layer]:
    measured = _Measuring(graph_module)
    if inputs is not None:
        measured.on(inputs)
    operations = Interpreter(graph_module, measured.values).operations
    reader = _Reader(graph_module, operations, measured, origins or {})
    return [reader.layer(node) for node in graph_module.graph.nodes if node.op != "get_attr"]


class _Measuring(PlainInterpreter):
    """The shape and type of every value, and the FLOPs of every node, from one run."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, Size] = {}
        self.values: dict[fx.Node, Value] = {}  # those of known sizes
        self.flops: dict[fx.Node, int] = {}
        self.counter = flop_counter()
        for node in graph_module.graph.nodes:  # as saved programs know them
            if isinstance(value := node.meta.get("val"), Tensor):
                self._note(node, value)

    def on(self, inputs: Any) -> None:
        """Raises `InvalidInputError` where the network does not run on the inputs."""
        with unchanged(self.module), running(f"the network {NO_EXAMPLES}"), reproducibly(), self.counter:
            self.run(*fresh(inputs))

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.flops[n] = self.counter.get_total_flops() - before
        if isinstance(value, Tensor):
            self._note(n, value)
        return value

    def _note(self, node: fx.Node, tensor: Tensor) -> None:
        self.shapes[node] = tuple(n if isinstance(n, int) else str(n) for n in tensor.shape)
        if all(isinstance(n, int) for n in tensor.shape):
            self.values[node] = Value(tuple(tensor.shape), tensor.dtype)


class _Reader:
    """Reads nodes of one graph as layers."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        operations: Mapping[fx.Node, Operation],
        measured: _Measuring,
        origins: Mapping[str, Any],
    ) -> None:
        self.graph_module = graph_module
        self.operations = operations
        self.measured = measured
        self.origins = origins

    def layer(self, node: fx.Node) -> Layer:
        place = self._place(node)
        tensors = self._tensors(node)
        operation = self.operations.get(node)
        convolves = operation is not None and operation.convolves
        text, kernel = self._text(node), self._kernel(node)
        if operation is not None and convolves:
            text, kernel = str(operation.geometry), operation.geometry.kernel_size
        origin = recorded_origin(self.graph_module, node) or tuple(self.origins.get(place, ()))
        return Layer(
            name=node.name,
            place=place,
            kind=("convolution" if kernel else "linear") if convolves else _kind(node, text),
            operation=text,
            sources=tuple(source.name for source in node.all_input_nodes if source.op != "get_attr"),
            reads=tuple(source.name for source in _read((node.args, node.kwargs)) if source.op != "get_attr"),
            shape=self.measured.shapes.get(node),
            kernel=kernel,
            flops=self.measured.flops.get(node),
            parameters=sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)),
            bias=operation is not None and convolves and operation.geometry.bias,
            settings=self._settings(node),
            origin=origin,
            state=_digest(tensors),
        )

    def _place(self, node: fx.Node) -> str:
        place = place_of(node)
        stack = list(node.meta.get("nn_module_stack", {}).values())  # in saved programs
        if place == node.name and node.op == "call_function" and stack:
            path, kind = stack[-1]
            if str(kind).startswith("torch.nn.modules.") and ".container." not in str(kind):
                return str(path)
        return place

    def _tensors(self, node: fx.Node) -> list[Tensor]:
        """The parameters and buffers that a node computes with."""
        if node.op == "call_module":
            module = module_of(self.graph_module, node)
            buffers = [b for name, b in module.named_buffers() if not name.endswith("num_batches_tracked")]
            return [t for t in (*module.parameters(), *buffers) if not is_lazy(t)]
        found = [_attribute(self.graph_module, s) for s in node.all_input_nodes if s.op == "get_attr"]
        return [value for value in found if isinstance(value, Tensor)]

    def _text(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            return "input" if node.op == "placeholder" else "output"
        module = module_of(self.graph_module, node) if node.op == "call_module" else None
        text = _words(function_name(node) if module is None else type(module).__name__)
        if "pool" in text and "adaptive" not in text:
            rest = (*node.args[1:], None, None, None)
            kernel = getattr(module, "kernel_size", node.kwargs.get("kernel_size", rest[0]))
            stride = getattr(module, "stride", node.kwargs.get("stride", rest[1])) or kernel
            text += f" {_short(kernel)} stride {_short(stride)}" if kernel else ""
            padding = getattr(module, "padding", node.kwargs.get("padding", rest[2]))
            text += f" padding {_short(padding)}" if kernel and _short(padding or 0) != "0" else ""
        return text

    def _settings(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = module_of(self.graph_module, node)
            constants = {k: v for k, v in vars(module).items() if _is_constant(v) and k not in _NO_SETTINGS}
            texts = [f"{name}={value}" for name, value in constants.items() if not name.startswith("_")]
            return f"{type(module).__name__}({', '.join(texts)})"
        if node.op not in ("call_function", "call_method"):
            return ""
        dot: Any = _Dot()
        texts = [str(fx.map_arg(value, lambda _: dot)) for value in node.args]
        texts += [f"{name}={fx.map_arg(value, lambda _: dot)}" for name, value in node.kwargs.items()]
        return f"{function_name(node)}({', '.join(texts)})"

    def _kernel(self, node: fx.Node) -> Ints:
        """The kernel of a convolution that the algebra does not read, such as one with gates."""
        if (
            node.op != "call_module"
            or "conv" not in type(module := module_of(self.graph_module, node)).__name__.lower()
        ):
            return ()
        weight = getattr(module, "weight", None)
        return tuple(weight.shape[2:]) if isinstance(weight, Tensor) else ()


_NO_SETTINGS = {"training", "inplace", ORIGIN}  # attributes that do not tell what a module does in eval


class _Dot:
    """Stands for a value that is computed, in the text of a call."""

    def __repr__(self) -> str:
        return "·"


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_constant, value))
    return isinstance(value, bool | int | float | str | None)


def _kind(node: fx.Node, text: str) -> str:
    if node.op in ("placeholder", "output"):
        return text
    if "conv" in text:
        return "convolution"
    if "norm" in text:
        return "normalisation"
    if "pool" in text or text == "mean":
        return "pooling"
    if text in _ACTIVATIONS or "activation" in text:
        return "activation"
    several = len([source for source in node.all_input_nodes if source.op != "get_attr"]) > 1
    return "join" if several or text in ("add", "cat") else "other"


def _words(name: str) -> str:
    """The plain name of an operation: BatchNorm2d, batch_norm and aten's batch_norm.default are "batch norm"."""
    name = name.partition(".")[0]
    name = name[1:] if name in IN_PLACE_OPERATORS else name.strip("_")
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name).replace("_", " ").lower()
    return re.sub(r"\d?d$", "", name) if re.search(r"[123]d$", name) else name


_ACTIVATIONS = {
    *(_words(cls.__name__) for cls in MODULES),
    "sigmoid",
    "softmax",
    "log softmax",
    "glu",
    "clamp",
    "hardtanh",
}


def _short(values: Any) -> str:
    values = list(values) if isinstance(values, tuple | list) else [values]
    return str(values[0]) if len(set(values)) == 1 else "×".join(map(str, values))


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name, None)


def _read(arguments: Any) -> Iterator[fx.Node]:
    """The nodes among arguments, in their order; those of a mapping by the names of its keys."""
    if isinstance(arguments, fx.Node):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from _read(argument)
    elif isinstance(arguments, Mapping):
        for key in sorted(arguments, key=str):
            yield from _read(arguments[key])
    elif isinstance(arguments, slice):
        yield from _read((arguments.start, arguments.stop, arguments.step))


def _digest(tensors: list[Tensor]) -> str | None:
    """Of the numbers of a layer."""
    if not tensors or any(t.is_meta for t in tensors):
        return "" if tensors else None
    digest = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        add_tensor(digest, "", tensor)
    return digest.hexdigest()
