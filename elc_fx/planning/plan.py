"""The plan: which candidates are carried out. A frozen value, printable as a table, saved as JSON."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from torch import Tensor, fx, nn

from elc_fx.affine import Ints
from elc_fx.capturing.graph import label
from elc_fx.capturing.inputs import ExampleInputs
from elc_fx.errors import InvalidInputError, PlanError, listed
from elc_fx.matching.regions import operations_of
from elc_fx.matching.serial import Region, SerialGraph, capacity, windows_keeping
from elc_fx.planning.budget import Costs, cost_text
from elc_fx.planning.candidates import (
    LARGEST_KERNEL,
    LONGEST,
    Candidate,
    CandidateFinder,
    candidate_table,
    kernel_text,
    operation_texts,
    serial_graph,
)

FORMAT = 3  # of the JSON


@dataclass(frozen=True)
class Prediction:
    """What a planner expects of a plan.

    before, after: the network's costs. losses: of each candidate alone. together: of all of them, as it was measured;
    None where it was not. gap: how far the solver may have been from its optimum, relative. latency: of the original
    and of the network that the plan leaves behind, measured as a whole, side by side, where the budget limits it.
    rehearsed: what is lost after a short training, where plans with more and fewer layers were compared by it.
    """

    before: Costs
    after: Costs
    losses: tuple[float, ...]
    together: float | None
    gap: float
    latency: tuple[float, float] | None = None
    rehearsed: float | None = None

    def __str__(self) -> str:
        pairs = {name: (before, getattr(self.after, name)) for name, before in vars(self.before).items()}
        changes = [_change(name, *pair) for name, pair in pairs.items() if None not in pair]
        if self.latency is not None:
            changes.append(f"measured: {_change('latency', *self.latency)}")
        measured = "" if self.together is None else f", {self.together:.4g} when measured together"
        measured += "" if self.rehearsed is None else f", {self.rehearsed:.4g} after a short training"
        gap = f"; up to {self.gap:.1%} from the best choice" if self.gap else ""
        return "\n".join([*changes, f"loss {sum(self.losses):.4g} in sum{measured}{gap}"])

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Prediction:
        """The inverse of `to_dict`, also after JSON. Raises `InvalidInputError` for anything else."""
        try:
            before, after = (_costs(data[name]) for name in ("before", "after"))
            together = None if data["together"] is None else float(data["together"])
            latency = None if data.get("latency") is None else (float(data["latency"][0]), float(data["latency"][1]))
            losses = tuple(float(loss) for loss in data["losses"])
            rehearsed = None if data.get("rehearsed") is None else float(data["rehearsed"])
            return cls(before, after, losses, together, float(data["gap"]), latency, rehearsed)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"this is not what a planner expects of a plan: {error}") from None


def _change(name: str, before: float, after: float) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{name} {cost_text(name, before)} → {cost_text(name, after)}{share}"


def _costs(data: Any) -> Costs:
    latency = data.get("latency")
    counts = {name: int(value) for name, value in data.items() if name != "latency"}
    return Costs(**counts, latency=None if latency is None else float(latency))


@dataclass(frozen=True)
class Plan:
    """The chosen candidates, which do not overlap. inputs: the model's, by parameter name of `forward`.

    prediction: what it costs and loses, where a planner made it.
    Raises `PlanError` if two candidates have a node in common, `InvalidInputError` if not each has its loss predicted.
    """

    candidates: tuple[Candidate, ...]
    inputs: tuple[str, ...] = ()
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for candidate in self.candidates:
            for node in candidate.nodes:
                if node in owner:
                    raise PlanError(
                        f"candidates `{owner[node]}` and `{candidate.full_name}` overlap: both contain `{node}`; "
                        "take one of them out of the plan"
                    )
                owner[node] = candidate.full_name
        if self.prediction is not None and len(self.prediction.losses) != len(self.candidates):
            raise InvalidInputError(
                f"the plan has {len(self.candidates)} candidates and predicts {len(self.prediction.losses)} losses"
            )

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
        *,
        collapse: Iterable[str] = ("*",),
        keep: Iterable[str] = (),
        kernels: Mapping[str, int | Ints] | None = None,
        longest: int = LONGEST,
    ) -> Plan:
        """The plan that somebody has in mind, by names.

        Args:
            model, example_inputs, longest: as for `candidates`.
            collapse: names of candidates, such as "layer1.0" or "layer1.0:5x5" (`Candidate.full_name` is one that
                stands for that alone); or patterns over names of layers, such as "layer1.*": each stands for the
                largest candidates all of whose layers match. Without a kernel size after a colon, the largest one is
                taken that is no larger than the largest kernel of its own layers, and a layer by itself, which only a
                smaller kernel makes cheaper, is left as it is.
            keep: names or patterns of layers that stay as they are.
            kernels: which kernels stay how large, by names or patterns of layers, where the choice of `candidates`
                is not wanted: {"layer1.0.conv1": 1, "layer1.0.conv2": 3}.

        Raises:
            PlanError: nothing matches a name or pattern, or what is named overlaps.
            TrainingModeError, InvalidInputError, CaptureError: as `candidates`.
        """
        collapse, keep = _texts("collapse", collapse), _texts("keep", keep)
        graph = serial_graph(model, example_inputs)
        if kernels is not None and not isinstance(kernels, Mapping):
            raise InvalidInputError(f"kernels is {kernels!r:.200}, expected a mapping from names of layers to sizes")
        _texts("kernels", kernels or ())
        chooser = _Chooser(CandidateFinder(graph, longest), keep, dict(kernels or {}))
        chosen: list[tuple[Region, Candidate]] = []
        for pattern in collapse:
            chosen.extend(chooser.matching(pattern))
        chosen = list({candidate: (region, candidate) for region, candidate in chosen}.values())
        inputs = named_inputs(model, example_inputs)
        order = {node.name: i for i, node in enumerate(graph.graph_module.graph.nodes)}
        chosen.sort(key=lambda pair: order[pair[0].output.name])
        return cls(tuple(candidate for _, candidate in chosen), inputs)

    def to_json(self) -> str:
        """The plan with its prediction, as text that `from_json` reads."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "inputs": self.inputs,
            "candidates": [c.to_dict() for c in self.candidates],
        }
        if self.prediction is not None:
            data["prediction"] = self.prediction.to_dict()
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. Raises `InvalidInputError` for anything else."""
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidInputError(f"this plan is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidInputError(f"this is not a plan of format {FORMAT}, as this version of elc_fx makes them")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Of the fields by name, as plain data. Raises `InvalidInputError` for anything else."""
        try:
            inputs, found = data["inputs"], data["candidates"]
        except KeyError as error:
            raise InvalidInputError(f"this plan is not complete: it has no {error}") from None
        for name, value in {"inputs": inputs, "candidates": found}.items():
            if not isinstance(value, list | tuple):
                raise InvalidInputError(f"`{name}` of a plan cannot be {value!r:.200}")
        predicted = data.get("prediction")
        prediction = None if predicted is None else Prediction.from_dict(predicted)
        return cls(tuple(Candidate.from_dict(c) for c in found), _texts("inputs", inputs), prediction)

    def __str__(self) -> str:
        if not self.candidates:
            met = "" if self.prediction is None else f" The budget is met without a merge.\n{self.prediction}"
            return f"An empty plan.{met}"
        before, after = (sum(c.flops[i] for c in self.candidates) for i in (0, 1))
        count = len(self.candidates)
        total = f"{count} region{'s' if count != 1 else ''}, {before:,} → {after:,} FLOPs"
        if self.prediction is None:
            return f"{candidate_table(self.candidates)}\n\n{total}"
        return f"{candidate_table(self.candidates, self.prediction.losses)}\n\n{total}\n{self.prediction}"

    def locate(self, graph: SerialGraph) -> list[tuple[Candidate, Region, dict[fx.Node, Ints]]]:
        """The candidates' regions in a model's graph, and the kernels that they keep.

        Raises `PlanError` where the plan was made for another model.
        """
        wanted = {frozenset(candidate.nodes): candidate for candidate in self.candidates}
        longest = max((len(candidate.nodes) for candidate in self.candidates), default=0)  # has no more layers
        found: dict[frozenset[str], Region] = {}
        firsts = {name for nodes in wanted for name in nodes}
        for region in graph.regions(longest):
            if region.output.name in firsts and (names := frozenset(n.name for n in region.nodes())) in wanted:
                found.setdefault(names, region)
        located = []
        for names, candidate in wanted.items():
            if names not in found:
                there = {node.name for node in graph.graph_module.graph.nodes}
                missing = [name for name in candidate.nodes if name not in there]
                detail = f"it has no `{missing[0]}`" if missing else "its layers are connected in another way"
                raise PlanError(
                    f"the plan is for another model: `{candidate.name}` is not a region of this one: {detail}"
                )
            region = found[names]
            windows = candidate.windows(region)
            fit = all(_fits(kept, _size(region, node)) for node, kept in windows.items())
            if not fit or len(windows) < len(candidate.kernels):
                raise PlanError(
                    f"the plan is for another model: the layers of `{candidate.name}` cannot keep the kernels "
                    f"{dict(candidate.kernels)}"
                )
            for is_, was in zip_longest(operation_texts(graph, region), candidate.operations):
                if is_ != was:
                    raise PlanError(
                        f"the plan is for another model: in `{candidate.name}` stands {is_}, the plan says {was}"
                    )
            if (result := str(region.geometry(windows))) != candidate.result:
                raise PlanError(
                    f"the plan is for another model: `{candidate.name}` would become {result}, "
                    f"the plan says {candidate.result}"
                )
            located.append((candidate, region, windows))
        return located


def named_inputs(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """The parameter names of `forward` that are given. Raises `InvalidInputError` where they stand for several."""
    parameters = inspect.signature(model.forward).parameters
    names = tuple(ExampleInputs.of(model, example_inputs).bound(model))
    for name in names:
        if parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise InvalidInputError(
                f"forward of {type(model).__name__} takes {parameters[name]}, and a plan needs a name for each input; "
                "wrap the model in a module whose forward names them"
            )
    return names


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if values is None or not all(isinstance(v, str) for v in values):
        raise InvalidInputError(f"{name} is {value!r:.200}, expected a sequence of names")
    return values


class _Chooser:
    """Finds the candidates that a name or a pattern stands for."""

    def __init__(self, finder: CandidateFinder, keep: tuple[str, ...], kernels: dict[str, int | Ints]) -> None:
        self.finder = finder
        self.kernels = kernels
        for pattern, size in kernels.items():
            sizes = (size,) if isinstance(size, int) else size
            if not isinstance(sizes, tuple) or not all(type(n) is int for n in sizes):
                raise InvalidInputError(f"kernels[{pattern!r}] is {size!r}, expected a whole number or a tuple of them")
        layers = {label(op.node) for op in finder.graph.interpreter.operations.values() if op.convolves}
        for pattern in (*keep, *kernels):
            if not any(_matches(name, pattern) for name in layers):
                raise PlanError(f"no layer is called `{pattern}`; there are {_names(sorted(layers))}")
        self.regions = [
            region for region in finder.regions if not any(_matches(label(n), p) for n in region.layers for p in keep)
        ]

    def matching(self, pattern: str) -> list[tuple[Region, Candidate]]:
        """The candidate of this name, or the largest ones whose layers all match, between max poolings."""
        named_so = re.fullmatch(r"(.*):(\d+(?:x\d+)*|linear)", pattern)
        name, kernel = named_so.groups() if named_so else (pattern, "")
        named = [region for region in self.regions if self.finder.names[region] == name]
        between = (region for region in self.regions if not region.nodes() & self.finder.graph.poolings)
        fitting = named or [r for r in between if all(_matches(label(n), name) for n in r.layers)]
        chosen: list[tuple[Region, Candidate]] = []
        used: set[fx.Node] = set()
        reasons = []
        for region in sorted(fitting, key=lambda region: -len(region.nodes())):
            if used & region.nodes():
                continue
            candidate = self._candidate(region, kernel, named=bool(named))
            if isinstance(candidate, str):
                reasons.append(candidate)
                continue
            chosen.append((region, candidate))
            used |= region.nodes()
        if not chosen:
            if reasons:
                raise PlanError(f"`{pattern}` cannot be collapsed so: {reasons[0]}")
            names = dict.fromkeys(self.finder.names[region] for region in self.regions)
            raise PlanError(
                f"no candidate is called `{pattern}`, or has only layers of that name; there are {_names(names)}"
            )
        return chosen

    def _candidate(self, region: Region, kernel: str, *, named: bool) -> Candidate | str:
        """The candidate with the kernel size that is asked for, or why there is none. named: not by a pattern."""
        own = {node: size for node in region.layers if (size := self._kept(region, node)) is not None}
        if own and (kernel or named or not region.is_one_layer):
            windows = {**windows_keeping(region.parts, capacity(region.parts)), **own}
            candidate = self.finder.candidate(region, {n: w for n, w in windows.items() if w != _size(region, n)})
            if candidate is None:
                return "its layers do not become one convolution with these kernels"
            became = kernel_text(candidate.kernel_size)
            return candidate if kernel in ("", became) else f"with the kernels that you keep it becomes {became}"
        options = list(self.finder.of_region(region, 1 << 30 if kernel or named else LARGEST_KERNEL))
        if region.is_one_layer and not region.ends_with_pooling and not kernel:
            ways = ", ".join(f"`{candidate.full_name}`" for candidate in options)
            return f"`{self.finder.names[region]}` is one layer; say what is left of its kernel: {ways}"
        if kernel:
            same = [c for c in options if kernel_text(c.kernel_size) == kernel]
            sizes = ", ".join(kernel_text(c.kernel_size) for c in options)
            return same[0] if same else f"`{self.finder.names[region]}` can be {sizes}, not {kernel}"
        within = [c for c in options if max(c.kernel_size, default=1) <= c.own_kernel]
        if within or options:
            return (within or options)[-1 if within else 0]
        return f"`{self.finder.names[region]}` does not become one convolution"

    def _kept(self, region: Region, node: fx.Node) -> Ints | None:
        """The kernel size that the caller wants a layer to keep."""
        size = _size(region, node)
        for pattern, wanted in self.kernels.items():
            if _matches(label(node), pattern):
                kept = (wanted,) * len(size) if isinstance(wanted, int) else tuple(wanted)
                if not _fits(kept, size):
                    raise PlanError(f"`{label(node)}` has a kernel of {kernel_text(size)} and cannot keep {wanted}")
                return kept
        return None


def _size(region: Region, node: fx.Node) -> Ints:
    return next(op.geometry.kernel_size for op in operations_of(region.parts) if op.node is node)


def _fits(kept: Ints, size: Ints) -> bool:
    """Whether a kernel can be cut to what is kept of it."""
    return len(kept) == len(size) and all(0 < k <= n for k, n in zip(kept, size, strict=True))


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _names(names: Iterable[str]) -> str:
    return listed((f"`{name}`" for name in names), 8)
