"""The report of a compression as one self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment

from elc_fx.planning.candidates import kernel_text
from elc_fx.report.table import Report

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>elc_fx: compression report</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
.bar { background: var(--line); width: 12rem; height: .8rem; position: relative; display: inline-block; }
.bar i { background: #2a78b8; position: absolute; inset: 0 auto 0 0; }
figure { margin: 1rem 0; background: white; padding: .5rem; border-radius: .4rem; max-width: 46rem; }
figure svg { width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Compression report</h1>
<table>
<thead><tr><th></th><th>before</th><th>after</th><th>change</th></tr></thead>
<tbody>
{% for row in summary %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{% if curve %}<h2>Training</h2><figure>{{ curve | safe }}</figure>{% endif %}
<h2>What became one convolution</h2>
<div class="wide"><table>
<thead><tr><th>region</th><th>layers</th><th>becomes</th><th>FLOPs before</th><th>after</th><th>left</th><th>loss</th>
</tr></thead>
<tbody>
{% for c in regions %}<tr><td>{{ c.name }}</td><td>{{ c.layers }}</td><td>{{ c.result }}</td><td>{{ c.before }}</td>
<td>{{ c.after }}</td><td><span class="bar"><i style="width: {{ c.left }}%"></i></span></td><td>{{ c.loss }}</td></tr>
{% endfor %}</tbody>
</table></div>
<h2>What stayed apart</h2>
{% if refused %}<ul>{% for reason in refused %}<li>{{ reason }}</li>{% endfor %}</ul>
{% else %}<p>Nothing more.</p>{% endif %}
</body>
</html>
"""
MOST_REFUSALS = 60


def page(summary: Sequence[Sequence[str]], report: Report) -> str:
    """summary: rows (what, before, after, change)."""
    plan = report.plan
    candidates = () if plan is None else plan.candidates
    losses = plan.prediction.losses if plan is not None and plan.prediction is not None else ("",) * len(candidates)
    regions = [
        {
            "name": c.name,
            "layers": len(c.layers),
            "result": f"{kernel_text(c.kernel_size)}: {c.result}",
            "before": f"{c.flops[0]:,}",
            "after": f"{c.flops[1]:,}",
            "left": round(100 * c.flops[1] / max(c.flops[0], 1), 1),
            "loss": f"{loss:.3g}" if isinstance(loss, float) else "",
        }
        for c, loss in zip(candidates, losses, strict=True)
    ]
    refused = [str(r) for r in (*report.refused, *report.opaque)][:MOST_REFUSALS]
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(summary=summary, regions=regions, refused=refused, curve=_curve(report))


def _curve(report: Report) -> str:
    """Loss, validation and gate over the epochs, as SVG; "" without training."""
    if not report.epochs:
        return ""
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(8, 3))
    left: Any = figure.subplots()
    numbers = [epoch.number for epoch in report.epochs]
    left.plot(numbers, [epoch.loss for epoch in report.epochs], "o-", color="#2a78b8")
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color="#2a78b8")
    scored = [(epoch.number, epoch.score) for epoch in report.epochs if epoch.score is not None]
    right = left.twinx()
    right.set_ylabel("validation score, gate")
    if scored:
        right.plot(*zip(*scored, strict=True), "s-", color="#c05020", label="validation")
    if any(epoch.gate for epoch in report.epochs):
        right.plot(numbers, [epoch.gate for epoch in report.epochs], ":", color="gray", label="gate")
    if right.lines:
        right.legend(loc="center right")
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    text = drawn.getvalue()
    return text[text.index("<svg") :]
