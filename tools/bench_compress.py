"""What `elc-fx compress` makes of trained CIFAR networks: accuracy, costs and time, as its users get them.

    python tools/bench_compress.py --weights resnet20.safetensors --data cifar10-jpeg.tar.xz \\
        --budget flops=0.5 --budget flops=0.65 --epochs 5 --out runs/

Runs the job of the command line for every network and budget, with its defaults; in a folder of its own each, so that a
run that was killed goes on. The epoch that remains is chosen on held-out training images; test images only give the
figures. Stores docs/results/compress.json, a row for each network, budget and number of epochs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import elc_fx
import provenance
import terminal
from cifar_models import load
from elc_fx import job

RESULT = provenance.RESULTS / "compress.json"


def compressed(weights: Path, data: Path, budget: str, epochs: int, out: Path) -> dict[str, Any]:
    folder = out / f"{weights.stem}-{budget}-{epochs}"
    result = job.run(load(weights), data, elc_fx.Budget.parse(budget), folder, epochs=epochs)
    comparison, plan = result.comparison, result.report.plan
    assert plan is not None
    return {
        "network": weights.stem,
        "budget": budget,
        "epochs": epochs,
        "accuracy": asdict(result.accuracy),
        "before": comparison.before.to_dict(),
        "after": comparison.after.to_dict(),
        "regions": [candidate.full_name for candidate in plan.candidates],
        "history": [asdict(epoch) for epoch in result.report.epochs],
    }


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Test accuracy and costs, before and after."""
    lines = []
    for row in rows:
        (a, b), before, after = row["accuracy"]["test"], row["before"], row["after"]
        flops, params = (f"{after[key] / before[key] - 1:+.1%}" for key in ("flops", "parameters"))
        depth = f"{before['depth']} → {after['depth']}"
        cells = [row["network"], row["budget"], row["epochs"], f"{a:.2%}", f"{b:.2%}", f"{100 * (b - a):+.2f}"]
        lines.append([*cells, flops, params, depth])
    headers = ("network", "budget", "epochs", "test accuracy", "after", "points", "FLOPs", "parameters", "depth")
    return terminal.table(lines, headers, style)


def main(
    weights: Annotated[list[Path], typer.Option(help="A weight file of a CIFAR network; several times for several.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    budget: Annotated[list[str], typer.Option(help="As for elc-fx compress; several times for several.")],
    out: Annotated[Path, typer.Option(help="Where the runs go.")],
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 5,
) -> None:
    run = provenance.collect()
    for path, limits in terminal.tracked([(path, limits) for path in weights for limits in budget], str):
        row = compressed(path, data, limits, epochs, out)
        kept = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
        key = (row["network"], row["budget"], row["epochs"])
        rows = [*(old for old in kept if (old["network"], old["budget"], old["epochs"]) != key), row]
        provenance.store(RESULT, run, {"rows": sorted(rows, key=lambda r: (r["network"], r["epochs"], r["budget"]))})
        print(table([row]), flush=True)


if __name__ == "__main__":
    terminal.run(main, __doc__)
