"""The lossless mode: everything of a model that is exactly one affine map, and cheaper so, becomes one layer."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from elc_fx.capturing.attributes import unchanged
from elc_fx.capturing.capture import capture
from elc_fx.capturing.copying import clone
from elc_fx.capturing.equivalence import rounding_of, verify_outputs, verify_trace
from elc_fx.capturing.graph import is_leaf, module_of, owners, put_attribute
from elc_fx.capturing.inputs import NO_EXAMPLES, ExampleInputs, running
from elc_fx.capturing.islands import modules_held, replaceable_children
from elc_fx.capturing.shapes import Value
from elc_fx.comparison import Run, run
from elc_fx.compiled import REPORT, CompiledModule
from elc_fx.errors import CaptureError, InvalidInputError, Refusal, VerificationError
from elc_fx.matching.chains import find_chains
from elc_fx.matching.interpret import Interpreter, Operation
from elc_fx.matching.partition import MergePlanner
from elc_fx.merging.distribution import Distribution
from elc_fx.merging.fusion import Fusion, MergedRegion
from elc_fx.report import Report, Totals

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def merge_all(interpreter: Interpreter, *, verify: bool) -> tuple[Fusion, list[Refusal]]:
    """Carries out the merges of the graph that was read, in place; with what was not merged, and why."""
    chains, joins, refusals = find_chains(interpreter)
    planner = MergePlanner(interpreter)
    fusion = Fusion(interpreter.captured, verify)
    for step in planner.plan(chains, joins):
        fusion.apply(step)
    return fusion, [*refusals, *planner.refusals, *fusion.refusals]


class LosslessCompilation:
    """One run over one model. memo: what of the model was copied or compiled already, by identity."""

    def __init__(self, examples: ExampleInputs | None, *, verify: bool) -> None:
        self.examples = examples
        self.verify = verify
        self.expected: Any = None  # the model's output on the examples
        self.rounding = 0.0  # eps of the coarsest type that the model computes with
        self.memo: dict[int, Any] = {}
        self.model: nn.Module | None = None
        self.merged: list[MergedRegion] = []
        self.refused: list[Refusal] = []
        self.opaque: list[Refusal] = []

    @torch.inference_mode(False)  # what is made in that mode could not be trained, nor run with gradients enabled
    def run(self, model: nn.Module, original: nn.Module | None = None) -> nn.Module:
        """A compiled copy of `model`, with its report. original: what the report compares it with, if not `model`."""
        original = model if original is None else original
        self.model = model
        if self.examples is not None:
            seen = _measured(model, self.examples)
            self.expected = seen.output
            before = seen.cost if original is model else _measured(original, self.examples).cost
            numbers = *original.parameters(), *original.buffers(), *model.parameters(), self.examples.args
            self.rounding = rounding_of(*numbers, self.examples.kwargs, *seen.dtypes)
        given = None if self.examples is None else self.examples.bound(model)
        compiled, depth = self._compile(model, "", given)
        totals = Totals(
            parameters=(_parameters(original), _parameters(compiled)),
            layers=(_layers(original), _layers(compiled)),
            depth=depth,
        )
        if self.examples is not None:
            try:
                actual, after, _ = _measured(compiled, self.examples)
            except InvalidInputError as error:  # the model itself ran
                raise VerificationError(f"the compiled model fails where the model runs: {error}") from error
            totals = replace(totals, flops=(before.flops, after.flops), depth=(before.depth, after.depth))
            if self.verify:
                totals = replace(totals, error=self._verify_outputs(self.expected, actual))
                self.refused.extend(_not_compared(self.expected))
        report = Report(tuple(self.merged), tuple(self.refused), tuple(self.opaque), totals)
        setattr(compiled, REPORT, report)
        return compiled

    @functools.cached_property
    def _holders(self) -> Counter[int]:
        """In how many ways modules have another, by its identity. Only asked where a module is opaque."""
        assert self.model is not None
        children = (child for module in self.model.modules() for child in module._modules.values())
        return Counter(id(held) for held in (*children, *modules_held(self.model)))

    def _verify_outputs(self, expected: Any, actual: Any) -> float:
        try:
            return verify_outputs(expected, actual, self.rounding)
        except VerificationError as error:
            suspect = f"; the first merged region is `{self.merged[0].name}`" if self.merged else ""
            raise VerificationError(f"{error}{suspect}") from None

    def _compile(
        self, module: nn.Module, path: str, given: Mapping[str, Any] | None, *, bind_defaults: bool = True
    ) -> tuple[nn.Module, tuple[int, int]]:
        """The compiled module, and the depth before and after."""
        try:
            captured = capture(module, given, bind_defaults=bind_defaults)
            values = {} if captured.inputs is None else verify_trace(captured, self.expected)
        except CaptureError as error:
            self.opaque.append(Refusal(path or "the model", str(error)))
            return self._compile_children(module, path)
        self.opaque.extend(replace(r, where=_join(path, r.where)) for r in captured.opaque)
        return self._merge(captured.graph_module, path, values)

    def _merge(
        self, graph_module: fx.GraphModule, path: str, values: dict[fx.Node, Value]
    ) -> tuple[fx.GraphModule, tuple[int, int]]:
        interpreter = Interpreter(graph_module, values)
        interpreter.free_layers_of_questions()
        before = depth_of(graph_module, interpreter)
        distributions = [Distribution(interpreter)]
        while distributions[-1].run():  # what stands behind it is next
            interpreter = Interpreter(graph_module, distributions[-1].values)
            distributions.append(Distribution(interpreter))
        fusion, refusals = merge_all(interpreter, verify=self.verify)
        for distribution in distributions:
            distribution.settle()
        self.merged.extend(replace(m, name=_join(path, m.name)) for m in fusion.merged)
        self.refused.extend(replace(self._advised(r), where=_join(path, r.where)) for r in refusals)
        for made in fusion.made:
            self.memo[id(made)] = made
        result = CompiledModule(self._copies(graph_module, path), graph_module.graph, type(graph_module).__name__)
        for module in result.modules():
            if module is result or type(module) is nn.Module:  # made by torch.fx, for the names of what is in them
                module.training = False
        result.graph.lint()
        return result, (before, depth_of(result))

    def _advised(self, refusal: Refusal) -> Refusal:
        unknown = self.examples is None and refusal.reason.endswith("not known")
        return replace(refusal, reason=f"{refusal.reason}; give example_inputs") if unknown else refusal

    def _copies(self, graph_module: fx.GraphModule, path: str) -> nn.Module:
        """Holds at the same paths copies of all that the graph calls or reads, and of the caller's model nothing else.

        Opaque modules are copied with compiled children.
        """
        root = nn.Module()
        nodes = [node for node in graph_module.graph.nodes if node.op in ("call_module", "get_attr")]
        targets = dict.fromkeys(str(node.target) for node in nodes)
        called = {str(node.target) for node in nodes if node.op == "call_module"}
        for target in targets:
            if called & owners(target):
                continue  # part of a module that is called, with which it is copied
            owner, _, name = target.rpartition(".")
            source = graph_module.get_submodule(owner)
            value = getattr(source, name)
            opaque = isinstance(value, nn.Module) and id(value) not in self.memo and not is_leaf(value)
            if opaque and not any(other.startswith(f"{target}.") for other in targets):  # whose paths must stay
                self._compile_children(value, _join(path, target))
            persistent = name not in source._non_persistent_buffers_set
            put_attribute(root, target, clone(value, self.memo), persistent=persistent)
        return root

    def _compile_children(self, module: nn.Module, path: str) -> tuple[nn.Module, tuple[int, int]]:
        """A copy of a module that cannot be traced, with its children compiled where it does no more than call them."""
        children, refusals = replaceable_children(module)
        for name, child in children.items():
            if id(child) in self.memo:
                continue
            if self._holders[id(child)] > 1:
                refusals.append(Refusal(name, "several modules have it, or one in several ways"))
                continue
            compiled, _ = self._compile(child, _join(path, name), None, bind_defaults=False)
            self.memo[id(child)] = compiled
        self.refused.extend(replace(r, where=_join(path, r.where) or "the model") for r in refusals)
        copied = clone(module, self.memo)
        return copied, (_layers(module), _layers(copied))


def _not_compared(output: Any) -> list[Refusal]:
    """What of an output has no numbers that could have been compared."""
    tensors = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor) and not value.is_meta]
    lost = sum(int((~value.isfinite()).sum()) for value in tensors)
    if not lost:
        return []
    total = sum(value.numel() for value in tensors)
    counted = f"{lost:,} of {total:,} numbers are NaN or infinite"
    return [Refusal("the output", f"{counted} on the example_inputs, and only their places were compared")]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _measured(module: nn.Module, examples: ExampleInputs) -> Run:
    """Output and costs on the example inputs. Raises `InvalidInputError` if the module does not run on them."""
    with unchanged(module), running(f"{type(module).__name__} {NO_EXAMPLES}"):
        return run(module, examples)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def _layers(module: nn.Module, layers: tuple[type[nn.Module], ...] = LAYERS) -> int:
    return sum(isinstance(m, layers) for m in module.modules())


def depth_of(
    graph_module: fx.GraphModule,
    interpreter: Interpreter | None = None,
    layers: tuple[type[nn.Module], ...] = LAYERS,
) -> int:
    """Convolutions and linear layers on the longest path. An opaque module counts with all that it has."""
    operations = {} if interpreter is None else interpreter.operations
    depth: dict[fx.Node, int] = {}
    for node in graph_module.graph.nodes:
        own = layers_at(graph_module, node, operations, layers)
        depth[node] = max((depth[source] for source in node.all_input_nodes), default=0) + own
    return max(depth.values(), default=0)


def layers_at(
    graph_module: fx.GraphModule,
    node: fx.Node,
    operations: Mapping[fx.Node, Operation],
    layers: tuple[type[nn.Module], ...] = LAYERS,
) -> int:
    """How many convolutions and linear layers a node stands for. operations: those of the graph that were read."""
    if node.op == "call_module":
        return _layers(module_of(graph_module, node), layers)
    return int(node in operations and operations[node].convolves)
