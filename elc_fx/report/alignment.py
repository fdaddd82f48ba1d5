"""The alignment of two networks: which layers of one are which of the other.

Layers with numbers of their own come first: those that stand for the same places of the original belong together,
whatever passes went over them; failing that, those with equal numbers. The layers between them, such as activations
and sums, follow from what surrounds them. What is left over then belongs to the group with which it fills the same gap
as the group's layers on the other side, as the inner activations of a merged block do; else it has no counterpart.
Every step looks at each layer and edge a bounded number of times.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import networkx as nx

from elc_fx.report.network import Layer, Network

Group = tuple[tuple[int, ...], tuple[int, ...]]  # positions of layers in the two networks
CONTEXT = 3  # steps away from a layer that have to look alike, where nothing else tells which it is
LONGEST_GAP = 100  # layers that are compared each with each
MOST_READERS = 64  # of a value through which an alignment is followed


def aligned(before: Network, after: Network) -> list[Group]:
    """Groups of layers that belong together; every layer of both networks is in exactly one of them."""
    return _Alignment(_Side(before), _Side(after)).groups()


class _Side:
    """One of the networks: its edges, and the groups of its layers so far."""

    def __init__(self, network: Network) -> None:
        self.layers = network.layers
        position = {layer.name: i for i, layer in enumerate(self.layers)}
        self.sources = [[position[s] for s in layer.sources] for layer in self.layers]
        self.readers: list[list[int]] = [[] for _ in self.layers]
        for i, sources in enumerate(self.sources):
            for source in sources:
                self.readers[source].append(i)
        self.group: dict[int, int] = {}
        self.members: dict[int, list[int]] = defaultdict(list)

    def put(self, i: int, group: int) -> None:
        self.group[i] = group
        self.members[group].append(i)

    def left(self) -> list[int]:
        return [i for i in range(len(self.layers)) if i not in self.group]

    def around(self, members: Iterable[int]) -> tuple[frozenset[int], frozenset[int]]:
        """The groups that layers read, and that read them; −1 for a layer that is in none."""
        inside = set(members)
        return (
            frozenset(self.group.get(s, -1) for i in inside for s in self.sources[i] if s not in inside),
            frozenset(self.group.get(r, -1) for i in inside for r in self.readers[i] if r not in inside),
        )

    def components(self) -> list[list[int]]:
        """The connected parts of what is in no group, in order."""
        left = set(self.left())
        graph = nx.Graph()
        graph.add_nodes_from(left)
        graph.add_edges_from((s, i) for i in left for s in self.sources[i] if s in left)
        return sorted(sorted(part) for part in nx.connected_components(graph))

    def contexts(self) -> list[list[str]]:
        """For each layer, what tells it by the operations up to 0, 1, 2, … steps away."""
        graph = nx.Graph()
        graph.add_nodes_from((i, {"operation": ascii(_sort(layer))}) for i, layer in enumerate(self.layers))
        graph.add_edges_from((s, i) for i, sources in enumerate(self.sources) for s in sources)
        found = nx.weisfeiler_lehman_subgraph_hashes(
            graph, node_attr="operation", iterations=CONTEXT, include_initial_labels=True
        )
        return [found[i] for i in range(len(self.layers))]


def _sort(layer: Layer) -> str:
    return f"{layer.kind} {layer.operation}"


class _Alignment:
    def __init__(self, before: _Side, after: _Side) -> None:
        self.sides = before, after
        self.count = 0

    def groups(self) -> list[Group]:
        self._by_place()
        self._by_unique(lambda layer: (layer.state, _sort(layer)) if layer.state else None)
        self._ends()
        self._behind_what_was_taken_in()
        self._take_in_enclosed()
        self._follow()
        self._by_context()
        self._follow()
        self._follow(ties=True)
        self._pair_gaps()
        self._take_in_enclosed()
        self._fill_gaps()
        self._in_order()
        return list(self._collected())

    def _new(self, before: Iterable[int], after: Iterable[int]) -> None:
        for side, members in zip(self.sides, (before, after), strict=True):
            for i in members:
                side.put(i, self.count)
        self.count += 1

    # What layers with numbers say.

    def _by_place(self) -> None:
        """Layers belong together where their origins overlap; those without numbers where others stand for them."""
        graph = nx.Graph()
        named = [{place for layer in side.layers for place in layer.origin} for side in self.sides]
        calls = [Counter(layer.place for layer in side.layers) for side in self.sides]
        for which, side in enumerate(self.sides):
            for i, layer in enumerate(side.layers):
                stands_for = layer.place in named[1 - which] and calls[which][layer.place] == 1
                if layer.state is not None or stands_for:
                    graph.add_edges_from(((which, i), place) for place in layer.origin or (layer.place,))
        for part in nx.connected_components(graph):
            members = [sorted(n[1] for n in part if isinstance(n, tuple) and n[0] == which) for which in (0, 1)]
            if not all(members):
                continue
            for group in self._one_by_one(*members) or [(members[0], members[1])]:
                self._new(*group)

    def _one_by_one(self, before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]] | None:
        """The calls of one module, which has one place, in their order."""
        places = {(layer.origin, layer.place) for layer in self._layers(before, after)}
        if len(before) != len(after) or len(places) > 1:
            return None
        return [([i], [j]) for i, j in zip(before, after, strict=True)]

    def _layers(self, before: Iterable[int], after: Iterable[int]) -> Iterator[Layer]:
        yield from (self.sides[0].layers[i] for i in before)
        yield from (self.sides[1].layers[j] for j in after)

    def _by_unique(self, key: Callable[[Layer], Hashable | None]) -> None:
        """Layers without a group that have a key which no other of their side has."""
        found = [_unique((key(side.layers[i]), i) for i in side.left()) for side in self.sides]
        for k in found[0].keys() & found[1].keys():
            self._new([found[0][k]], [found[1][k]])

    # What their neighbours say.

    def _ends(self) -> None:
        """Inputs and outputs, in their order."""
        for kind in ("input", "output"):
            ends = [[i for i in side.left() if side.layers[i].kind == kind] for side in self.sides]
            for i, j in zip(*ends, strict=False):
                self._new([i], [j])

    def _behind_what_was_taken_in(self) -> None:
        """What stands between layers of one group, and behind that group in the other network under the same name.

        As an activation does that stood between a convolution and its pooling, which are one now.
        """
        before, after = self.sides
        names = [_unique(((s.layers[i].place, _sort(s.layers[i])), i) for i in s.left()) for s in self.sides]
        for name, i in names[0].items():
            sources, readers = before.around([i])
            j = names[1].get(name)
            if j is not None and len(sources) == 1 and sources == readers == after.around([j])[0] != {-1}:
                self._new([i], [j])

    def _follow(self, *, ties: bool = False) -> None:
        """From layers that are aligned to those that alone stand so beside them, step by step.

        ties: also to several that stand alike, if they are as many in both networks, in their order.
        """
        dirty: tuple[set[int], set[int]] = tuple(set(side.left()) for side in self.sides)  # type: ignore[assignment]
        while all(dirty):
            fresh: tuple[set[int], set[int]] = (set(), set())
            for view in (self._both, self._readers, self._sources):
                keyed = [
                    _by_key((view(side, i), i) for i in sorted(todo) if i not in side.group)
                    for side, todo in zip(self.sides, dirty, strict=True)
                ]
                alike = [(here, keyed[1].get(key, [])) for key, here in keyed[0].items()]
                alike = [both for both in alike if len(both[0]) == len(both[1]) and (ties or len(both[0]) == 1)]
                for i, j in itertools.chain(*(zip(*both, strict=True) for both in alike)):
                    self._new([i], [j])
                    for side, at, found in zip(self.sides, (i, j), fresh, strict=True):
                        near = (*side.sources[at][:MOST_READERS], *side.readers[at][:MOST_READERS])
                        found.update(n for n in near if n not in side.group)
                if any(fresh):
                    break
            dirty = fresh

    @staticmethod
    def _both(side: _Side, i: int) -> Hashable | None:
        around = side.around([i])
        return (_sort(side.layers[i]), *around) if all(around) and not any(-1 in part for part in around) else None

    @staticmethod
    def _readers(side: _Side, i: int) -> Hashable | None:
        known = side.around([i])[1] - {-1}
        return (_sort(side.layers[i]), "read by", known) if known else None

    @staticmethod
    def _sources(side: _Side, i: int) -> Hashable | None:
        known = side.around([i])[0] - {-1}
        return (_sort(side.layers[i]), "reads", known) if known else None

    def _by_context(self) -> None:
        """Layers whose surroundings occur once in each network, the widest surroundings first, without crossings."""
        contexts = [side.contexts() for side in self.sides]
        for steps in range(CONTEXT, 0, -1):
            found = [
                _unique((hashes[i][steps], i) for i in side.left())
                for side, hashes in zip(self.sides, contexts, strict=True)
            ]
            pairs = sorted((found[0][key], found[1][key]) for key in found[0].keys() & found[1].keys())
            for i, j in self._without_crossings(pairs):
                self._new([i], [j])

    def _without_crossings(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The most of the pairs that keep the order, among themselves and with what is aligned already."""
        fixed = self._in_both_orders()
        here, there = [i for i, _ in fixed], [j for _, j in fixed]
        return _increasing([p for p in pairs if bisect.bisect(here, p[0]) == bisect.bisect(there, p[1])])

    # What is left over.

    def _take_in_enclosed(self) -> None:
        """What stands between layers of one group alone belongs to it."""
        for side in self.sides:
            for part in side.components():
                sources, readers = side.around(part)
                if len(sources | readers) == 1 and sources == readers:
                    for i in part:
                        side.put(i, next(iter(sources)))

    def _pair_gaps(self) -> None:
        """Left-over parts with the same neighbours on both sides: many layers for one, or one for others."""
        found = [_unique((side.around(part), tuple(part)) for part in side.components()) for side in self.sides]
        for around in sorted(found[0].keys() & found[1].keys(), key=found[0].__getitem__):
            parts = found[0][around], found[1][around]
            old, new = ([side.layers[i] for i in part] for side, part in zip(self.sides, parts, strict=True))
            several_in_one = sum(layer.is_heavy for layer in new) == 1 and len(old) > len(new)
            one_for_others = min(len(old), len(new)) == 1 and not {*map(_sort, old)} & {*map(_sort, new)}
            if several_in_one or one_for_others:
                self._new(*parts)

    def _fill_gaps(self) -> None:
        """Left-over parts with which a group has the same neighbours on both sides belong to that group.

        That is so for groups whose convolution or linear layer took others in: several became one, or it got a bias or
        another shape; and for batch norms beside one with other numbers.
        """
        parts = [{i: part for part in side.components() for i in part} for side in self.sides]
        for group in sorted(self.sides[0].members, key=lambda g: self.sides[0].members[g][0]):
            took_in, changed = self._changes(group)
            if not took_in and not changed:
                continue
            beside = [self._beside(side, own, group) for side, own in zip(self.sides, parts, strict=True)]
            if not any(beside):
                continue
            if not took_in and any(layer.kind != "normalisation" for layer in self._layers(*beside)):
                continue
            filled = [[*side.members[group], *more] for side, more in zip(self.sides, beside, strict=True)]
            if self.sides[0].around(filled[0]) == self.sides[1].around(filled[1]):
                for side, more in zip(self.sides, beside, strict=True):
                    for i in more:
                        side.put(i, group)

    def _changes(self, group: int) -> tuple[bool, bool]:
        """Whether its convolution or linear layer became another, and whether its numbers are others."""
        old, new = ([side.layers[i] for i in side.members[group]] for side in self.sides)
        if not any(layer.is_heavy for layer in old) or not any(layer.is_heavy for layer in new):
            return False, False
        if [(a.operation, a.bias) for a in old] != [(b.operation, b.bias) for b in new]:
            return True, False
        return False, [a.state for a in old] != [b.state for b in new]

    def _in_order(self) -> None:
        """What is left over between two aligned layers: the same operations in order, as a diff of texts finds them."""
        fixed = list(zip(*self._in_both_orders(), strict=True)) or [(), ()]
        gaps: tuple[dict[int, list[int]], ...] = (defaultdict(list), defaultdict(list))
        for side, gap, ends in zip(self.sides, gaps, fixed, strict=True):
            for i in side.left():
                gap[bisect.bisect(ends, i)].append(i)
        for at, before in gaps[0].items():
            after = gaps[1].get(at, [])
            if max(len(before), len(after)) <= LONGEST_GAP:
                old, new = (
                    [_sort(s.layers[i]) for i in gap] for s, gap in zip(self.sides, (before, after), strict=True)
                )
                for block in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
                    for n in range(block.size):
                        self._new([before[block.a + n]], [after[block.b + n]])

    def _in_both_orders(self) -> list[tuple[int, int]]:
        """The most of the layers that are aligned which stand in the same order in both networks."""
        before, after = self.sides
        return _increasing(
            sorted((before.members[g][0], after.members[g][0]) for g in before.members if g in after.members)
        )

    @staticmethod
    def _beside(side: _Side, parts: dict[int, list[int]], group: int) -> list[int]:
        """The left-over parts that touch a group."""
        near = (n for i in side.members[group] for n in (*side.sources[i], *side.readers[i]))
        touched = {id(parts[n]): parts[n] for n in near if n in parts and n not in side.group}
        return sorted(i for part in touched.values() for i in part)

    def _collected(self) -> Iterator[Group]:
        before, after = self.sides
        for group in range(self.count):
            yield tuple(sorted(before.members[group])), tuple(sorted(after.members[group]))
        yield from (((i,), ()) for i in before.left())
        yield from (((), (j,)) for j in after.left())


def _unique(keyed: Iterable[tuple[Hashable | None, int | tuple[int, ...]]]) -> dict[Hashable, Any]:
    """The value of each key that occurs once."""
    return {key: values[0] for key, values in _by_key(keyed).items() if len(values) == 1}


def _by_key(keyed: Iterable[tuple[Hashable | None, Any]]) -> dict[Hashable, list[Any]]:
    found: dict[Hashable, list[Any]] = defaultdict(list)
    for key, value in keyed:
        if key is not None:
            found[key].append(value)
    return found


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A longest run of pairs, in their order, whose second numbers increase."""
    tails: list[int] = []  # the smallest second number that ends a run of each length
    ends: list[int] = []  # and where it is
    previous: list[int] = []
    for at, (_, second) in enumerate(pairs):
        length = bisect.bisect_left(tails, second)
        previous.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [second]
        ends[length : length + 1] = [at]
    chosen, at = [], ends[-1] if ends else -1
    while at >= 0:
        chosen.append(pairs[at])
        at = previous[at]
    return chosen[::-1]
