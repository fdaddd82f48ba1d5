"""What more calibration samples are worth to the fits: accuracy of planned networks before any training.

    python tools/bench_samples.py --row docs/results/benchmark/vgg16-elc-0.259-5-0.json \\
        --weights vgg16.safetensors --data cifar10-jpeg.tar.xz

A row of the benchmark has the plan; several rows may be given, with a weight file each. The accuracy is that on a
held-out part of the training set, which the original has seen in its own training. Stores
docs/results/fit_samples.json.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import elc_fx
import provenance
import terminal
from benchmark.methods import CALIBRATION, CALIBRATION_BATCH, Task
from elc_fx.training import data as pictures

SAMPLES = [1024, CALIBRATION]
RESULT = provenance.RESULTS / "fit_samples.json"


def measured(row: Mapping[str, Any], weights: Path, data: Path, samples: Sequence[int]) -> dict[str, Any]:
    task = Task(weights, data, row["budget"], row["seed"], cache=Path())  # nothing is measured that could be kept
    plan, images = elc_fx.Plan.from_json(json.dumps(row["plan"])), torch.cat(task.calibration)
    fits = []
    for count in samples:
        batches = images[:count].split(CALIBRATION_BATCH)
        planner = elc_fx.Planner(task.model, task.x, batches, loss="uniform", samples=count)
        start = time.perf_counter()
        network = planner.collapse(plan)
        seconds = time.perf_counter() - start
        fits.append({"samples": count, "seconds": seconds, "accuracy": pictures.accuracy(network, task.images[1])})
    return {"network": row["network"], "budget": row["budget"], "fits": fits}


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Accuracy before training, and the seconds that `collapse` takes."""
    lines = [
        [row["network"], f"{row['budget']:.1%}", *(f"{f['accuracy']:.1%} ({f['seconds']:.0f} s)" for f in row["fits"])]
        for row in rows
    ]
    headers = ["network", "budget", *(f"{fit['samples']:,} samples" for fit in rows[0]["fits"])]
    return terminal.table(lines, headers, style)


def main(
    row: Annotated[list[Path], typer.Option(help="A row of the benchmark, for its plan; several for several.")],
    weights: Annotated[list[Path], typer.Option(help="The weight file of each row's network.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    samples: Annotated[
        list[int], typer.Option(help="That are fitted to; several for several.", min=1, max=CALIBRATION)
    ] = SAMPLES,
) -> None:
    if len(row) != len(weights):
        raise typer.BadParameter(f"{len(row)} rows and {len(weights)} weight files; give one for each")
    run = provenance.collect()
    stored = [json.loads(file.read_text(encoding="utf-8")) for file in row]
    pairs = list(zip(stored, weights, strict=True))
    rows = [measured(each, file, data, samples) for each, file in terminal.tracked(pairs, lambda p: p[0]["network"])]
    provenance.store(RESULT, run, {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    terminal.run(main, __doc__)
