"""Where a drawn diff has its layers: rows that both networks share, and lanes for the values on their way.

One layer a row, as in a diff of texts: what belongs together stands side by side, whatever else changed. (A layout of
each graph for itself, as dot makes it, could not do that.) Beside the names, every value that is still needed has a
lane from the layer that gives it to the last that reads it, as branches have in the history of a repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from elc_fx.report.diff import Change, Diff
from elc_fx.report.network import Layer, Network

MOST_LANES = 16  # that are drawn; values on more lanes are drawn on the last


@dataclass(frozen=True)
class Cell:
    """One side of a row. lane: of the layer, None where there is none. passing: lanes that go through.

    arriving: lanes of the values that the layer reads. leaves: whether its own value is read later.
    """

    layer: Layer | None
    passing: tuple[int, ...]
    arriving: tuple[int, ...] = ()
    lane: int | None = None
    leaves: bool = False


@dataclass(frozen=True)
class Block:
    """The rows of a change: pairs of cells, before and after."""

    change: Change
    rows: tuple[tuple[Cell, Cell], ...]


@dataclass(frozen=True)
class Layout:
    """The blocks from top to bottom, and how many lanes each side needs."""

    blocks: tuple[Block, ...]
    lanes: tuple[int, int]


def layout(diff: Diff) -> Layout:
    """The rows of a diff."""
    rows = [list(zip_longest(change.before, change.after)) for change in diff.changes]
    sides = [_Lanes(network) for network in (diff.before, diff.after)]
    ends = [side.last_reads([pair[i] for block in rows for pair in block]) for i, side in enumerate(sides)]
    blocks, at = [], 0
    for change, block in zip(diff.changes, rows, strict=True):
        cells = []
        for pair in block:
            cells.append(tuple(side.cell(layer, at, end) for side, layer, end in zip(sides, pair, ends, strict=True)))
            at += 1
        blocks.append(Block(change, tuple(cells)))  # type: ignore[arg-type]
    return Layout(tuple(blocks), (sides[0].most, sides[1].most))


@dataclass
class _Lanes:
    """The lanes of one network, row by row."""

    network: Network
    taken: dict[str, int] = field(default_factory=dict)  # the lane of each value that will be read
    most: int = 1

    def last_reads(self, layers: Sequence[Layer | None]) -> dict[str, int]:
        """The row of the last layer that reads each layer's value."""
        return {source: row for row, layer in enumerate(layers) if layer for source in layer.sources}

    def cell(self, layer: Layer | None, row: int, ends: dict[str, int]) -> Cell:
        if layer is None:
            return Cell(None, self._drawn(self.taken.values()))
        arriving = [self.taken[source] for source in layer.sources if source in self.taken]
        for source in layer.sources:
            if ends[source] <= row:
                self.taken.pop(source, None)
        passing = self._drawn(self.taken.values())
        free = sorted(set(arriving) - set(self.taken.values()))
        lane = free[0] if free else next(self._free())
        leaves = ends.get(layer.name, -1) > row
        if leaves:
            self.taken[layer.name] = lane
        self.most = min(max(self.most, lane + 1), MOST_LANES)
        return Cell(layer, passing, self._drawn(arriving), self._drawn([lane])[0], leaves)

    def _free(self) -> Iterator[int]:
        used = set(self.taken.values())
        return (lane for lane in range(len(used) + 1) if lane not in used)

    @staticmethod
    def _drawn(lanes: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({min(lane, MOST_LANES - 1) for lane in lanes}))
