"""Charts as SVG: for a report, in the colours of the page around them; for a file, in those of light or dark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elc_fx.report import drawing
from elc_fx.training.history import Epoch

INK = "#010203"  # what the page's own colour is put in the place of
BLUE, ORANGE = "#3b82d6", "#d0702a"  # that can be read on white and on black
LONGEST_NAME = 24  # characters of a point's name
STYLE: dict[Any, Any] = {  # what figures are made with, as matplotlib calls it
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "text.parse_math": False,  # names are text
    "svg.fonttype": "none",  # and text stays text
}


@dataclass(frozen=True)
class Point:
    """A network on the accuracy–cost curve. flops: of one sample; accuracy: a share."""

    name: str
    flops: int
    accuracy: float


def accuracy_cost(points: Sequence[Point]) -> str:
    """Accuracy over FLOPs, one point for each network, with its name."""
    from matplotlib import rc_context  # a second to import

    points = sorted(points, key=lambda point: point.flops)
    with rc_context(STYLE):
        figure, axes = _figure()
        axes.plot([p.flops / 1e6 for p in points], [100 * p.accuracy for p in points], "o-", color=BLUE)
        for point in points:
            axes.annotate(
                drawing.shortened(point.name, LONGEST_NAME),
                (point.flops / 1e6, 100 * point.accuracy),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
            )
        axes.margins(0.15, 0.2)
        axes.spines["right"].set_visible(False)
        axes.set_xlabel("MFLOPs")
        axes.set_ylabel("accuracy [%]")
        return svg(figure, "accuracy-cost")


def training(epochs: Sequence[Epoch]) -> str:
    """Loss, validation and gate over the epochs."""
    from matplotlib import rc_context

    numbers = [epoch.number for epoch in epochs]
    scored = [(epoch.number, epoch.score) for epoch in epochs if epoch.score is not None]
    with rc_context(STYLE):
        figure, axes = _figure()
        axes.plot(numbers, [epoch.loss for epoch in epochs], "o-", color=BLUE, label="training loss (left)")
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0.5, len(epochs) + 0.5)
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        if scored:
            right.plot(*zip(*scored, strict=True), "s-", color=ORANGE, label="validation (right)")
        right.plot(numbers, [epoch.gate for epoch in epochs], ".:", color=INK, label="gate (right)")
        right.set_ylabel("validation, gate")
        if all(score >= 0 for _, score in scored):  # else it is minus a loss
            right.set_ylim(-0.03, 1.05)
        lines = [*axes.lines, *right.lines]
        labels = [line.get_label() for line in lines]
        axes.legend(lines, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
        return svg(figure, "training")


def svg(figure: Any, name: str) -> str:
    """A figure of this style for a page: the same text for the same figure and name."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def picture(figure: Any, name: str) -> str:
    """The same for a file of its own, which follows light and dark."""
    start, end, rest = svg(figure, name).partition(">")
    light, dark = (
        f"svg{{color:{ink};background:{paper}}}" for ink, paper in zip(drawing.INK, drawing.PAPER, strict=True)
    )
    return f"{start}{end}<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>{rest}"


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.spines["top"].set_visible(False)
    return figure, axes
