"""The explanation: before anything is compiled, what would merge exactly, what after decoupling, what not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from elc_fx.capturing.graph import label
from elc_fx.capturing.inputs import ExampleInputs, check_model
from elc_fx.compiled import report_of
from elc_fx.errors import CaptureError, Refusal, listed
from elc_fx.matching.serial import SerialGraph
from elc_fx.merging.lossless import LAYERS, LosslessCompilation
from elc_fx.planning.candidates import LARGEST_KERNEL, LONGEST, Candidate, CandidateFinder, candidate_table
from elc_fx.report import Report

MOST_SHOWN = 12  # rows of a table that `str()` prints; the fields have all


@dataclass(frozen=True)
class Explanation:
    """What elc_fx finds in a model; `str()` is a summary.

    report: what `compile` would do, so what merges exactly, what does not, and why. layers: all convolutions and
    linear layers, in the order in which they run. candidates: every region that could become one convolution after
    decoupling, or a layer whose kernel could shrink. alone: the layers that merge with no other, and what they stand
    between. no_candidates: why there are none, where they were not looked for.
    """

    model: str
    report: Report
    layers: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    alone: tuple[Refusal, ...]
    no_candidates: str | None = None

    @property
    def smallest(self) -> tuple[Candidate, ...]:
        """The merges that change least: of few layers, that save FLOPs, and have no layer in common.

        Of each region the one with the largest kernel that saves and is no larger than those of its own layers, as max
        poolings widen them.
        """
        best: dict[tuple[str, ...], Candidate] = {}
        for candidate in self.candidates:  # those of one region stand together, small kernels first
            if candidate.merges and candidate.saves and max(candidate.kernel_size, default=1) <= candidate.own_kernel:
                best[candidate.nodes] = candidate
        order = {candidate: position for position, candidate in enumerate(self.candidates)}
        chosen: list[Candidate] = []
        used: set[str] = set()
        for candidate in sorted(best.values(), key=lambda c: (len(c.layers), -len(c.nodes), c.flops[1] - c.flops[0])):
            if not used & set(candidate.nodes):
                chosen.append(candidate)
                used |= set(candidate.nodes)
        return tuple(sorted(chosen, key=order.__getitem__))

    @property
    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Why something does not merge exactly, and where that is so."""
        found: dict[str, list[str]] = {}
        for refusal in (*self.report.refused, *self.report.opaque):
            found.setdefault(refusal.reason, []).append(refusal.where)
        return {reason: tuple(where) for reason, where in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        totals = self.report.totals
        size = f", {totals.flops[0]:,} FLOPs" if totals.flops is not None else ""
        head = f"{self.model}: {len(self.layers)} convolutions and linear layers, depth {totals.depth[0]}{size}"
        parts = [head, self._exact(), self._after_decoupling(), self._standing_alone(), self._refused()]
        return "\n\n".join(part for part in parts if part)

    def _exact(self) -> str:
        merged, totals = self.report.merged, self.report.totals
        if not merged:
            return "Merges exactly (elc_fx.compile): nothing."
        launches = [sum(region.launches[i] for region in merged) for i in (0, 1)]
        saved = "" if totals.flops is None else f", FLOPs {totals.flops[0]:,} → {totals.flops[1]:,}"
        head = (
            f"Merges exactly (elc_fx.compile): {_number(merged, 'region')}, "
            f"{launches[0]} operations → {launches[1]}{saved}"
        )
        kinds = Counter((region.layers, region.result) for region in merged)
        first = {(region.layers, region.result): region.name for region in reversed(merged)}
        rows = [
            [first[kind] + (f" and {count - 1} more" if count > 1 else ""), *kind]
            for kind, count in kinds.most_common(MOST_SHOWN)
        ]
        rest = len(kinds) - len(rows)
        more = f"\n… and {rest} more kinds of region; `.report` has all" if rest else ""
        table = tabulate(rows, ("region", "was", "becomes"), disable_numparse=True, maxcolwidths=[44, 40, 36])
        return f"{head}\n{table}{more}"

    def _after_decoupling(self) -> str:
        if self.no_candidates is not None:
            return f"After decoupling: {self.no_candidates}"
        if not self.candidates:
            return "After decoupling (elc_fx.plan, elc_fx.decouple): nothing more."
        merges = [c for c in self.candidates if c.merges]
        shrinking = {c.layers for c in self.candidates if not c.merges}
        shrunk = f" Could have a smaller kernel, and stay: {_number(shrinking, 'layer')}." if shrinking else ""
        if not merges:
            return f"Could merge after decoupling: nothing.{shrunk}"
        barriers, poolings, paddings = (
            {place for c in merges for place in getattr(c, name)} for name in ("activations", "poolings", "paddings")
        )
        pooled = f"{_number(poolings, 'max pooling')}, " if poolings else ""
        head = (
            "Could merge after decoupling, at a loss that elc_fx.plan measures: "
            f"{_number({c.nodes for c in merges}, 'region')}, {_number(merges, 'candidate')}; in the way: "
            f"{_number(barriers - poolings, 'activation')}, {pooled}{_number(paddings, 'padding')}.{shrunk}"
        )
        best = self.smallest
        if not best:
            return f"{head}\nNone saves FLOPs with a kernel as small as those of its layers; `.candidates` has all."
        saved, flops = sum(c.flops[0] - c.flops[1] for c in best), self.report.totals.flops
        share = f", {saved / flops[0]:.0%} of all" if flops and flops[0] else ""
        more = f"\n… and {len(best) - MOST_SHOWN} more; `.smallest` has all" if len(best) > MOST_SHOWN else ""
        return (
            f"{head}\nThe smallest, each apart from the others, save {saved:,} FLOPs{share}; larger ones save more "
            f"(`.candidates`).\n{candidate_table(best[:MOST_SHOWN])}{more}"
        )

    def _standing_alone(self) -> str:
        if not self.alone:
            return ""
        lines = [f"  {refusal}" for refusal in self.alone[:MOST_SHOWN]]
        rest = len(self.alone) - len(lines)
        return "\n".join(
            ["Merges with nothing:", *lines, *([f"  … and {rest} more; `.alone` has all"] if rest else [])]
        )

    def _refused(self) -> str:
        if not self.reasons:
            return ""
        ranked = sorted(self.reasons.items(), key=lambda pair: -len(pair[1]))
        lines = [f"  {listed(f'`{place}`' for place in where)}: {reason}" for reason, where in ranked[:MOST_SHOWN]]
        rest = len(ranked) - len(lines)
        return "\n".join(
            ["Does not merge exactly, because", *lines, *([f"  … and {rest} more; `.reasons` has all"] if rest else [])]
        )


def explain(model: nn.Module, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None) -> Explanation:
    """What elc_fx could do with a model, and why not more. The model is not changed.

    Args:
        model: any module, in eval mode.
        example_inputs: as for `compile`; without them nothing is said of FLOPs, and of decoupling.

    Raises:
        TrainingModeError: the model is in training mode.
        InvalidInputError: an argument is of the wrong type, or the model does not run on `example_inputs`.
    """
    check_model(model)
    examples = None if example_inputs is None else ExampleInputs.of(model, example_inputs)
    # What is exact is found by doing it: numbers can forbid a merge that shapes allow.
    report = report_of(LosslessCompilation(examples, verify=False).run(model))
    name = type(model).__name__
    if examples is None:
        return Explanation(name, report, _layers_of(model), (), (), "give example inputs, whose shapes decide")
    try:
        graph = SerialGraph.of(model, examples)
    except CaptureError as error:
        why = f"the forward of {name} cannot be traced: {error}; decouple the part of it that can"
        return Explanation(name, report, _layers_of(model), (), (), why)
    regions = CandidateFinder(graph, LONGEST).all(LARGEST_KERNEL)
    found = [c for _, c in regions if c.activations or c.kernels or c.paddings]  # the others merge exactly
    layers = tuple(label(op.node) for op in graph.interpreter.operations.values() if op.convolves)
    merged = {place for region in report.merged for place in region.nodes}
    free = set(layers) - {layer for candidate in found if candidate.merges for layer in candidate.layers} - merged
    return Explanation(name, report, layers, tuple(found), tuple(_alone(graph, free)))


def _layers_of(model: nn.Module) -> tuple[str, ...]:
    """The convolutions and linear layers of a model that may not be traceable, in the order of its modules."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, LAYERS))


def _alone(graph: SerialGraph, free: set[str]) -> Iterable[Refusal]:
    """Layers that merge with nothing, and what stands before and behind them."""
    for node, operation in graph.interpreter.operations.items():
        if operation.convolves and label(node) in free:
            free.discard(label(node))
            readers = ", ".join(f"`{label(user)}`" for user in node.users if user.op != "output")
            behind = f"it feeds {readers}" if readers else "it gives the output"
            yield Refusal(label(node), f"it reads `{label(operation.source)}`, and {behind}")


def _number(items: Any, what: str) -> str:
    return f"{len(items)} {what}{'s' if len(items) != 1 else ''}"
