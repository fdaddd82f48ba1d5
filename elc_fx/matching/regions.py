"""Regions: the parts of a captured graph that are affine maps.

Affine operations form chains; branches of one value that end in a sum or a concatenation form joins, which are parts
of chains again. Parts that become one convolution are a `Merge`. `chains.py` finds them, `partition.py` chooses what
merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, fx

from elc_fx.affine import AffineMap, Geometry
from elc_fx.capturing.graph import label
from elc_fx.errors import NotAffineError
from elc_fx.matching.interpret import Operation

Cost: TypeAlias = tuple[int, int, int]  # FLOPs, weights, launches: compared in this order


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
        return next(iter(ranks), None if self.exact_size else self.counted_axes)

    @property
    def counted_axes(self) -> int | None:
        """How many axes its values have, if it counts the axis of the channels from the front."""
        joins = (part for part in walk(self.parts) if isinstance(part, Join))
        axis = next((join.axis for join in joins if join.concatenates and join.axis > 0), None)
        return axis if axis is None else self.geometry.dims + 2 if self.geometry.dims else axis + 1

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


def walk(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts, and those inside of joins: what is in a join comes before it."""
    for part in parts:
        if isinstance(part, Join):
            for branch in part.branches:
                yield from walk(branch.chain.parts)
        yield part


def operations_of(parts: Sequence[Part]) -> Iterator[Operation]:
    return (part for part in walk(parts) if isinstance(part, Operation))


def nodes_of(parts: Sequence[Part]) -> Iterator[fx.Node]:
    for part in walk(parts):
        yield from part.inner
        if isinstance(part, Operation) or not part.partial:
            yield part.node


def kinds_of(parts: Sequence[Part]) -> frozenset[object]:
    return frozenset(k for op in operations_of(parts) for k in (op.dtype, op.device) if k is not None)


def fit_one_layer(kinds: frozenset[object]) -> bool:
    """Whether weights have one data type and one device."""
    return sum(isinstance(k, torch.dtype) for k in kinds) <= 1 and sum(isinstance(k, torch.device) for k in kinds) <= 1


class _Map(Protocol):
    @property
    def out_channels(self) -> int: ...
    def then(self, second: Any) -> Any: ...
    def __add__(self, other: Any) -> Any: ...
    def beside(self, other: Any) -> Any: ...


M = TypeVar("M", bound=_Map)


def interpret(
    parts: Sequence[Part],
    read: Callable[[Operation], M],
    identity: Callable[[int], M],
    channels: int | None,
    then: Callable[[M, M], M] | None = None,
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
            branches = [interpret(branch.parts, read, identity, width, then) for branch in part.branches]
            step = branches[0]
            for other in branches[1:]:
                step = step.beside(other) if part.concatenates else step + other
        result = step if result is None else then(result, step) if then else result.then(step)
    if result is not None:
        return result
    if channels is None:
        raise NotAffineError("the number of channels is not known")
    return identity(channels)
