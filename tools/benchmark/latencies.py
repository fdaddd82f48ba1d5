"""The time of every network of the benchmark against its original, in one run, under several runtimes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

import elc_fx
import provenance
import terminal
from benchmark.methods import BATCHES, FOR_TIME, METHODS, RUNTIMES, Task
from benchmark.rows import FOLDER, RUNS, deployed, layers_of
from cifar_models import load
from elc_fx.deploying import exporting
from elc_fx.planning.latency import Backend, rounds, runner

RESULT = provenance.RESULTS / "benchmark_latency.json"
BLOCKS = 15  # of each network, in turns
TOLERANCE = 0.01  # of the FLOPs of a network that is made again
METHOD_NAMES = list(METHODS)
ORIGINAL, FOLDED = "original", "batch norms folded"


def measure(
    weights: Annotated[Path, typer.Option(help="The weight file of the original.")],
    runtime: Annotated[list[str], typer.Option(help="Several times for several.")] = RUNTIMES,
    batch: Annotated[list[int], typer.Option(help="Images at a time; several times for several.")] = BATCHES,
    method: Annotated[list[str], typer.Option(help="Several times for several.")] = METHOD_NAMES,
    runs: Annotated[Path, typer.Option(help="Where `train` kept the networks.")] = RUNS,
    data: Annotated[Path | None, typer.Option(help="CIFAR-10, to make networks again that are not kept.")] = None,
    result: Annotated[Path, typer.Option(help="What is stored; another file for another processor.")] = RESULT,
) -> None:
    """Times all networks that were made of one, with the original and its exact merge, in turns.

    Those that are not kept are planned or pruned again, and not trained, since times do not depend on weights.
    Networks of the same layers are timed once. A network, runtime and batch that is measured again replaces its rows.
    """
    run = provenance.collect()
    networks, names = _networks(weights, runs, data, method)
    for backend, size in terminal.tracked([(b, n) for b in runtime for n in batch], str):
        x = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        calls = [runner(network, [x], cast(Backend, backend)) for network in networks.values()]
        times = dict(zip(networks, rounds(calls, BLOCKS), strict=True))
        measured = {"network": weights.stem, "runtime": backend, "batch": size, "date": run.date}
        new = [{**measured, "row": row, **_summary(times, name)} for row, name in names.items()]
        key = weights.stem, backend, size
        rows = [*(row for row in stored(result) if (row["network"], row["runtime"], row["batch"]) != key), *new]
        provenance.store(result, run, {"rows": rows})


def _summary(times: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Seconds, and how many times as fast as the original with its batch norms folded: block by block."""
    speedups = [folded / own for folded, own in zip(times[FOLDED], times[name], strict=True)]
    low, median, high = statistics.quantiles(speedups, n=4)
    return {"seconds": statistics.median(times[name]), "speedup": median, "quartiles": [low, high]}


def stored(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, each with the date of its measurement; none where there is no such file."""
    if not file.exists():
        return []
    run = json.loads(file.read_text(encoding="utf-8"))
    return [{"date": run["provenance"]["date"], **row} for row in run["rows"]]


def _networks(
    weights: Path, runs: Path, data: Path | None, methods: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """One network of each architecture, by the first row that has it; and for each row that name."""
    model = load(weights)
    networks: dict[str, nn.Module] = {ORIGINAL: model, FOLDED: elc_fx.compile(model)}
    names, first = {ORIGINAL: ORIGINAL, FOLDED: FOLDED}, dict[str, str]()
    for file in sorted(FOLDER.glob(f"{weights.stem}-*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        if row["method"] not in methods:
            continue
        layers = layers_of(row)
        if layers not in first:
            program = _program(row, runs / file.stem / "model.pt2", weights, data)
            if program is None:
                continue
            first[layers] = file.stem
            networks[file.stem] = program.module(check_guards=False)
        names[file.stem] = first[layers]
    return networks, names


def _program(row: dict[str, Any], kept: Path, weights: Path, data: Path | None) -> torch.export.ExportedProgram | None:
    """The row's network, or one of about its costs that is made again without training; None where there is neither."""
    if kept.exists():
        return torch.export.load(kept)
    if data is None or "after" not in row or (row["method"] in FOR_TIME and not row.get("plan")):
        return None  # a plan for time is another one each time
    task = Task(weights, data, row["budget"], row["seed"], kept.parent.parent / "losses")
    method, stored_plan = METHODS[row["method"]], row.get("plan")
    plan = elc_fx.Plan.from_json(json.dumps(stored_plan)) if stored_plan else method.plan(task)
    network = deployed(method.network(task, plan), task.x)
    measured, stored = elc_fx.measure(network, task.x).to_dict(), row["after"]
    if measured["depth"] != stored["depth"] or abs(measured["flops"] / stored["flops"] - 1) > TOLERANCE:
        print(f"{kept.parent.name} is not timed: made again, its costs are {measured}, not {stored}")
        return None
    return exporting.export(network, (task.x,)).program
