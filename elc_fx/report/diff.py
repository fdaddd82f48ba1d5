"""The diff of two networks as a value: what was kept, merged into what, split, changed, inserted, removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn
from torch.export import ExportedProgram

from elc_fx.compiled import REPORT
from elc_fx.deploying.exporting import Exported
from elc_fx.errors import InvalidInputError
from elc_fx.report.alignment import Group, aligned
from elc_fx.report.network import Layer, Network, flops_of, stored_inputs

Kind = Literal["kept", "merged", "split", "changed", "inserted", "removed"]
KINDS: tuple[Kind, ...] = ("kept", "merged", "split", "changed", "inserted", "removed")
SIGNS: dict[str, str] = {"kept": " ", "merged": "»", "split": "«", "changed": "~", "inserted": "+", "removed": "-"}
COMMUTATIVE = ("add", "mul", "maximum", "minimum")
SHOWN_KEPT = 1  # layers at each end of a run of kept ones that the text shows


@dataclass(frozen=True)
class Change:
    """Layers that belong together, before and after.

    loss: what the planner expected to lose by it, where it was planned. retrained: the same layer with other numbers.
    rewired: the same layer, which reads other layers that were kept.
    """

    kind: Kind
    before: tuple[Layer, ...]
    after: tuple[Layer, ...]
    loss: float | None = None
    retrained: bool = False
    rewired: bool = False

    @property
    def notes(self) -> str:
        """How a kept layer differs all the same."""
        return ", ".join(["other weights"] * self.retrained + ["reads other layers"] * self.rewired)

    @property
    def flops(self) -> tuple[int | None, int | None]:
        return flops_of(self.before), flops_of(self.after)

    @property
    def parameters(self) -> tuple[int, int]:
        before, after = (sum(layer.parameters for layer in layers) for layers in (self.before, self.after))
        return before, after

    @property
    def name(self) -> str:
        """Of its first convolution or linear layer, else of its first layer."""
        layers = self.before or self.after
        return next((layer for layer in layers if layer.is_heavy), layers[0]).place


@dataclass(frozen=True)
class Line:
    """A line of the diff as text."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Diff:
    """Two networks and their changes, in the order in which they run; every layer is in one. `str()` is text."""

    before: Network
    after: Network
    changes: tuple[Change, ...]

    @cached_property
    def counts(self) -> dict[Kind, int]:
        """How many changes there are of each kind."""
        return {kind: sum(change.kind == kind for change in self.changes) for kind in KINDS}

    @property
    def is_empty(self) -> bool:
        """Whether the networks have the same layers with the same numbers, which read each other in the same way."""
        return all(change.kind == "kept" and not change.notes for change in self.changes)

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        notes = [f"{count} of them {note}" for note, count in _noted(self.changes).items()]
        counts += f" ({', '.join(notes)})" if notes else ""
        sides = [f"{network.name} ({len(network.layers)} layers)" for network in (self.before, self.after)]
        return f"{' → '.join(sides)}: {counts}"

    def lines(self, *, everything: bool = False) -> Iterator[Line]:
        """The diff as text, after a sign for each kind. everything: also the kept layers in the middle of a run."""
        run: list[Change] = []
        for change in self.changes:
            if change.kind == "kept":
                run.append(change)
                continue
            yield from _kept_lines(run, everything)
            yield from _changed_lines(change)
            run = []
        yield from _kept_lines(run, everything)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([self.summary(), "", *(line.text.rstrip() for line in self.lines())])


def _kept_lines(run: Sequence[Change], everything: bool) -> Iterator[Line]:
    hidden = len(run) - 2 * SHOWN_KEPT
    noted = "".join(f", {count} {note}" for note, count in _noted(run[SHOWN_KEPT:-SHOWN_KEPT]).items())
    for i, change in enumerate(run):
        if everything or hidden < 2 or i < SHOWN_KEPT or i >= len(run) - SHOWN_KEPT:
            note = f"  ({change.notes})" if change.notes else ""
            yield Line("kept", f"  {_layer_text(change.after[0])}{note}")
        elif i == SHOWN_KEPT:
            yield Line("kept", f"  … {hidden} kept{noted}")


def _noted(changes: Sequence[Change]) -> dict[str, int]:
    """How many layers were kept with other weights, or read other layers."""
    counts = {
        "with other weights": sum(change.retrained for change in changes),
        "reading other layers": sum(change.rewired for change in changes),
    }
    return {note: count for note, count in counts.items() if count}


def _changed_lines(change: Change) -> Iterator[Line]:
    sign = SIGNS[change.kind]
    told = {layer.operation for layer in change.before} != {layer.operation for layer in change.after}
    arrow = "→ " if change.before else ""
    for layer in change.before:
        yield Line(change.kind, f"{sign} {_layer_text(layer, settings=not told)}")
    for layer in change.after:
        yield Line(change.kind, f"{sign} {arrow}{_layer_text(layer, settings=not told)}")
    if change.before and change.after:
        before, after = change.flops
        cost = [f"{before:,} → {after:,} FLOPs"] if before and after is not None else []
        cost += [] if change.loss is None else [f"loss {change.loss:.3g}"]
        if cost:
            yield Line(change.kind, f"{sign}   {', '.join(cost)}")


def _layer_text(layer: Layer, *, settings: bool = False) -> str:
    """settings: told where the operations of a change are the same."""
    if settings and not layer.is_heavy and layer.settings:
        return f"{layer.place}: {layer.settings}"
    return layer.place if layer.place == layer.operation else f"{layer.place}: {layer.operation}"


def diff(
    before: nn.Module | Exported | ExportedProgram,
    after: nn.Module | Exported | ExportedProgram,
    example_inputs: Any = None,
    *,
    names: tuple[str, str] = ("", ""),
) -> Diff:
    """What became of the layers of one network in another. Neither is changed.

    Args:
        before, after: modules in eval mode, graphs as they stand, or programs of `torch.export`. Where `compile`,
            `decouple` or `merge` made one, its layers know which layers of the original they stand for; others are
            aligned by their places, their numbers, and what surrounds them.
        example_inputs: as for `compile`; with them, shapes and FLOPs are known. By default, those of a saved program.
        names: of the two networks, for people.

    Raises:
        InvalidInputError: an argument is of the wrong type, or a network does not run on the inputs.
        TrainingModeError, CaptureError: a model is in training mode, or its `forward` cannot be traced.
    """
    if not isinstance(names, tuple) or len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise InvalidInputError(f"names is {names!r}, expected two texts")
    if example_inputs is None:
        networks = _on_the_inputs_of_a_program(before, after, names)
    else:
        networks = Network.of(before, example_inputs, names[0]), Network.of(after, example_inputs, names[1])
    changes = [_change(*networks, group) for group in aligned(*networks)]
    report = getattr(after, REPORT, None)
    plan = None if report is None else report.plan
    if plan is not None and plan.prediction is not None:
        changes = _with_losses(changes, plan.candidates, plan.prediction.losses)
    return Diff(*networks, tuple(_ordered(*networks, _with_wiring(changes))))


def _on_the_inputs_of_a_program(before: Any, after: Any, names: tuple[str, str]) -> tuple[Network, Network]:
    """Both networks on the inputs of the first that is stored with some, where the other takes them."""
    programs = [s.program if isinstance(s, Exported) else s for s in (before, after)]
    stored = (stored_inputs(program) for program in programs if isinstance(program, ExportedProgram))
    inputs = next((inputs for inputs in stored if inputs is not None), None)
    try:
        return Network.of(before, inputs, names[0]), Network.of(after, inputs, names[1])
    except InvalidInputError:
        if inputs is None:
            raise
        return Network.of(before, None, names[0]), Network.of(after, None, names[1])


def _change(before: Network, after: Network, group: Group) -> Change:
    old, new = (tuple(n.layers[i] for i in part) for n, part in zip((before, after), group, strict=True))
    if not old or not new:
        return Change("removed" if old else "inserted", old, new)
    if len(old) == len(new) == 1:
        a, b = old[0], new[0]
        if a.does_as(b):
            return Change("kept", old, new, retrained=a.state != b.state)
        return Change("changed", old, new)
    if len(old) > 1 and sum(layer.is_heavy for layer in new) <= 1:
        return Change("merged", old, new)
    with_numbers = [sum(layer.state is not None for layer in layers) for layers in (old, new)]
    return Change("split" if with_numbers[0] == 1 < with_numbers[1] else "changed", old, new)


def _with_wiring(changes: Sequence[Change]) -> list[Change]:
    """Of kept layers that read kept layers alone, whether these are others; those of a sum in any order."""
    kept = {change.before[0].name: change.after[0].name for change in changes if change.kind == "kept"}

    def rewired(change: Change) -> bool:
        if change.kind != "kept" or not all(name in kept for name in change.before[0].reads):
            return False
        old, new = change.before[0], change.after[0]
        before, after = [kept[name] for name in old.reads], list(new.reads)
        if old.operation in COMMUTATIVE and "alpha" not in old.settings:
            before, after = sorted(before), sorted(after)
        return before != after and set(after) <= set(kept.values())

    return [replace(change, rewired=rewired(change)) for change in changes]


def _with_losses(changes: Sequence[Change], candidates: Sequence[Any], losses: Sequence[float]) -> list[Change]:
    """Each candidate's loss with the change that its layers are in."""
    owner = {layer.place: i for i, change in enumerate(changes) for layer in change.before if layer.is_heavy}
    found: dict[int, float] = {}
    for candidate, loss in zip(candidates, losses, strict=True):
        for i in {owner[place] for place in candidate.layers if place in owner}:
            if changes[i].kind != "kept":
                found[i] = found.get(i, 0.0) + loss
    return [replace(change, loss=found.get(i)) for i, change in enumerate(changes)]


def _ordered(before: Network, after: Network, changes: Sequence[Change]) -> list[Change]:
    """As the layers run: those of `before`, with what was inserted in front of the first that reads it."""
    position = {layer.name: i for i, layer in enumerate(before.layers)}
    key = {i: (position[c.before[0].name], 1, 0) for i, c in enumerate(changes) if c.before}
    owner = {layer.name: i for i, change in enumerate(changes) for layer in change.after}
    first_read: dict[str, int] = {}  # where the first reader of a layer stands
    for j, layer in reversed(list(enumerate(after.layers))):
        at = owner[layer.name]
        if at not in key:
            read = first_read.get(layer.name)
            last = max((key[owner[s]][0] for s in layer.sources if owner[s] in key), default=0)  # nobody reads it
            key[at] = (last, 2, j) if read is None else (read, 0, j)
        for source in layer.sources:
            first_read[source] = min(first_read.get(source, key[at][0]), key[at][0])
    return [changes[i] for i in sorted(key, key=key.__getitem__)]
