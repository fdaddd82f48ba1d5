"""Losses: how far the network's output moves when regions are collapsed, after the best cheap fit, on calibration data.

The graph is walked once, node by node, for all batches. Where a candidate's region ends, what it reads and gives is
known: a convolution is fitted to that, and only what comes after the region is run again with its output.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx, nn

from elc_fx.capturing.graph import overwritten_argument, runs_foreign_code
from elc_fx.capturing.identity import add_tensor, described, names_and_shapes
from elc_fx.capturing.inputs import NO_CALIBRATION, batch_values, batches_of, fresh, number_type, of_type, running
from elc_fx.capturing.randomness import generators, seed_all
from elc_fx.capturing.shapes import PlainInterpreter
from elc_fx.errors import InvalidInputError
from elc_fx.matching.activations import activation_of, flat_beyond
from elc_fx.matching.pooling import max_pooling_of
from elc_fx.matching.serial import SerialGraph
from elc_fx.planning.candidates import check_computes
from elc_fx.planning.cost import Choice
from elc_fx.planning.fitting import Substitute, Windows
from elc_fx.planning.stored import StoredTable
from elc_fx.planning.substitution import substituted
from elc_fx.training.losses import distance, of_classes

T = TypeVar("T")
Loss = Callable[[Any, Any], Any]  # (output, output of the original) → a number, or a tensor with one
SAMPLES, NUMBERS = 1024, 2**26  # to measure losses on, and what they hold at most, if nobody says how many
FITTED_MORE = 4  # times as many samples, at most, are fitted to once the choice is made,
LARGEST = 2**28  # of which the largest value inside of the network has so many numbers at most
KEPT = 2**28  # numbers of the original's values that are kept between sets of choices, and of windows between fits
JUDGED = 4  # one of so many batches is not fitted to, but judged on: fits to few windows look better than they are


class Calibration:
    """Batches of a model's inputs.

    batches: for each, the values of the graph's placeholders, in order. sizes: how many samples each has. fitted_on,
    judged: which of them convolutions are fitted to, and on which the network is judged.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[list[Any]], sizes: Sequence[int]) -> None:
        self.graph_module = graph_module
        self.batches, self.sizes = batches, sizes
        self.fitted_on, self.judged = _split(sizes)

    @classmethod
    def read(cls, graph: SerialGraph, batches: Iterable[Any], samples: int | None) -> tuple[Calibration, Calibration]:
        """What losses are measured on, and what is fitted to once the choice is made: the same and what follows.

        samples: how many to measure on, at most. Raises InvalidInputError where there are none.
        """
        check_computes(graph.graph_module)
        parts: list[list[Any]] = []
        sizes: list[int] = []
        measured, held, bearable = samples or 0, 0, min(NUMBERS, LARGEST / _growth(graph))
        dtype = number_type(graph.graph_module)
        for batch in batches_of(batches):
            values = batch_values(graph.graph_module, batch)
            size, count = samples_of(values), sum(sizes)
            if not size:
                continue
            numbers = _numbers_of_one(values)
            measured = measured or min(SAMPLES, max(1, NUMBERS // numbers))
            piece = math.ceil(measured / JUDGED)  # at most, so that some are left to judge on
            due = min(max(0, measured - count), size)  # of this batch, to measure on
            end = max(due, min(size, FITTED_MORE * measured - count, int((bearable - held) / numbers)))
            if not due and end < size:  # beyond what is measured whole batches are enough
                break
            if due and end - due < piece:  # what is left of one may be very little
                end = due
            for first, last in itertools.pairwise(sorted({0, due, end})):
                pieces = math.ceil((last - first) / piece)
                bounds = [first + (last - first) * i // pieces for i in range(pieces + 1)]
                parts.extend(part_of(values, start, stop, dtype) for start, stop in itertools.pairwise(bounds))
                sizes.extend(stop - start for start, stop in itertools.pairwise(bounds))
            held += end * numbers
            if sum(sizes) >= FITTED_MORE * measured:
                break
        if not parts:
            raise InvalidInputError("calibration has no batches, or empty ones only")
        few = sum(so_far <= measured for so_far in itertools.accumulate(sizes))
        return cls(graph.graph_module, parts[:few], sizes[:few]), cls(graph.graph_module, parts, sizes)

    def named(self) -> list[dict[str, Any]]:
        """The batches as mappings from names of inputs."""
        names = [str(node.target) for node in self.graph_module.graph.find_nodes(op="placeholder")]
        return [dict(zip(names, values, strict=True)) for values in self.batches]

    def fingerprint(self) -> str:
        """Of the data and of everything that the graph computes with."""
        digest = hashlib.sha256(f"{self.graph_module.graph} {described(self.graph_module)}".encode())
        # Not the state_dict, which lacks buffers that are not persistent.
        state = dict([*self.graph_module.named_parameters(), *self.graph_module.named_buffers()])
        for name, value in [*state.items(), *enumerate(pytree.tree_leaves(self.batches))]:
            if isinstance(value, Tensor):
                add_tensor(digest, str(name), value)
            else:
                digest.update(f"{name} {value!r}".encode())
        return digest.hexdigest()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor) and value.dim()]


def samples_of(values: Sequence[Any]) -> int:
    """How many samples a batch has: as many as its first tensor is long; one without a tensor is a sample.

    A tensor inside of an input only counts where no input is one.
    """
    own = [value for value in values if isinstance(value, Tensor) and value.dim()]
    return next((len(value) for value in own or _tensors(values)), 1)


def _numbers_of_one(values: Sequence[Any]) -> int:
    """What a sample of a batch holds, at least 1."""
    size = samples_of(values)
    return max(1, sum(value[0].numel() for value in _tensors(values) if len(value) == size))


def _growth(graph: SerialGraph) -> float:
    """How many times as many numbers as the inputs the largest value inside of the network has, at least 1."""
    largest = max((math.prod(shape) for node, shape in graph.shapes.items() if node.op != "get_attr"), default=0)
    given = [shape for node, shape in graph.shapes.items() if node.op == "placeholder" and shape]
    inputs = sum(math.prod(shape) for shape in given if shape[0] == given[0][0])  # what has samples
    return max(1.0, largest / max(1, inputs))


def part_of(values: Sequence[Any], start: int, stop: int, dtype: torch.dtype | None = None) -> list[Any]:
    """Samples of a batch, also as another type of numbers. What is not as long as the first tensor stays whole."""
    size = samples_of(values)

    def cut(value: Tensor) -> Tensor:
        return value[start:stop] if value.dim() and len(value) == size else value

    return [of_type(pytree.tree_map_only(Tensor, cut, value), dtype) for value in values]


class Walk(PlainInterpreter):
    """One batch on its way through the graph.

    env: the values that are still needed. seeds: for every node that may draw random numbers; walks share them, so that
    a node draws the same in every walk.
    """

    def __init__(self, graph_module: fx.GraphModule, values: Sequence[Any], seeds: dict[fx.Node, int]) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.captured = graph_module
        self.args_iter: Iterator[Any] = iter(values)
        self.seeds = seeds

    def step(self, node: fx.Node) -> None:
        if node not in self.seeds:
            self._step(node)
            return
        seed_all(self.seeds[node])
        before = generators()
        self._step(node)
        if generators() == before:
            del self.seeds[node]

    def _step(self, node: fx.Node) -> None:
        if runs_foreign_code(self.captured, node):
            for source in node.all_input_nodes:
                self.env[source] = fresh(self.env[source])  # the batch is the caller's, and other walks read it too
        written = overwritten_argument(self.captured, node)
        before = None if written is None else self.env[written]
        if written is not None and isinstance(before, Tensor):  # others will still read it
            self.env[written] = before.clone()
        self.env[node] = self.run_node(node)
        if written is not None:
            self.env[written] = before

    def output_with(self, node: fx.Node, value: Any, rest: Sequence[fx.Node]) -> Any:
        """What the network gives if `node` had this value. rest: the nodes after it."""
        kept, self.env = self.env, {**self.env, node: value}
        try:
            for later in rest:
                self.step(later)
            return self.env[rest[-1]]
        finally:
            self.env = kept


def _checked(loss: Loss, output: Any, expected: Any) -> float:
    """What a function of the user's gives. Raises InvalidInputError where that is no loss."""
    given = loss(fresh(output), fresh(expected))  # it may write into them, and others are measured by them too
    try:
        value = float(given)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not value >= 0:
        shape = f" of shape {list(given.shape)}" if isinstance(given, Tensor) and given.dim() else f": {given!r:.80}"
        raise InvalidInputError(f"the loss function gives a {type(given).__name__}{shape}, expected a number from 0 on")
    return value


class Sensitivity:
    """Measures losses of choices on one graph and one set of batches.

    loss: of an output against the original's; "auto" is the Kullback–Leibler divergence of the classes' distributions
    for one output [N, classes], else the mean squared error over the mean square of the original's output.
    """

    def __init__(self, graph: SerialGraph, calibration: Calibration, loss: Loss | None, *, progress: bool) -> None:
        self.graph_module = graph.graph_module
        self.model = names_and_shapes(self.graph_module)
        self.nodes = list(graph.graph_module.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.calibration = calibration
        self.loss: Loss = divergence if loss is None else partial(_checked, loss)
        self.progress = progress and sys.stderr.isatty()
        self.seeds = dict(self.position)
        self.kept: dict[fx.Node, list[Any]] = {}  # what the original gives there for each batch; the latest used last
        self.keeps = False

    def each_alone(self, choices: Sequence[Choice], known: StoredTable) -> list[float]:
        """The loss of every choice when it alone is collapsed. known: what was measured before; gets the rest.

        Under torch.distributed, every process measures its share.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = choices[rank::world]
        if missing := [choice for choice in own if choice.key not in known]:
            self._measure(missing, known)
        if world > 1:
            gathered: list[Any] = [None] * world
            dist.all_gather_object(gathered, {choice.key: known[choice.key] for choice in own})
            for table in gathered:
                known.update(table)
        return [known[choice.key] for choice in choices]

    @torch.no_grad()
    def _measure(self, choices: Sequence[Choice], known: StoredTable) -> None:
        ending: dict[fx.Node, list[Choice]] = defaultdict(list)
        for choice in choices:
            ending[choice.region.output].append(choice)
        needed = self._needed_until(choices)
        walks = self._walks()
        fitted_on, judged = ([walks[i] for i in part] for part in (self.calibration.fitted_on, self.calibration.judged))
        expected = [self._output(self.calibration.batches[i], needed) for i in self.calibration.judged]
        bar = self.shown(self.nodes, f"candidates: {len(choices)}")
        windows: dict[Any, Windows] = {}  # of the sources that later candidates read too
        for position, node in enumerate(bar):
            _step(walks, node)
            rest = self.nodes[position + 1 :]
            for choice in ending.get(node, ()):
                given = [walk.env[choice.region.output] for walk in fitted_on]
                fitted = self._fitted(choice, fitted_on, given, windows)
                losses = []
                for walk, wanted in zip(judged, expected, strict=True):
                    value = fitted(walk.env[choice.region.source])
                    losses.append(float(self.loss(walk.output_with(node, value, rest), wanted)))
                known[choice.key] = self._mean(losses)
            windows = {key: value for key, value in windows.items() if needed[key[0]] > position}
            for walk in walks:
                self._forget(walk, node, needed)

    @property
    def draws(self) -> bool:
        """Whether the original draws random numbers."""
        if len(self.seeds) == len(self.nodes):  # nobody has been through it yet: all losses were known
            self._output(self.calibration.batches[0], self._needed_until([]))
        return bool(self.seeds)

    def shown(self, steps: Iterable[T], description: str, count: int | None = None) -> Iterable[T]:
        """With a bar. count: of the steps, by default one for each node."""
        console = Console(stderr=True)
        return track(steps, description, count or len(self.nodes), console=console, disable=not self.progress)

    def _output(self, values: Sequence[Any], needed: Mapping[fx.Node, int]) -> Any:
        """What the original gives for a batch."""
        walk = Walk(self.graph_module, values, self.seeds)
        for node in self.nodes:
            _step([walk], node)
            self._forget(walk, node, needed)
        return walk.env[self.nodes[-1]]

    def _mean(self, losses: Sequence[float]) -> float:
        """Over the samples that are judged on. losses: of their batches."""
        sizes = [self.calibration.sizes[i] for i in self.calibration.judged]
        mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
        return mean if mean == mean else math.inf  # what gives NaN is never chosen

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Meanwhile the model and the batches stay as they are: what the original gives is kept for the next set.

        Not where code that is not torch's runs, which may give something else each time, or write into it.
        """
        self.keeps = not any(runs_foreign_code(self.graph_module, node) for node in self.nodes)
        try:
            yield
        finally:
            self.keeps = False
            self.kept.clear()

    def together(self, choices: Sequence[Choice]) -> float:
        """The loss when all choices are collapsed."""
        outputs, expected, _ = self._walked(choices, self._originals(choices), self.calibration.fitted_on)
        return self._mean([float(self.loss(outputs[i], expected[i])) for i in self.calibration.judged])

    def collapsed(self, choices: Sequence[Choice]) -> fx.GraphModule:
        """A copy of the network in which the choices are convolutions, fitted one after the other on all batches."""
        steps = self.shown(self._originals(choices), f"fits: {len(choices)}")
        return self._substituted(choices, steps, range(len(self.calibration.batches)))

    def fitted(self, choices: Sequence[Choice]) -> fx.GraphModule:
        """The same, fitted on the batches that are not judged on."""
        return self._substituted(choices, self._originals(choices), self.calibration.fitted_on)

    def _substituted(
        self, choices: Sequence[Choice], originals: Iterable[tuple[fx.Node, list[Any]]], fitted_on: Sequence[int]
    ) -> fx.GraphModule:
        _, _, fitted = self._walked(choices, originals, fitted_on)
        if not all(value.isfinite().all() for fit in fitted.values() for value in fit.state_dict().values()):
            raise InvalidInputError("the calibration batches give activations that are not finite")
        network = substituted(self.graph_module, choices, fitted)
        network.eval()  # as the original
        return network

    @torch.no_grad()
    def loss_of(self, network: nn.Module) -> float:
        """Of another network that takes the same inputs."""
        losses = []
        for i in self.calibration.judged:
            given, wanted = (module(*fresh(self.calibration.batches[i])) for module in (network, self.graph_module))
            losses.append(float(self.loss(given, wanted)))
        return self._mean(losses)

    @torch.no_grad()
    def _walked(
        self, choices: Sequence[Choice], originals: Iterable[tuple[fx.Node, list[Any]]], fitted_on: Sequence[int]
    ) -> tuple[list[Any], list[Any], dict[str, Substitute]]:
        """The outputs of the collapsed network and of the original, and what stands for the choices, by their outputs.

        They are fitted in the order of the graph, each to what the network computes that is collapsed up to there.
        originals: from `_originals`. fitted_on: which of the batches.
        """
        ends = {choice.region.output: choice for choice in choices}
        inside = {node for choice in choices for node in choice.region.nodes()}
        fitted: dict[str, Substitute] = {}
        needed = self._needed_until(choices)
        collapsed = self._walks()
        expected: list[Any] = []
        for node, values in originals:
            if node in ends:
                read, given = [collapsed[i] for i in fitted_on], [values[i] for i in fitted_on]
                substitute = self._fitted(ends[node], read, given, {})
                fitted[node.name] = substitute
                for walk in collapsed:
                    walk.env[node] = substitute(walk.env[ends[node].region.source])
                substitute.normalise([walk.env[node] for walk in read])
            elif node not in inside:
                for walk in collapsed:
                    walk.step(node)
            for walk in collapsed:
                self._forget(walk, node, needed)
            expected = values
        return [walk.env[self.nodes[-1]] for walk in collapsed], expected, fitted

    def _originals(self, choices: Sequence[Choice]) -> Iterator[tuple[fx.Node, list[Any]]]:
        """Every node in order, with what the original gives there for each batch where a choice or the network ends."""
        wanted = {*(choice.region.output for choice in choices), self.nodes[-1]}
        pending = wanted & self.kept.keys()
        last = max((self.position[node] for node in wanted - pending), default=-1)
        walks, needed = self._walks(), self._needed_until([])
        for position, node in enumerate(self.nodes):
            if position <= last:
                _step(walks, node)
            values = []
            if node in wanted:
                values = self.kept.pop(node) if node in pending else [walk.env[node] for walk in walks]
            yield node, values
            pending.discard(node)
            if node in wanted and self.keeps:
                self.kept[node] = values
                while sum(map(numbers_of, self.kept.values())) > KEPT:
                    del self.kept[next(other for other in self.kept if other not in pending)]
            if position <= last:
                for walk in walks:
                    self._forget(walk, node, needed)

    def _walks(self) -> list[Walk]:
        return [Walk(self.graph_module, values, self.seeds) for values in self.calibration.batches]

    def _fitted(
        self, choice: Choice, read: Sequence[Walk], given: Sequence[Any], windows: dict[Any, Windows]
    ) -> Substitute:
        """The best convolution for a choice, from what walks read to what is given for each of them.

        windows: those that are there already, by source and geometry; gets these, and loses those that are too much.
        """
        region = choice.region
        sources = [walk.env[region.source] for walk in read]
        key = region.source, replace(choice.geometry, out_channels=0)
        found = windows.pop(key, None) or Windows.of(sources, choice.geometry)
        fitted = replace(found, geometry=choice.geometry).fit(given, self._flat(region.output))
        windows[key] = found  # the latest used last
        while sum(numbers_of(vars(each.equations)) for each in windows.values()) > KEPT and len(windows) > 1:
            del windows[next(iter(windows))]
        return Substitute(fitted, sources[0].dtype, region.output.name, self.model)

    def _flat(self, output: fx.Node) -> tuple[float, float]:
        """What the activation behind a value does not tell apart, if it is the value's only reader.

        Or the only one of its max pooling: what is in a flat part before that can be nothing else behind it.
        """
        readers = list(output.users)
        while len(readers) == 1 and max_pooling_of(self.graph_module, readers[0]) is not None:
            readers = list(readers[0].users)
        activation = activation_of(self.graph_module, readers[0]) if len(readers) == 1 else None
        return (-float("inf"), float("inf")) if activation is None else flat_beyond(activation)

    def _needed_until(self, choices: Sequence[Choice]) -> dict[fx.Node, int]:
        """The position of the last node for which each value is needed, where the choices are fitted on the way."""
        needed = {node: max((self.position[user] for user in node.users), default=-1) for node in self.nodes}
        for choice in choices:
            source = choice.region.source
            needed[source] = max(needed[source], self.position[choice.region.output])
        return needed

    def _forget(self, walk: Walk, node: fx.Node, needed: Mapping[fx.Node, int]) -> None:
        """Drops the values that nothing after `node` reads."""
        now = self.position[node]
        for value in (node, *node.all_input_nodes):
            if needed[value] <= now and value.op != "output":
                walk.env.pop(value, None)


def numbers_of(values: Any) -> int:
    """How many all tensors together hold."""
    return sum(value.numel() for value in pytree.tree_leaves(values) if isinstance(value, Tensor))


def divergence(output: Any, expected: Any) -> Tensor:
    """The loss "auto", see `Sensitivity`."""
    if not all(t.isfinite().all() for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)):
        raise InvalidInputError(
            "the model's output for a calibration batch is not finite: "
            "look for NaN and infinity in the batches, or pass a loss of your own"
        )
    found = distance(output, expected, 1.0 if of_classes(expected) else None, torch.float64)
    return found.clamp_min(0)  # but for rounding, it is


def _step(walks: Iterable[Walk], node: fx.Node) -> None:
    """Through the original. Raises InvalidInputError where a batch and the model do not go together."""
    with running(NO_CALIBRATION):
        for walk in walks:
            walk.step(node)


def _split(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which batches to fit to, and which to judge on: one of JUDGED. A single batch is both.

    Of the batches to begin with, those that leave the most samples to both parts: a last batch is often a small one.
    """
    everything = range(len(sizes))
    if len(sizes) == 1:
        return [0], [0]

    def worth(judged: range) -> int:
        count = sum(sizes[i] for i in judged)
        return count * (sum(sizes) - count) ** (JUDGED - 1)  # the largest where one of JUDGED samples is judged on

    judged = max((everything[start::JUDGED] for start in reversed(everything[:JUDGED])), key=worth)
    return [i for i in everything if i not in judged], list(judged)
