"""The merge: a region of affine operations becomes one convolution (or linear layer) in the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.affine import (
    AffineMap,
    Geometry,
    append_ones,
    pad,
    regroup,
    transposed_weight,
)
from elc_fx.capturing.graph import constants, erase_unread, label, module_of, owners, put_attribute
from elc_fx.capturing.origins import origins_of, remember
from elc_fx.errors import NotAffineError, Refusal, VerificationError
from elc_fx.matching.interpret import Operation
from elc_fx.matching.partition import needs_explicit_padding
from elc_fx.matching.regions import Join, Merge, Regroup, Step, walk
from elc_fx.merging.verification import verify_merge

CONV_MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE_MODULES: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM_MODULES: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by axes


@dataclass(frozen=True)
class MergedRegion:
    """One merge that was carried out. flops: per sample, before and after; None where no example told the shapes."""

    name: str
    nodes: tuple[str, ...]
    layers: str
    result: str
    flops: tuple[int, int] | None
    launches: tuple[int, int]


class Fusion:
    """Carries out merges in a captured graph, one region after the other.

    verify: each merge is compared with the nodes that it replaces, before they are gone.
    made: the modules that are new; all others still belong to the caller's model.
    """

    def __init__(self, captured: fx.GraphModule, verify: bool = True) -> None:
        self.captured = captured
        self.graph = captured.graph
        self.verify = verify
        self.made: set[nn.Module] = set()
        self.paths: dict[Any, str] = {}  # of the layers that are new, by what was merged
        self.merged: list[MergedRegion] = []
        self.refusals: list[Refusal] = []
        self.position = {node: index for index, node in enumerate(self.graph.nodes)}
        self.calls: dict[str, int] = {}
        self.read: set[str] = set()  # paths of modules whose attributes the graph reads
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1
            if node.op == "get_attr":
                self.read |= owners(str(node.target)) | {str(node.target)}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.constant = constants(self.graph)

    def apply(self, step: Step) -> None:
        if isinstance(step, Merge):
            self._apply_merge(step)
        else:
            self._apply_regroup(step)

    def _apply_merge(self, merge: Merge) -> None:
        output = merge.output
        assert output is not None
        if (value := self._insert(merge)) is not None:
            self._replace(output, value)
            self._erase(merge.nodes())

    def _apply_regroup(self, step: Regroup) -> None:
        """acc = block₁; acc = acc + block₂; …: merged blocks by their convolution, others as they are."""
        values: list[tuple[fx.Node, float]] = []
        obsolete: set[fx.Node] = {step.join.node, *step.join.inner}
        for members, merge in step.blocks:
            value = self._insert(merge) if merge is not None else None
            if merge is not None and value is not None:
                values.append((value, 1.0))
                obsolete |= merge.nodes()
            else:
                values.extend((self._now(member.value), member.coefficient) for member in members)
        with self.graph.inserting_before(step.join.node):
            joined = self._concatenate(step, values) if step.join.concatenates else self._add(values)
        self._replace(step.join.node, joined)
        self._erase(obsolete)

    def _add(self, values: list[tuple[fx.Node, float]]) -> fx.Node:
        values = sorted(values, key=lambda value: value[1] != 1.0)
        total, coefficient = values[0]
        if coefficient != 1.0:
            total = self.graph.call_function(torch.mul, (total, coefficient))
        for value, coefficient in values[1:]:
            kwargs: dict[str, Any] = {} if coefficient == 1.0 else {"alpha": coefficient}
            total = self.graph.call_function(torch.add, (total, value), kwargs)
        return total

    def _concatenate(self, step: Regroup, values: list[tuple[fx.Node, float]]) -> fx.Node:
        if len(values) == 1:
            return values[0][0]
        return self.graph.call_function(torch.cat, ([value for value, _ in values], step.join.axis))

    def _now(self, node: fx.Node) -> fx.Node:
        """The node that has a value since an earlier merge."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.replaced[old] = new

    def _erase(self, nodes: set[fx.Node]) -> None:
        for node in sorted(nodes, key=lambda n: self.position[n], reverse=True):
            for erased in erase_unread(node, self.constant):
                if erased.op in ("call_module", "get_attr"):
                    self.calls[str(erased.target)] -= 1

    def _insert(self, merge: Merge) -> fx.Node | None:
        """The merged layer, where the region first reads its source; None if its numbers do not allow the merge."""
        source = self._now(merge.source)
        nodes = sorted(merge.nodes(), key=lambda node: self.position[node])
        key = self._identity_of(merge)
        if key not in self.paths:
            try:
                layer = self._merged_layer(merge, source, nodes)
            except (NotAffineError, VerificationError) as error:
                # The constants of a padding are the caller's numbers: close to what would merge is not enough.
                if isinstance(error, VerificationError) and not any(op.geometry.fill for op in merge.operations()):
                    raise
                self.refusals.append(Refusal(merge.name, str(error)))
                return None
            self.paths[key] = self._register(layer, merge)
        path = self.paths[key]
        self.calls[path] = self.calls.get(path, 0) + 1
        first = next(node for node in nodes if source in node.all_input_nodes)
        with self.graph.inserting_before(first):
            if (rank := merge.rank) is not None:
                self._insert_rank_check(source, rank)
            for condition in merge.geometry.sizes:
                self._insert_size_check(source, *condition)
            value = self.graph.call_module(path, (padded(merge.geometry, fx.Proxy(source)).node,))
        self._record(merge, nodes)
        return value

    def _identity_of(self, merge: Merge) -> Any:
        """Equal for merges of the same modules, of which one layer does for all calls."""
        found = list[Any]([merge.geometry])
        for part in walk(merge.parts):
            if isinstance(part, Join):
                branches = tuple((branch.coefficient, len(branch.chain.parts)) for branch in part.branches)
                found.append((part.concatenates, part.axis, branches))
            elif part.inner or not (part.node.op == "call_module" and len(part.node.args) == 1):
                return object()  # functions are not compared
            else:
                found.append((str(part.node.target), part.geometry))
        return tuple(found)

    def _merged_layer(self, merge: Merge, source: fx.Node, nodes: list[fx.Node]) -> nn.Module:
        """Raises `NotAffineError` if its numbers do not fit, and `VerificationError`."""
        operations = list(merge.operations())
        dtype = next(op.dtype for op in operations if op.dtype is not None)
        stored = merge.affine_map().rounded(dtype)
        assert stored.geometry == merge.geometry
        layer = self._like_the_original(layer_of(stored, dtype), operations)
        if self.verify:

            def merged(x: Tensor) -> Any:
                return layer(padded(merge.geometry, x))

            verify_merge(self.captured, merge, source, nodes, merged, stored)
        remember(layer, origins_of(self.captured, nodes))
        return layer

    def _insert_rank_check(self, source: fx.Node, rank: int) -> None:
        """An error for inputs with more or fewer axes, which the layers would have read in another way."""
        message = f"elc_fx merged layers for inputs of {rank} axes; compile with example_inputs for others"
        value: Any = fx.Proxy(source)
        torch._assert(value.dim() == rank, message)

    def _insert_size_check(self, source: fx.Node, axis: int, a: int, b: int, stride: int) -> None:
        """An error for the sizes at which the branches that were merged did not fit each other."""
        value: Any = fx.Proxy(source)
        size = value.size(axis + 2)
        message = f"the merged branches differ in size for this input: along axis {axis + 2}, stride {stride}"
        torch._assert((size + a) // stride == (size + b) // stride, message)

    def _like_the_original(self, layer: nn.Module, operations: list[Operation]) -> nn.Module:
        """Device, memory format and requires_grad of the layers that are merged."""
        for op in operations:
            if op.node.op == "call_module" and op.convolves:
                original = module_of(self.captured, op.node)
                weight = next(original.parameters(), None)
                if weight is not None:
                    layer.requires_grad_(any(p.requires_grad for p in original.parameters()))
                    last = CHANNELS_LAST.get(weight.dim())
                    if last is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=last):
                        return layer.to(memory_format=last)  # type: ignore[call-overload, no-any-return]
                    return layer
        return layer

    def _register(self, layer: nn.Module, merge: Merge) -> str:
        """Puts the layer where the first convolution that it replaces was, under a new name if others call that."""
        named = [op for op in merge.operations() if op.node.op == "call_module" and op.convolves]
        path = str(named[0].node.target) if named else merge.parts[-1].node.name
        if self.calls.keys() & owners(path):
            path = path.replace(".", "_")  # inside a module that the graph calls as a whole, and that is not ours
        taken = (
            self.calls.get(path, 0) > 1 or path in self.read or (path != str(named[0].node.target) if named else True)
        )
        if taken and self._exists(path):
            path = next(p for i in range(len(self.calls) + 2) if not self._exists(p := f"{path}_merged{i or ''}"))
        put_attribute(self.captured, path, layer)
        self.made.add(layer)
        return path

    def _exists(self, path: str) -> bool:
        owner, _, name = path.rpartition(".")
        return path in self.calls or hasattr(self.captured.get_submodule(owner), name)

    def _record(self, merge: Merge, nodes: Sequence[fx.Node]) -> None:
        counts = Counter(str(op.geometry) for op in merge.operations() if op.convolves)
        layers = ", ".join(f"{count} × ({text})" if count > 1 else text for text, count in counts.items())
        self.merged.append(
            MergedRegion(
                name=merge.name,
                nodes=tuple(label(node) for node in nodes),
                layers=layers or "elementwise",
                result=str(merge.geometry),
                flops=(merge.before[0], merge.after[0]) if merge.exact_size else None,
                launches=(merge.before[2], merge.after[2]),
            )
        )


def padded(geometry: Geometry, x: Any) -> Any:
    """What the layer of a geometry reads: x with a channel of ones, or padded as torch's layers cannot.

    x: [N, in_channels, *spatial]; or an `fx.Proxy`, which records the same calls in its graph.
    """
    if geometry.ones:
        x = append_ones(x, geometry.dims)
    if not needs_explicit_padding(geometry):
        return x
    return pad(x, geometry.padding, geometry.padding_mode)


def layer_of(affine: AffineMap, dtype: torch.dtype) -> nn.Module:
    """The torch.nn layer of a map. A padding that it cannot do, and the channel of ones, are left to its caller.

    Its parameters are copies: the map's tensors may be those of the caller's model, or of another layer.
    """
    if affine.ones is not None:
        affine = affine.with_channel_of_ones()
    g = affine.geometry
    arguments: dict[str, Any] = {"bias": affine.bias is not None, "device": "meta", "dtype": dtype}
    if g.dims == 0:
        layer: Any = nn.Linear(g.in_channels, g.out_channels, **arguments)
        weight = regroup(affine.kernel, g.groups, 1)
    else:
        arguments.update(stride=g.stride, dilation=g.dilation, groups=g.groups)
        lows = tuple(low for low, _ in g.padding)
        if g.transposed:
            weight = transposed_weight(affine.kernel, g.groups)
            arguments.update(padding=lows, output_padding=g.output_padding)
            layer = CONV_TRANSPOSE_MODULES[g.dims](g.in_channels, g.out_channels, g.kernel_size, **arguments)
        else:
            weight = affine.kernel
            symmetric = all(low == high for low, high in g.padding)
            padding: Any = 0 if needs_explicit_padding(g) else lows if symmetric else "same"
            mode = "zeros" if padding == 0 else g.padding_mode
            arguments.update(padding=padding, padding_mode=mode)
            layer = CONV_MODULES[g.dims](g.in_channels, g.out_channels, g.kernel_size, **arguments)
    layer.weight = nn.Parameter(weight.to(dtype, copy=True).contiguous())
    if affine.bias is not None:
        layer.bias = nn.Parameter(affine.bias.to(dtype, copy=True).contiguous())
    return layer.eval()  # type: ignore[no-any-return]
