"""Pages of HTML that need nothing but themselves: a diff, and the report of a compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from elc_fx.report import charts
from elc_fx.report.diff import SIGNS, Change, Diff
from elc_fx.report.drawing import COLORS, curves, gutter
from elc_fx.report.network import Layer
from elc_fx.report.rows import layout
from elc_fx.report.table import Report

MOST_REFUSALS = 60
TITLE = "Compression report"


def diff_page(diff: Diff) -> str:
    """The diff alone."""
    title, style = f"{diff.before.name} → {diff.after.name}", _style("base.css", "diff.css")
    return _environment().get_template("diff_page.html").render(**_of_diff(diff), title=title, style=style)


def page(
    summary: Sequence[Sequence[str]],
    report: Report,
    diff: Diff | None = None,
    points: Sequence[charts.Point] = (),
    title: str = TITLE,
) -> str:
    """The report of a compression.

    summary: rows (what, before, after, change). diff: of the original and the result. points: of the accuracy–cost
    curve, which is drawn where there are several besides the original.
    """
    refused = [*report.refused, *report.opaque]
    parts = {
        "plan": "Plan" if report.plan is not None and report.plan.candidates else "",
        "layers": "Layer by layer" if diff is not None else "",
        "costs": "Costs" if diff is not None else "",
        "training": "Training" if report.epochs else "",
        "apart": "What stayed apart",
    }
    prediction = None if report.plan is None else report.plan.prediction
    values: dict[str, Any] = {"diff": None} if diff is None else {**_of_diff(diff), "costs": _costs(diff)}
    return (
        _environment()
        .get_template("report.html")
        .render(
            **values,
            title=title,
            parts=[(id_, name) for id_, name in parts.items() if name],
            summary=summary,
            regions=_regions(report),
            expected=[] if prediction is None else ["What the planner expected:", *str(prediction).splitlines()],
            refused=refused[:MOST_REFUSALS],
            more=max(len(refused) - MOST_REFUSALS, 0),
            curve=charts.accuracy_cost(points) if len(points) > 2 else "",
            training=charts.training(report.epochs) if report.epochs else "",
            style=_style("base.css", "diff.css", "report.css"),
        )
    )


def _environment() -> Environment:
    # The templates lie beside this file; what they are given is escaped.
    return Environment(
        loader=PackageLoader("elc_fx.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )


def _style(*files: str) -> str:
    environment = Environment(loader=PackageLoader("elc_fx.report"), undefined=StrictUndefined)
    return "\n".join(environment.get_template(file).render(colors=COLORS) for file in files)


def _of_diff(diff: Diff) -> dict[str, Any]:
    """What the template of a diff shows."""
    environment = _environment()
    drawn = layout(diff)
    assert environment.loader is not None
    return {
        "diff": diff,
        "layout": drawn,
        "gutters": [gutter(lanes) for lanes in drawn.lanes],
        "curves": curves,
        "rounded": _rounded,
        "signs": SIGNS,
        "changes": [_plain(change) for change in diff.changes],
        "script": environment.loader.get_source(environment, "diff.js")[0],
    }


def _rounded(count: int) -> str:
    """Three digits, and the letter that goes before a unit."""
    value, prefixes = float(count), iter("kMGTP")
    prefix = ""
    while float(f"{value:.3g}") >= 1000:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"


def _plain(change: Change) -> dict[str, Any]:
    return {
        "kind": change.kind,
        "name": change.name,
        "loss": change.loss,
        "retrained": change.retrained,
        "rewired": change.rewired,
        "flops": change.flops,
        "parameters": change.parameters,
        "before": [_plain_layer(layer) for layer in change.before],
        "after": [_plain_layer(layer) for layer in change.after],
    }


def _plain_layer(layer: Layer) -> dict[str, Any]:
    shown = ("place", "kind", "operation", "settings", "kernel", "shape", "flops", "parameters")
    return {name: getattr(layer, name) for name in shown}


def _regions(report: Report) -> list[dict[str, Any]]:
    plan = report.plan
    candidates = () if plan is None else plan.candidates
    losses = plan.prediction.losses if plan is not None and plan.prediction is not None else ("",) * len(candidates)
    return [
        {
            "name": c.name,
            "layers": len(c.layers),
            "result": c.result,
            "before": f"{c.flops[0]:,}",
            "after": f"{c.flops[1]:,}",
            "change": f"{c.flops[1] / c.flops[0] - 1:+.1%}" if c.flops[0] else "",
            "loss": f"{loss:.3g}" if isinstance(loss, float) else "",
        }
        for c, loss in zip(candidates, losses, strict=True)
    ]


def _costs(diff: Diff) -> list[dict[str, Any]]:
    """The changes that have FLOPs before or after, with the lengths of their bars."""
    found = [(change, change.flops[0] or 0, change.flops[1] or 0) for change in diff.changes if any(change.flops)]
    largest = max((max(before, after) for _, before, after in found), default=1)
    return [
        {
            "name": change.name if len(change.before) < 2 else f"{change.name} ({len(change.before)} layers)",
            "kind": change.kind,
            "before": f"{before:,}",
            "after": f"{after:,}",
            "widths": [round(100 * n / largest, 2) for n in (before, after)],
        }
        for change, before, after in found
    ]
