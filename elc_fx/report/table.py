"""The report as a value of plain numbers; only `__str__` formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from elc_fx.errors import InvalidInputError, Refusal
from elc_fx.merging.fusion import MergedRegion
from elc_fx.planning.plan import Plan
from elc_fx.training.history import Epoch

MOST_ROWS = 40  # of refusals that the table prints; `Report.refused` has all


@dataclass(frozen=True)
class Totals:
    """Before and after. layers: convolutions and linear layers; depth: those on the longest path, measured where there
    are example inputs. flops: with example inputs only.

    error: the largest difference of the outputs on the example inputs, relative to the largest value.
    """

    parameters: tuple[int, int]
    layers: tuple[int, int]
    depth: tuple[int, int]
    flops: tuple[int, int] | None = None
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """What `compile` did. merged: the regions; refused: what stayed apart; opaque: what could not be looked into.

    plan, epochs: with mode "decouple", what was collapsed before, and how the training went.
    """

    merged: tuple[MergedRegion, ...]
    refused: tuple[Refusal, ...]
    opaque: tuple[Refusal, ...]
    totals: Totals
    plan: Plan | None = None
    epochs: tuple[Epoch, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`, also after JSON. Raises `InvalidInputError` for anything else."""
        try:
            plan = None if data["plan"] is None else Plan.from_dict(data["plan"])
            report = cls(
                tuple(MergedRegion(**_tuples(region)) for region in data["merged"]),
                tuple(Refusal(**refusal) for refusal in data["refused"]),
                tuple(Refusal(**refusal) for refusal in data["opaque"]),
                Totals(**_tuples(data["totals"])),
                plan,
                tuple(Epoch(**epoch) for epoch in data["epochs"]),
            )
            str(report)  # fails where a number is none
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidInputError(f"this is no report: {error}") from None
        return report

    def __str__(self) -> str:
        planned = [] if self.plan is None else [f"Collapsed:\n{self.plan}"]
        trained = [_epochs_table(self.epochs)] if self.epochs else []
        sections = [*planned, *trained, self._merged_table(), self._totals_table()]
        sections += [_refusals("Not merged", self.refused), _refusals("Not looked into", self.opaque)]
        return "\n\n".join(section for section in sections if section)

    def _merged_table(self) -> str:
        if not self.merged:
            return "Nothing was merged."
        rows = []
        for region in self.merged:
            flops = ["", ""] if region.flops is None else [f"{n:,}" for n in region.flops]
            rows.append([region.name, region.layers, region.result, *flops, "{} → {}".format(*region.launches)])
        headers = ["region", "was", "is", "FLOPs before", "FLOPs after", "operations"]
        if all(region.flops is None for region in self.merged):
            headers, rows = headers[:3] + headers[5:], [row[:3] + row[5:] for row in rows]
        widths = [32, 36, 32] + [None] * (len(headers) - 3)
        return tabulate(rows, headers, disable_numparse=True, colalign=_align(headers), maxcolwidths=widths)

    def _totals_table(self) -> str:
        t = self.totals
        pairs = {"parameters": t.parameters, "convolutions and linear layers": t.layers, "depth": t.depth}
        if t.flops is not None:
            pairs["FLOPs"] = t.flops
        rows = [[name, f"{a:,}", f"{b:,}", f"{b / a:.3f}×" if a else ""] for name, (a, b) in pairs.items()]
        headers = ["total", "before", "after", "ratio"]
        text = tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right"))
        if t.error is not None:
            text += f"\n\nOutputs on the example inputs agree to {t.error:.1e} of the largest value."
        return text


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _epochs_table(epochs: Sequence[Epoch]) -> str:
    rows = [
        [
            e.number,
            f"{e.loss:.4f}",
            f"{e.gate:.2f}",
            "" if e.score is None else f"{e.score:.4f}",
            f"{e.images_per_second:,.0f}",
        ]
        for e in epochs
    ]
    headers = ("epoch", "loss", "gate", "validation", "images/s")
    return tabulate(rows, headers, disable_numparse=True, colalign=("right",) * len(headers))


def _align(headers: Sequence[str]) -> list[str]:
    return ["right" if header.startswith("FLOPs") or header == "operations" else "left" for header in headers]


def _refusals(title: str, refusals: Sequence[Refusal]) -> str:
    if not refusals:
        return ""
    lines = [f"  {refusal}" for refusal in refusals[:MOST_ROWS]]
    if len(refusals) > MOST_ROWS:
        lines.append(f"  … and {len(refusals) - MOST_ROWS} more")
    return "\n".join([f"{title}:", *lines])
