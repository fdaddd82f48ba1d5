"""One row of the benchmark: make a network, fine-tune it, merge it, score it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import elc_fx
import provenance
from benchmark.methods import METHODS, Task
from elc_fx.deploying import exporting
from elc_fx.training import data as pictures
from elc_fx.training import finetuning as training

Row = Mapping[str, Any]
FOLDER = provenance.RESULTS / "benchmark"
RUNS = provenance.ROOT.parent / "elc_fx_benchmark"
BATCH = 128


def train(
    weights: Annotated[Path, typer.Option(help="A weight file of a CIFAR network.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    method: Annotated[list[str], typer.Option(help=f"{', '.join(METHODS)}; several times for several.")],
    budget: Annotated[float, typer.Option(help="Share of the FLOPs; for elc-RUNTIME, of the time.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Of all that is random in the training.")] = 0,
    runs: Annotated[Path, typer.Option(help="Where checkpoints and networks are kept.")] = RUNS,
    plan: Annotated[Path | None, typer.Option(help="A stored row, whose plan is taken instead of a new one.")] = None,
) -> None:
    """Makes, trains and scores a network for each method; what is stored is not run again."""
    unknown = [name for name in method if name not in METHODS]
    if unknown:
        raise typer.BadParameter(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    run = provenance.collect()
    made = plan and _plan_of(plan, weights.stem, budget, method)
    for name in method:
        key = {"network": weights.stem, "method": name, "budget": budget, "epochs": epochs, "seed": seed}
        stem = stem_of(key)
        if (FOLDER / f"{stem}.json").exists():
            print(f"{stem} is there")
            continue
        task = Task(weights, data, budget, seed, runs / "losses")
        provenance.store(FOLDER / f"{stem}.json", run, key | trained(task, name, epochs, runs / stem, made))


def _plan_of(file: Path, network: str, budget: float, methods: Sequence[str]) -> elc_fx.Plan:
    """What a stored row was planned, for methods that would plan the same."""
    row = json.loads(file.read_text(encoding="utf-8"))
    if (row["network"], row["budget"]) != (network, budget) or not row.get("plan"):
        raise typer.BadParameter(f"{file.name} has no plan of {network} for a budget of {budget:g}")
    for name in methods:
        if METHODS[name].plan is not METHODS[row["method"]].plan:
            raise typer.BadParameter(f"{name!r} is not planned as {row['method']!r} is, in {file.name}")
    return elc_fx.Plan.from_json(json.dumps(row["plan"]))


def trained(task: Task, name: str, epochs: int, folder: Path, plan: elc_fx.Plan | None = None) -> dict[str, Any]:
    """What came of it, or why there is no plan; the network is written to the folder as model.pt2.

    plan: by default the method makes one.
    """
    method, (train, kept) = METHODS[name], task.images
    torch.manual_seed(task.seed)
    try:
        plan = plan or method.plan(task)
    except elc_fx.PlanError as error:
        return {"unreachable": str(error)}
    network = method.network(task, plan)
    held_out = list(kept.batches(pictures.SCORED_BATCH))
    untrained = pictures.accuracy(network.eval(), kept)
    history = elc_fx.finetune(
        network,
        train.loader(BATCH),
        teacher=task.model,
        epochs=method.epochs * epochs,
        validation=held_out,
        folder=folder / "work",
        seed=1000 * task.seed,
        **method.options,
    )
    small = deployed(network, task.x)
    exporting.save(exporting.export(small, (task.x,)), folder / "model.pt2")
    test = pictures.load(task.data, "test")
    assert test is not None
    comparison = elc_fx.compare(task.model, small, task.x)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # that `finetune` takes
    return {
        "plan": plan and json.loads(plan.to_json()),
        "held_out": [untrained, pictures.accuracy(small, kept)],
        "test": [pictures.accuracy(task.model, test), pictures.accuracy(small, test)],
        "before": comparison.before.to_dict(),
        "after": comparison.after.to_dict(),
        "arithmetic": "bfloat16" if training.computes_in_bf16(device) else "float32",
        "history": [asdict(epoch) for epoch in history.epochs],
    }


def deployed(network: nn.Module, x: Tensor) -> nn.Module:
    """What remains of a network that a method made: its regions and batch norms merged."""
    if isinstance(network, elc_fx.DecoupledModule):
        elc_fx.set_gate(network, 0)
        network = elc_fx.merge(network.eval())
    return elc_fx.compile(network.eval(), x)


def stem_of(row: Row) -> str:
    """The name of a row's file and of its network's folder."""
    return f"{row['network']}-{row['method']}-{row['budget']:g}-{row['epochs']}-{row['seed']}"


def layers_of(row: Row) -> str:
    """Equal for networks of the same layers, which take the same time. Pruned ones of equal costs were pruned alike."""
    plan, activations = row.get("plan"), METHODS[row["method"]].activations
    if METHODS[row["method"]].prunes and "after" in row:
        return f"{row['network']} {row['method']} {json.dumps(row['after'], sort_keys=True)}"
    return f"{row['network']} {activations} {json.dumps(plan['candidates'], sort_keys=True)}" if plan else stem_of(row)
