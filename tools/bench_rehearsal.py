"""Whether a short training tells which plan is worth more once it is trained: plans of the benchmark, by both.

    python tools/bench_rehearsal.py --network resnet20 --weights resnet20.safetensors --budget 0.5 \\
        --data cifar10-jpeg.tar.xz

The plans are those of the benchmark's rows at one budget, whose networks were trained for some epochs from fitted
convolutions; their losses are measured again on calibration samples, before and after a short training. Stores
docs/results/rehearsal.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

import elc_fx
import provenance
import terminal
from benchmark.methods import METHODS, Task, fitted
from benchmark.rows import FOLDER, RUNS

RESULT = provenance.RESULTS / "rehearsal.json"


def rows_of(network: str, budget: float, epochs: int) -> list[list[dict[str, Any]]]:
    """Of each method whose convolutions are fitted, those with a plan, one for each seed."""
    names = [name for name, method in METHODS.items() if method.network is fitted]
    files = [sorted(FOLDER.glob(f"{network}-{name}-{budget:g}-{epochs}-*.json")) for name in names]
    rows = [[json.loads(file.read_text(encoding="utf-8")) for file in own] for own in files]
    return [planned for own in rows if (planned := [row for row in own if row.get("plan")])]


def measured(rows: Sequence[Mapping[str, Any]], planner: elc_fx.Planner) -> dict[str, Any]:
    """The losses of a plan, and what its networks reached."""
    first = rows[0]
    plan = elc_fx.Plan.from_json(json.dumps(first["plan"]))
    positions = [[c.candidate for c in planner.choices].index(candidate) for candidate in plan.candidates]
    return {
        **{key: first[key] for key in ("network", "method", "budget", "epochs")},
        "layers": first["after"]["depth"],
        "before": planner.loss_together(positions),
        "after": planner.loss_after_training(positions),
        "accuracies": [row["test"][1] for row in rows],
    }


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Losses before and after the short training, beside the accuracy after the long one."""
    lines = [
        [
            *(row["network"], f"{row['budget']:.1%}", row["method"], row["layers"]),
            *(f"{row['before']:.3f}", f"{row['after']:.3f}"),
            f"{mean(row['accuracies']):.2%} ({row['epochs']} epochs, seeds: {len(row['accuracies'])})",
        ]
        for row in sorted(rows, key=lambda row: (row["network"], row["after"]))
    ]
    headers = ["network", "budget", "plan of", "layers", "loss before training", "after a short one", "test accuracy"]
    return terminal.table(lines, headers, style)


def main(
    network: Annotated[list[str], typer.Option(help="As the benchmark's rows call it; several for several.")],
    weights: Annotated[list[Path], typer.Option(help="The weight file of each.")],
    budget: Annotated[list[float], typer.Option(help="The share of the FLOPs of each.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    epochs: Annotated[int, typer.Option(help="Of the benchmark's rows.", min=1)] = 5,
    runs: Annotated[Path, typer.Option(help="Where the benchmark keeps the losses of candidates.")] = RUNS,
) -> None:
    if not len(network) == len(weights) == len(budget):
        raise typer.BadParameter(f"{len(network)} networks, {len(weights)} weight files and {len(budget)} budgets")
    run = provenance.collect()
    pairs = zip(weights, budget, strict=True)
    tasks = [Task(file, data, share, seed=0, cache=runs / "losses") for file, share in pairs]
    planned = [rows_of(name, share, epochs) for name, share in zip(network, budget, strict=True)]
    for name, share, found in zip(network, budget, planned, strict=True):
        if not found:
            raise typer.BadParameter(f"{FOLDER} has no rows with plans of {name} at {share:g} and {epochs} epochs")
    rows = []
    for task, found in zip(tasks, planned, strict=True):
        planner = task.planner()
        rows += [measured(own, planner) for own in terminal.tracked(found, lambda own: own[0]["method"])]
    provenance.store(RESULT, run, {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    terminal.run(main, __doc__)
