"""What planning is worth: accuracy of planned networks against other plans of equal cost, without any training.

    python tools/bench_plan.py --weights resnet20.safetensors --data cifar10-jpeg.tar.xz

For each budget of FLOPs the planner chooses; against it stand plans that collapse random candidates, the first blocks
first, the last blocks first, and greedily the candidates that lose least per FLOP saved, each until the budget is met.
Every network has its convolutions fitted in the same way, on the same calibration images. Calibration and accuracy are
both on images of the training set, different ones. Stores docs/results/plan_accuracy.json, a row for each network and
budget; a network that is measured again replaces its rows.
"""

import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn

import elc_fx
import provenance
import terminal
from cifar_models import load
from elc_fx.planning.cost import Choice
from elc_fx.training import data as pictures

BUDGETS = (0.8, 0.65, 0.5, 0.4, 0.3)
RANDOM_PLANS = 5
RESULT = provenance.RESULTS / "plan_accuracy.json"


def until_met(planner: elc_fx.Planner, order: Iterable[Choice], limit: float) -> list[Choice] | None:
    """Takes the candidates in their order, where they overlap with none that was taken, until the limit is kept."""
    taken: list[Choice] = []
    used: set[str] = set()
    for choice in order:
        if planner.model.after(taken).flops <= limit:
            break
        if not used & set(choice.candidate.nodes):
            taken.append(choice)
            used |= set(choice.candidate.nodes)
    return taken if planner.model.after(taken).flops <= limit else None


def at_random(planner: elc_fx.Planner, limit: float, generator: random.Random) -> list[Choice]:
    while True:
        order = generator.sample(planner.choices, len(planner.choices))
        if (taken := until_met(planner, order, limit)) is not None:
            return taken


def blocks_in_order(planner: elc_fx.Planner, limit: float, *, last_first: bool) -> list[Choice] | None:
    """Residual blocks one by one into 3×3 convolutions; where that is not enough, as many as needed into 1×1."""
    blocks: dict[str, dict[str, Choice]] = {}
    for choice in planner.choices:
        name, _, kernel = choice.candidate.full_name.partition(":")
        if len(choice.candidate.layers) == 2 and ".." not in name:
            blocks.setdefault(name, {})[kernel] = choice
    names = sorted(blocks, reverse=last_first)
    for pointwise in range(len(names) + 1):
        order = [blocks[n]["1x1"] for n in names[:pointwise]] + [blocks[n]["3x3"] for n in names[pointwise:]]
        if (taken := until_met(planner, order, limit)) is not None:
            return taken
    return None


def accuracy(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of the images, the share with the right class."""
    with torch.no_grad():
        right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def measured(weights: Path, images: pictures.Images, calibration: int, held_out: int) -> list[dict[str, Any]]:
    model = load(weights)
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs = images.taken(drawn[:calibration]).inputs()
    chosen = drawn[calibration : calibration + held_out]
    batches = list(images.taken(chosen).batches(250))
    start = time.perf_counter()
    planner = elc_fx.Planner(model, inputs[:1], list(inputs.split(128)), rehearse=False)
    tables = time.perf_counter() - start
    generator, rows = random.Random(0), []

    def result(choices: Sequence[Choice] | None) -> dict[str, float] | None:
        if choices is None:
            return None
        plan = elc_fx.Plan(tuple(choice.candidate for choice in choices), planner.inputs)
        share = planner.model.after(choices).flops / planner.model.original.flops
        return {"flops": share, "accuracy": accuracy(planner.collapse(plan), batches)}

    by_candidate = {choice.candidate: choice for choice in planner.choices}
    ratio = [
        loss / (c.candidate.flops[0] - c.candidate.flops[1])
        for c, loss in zip(planner.choices, planner.losses, strict=True)
    ]
    greedy = [planner.choices[i] for i in sorted(range(len(ratio)), key=ratio.__getitem__)]
    original = accuracy(model, batches)
    for budget in BUDGETS:
        limit = budget * planner.model.original.flops
        start = time.perf_counter()
        plan = planner.plan(elc_fx.Budget(flops=budget))
        seconds = time.perf_counter() - start
        rows.append(
            {
                "network": weights.stem,
                "budget": budget,
                "candidates": len(planner.choices),
                "seconds": {"tables": tables, "plan": seconds},
                "original": original,
                "planned": result([by_candidate[c] for c in plan.candidates]),
                "greedy": result(until_met(planner, greedy, limit)),
                "first": result(blocks_in_order(planner, limit, last_first=False)),
                "last": result(blocks_in_order(planner, limit, last_first=True)),
                "random": [result(at_random(planner, limit, generator)) for _ in range(RANDOM_PLANS)],
            }
        )
        print(table(rows[-1:]))
    return rows


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Accuracy in per cent of each kind of plan, with the FLOPs that it leaves."""

    def cell(result: Mapping[str, float] | None) -> str:
        return "not reached" if result is None else f"{result['accuracy']:.1%} ({result['flops']:.1%})"

    def spread(results: Sequence[Mapping[str, float]]) -> str:
        values = [r["accuracy"] for r in results]
        return f"{statistics.median(values):.1%} ({min(values):.1%}–{max(values):.1%})"

    lines = [
        [
            row["network"],
            f"{row['budget']:.0%}",
            f"{row['original']:.1%}",
            *(cell(row[kind]) for kind in ("planned", "greedy", "first", "last")),
            spread(row["random"]),
        ]
        for row in rows
    ]
    headers = ("network", "budget", "original", "planned (FLOPs)", "greedy", "first blocks first", "last blocks first")
    return tabulate(lines, (*headers, "random: median (range)"), tablefmt=style, disable_numparse=True)


def seconds_table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """How long the planner took: the losses of all candidates, and then the plan for one budget."""
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        plans = [row["seconds"]["plan"] for row in own]
        tables = own[0]["seconds"]["tables"]
        lines.append([network, own[0]["candidates"], f"{tables:.0f}", f"{statistics.median(plans):.1f}"])
    headers = ("network", "candidates", "losses [s]", "plan for a budget [s]")
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True, colalign=("left", *["right"] * 3))


def main(
    weights: Annotated[list[Path], typer.Option(help="A weight file of a CIFAR network; several times for several.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    calibration: Annotated[int, typer.Option(help="Images that losses are measured on.", min=1)] = 512,
    held_out: Annotated[int, typer.Option(help="Other images, for the accuracy.", min=1)] = 2000,
) -> None:
    run = provenance.collect()
    images = pictures.load(data)
    assert images is not None
    rows = [row for path in weights for row in measured(path, images, calibration, held_out)]
    kept = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    names = {row["network"] for row in rows}
    provenance.store(RESULT, run, {"rows": [*(row for row in kept if row["network"] not in names), *rows]})


if __name__ == "__main__":
    terminal.run(main, __doc__)
