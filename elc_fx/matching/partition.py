"""Which merges of chains and joins cost least: FLOPs first, then weights, then the number of operations launched.

`MergePlanner` splits each chain, and the branches of each join, where that is cheapest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx

from elc_fx.affine import Geometry, Ints, same_padding
from elc_fx.capturing.graph import label
from elc_fx.errors import NotAffineError, Refusal
from elc_fx.matching.interpret import Interpreter, Operation
from elc_fx.matching.regions import (
    Branch,
    Chain,
    Cost,
    Join,
    Merge,
    Part,
    Regroup,
    Step,
    fit_one_layer,
    interpret,
    kinds_of,
    operations_of,
)

LONGEST_SPAN = 32  # parts that one step of planning merges at most; longer chains are merged step by step
MOST_BRANCHES = 8  # up to here all ways to group the branches of a sum are compared
NOMINAL_SIZE = 1 << 20  # positions per axis where no example says: large, so that borders do not count
NOTHING: Cost = (0, 0, 0)


Groups: TypeAlias = list[tuple[list[Branch], Merge | None]]


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
            raise NotAffineError("the number of channels is not known")
        if not fit_one_layer(kinds_of(parts)):
            raise NotAffineError("the layers differ in data type or device")
        feature = self.interpreter.features[source]
        dims = next((op.geometry.dims for op in operations_of(parts)), feature.dims)

        def identity(channels: int) -> Geometry:
            if dims is None:
                raise NotAffineError("the number of axes is not known")
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
            while (merged := self._partition(blocks, size)) != blocks:
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
                price = _add(before.cost, cost, _price_of_ones(geometry, cost))
                _relax(best, end, _Span(price, start, geometry, cost))
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
        first = blocks[start].parts[0]
        if geometry is not None and (isinstance(first, Join) or first.computes):
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
        blocks: Groups = []
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

    def _group(self, branches: list[Branch], size: Ints, axis: int, *, ordered: bool) -> tuple[Cost, Groups]:
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
    return geometry.flops(size), geometry.weights, 1 + (geometry.padding_mode != "zeros") + operation.computes


def merged_cost(geometry: Geometry, size: Ints) -> Cost:
    """What the convolution of a geometry costs, with the padding or the channel of ones that must go before it."""
    explicit = needs_explicit_padding(geometry) or geometry.padding_mode != "zeros"
    if geometry.ones:  # all outputs read that channel, so there is but one group
        geometry = replace(geometry, groups=1)
    return geometry.flops(size), geometry.weights, 1 + explicit + geometry.ones


def _price_of_ones(geometry: Geometry, cost: Cost) -> Cost:
    """What a channel of ones takes beyond its FLOPs, as FLOPs: it is worth it where it saves a quarter of them.

    The input is copied, and its channels are then an odd number, which runtimes are slow with.
    """
    return (cost[0] // 3, 0, 0) if geometry.ones else NOTHING


def needs_explicit_padding(geometry: Geometry) -> bool:
    """Whether torch's convolutions cannot pad so themselves: a crop, or sides that differ otherwise than in 'same'."""
    if geometry.transposed:
        return False
    symmetric = all(low == high >= 0 for low, high in geometry.padding)
    return not symmetric and not is_same_padding(geometry)


def is_same_padding(geometry: Geometry) -> bool:
    """Whether the padding is what torch's convolutions do for padding='same'."""
    return geometry.padding == same_padding(geometry.extent) and all(s == 1 for s in geometry.stride)


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
