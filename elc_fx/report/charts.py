"""The charts of a report, as SVG that takes the colours of the page around it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elc_fx.training import Epoch

INK = "#010203"  # what the page's own colour is put in the place of
BLUE, ORANGE = "#3b82d6", "#d0702a"  # that can be read on white and on black


@dataclass(frozen=True)
class Point:
    """A network on the accuracy–cost curve. flops: of one sample; accuracy: a share."""

    name: str
    flops: int
    accuracy: float


def accuracy_cost(points: Sequence[Point]) -> str:
    """Accuracy over FLOPs, one point for each network, with its name."""
    figure, axes = _figure()
    points = sorted(points, key=lambda point: point.flops)
    axes.plot([p.flops / 1e6 for p in points], [100 * p.accuracy for p in points], "o-", color=BLUE)
    for point in points:
        axes.annotate(
            point.name,
            (point.flops / 1e6, 100 * point.accuracy),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            color=INK,
        )
    axes.margins(0.15, 0.2)
    axes.set_xlabel("MFLOPs")
    axes.set_ylabel("accuracy [%]")
    return _svg(figure, "accuracy-cost")


def training(epochs: Sequence[Epoch]) -> str:
    """Loss, validation and gate over the epochs."""
    figure, axes = _figure()
    numbers = [epoch.number for epoch in epochs]
    axes.plot(numbers, [epoch.loss for epoch in epochs], "o-", color=BLUE, label="training loss (left)")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0.5, len(epochs) + 0.5)
    right = axes.twinx()
    scored = [(epoch.number, epoch.score) for epoch in epochs if epoch.score is not None]
    if scored:
        right.plot(*zip(*scored, strict=True), "s-", color=ORANGE, label="validation (right)")
    right.plot(numbers, [epoch.gate for epoch in epochs], ".:", color=INK, label="gate (right)")
    right.set_ylabel("validation, gate")
    if all(score >= 0 for _, score in scored):  # else it is minus a loss
        right.set_ylim(-0.03, 1.05)
    lines = [*axes.lines, *right.lines]
    axes.legend(
        lines,
        [line.get_label() for line in lines],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
        labelcolor=INK,
    )
    for one in (axes, right):
        _colored(one)
    return _svg(figure, "training")


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(6.2, 3.1), layout="constrained")
    axes = figure.subplots()
    _colored(axes)
    return figure, axes


def _colored(axes: Any) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.spines[:].set_color(INK)
    axes.spines["top"].set_visible(False)


def _svg(figure: Any, name: str) -> str:
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # text as text; the same names each time
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
