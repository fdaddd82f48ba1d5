"""Costs of the network that a choice of candidates leaves behind: exactly those of the merged network."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import fx, nn

from elc_fx.affine import Geometry
from elc_fx.capturing.graph import label
from elc_fx.capturing.inputs import fresh
from elc_fx.capturing.randomness import reproducibly
from elc_fx.capturing.shapes import PlainInterpreter
from elc_fx.comparison import layers_between, measure
from elc_fx.matching.serial import Region, SerialGraph
from elc_fx.planning.budget import Costs
from elc_fx.planning.candidates import Candidate, CandidateFinder, readers_of_parameters


@dataclass(frozen=True)
class Choice:
    """A candidate in the graph: the node whose value it reads, and the one whose value it gives."""

    candidate: Candidate
    region: Region

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Of the convolution that it becomes."""
        return self.region.geometry(self.candidate.windows(self.region))

    @functools.cached_property
    def key(self) -> str:
        """The candidate's name, and a hash of what it is: names depend on which other candidates there are."""
        identity = repr((self.candidate.nodes, self.candidate.kernels, self.candidate.result))
        return f"{self.candidate.full_name} {hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    @property
    def source(self) -> str:
        return self.region.source.name

    @property
    def output(self) -> str:
        return self.region.output.name


def choices_of(graph: SerialGraph, *, longest: int, largest_kernel: int) -> list[Choice]:
    """All candidates of a graph with shapes."""
    found = CandidateFinder(graph, longest).all(largest_kernel)
    return [Choice(candidate, region) for region, candidate in found]


@dataclass(frozen=True)
class LatencyModel:
    """How the latency follows from the choice, in seconds.

    whole: of the original. nodes: of each node of the graph; choices: of each merged convolution, by its key. What
    else a network takes remains, whatever is chosen. known: networks that were measured as a whole, by the keys of
    their choices, each as (what the layers add up to, what it takes); for one that lies between two of them, both tell
    by how much its sum is off.
    """

    whole: float
    nodes: Mapping[str, float]
    choices: Mapping[str, float]
    known: Mapping[frozenset[str], tuple[float, float]] = field(default_factory=dict)

    def saved(self, choice: Choice) -> float:
        """What a choice takes away, of the sum."""
        return sum(self.nodes[name] for name in choice.candidate.nodes) - self.choices[choice.key]

    def summed(self, chosen: Sequence[Choice]) -> float:
        """What the layers add up to when these candidates, which do not overlap, are merged."""
        return self.whole - sum(self.saved(choice) for choice in chosen)

    def after(self, chosen: Sequence[Choice]) -> float:
        """The latency when these candidates, which do not overlap, are merged."""
        if (keys := _keys(chosen)) in self.known:
            return self.known[keys][1]
        total = self.summed(chosen)
        sums, taken = self._curve()
        return total + float(np.interp(total, sums, taken - sums))

    def allowed(self, latency: float) -> float:
        """What the layers may add up to for this latency: the inverse of how `after` follows from the sum."""
        sums, taken = self._curve()
        return latency + float(np.interp(latency, taken, sums - taken))

    def _curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums, rising, and what they take, which does not fall where sums rise: times are measured with errors."""
        saving = [pair for pair in self.known.values() if pair[0] < self.whole]
        least = dict(sorted([*saving, (self.whole, self.whole)], reverse=True))  # of networks with the same sum
        sums, taken = np.array(sorted(least.items())).T
        return sums, np.minimum.accumulate(taken[::-1])[::-1]

    def knowing(self, chosen: Sequence[Choice], latency: float) -> LatencyModel:
        """The same, with what the network that these candidates leave behind takes as a whole; if there are any."""
        measured = (self.summed(chosen), latency)
        return replace(self, known={**self.known, _keys(chosen): measured}) if chosen else self

    def through(self, chosen: Sequence[Choice], before: float, after: float) -> LatencyModel:
        """Times of layers scaled, so that the sums are right for the original and what these candidates leave."""
        saved = self.whole - self.summed(chosen)
        factor = max(before - after, 0.0) / saved if saved > 0 else 1.0
        nodes, choices = ({key: factor * time for key, time in times.items()} for times in (self.nodes, self.choices))
        return LatencyModel(before, nodes, choices).knowing(chosen, min(before, after))


def _keys(chosen: Iterable[Choice]) -> frozenset[str]:
    return frozenset(choice.key for choice in chosen)


@dataclass(frozen=True)
class CostModel:
    """How the costs follow from the choice.

    The latency is None until somebody measures it (`latency.py`).

    original: of the network as it is. reads: for every node of the graph, in order, what it reads that derives from
    the inputs, and how many layers it puts behind each. groups: parameters that the same nodes read, as (count, those
    nodes). labels: what people call nodes, where that is not their name.
    """

    original: Costs
    reads: dict[str, dict[str, int]]
    groups: tuple[tuple[int, frozenset[str]], ...]
    labels: dict[str, str] = field(default_factory=dict)
    latency: LatencyModel | None = None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, graph: SerialGraph) -> CostModel:
        """Counts one run of the model on the examples."""
        counted = measure(model, example_inputs)
        reads = _LayerCounter(graph.graph_module).count(graph.captured.inputs or ())
        costs = Costs(counted.flops, counted.parameters, counted.depth)
        labels = {node.name: label(node) for node in graph.graph_module.graph.nodes}
        return cls(costs, reads, tuple(_parameter_groups(graph)), labels)

    def after(self, chosen: Sequence[Choice]) -> Costs:
        """The costs when these candidates, which do not overlap, are merged."""
        gone = {name for choice in chosen for name in choice.candidate.nodes}
        saved = sum(choice.candidate.flops[0] - choice.candidate.flops[1] for choice in chosen)
        kept = sum(count for count, readers in self.groups if not readers <= gone)
        added = sum(choice.candidate.parameters[1] for choice in chosen)
        latency = None if self.latency is None else self.latency.after(chosen)
        return Costs(self.original.flops - saved, kept + added, self._depth(chosen, gone), latency)

    def _depth(self, chosen: Sequence[Choice], gone: set[str]) -> int:
        """Layers on the longest way through the graph, where each choice is one layer from its source to its output."""
        merged = {choice.output: choice.source for choice in chosen}
        depth: dict[str, int] = {}
        for name, read in self.reads.items():
            ways = [depth[source] + (0 if name in gone else count) for source, count in read.items()]
            if name in merged:
                ways.append(depth[merged[name]] + 1)
            depth[name] = max(ways, default=0)
        return max(depth.values(), default=0)

    def with_latency(self, latency: LatencyModel | None) -> CostModel:
        """The same model, which knows latencies too, or none."""
        whole = None if latency is None else latency.whole
        return replace(self, original=replace(self.original, latency=whole), latency=latency)


class _LayerCounter(PlainInterpreter):
    """Runs a graph, and counts the layers between what each node reads and what it gives."""

    def count(self, inputs: Sequence[Any]) -> dict[str, dict[str, int]]:
        """As `CostModel.reads`."""
        self.reads: dict[str, dict[str, int]] = {}
        with reproducibly():
            self.run(*fresh(inputs))
        return self.reads

    def run_node(self, n: fx.Node) -> Any:
        derived = [source for source in n.all_input_nodes if self.reads[source.name] or source.op == "placeholder"]
        counts = {source.name: self._between(source, n, derived) for source in derived}
        self.reads[n.name] = {name: count for name, count in counts.items() if count is not None}
        return super().run_node(n)

    def _between(self, source: fx.Node, node: fx.Node, derived: Sequence[fx.Node]) -> int | None:
        values = {read: fresh(self.env[read]) for read in node.all_input_nodes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        others = [values[read] for read in derived if read is not source]
        return layers_between(values[source], others, lambda: getattr(self, node.op)(node.target, args, kwargs))


def _parameter_groups(graph: SerialGraph) -> Iterable[tuple[int, frozenset[str]]]:
    """Parameters with the nodes that read them; those of the same nodes together."""
    counts: dict[frozenset[str], int] = {}
    for parameter, nodes in readers_of_parameters(graph).items():
        names = frozenset(node.name for node in nodes)
        counts[names] = counts.get(names, 0) + parameter.numel()
    return [(count, names) for names, count in counts.items()]
