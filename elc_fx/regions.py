"""Regions: the parts of a captured graph that are affine maps, and which merges of them cost least.

Affine operations form chains; branches of one value that end in a sum or a concatenation form joins, which are parts
of chains again. `find_chains` reads this series-parallel structure off the graph in one pass. `MergePlanner` splits
each chain where that is cheapest: FLOPs first, and at equal FLOPs the number of operations that are launched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from networkx.utils import UnionFind
from torch import Tensor, fx

from elc_fx.affine import AffineMap, Geometry, Ints
from elc_fx.capture import Refusal
from elc_fx.errors import NotAffineError
from elc_fx.graph import allocates, function_name, label, overwritten_argument, runs_foreign_code, signature_of, tuples
from elc_fx.interpret import CPU, Feature, Interpreter, Operation

LONGEST_SPAN = 32  # parts that one step of planning merges at most; longer chains are merged step by step
MOST_BRANCHES = 8  # up to here all ways to group the branches of a sum are compared
DEEPEST_NESTING = 24  # joins inside each other that are planned as one
NOMINAL_SIZE = 1 << 20  # positions per axis where no example says: large, so that borders do not count

Cost: TypeAlias = tuple[int, int, int]  # FLOPs, weights, launches: compared in this order
NOTHING: Cost = (0, 0, 0)


@dataclass
class Branch:
    """One operand of a join: a chain from the join's source to `value`, times `coefficient`, which `scale` does."""

    chain: Chain
    value: fx.Node
    coefficient: float = 1.0
    scale: Operation | None = None

    @property
    def parts(self) -> list[Part]:
        return [*self.chain.parts, self.scale] if self.scale else self.chain.parts


@dataclass
class Join:
    """Branches that are summed or concatenated. inner: the additions below `node` that it stands for.

    partial: only some of the node's branches, whose joint value no node of the graph has.
    """

    node: fx.Node
    branches: list[Branch]
    concatenates: bool = False
    inner: list[fx.Node] = field(default_factory=list)
    partial: bool = False
    axis: int = 1  # along which it concatenates

    @property
    def counts_axes(self) -> bool:
        """Whether it names the axis of the channels by its number from the front."""
        return self.concatenates and self.axis > 0

    @property
    def sources(self) -> list[fx.Node]:
        return list(dict.fromkeys(branch.chain.source for branch in self.branches))


Part: TypeAlias = Operation | Join


@dataclass(eq=False)
class Chain:
    """Parts one after the other, each the only reader of what stands before it.

    reads: how often `source` is read. depth: how many joins stand inside each other.
    """

    source: fx.Node
    parts: list[Part]
    reads: int = 1
    depth: int = 0


@dataclass(frozen=True)
class Merge:
    """Parts of a chain, or branches of a join, that become one convolution of `source`."""

    source: fx.Node
    parts: tuple[Part, ...]
    geometry: Geometry
    before: Cost
    after: Cost
    exact_size: bool

    @property
    def output(self) -> fx.Node | None:
        """The node whose value the convolution gives; None for a merge of some branches of a join."""
        last = self.parts[-1]
        return None if isinstance(last, Join) and last.partial else last.node

    @property
    def name(self) -> str:
        """The region's layers, for people: its convolutions, else all its operations."""
        operations = list(self.operations())
        named = [label(op.node) for op in operations if op.convolves] or [label(op.node) for op in operations]
        named = list(dict.fromkeys(named))
        return " + ".join(named) if len(named) <= 6 else f"{named[0]} + … + {named[-1]} ({len(named)} layers)"

    @property
    def rank(self) -> int | None:
        """The number of axes that the source must have, if its layers take others and would do something else."""
        ranks = [op.rank for op in self.operations() if op.rank is not None]
        if not ranks and any(join.counts_axes for join in _joins(self.parts)) and not self.exact_size:
            ranks = [self.geometry.dims + 2]
        return ranks[0] if ranks else None

    def operations(self) -> Iterator[Operation]:
        return operations_of(self.parts)

    def nodes(self) -> set[fx.Node]:
        return set(nodes_of(self.parts))

    def affine_map(self, *, magnitude: bool = False) -> AffineMap:
        """The map in float64 (complex128 for complex weights): the region's operations, interpreted by the algebra.

        magnitude: with the absolute values of all numbers, which bounds what intermediate results can be.
        Raises `NotAffineError` if the numbers do not allow the merge.
        """
        operations = list(self.operations())
        device = next((op.device for op in operations if op.device is not None), None)
        complex_valued = any(op.dtype is not None and op.dtype.is_complex for op in operations)
        dtype = torch.complex128 if complex_valued else torch.float64

        def place(t: Tensor) -> Tensor:
            return (t.abs() if magnitude else t).to(device, dtype)

        def read(op: Operation) -> AffineMap:
            loaded = op.load()
            kernel = loaded.kernel.abs() if magnitude else loaded.kernel
            # The algebra widens the kernel of a convolution when it computes with it. A fill is compared at its own
            # precision and by its value: magnitudes are not to be compared.
            kernel = kernel.to(device) if op.convolves else kernel.to(device, dtype)
            fill = None if loaded.fill is None or magnitude else loaded.fill.to(device)
            bias, ones = (None if t is None else place(t) for t in (loaded.bias, loaded.ones))
            return AffineMap(loaded.geometry, kernel, bias, ones, fill)

        def identity(channels: int) -> AffineMap:
            return AffineMap.identity(channels, self.geometry.dims, torch.empty(0, device=device, dtype=dtype))

        with torch.no_grad():
            return interpret(self.parts, read, identity, self.geometry.in_channels)


@dataclass
class Regroup:
    """A join whose blocks of branches are merged one by one, and joined again."""

    join: Join
    blocks: list[tuple[list[Branch], Merge | None]]


Step: TypeAlias = Merge | Regroup


def operations_of(parts: Sequence[Part]) -> Iterator[Operation]:
    for part in parts:
        if isinstance(part, Operation):
            yield part
        else:
            for branch in part.branches:
                yield from operations_of(branch.chain.parts)


def _joins(parts: Sequence[Part]) -> Iterator[Join]:
    for part in parts:
        if isinstance(part, Join):
            yield part
            for branch in part.branches:
                yield from _joins(branch.chain.parts)


def nodes_of(parts: Sequence[Part]) -> Iterator[fx.Node]:
    for part in parts:
        if isinstance(part, Join):
            for branch in part.branches:
                yield from nodes_of(branch.chain.parts)
        yield from part.inner
        if isinstance(part, Operation) or not part.partial:
            yield part.node


class _Map(Protocol):
    @property
    def out_channels(self) -> int: ...
    def then(self, second: Any) -> Any: ...
    def __add__(self, other: Any) -> Any: ...
    def beside(self, other: Any) -> Any: ...


M = TypeVar("M", bound=_Map)


def interpret(
    parts: Sequence[Part], read: Callable[[Operation], M], identity: Callable[[int], M], channels: int | None
) -> M:
    """The parts as one map, by the algebra: operations compose, joins add or stand side by side.

    identity: that of a number of channels. channels: of what the parts read, where it is known. Works on geometries and
    on maps with numbers alike. Raises `NotAffineError`.
    """
    result: M | None = None
    for part in parts:
        if isinstance(part, Operation):
            step = read(part)
        else:
            width = channels if result is None else result.out_channels
            branches = [interpret(branch.parts, read, identity, width) for branch in part.branches]
            step = branches[0]
            for other in branches[1:]:
                step = step.beside(other) if part.concatenates else step + other
        result = step if result is None else result.then(step)
    if result is not None:
        return result
    if channels is None:
        raise NotAffineError("the number of channels is not known; give example_inputs")
    return identity(channels)


def find_chains(interpreter: Interpreter) -> tuple[list[Chain], list[Join], list[Refusal]]:
    """The maximal chains of a graph, the joins of several sources, and why other places are neither."""
    finder = _Finder(interpreter)
    for node in interpreter.captured.graph.nodes:
        finder.visit(node)
    finder.explain_forks()
    return list(finder.chains.values()), list(finder.mixed.values()), finder.refusals


class _Finder:
    """One pass over the graph: chains grow at their end, and move into the join that reads them."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.graph_module = interpreter.captured
        nodes = list(self.graph_module.graph.nodes)
        self.position = {node: index for index, node in enumerate(nodes)}
        self.uses = dict.fromkeys(nodes, 0)
        for node in nodes:
            fx.map_arg((node.args, node.kwargs), self._count)
        self.aliases = _Aliases(interpreter)
        self.chains: dict[fx.Node, Chain] = {}  # by their last node
        self.mixed: dict[fx.Node, Join] = {}  # joins of several sources, by their node
        self.refusals: list[Refusal] = [Refusal(label(node), why) for node, why in interpreter.refusals.items()]

    def _count(self, node: fx.Node) -> fx.Node:
        self.uses[node] += 1
        return node

    def visit(self, node: fx.Node) -> None:
        if (written := overwritten_argument(self.graph_module, node)) is not None:
            affine = node in self.interpreter.operations or self.interpreter.summands(node)
            if affine and written not in self.aliases.private:
                self.refusals.append(Refusal(label(node), f"it overwrites `{label(written)}`, which others may read"))
            if written not in self.aliases.private:
                return
        if (operation := self.interpreter.operations.get(node)) is not None:
            self._append(node, operation)
        elif (terms := self.interpreter.summands(node)) is not None:
            join = Join(node, [])
            for term in terms:
                self._add_operand(join, term.value, term.coefficient)
            self._close(join)
        elif (values := self.interpreter.concatenated(node)) is not None:
            axis = signature_of(node).get("dim", 0)
            self._close(Join(node, [self._branch(value) for value in values], concatenates=True, axis=axis))

    def _append(self, node: fx.Node, operation: Operation) -> None:
        source, geometry = operation.source, operation.geometry
        if operation.inner and operation.inner[0] in self.chains:  # it continues where its first node began
            inner = self.chains.pop(operation.inner[0])
            inner.parts.pop()
            if inner.parts:
                self.chains[source] = inner
        chain = self.chains.get(source)
        fits = self.interpreter.features[source] == Feature(geometry.in_channels, geometry.dims)
        if chain is not None and self.uses[source] == 1 and fits:
            del self.chains[source]
            chain.parts.append(operation)
        else:
            chain = Chain(source, [operation])
        self.chains[node] = chain

    def explain_forks(self) -> None:
        """A chain that ends at a value with several readers cannot go on with one of them."""
        for node in self.chains:
            readers = [user for user in node.users if user in self.interpreter.operations]
            if readers and self.uses[node] > 1:
                everyone = ", ".join(f"`{label(user)}`" for user in node.users)
                self.refusals.append(
                    Refusal(label(node), f"not merged with `{label(readers[0])}`: it feeds {everyone}")
                )

    def _branch(self, value: fx.Node) -> Branch:
        if self.uses[value] == 1 and value in self.chains:
            return Branch(self.chains.pop(value), value)
        return Branch(Chain(value, []), value)

    def _add_operand(self, join: Join, value: fx.Node, coefficient: float) -> None:
        """A summand; the summands of an inner sum that nobody else reads become the join's own."""
        inner = self.mixed.get(value)
        if inner is None and value in self.chains and len(self.chains[value].parts) == 1:
            only = self.chains[value].parts[0]
            inner = only if isinstance(only, Join) else None
        if self.uses[value] != 1 or inner is None or inner.concatenates or coefficient != 1:
            branch = self._branch(value)
            branch.coefficient = coefficient
            branch.scale = self._scale(join.node, value, coefficient)
            join.branches.append(branch)
            return
        self.mixed.pop(value, None)
        self.chains.pop(value, None)
        join.branches.extend(inner.branches)
        join.inner.extend([*inner.inner, inner.node])

    def _scale(self, node: fx.Node, value: fx.Node, coefficient: float) -> Operation | None:
        feature = self.interpreter.features[value]
        if coefficient == 1 or feature.channels is None or feature.dims is None:
            return None
        channels, dims = feature.channels, feature.dims
        geometry = Geometry.identity(channels, dims)
        scale = torch.full((channels,), float(coefficient), dtype=torch.float64, device=CPU)
        return Operation(node, value, geometry, lambda: AffineMap.scale(scale, None, dims))

    def _close(self, join: Join) -> None:
        """A join of one source continues the chain before that source, if the join's branches are its only readers."""
        sources = join.sources
        if self._is_overwritten_between(join):
            self.chains.update({branch.value: branch.chain for branch in join.branches if branch.chain.parts})
            return
        depth = 1 + max(branch.chain.depth for branch in join.branches)
        if len(sources) != 1 or depth > DEEPEST_NESTING:
            in_place = [n for n in (join.node, *join.inner) if overwritten_argument(self.graph_module, n) is not None]
            if in_place:  # its first operand decides the data type of the result, which a regrouped sum would not keep
                self.chains.update({branch.value: branch.chain for branch in join.branches if branch.chain.parts})
            else:
                self.mixed[join.node] = join
            return
        source, reads = sources[0], sum(branch.chain.reads for branch in join.branches)
        if source in self.chains and reads == self.uses[source]:
            chain = self.chains.pop(source)
            chain.parts.append(join)
            chain.depth = max(chain.depth, depth)
        else:
            chain = Chain(source, [join], reads, depth)
        self.chains[join.node] = chain

    def _is_overwritten_between(self, join: Join) -> bool:
        """Whether somebody may change the source between the first and the last of the join's reads."""
        nodes = {join.node, *nodes_of([join])}
        positions = [self.position[node] for node in nodes]
        for member in {m for source in join.sources for m in self.aliases.of[source]}:
            for user in member.users:
                between = min(positions) < self.position[user] < max(positions)
                if between and user not in nodes and self.aliases.may_overwrite(user):
                    self.refusals.append(
                        Refusal(label(join.node), f"`{label(user)}` may overwrite what its branches read")
                    )
                    return True
        return False


def allocating(captured: fx.GraphModule) -> set[fx.Node]:
    """The nodes of which it is known that what they give is in memory of its own."""
    several = tuples(captured.graph)
    return {node for node in captured.graph.nodes if node not in several and allocates(captured, node)}


class _Aliases:
    """Which values may share memory, erring on the safe side: what is not known to allocate its output, may."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.captured = interpreter.captured
        self.allocating = allocating(self.captured)
        storages = UnionFind(self.captured.graph.nodes)
        shared = set()  # views, inputs, attributes and opaque values
        for node in self.captured.graph.nodes:
            if (written := overwritten_argument(self.captured, node)) is not None:
                storages.union(node, written)
            elif node.op != "output" and not self._allocates(node):
                shared.add(node)
                storages.union(node, *(source for source in node.all_input_nodes if source.op != "get_attr"))
        self.of: dict[fx.Node, set[fx.Node]] = {}  # the values that may be in the same memory, itself among them
        self.private: set[fx.Node] = set()  # whose memory is seen only through them and in-place operations on them
        for storage in storages.to_sets():
            self.of |= dict.fromkeys(storage, storage)
            if shared.isdisjoint(storage):
                self.private |= storage

    def _allocates(self, node: fx.Node) -> bool:
        read = node.op != "call_module" and function_name(node) != "getitem" and node in self.interpreter.operations
        return read or node in self.allocating

    def may_overwrite(self, node: fx.Node) -> bool:
        if overwritten_argument(self.captured, node) is not None:
            return True
        if node in self.interpreter.operations:  # rings of a decoupled network are modules of elc_fx
            return False
        return runs_foreign_code(self.captured, node)


@dataclass(frozen=True)
class _Block:
    """Parts that stay together while a chain is planned: one part as it is, or several as one convolution."""

    parts: tuple[Part, ...]
    geometry: Geometry | None  # None: not an affine map, as a whole
    cost: Cost
    kinds: frozenset[object]  # data types and devices of the weights
    merged: bool = False
    why_not: str = ""
    step: Regroup | None = None

    def output_size(self, size: Ints) -> Ints:
        return self.geometry.output_size(size) if self.geometry else size


@dataclass(frozen=True)
class _Span:
    """The cheapest way to reach a block: over the blocks from `start`, as one convolution unless geometry is None."""

    cost: Cost
    start: int
    geometry: Geometry | None = None
    own_cost: Cost = NOTHING


def kinds_of(parts: Sequence[Part]) -> frozenset[object]:
    return frozenset(k for op in operations_of(parts) for k in (op.dtype, op.device) if k is not None)


def fit_one_layer(kinds: frozenset[object]) -> bool:
    """Whether weights have one data type and one device."""
    return sum(isinstance(k, torch.dtype) for k in kinds) <= 1 and sum(isinstance(k, torch.device) for k in kinds) <= 1


class MergePlanner:
    """Chooses the cheapest merges. Costs are exact where the shapes are known, else for large inputs."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.refusals: list[Refusal] = []
        self.steps: list[Step] = []
        self._splits: dict[tuple[Chain, Ints], list[_Block]] = {}  # by the identity of a chain, and its input's size

    def plan(self, chains: Sequence[Chain], joins: Sequence[Join]) -> list[Step]:
        """The merges to carry out, for all chains and joins of a graph."""
        for chain in chains:
            self._emit(chain, self._source_size(chain.source, chain.parts))
        for join in joins:
            _, regroup = self._regroup(join)
            self._emit_regroup(regroup, None)
        return self.steps

    # Sizes.

    def _source_size(self, source: fx.Node, parts: Sequence[Part]) -> Ints:
        dims = next((op.geometry.dims for op in operations_of(parts)), self.interpreter.features[source].dims) or 0
        shape = self.interpreter.shapes.get(source)
        if shape is not None and dims and len(shape) == dims + 2:
            return tuple(shape[2:])
        return (NOMINAL_SIZE,) * dims

    def _knows(self, source: fx.Node) -> bool:
        return source in self.interpreter.shapes

    # Geometry of parts.

    def _geometry(self, parts: Sequence[Part], source: fx.Node) -> Geometry:
        """The parts as one map. Raises `NotAffineError`."""
        joins = [part for part in parts if isinstance(part, Join)]
        if any(b.coefficient != 1 and b.scale is None for join in joins for b in join.branches):
            raise NotAffineError("the number of channels is not known; give example_inputs")
        if not fit_one_layer(kinds_of(parts)):
            raise NotAffineError("the layers differ in data type or device")
        feature = self.interpreter.features[source]
        dims = next((op.geometry.dims for op in operations_of(parts)), feature.dims)

        def identity(channels: int) -> Geometry:
            if dims is None:
                raise NotAffineError("the number of axes is not known; give example_inputs")
            return Geometry.identity(channels, dims)

        geometry = interpret(parts, lambda op: op.geometry, identity, feature.channels)
        shape = self.interpreter.shapes.get(source)
        for axis, a, b, stride in geometry.sizes:
            if shape is not None and (shape[axis + 2] + a) // stride != (shape[axis + 2] + b) // stride:
                raise NotAffineError("the branches differ in size for the example_inputs")
        return geometry

    # Chains.

    def _split(self, chain: Chain, size: Ints) -> list[_Block]:
        """The cheapest partition of a chain into blocks; LONGEST_SPAN at most merge at once, so until no more do."""
        key = (chain, size)
        if key not in self._splits:
            at, blocks = size, []
            for part in chain.parts:
                blocks.append(self._single(part, at))
                at = blocks[-1].output_size(at)
            while len(merged := self._partition(blocks, size)) < len(blocks):
                blocks = merged
            self._splits[key] = blocks
        return self._splits[key]

    def _single(self, part: Part, size: Ints) -> _Block:
        kinds = kinds_of([part])
        if isinstance(part, Operation):
            return _Block((part,), part.geometry, operation_cost(part, size), kinds)
        cost, regroup = self._regroup(part, size)
        try:
            geometry = self._geometry([part], part.branches[0].chain.source)
        except NotAffineError as error:
            return _Block((part,), None, cost, kinds, why_not=str(error), step=regroup)
        whole = len(regroup.blocks) == 1
        return _Block((part,), geometry, cost, kinds, merged=whole, step=None if whole else regroup)

    def _partition(self, blocks: list[_Block], size: Ints) -> list[_Block]:
        """best[j] = min over i < j of best[i] + cost of blocks i…j−1 as one: a shortest path."""
        sizes = [size]
        for block in blocks:
            sizes.append(block.output_size(sizes[-1]))
        best: list[_Span | None] = [_Span(NOTHING, 0)] + [None] * len(blocks)
        for start, first in enumerate(blocks):
            before = best[start]
            assert before is not None
            _relax(best, start + 1, _Span(_add(before.cost, first.cost), start))
            for end, geometry in self._spans(blocks, start):
                cost = merged_cost(geometry, sizes[start])
                _relax(best, end, _Span(_add(before.cost, cost), start, geometry, cost))
        chosen: list[_Block] = []
        end = len(blocks)
        while end:
            span = best[end]
            assert span is not None
            chosen.append(_join_blocks(blocks[span.start : end], span))
            end = span.start
        return chosen[::-1]

    def _spans(self, blocks: list[_Block], start: int) -> Iterator[tuple[int, Geometry]]:
        """The blocks from `start` that can be one convolution: where they end, and its geometry."""
        geometry, kinds = blocks[start].geometry, blocks[start].kinds
        if geometry is not None and isinstance(blocks[start].parts[0], Join):
            yield start + 1, geometry
        for end in range(start + 2, min(start + LONGEST_SPAN, len(blocks)) + 1):
            block = blocks[end - 1]
            kinds |= block.kinds
            if geometry is None or block.geometry is None or not fit_one_layer(kinds):
                return
            try:
                geometry = geometry.then(block.geometry)
            except NotAffineError:
                return
            yield end, geometry

    # Joins.

    def _regroup(self, join: Join, size: Ints | None = None) -> tuple[Cost, Regroup]:
        """The cheapest way to merge some branches of a join with each other and leave the others as they are."""
        blocks: list[tuple[list[Branch], Merge | None]] = []
        cost = NOTHING
        if join.concatenates:
            runs = [list(run) for _, run in itertools.groupby(join.branches, key=lambda b: b.chain.source)]
        else:
            runs = [[b for b in join.branches if b.chain.source is source] for source in join.sources]
        for run in runs:
            at = size or self._source_size(run[0].chain.source, [part for b in run for part in b.chain.parts])
            run_cost, groups = self._group(run, at, join.axis, ordered=join.concatenates)
            cost = _add(cost, run_cost)
            blocks.extend(groups)
        joins = (len(blocks) > 1) if join.concatenates else len(blocks) - 1
        return _add(cost, _launches(joins)), Regroup(join, blocks)

    def _group(
        self, branches: list[Branch], size: Ints, axis: int, *, ordered: bool
    ) -> tuple[Cost, list[tuple[list[Branch], Merge | None]]]:
        """The cheapest partition of branches of one source into merged groups (of neighbours, where `ordered`)."""
        source = branches[0].chain.source
        alone = [self._cost_alone(branch, size) for branch in branches]

        def merged(indices: Sequence[int]) -> Merge | None:
            members = [branches[i] for i in indices]
            join = Join(members[-1].value, members, concatenates=ordered, partial=True, axis=axis)
            try:
                geometry = self._geometry([join], source)
            except NotAffineError:
                return None
            before = _add(*(alone[i] for i in indices), _launches(len(indices) - 1))
            after = merged_cost(geometry, size)
            return Merge(source, (join,), geometry, before, after, self._knows(source))

        if ordered:
            return _best_intervals(branches, alone, merged)
        if len(branches) <= MOST_BRANCHES:
            return _best_subsets(branches, alone, merged)
        return _greedy_groups(branches, alone, merged)

    def _cost_alone(self, branch: Branch, size: Ints) -> Cost:
        if any(op.geometry.dims != len(size) for op in operations_of(branch.parts)):
            size = self._source_size(branch.chain.source, branch.parts)
        blocks = self._split(branch.chain, size)
        scaled = branch.scale is not None
        return _add(*(block.cost for block in blocks), _launches(scaled))

    # From blocks to steps.

    def _emit(self, chain: Chain, size: Ints) -> None:
        value, previous = chain.source, None
        for block in self._split(chain, size):
            if block.merged:
                assert block.geometry is not None
                before = self._original_cost(block.parts, size)
                self.steps.append(Merge(value, block.parts, block.geometry, before, block.cost, self._knows(value)))
            elif block.step is not None:
                self._emit_regroup(block.step, size)
            if previous is not None:
                self._explain(previous, block)
            value, previous, size = block.parts[-1].node, block, block.output_size(size)

    def _emit_regroup(self, regroup: Regroup, size: Ints | None) -> None:
        for members, merge in regroup.blocks:
            if merge is None:
                chain = members[0].chain
                self._emit(chain, size or self._source_size(chain.source, chain.parts))
        if any(merge is not None for _, merge in regroup.blocks):
            self.steps.append(regroup)

    def _original_cost(self, parts: Sequence[Part], size: Ints) -> Cost:
        cost = NOTHING
        for part in parts:
            if isinstance(part, Operation):
                cost = _add(cost, operation_cost(part, size))
                size = part.geometry.output_size(size)
            else:
                branches = [self._original_cost(branch.chain.parts, size) for branch in part.branches]
                cost = _add(cost, *branches, _launches(1 if part.concatenates else len(branches) - 1))
                size = self._geometry([part], part.branches[0].chain.source).output_size(size)
        return cost

    def _explain(self, first: _Block, second: _Block) -> None:
        """Notes why two neighbours stayed apart."""
        if not any(op.convolves for op in operations_of((*first.parts, *second.parts))):
            return
        where = f"{label(first.parts[-1].node)} → {label(second.parts[-1].node)}"
        if first.geometry is None or second.geometry is None:
            self.refusals.append(Refusal(where, first.why_not or second.why_not))
            return
        try:
            merged = first.geometry.then(second.geometry)
        except NotAffineError as error:
            self.refusals.append(Refusal(where, str(error)))
            return
        self.refusals.append(
            Refusal(where, f"merging costs more: {first.geometry} and {second.geometry} give {merged}")
        )


def _relax(best: list[_Span | None], end: int, span: _Span) -> None:
    known = best[end]
    if known is None or span.cost < known.cost:
        best[end] = span


def _join_blocks(blocks: list[_Block], span: _Span) -> _Block:
    if span.geometry is None:
        return blocks[0]
    parts = tuple(part for block in blocks for part in block.parts)
    kinds = frozenset[object]().union(*(block.kinds for block in blocks))
    return _Block(parts, span.geometry, span.own_cost, kinds, merged=True)


def operation_cost(operation: Operation, size: Ints) -> Cost:
    """What an operation costs as it is, for one sample of spatial size `size`."""
    geometry = operation.geometry
    if not operation.convolves:
        return (0, 0, 1)
    return geometry.flops(size), geometry.weights, 1 + (geometry.padding_mode != "zeros")


def merged_cost(geometry: Geometry, size: Ints) -> Cost:
    """What the convolution of a geometry costs, with the padding or the channel of ones that must go before it."""
    explicit = needs_explicit_padding(geometry) or geometry.padding_mode != "zeros"
    if geometry.ones:  # all outputs read that channel, so there is but one group
        geometry = replace(geometry, groups=1)
    return geometry.flops(size), geometry.weights, 1 + explicit + geometry.ones


def needs_explicit_padding(geometry: Geometry) -> bool:
    """Whether torch's convolutions cannot pad so themselves: a crop, or sides that differ otherwise than in 'same'."""
    if geometry.transposed:
        return False
    symmetric = all(low == high >= 0 for low, high in geometry.padding)
    return not symmetric and not is_same_padding(geometry)


def is_same_padding(geometry: Geometry) -> bool:
    """Whether the padding is what torch's convolutions do for padding='same'."""
    same = tuple(((e - 1) // 2, (e - 1) - (e - 1) // 2) for e in geometry.extent)
    return geometry.padding == same and all(s == 1 for s in geometry.stride)


Groups: TypeAlias = list[tuple[list[Branch], Merge | None]]


def _add(*costs: Cost) -> Cost:
    return sum(c[0] for c in costs), sum(c[1] for c in costs), sum(c[2] for c in costs)


def _launches(count: int) -> Cost:
    return 0, 0, count


def _best_subsets(
    branches: list[Branch], alone: list[Cost], merged: Callable[[Sequence[int]], Merge | None]
) -> tuple[Cost, Groups]:
    """All partitions of up to MOST_BRANCHES branches, by dynamic programming over subsets; a join is one launch."""
    count = len(branches)
    options: dict[int, tuple[Cost, Merge | None]] = {1 << i: (alone[i], None) for i in range(count)}
    for subset in range(1, 1 << count):
        indices = [i for i in range(count) if subset >> i & 1]
        if len(indices) > 1 and (merge := merged(indices)) is not None:
            options[subset] = (merge.after, merge)
    best: dict[int, tuple[Cost, list[int]]] = {0: (_launches(-1), [])}  # the first block needs no addition
    for subset in range(1, 1 << count):
        lowest, candidates = subset & -subset, []
        block = subset
        while block:
            if block & lowest and block in options:
                cost, blocks = best[subset ^ block]
                candidates.append((_add(cost, options[block][0], _launches(1)), [*blocks, block]))
            block = (block - 1) & subset
        best[subset] = min(candidates)
    cost, blocks = best[(1 << count) - 1]
    groups = [([branches[i] for i in range(count) if b >> i & 1], options[b][1]) for b in sorted(blocks)]
    return _add(cost, _launches(1 - len(blocks))), groups


def _best_intervals(
    branches: list[Branch], alone: list[Cost], merged: Callable[[Sequence[int]], Merge | None]
) -> tuple[Cost, Groups]:
    """The cheapest partition of neighbours: a shortest path, as for chains."""
    best: list[tuple[Cost, Groups]] = [(NOTHING, [])]
    for end in range(1, len(branches) + 1):
        cost, groups = best[end - 1]
        choice = (_add(cost, alone[end - 1]), [*groups, ([branches[end - 1]], None)])
        for start in range(max(end - LONGEST_SPAN, 0), end - 1):
            merge = merged(range(start, end))
            if merge is not None and _add(best[start][0], merge.after) < choice[0]:
                choice = (_add(best[start][0], merge.after), [*best[start][1], (branches[start:end], merge)])
        best.append(choice)
    return best[-1]


def _greedy_groups(
    branches: list[Branch], alone: list[Cost], merged: Callable[[Sequence[int]], Merge | None]
) -> tuple[Cost, Groups]:
    """Very many branches: each joins the group that grows least by it."""
    groups: list[tuple[list[int], Cost, Merge | None]] = []
    for index in range(len(branches)):
        options: list[tuple[Cost, int, Merge | None]] = [(_add(alone[index], _launches(1)), -1, None)]
        for at, (members, cost, _) in enumerate(groups):
            if (merge := merged([*members, index])) is not None:
                growth = tuple(after - before for after, before in zip(merge.after, cost, strict=True))
                options.append((growth, at, merge))  # type: ignore[arg-type]
        _, at, merge = min(options, key=lambda option: option[0])
        if at < 0:
            groups.append(([index], alone[index], None))
        else:
            assert merge is not None
            groups[at] = ([*groups[at][0], index], merge.after, merge)
    return _add(*(cost for _, cost, _ in groups)), [
        ([branches[i] for i in members], merge) for members, _, merge in groups
    ]
