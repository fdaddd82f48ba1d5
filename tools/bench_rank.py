"""Does the loss before training foretell the accuracy after it? Many plans of equal cost, each trained for a while.

    python tools/bench_rank.py --weights resnet20.safetensors --data cifar10-jpeg.tar.xz

Draws plans that keep one budget of FLOPs, from good to bad: candidates in random order, weighted by the loss of each to
powers that differ from plan to plan. Each is collapsed and fine-tuned in the same way, on the same images in the same
order. Stores docs/results/plan_rank.json after each plan, and goes on from there: Spearman's rank correlation of the
accuracy, on images of the training set that nothing was fitted to or trained on, with the sum of the predicted losses,
and with the loss of the plan measured as a whole.
"""

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import bootstrap, spearmanr

import elc_fx
import provenance
import terminal
from bench_plan import accuracy, until_met
from cifar_models import load
from elc_fx.planning.cost import Choice
from elc_fx.training import data as pictures

RESULT = provenance.RESULTS / "plan_rank.json"
POWERS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the losses, in the order that candidates are drawn in
NARROW = 0.03  # plans cost this much less than the budget at most


def main(
    weights: Annotated[Path, typer.Option(help="A weight file of a CIFAR network.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    plans: Annotated[int, typer.Option(help="How many.", min=4)] = 32,
    budget: Annotated[float, typer.Option(help="Share of the FLOPs.")] = 0.5,
    images: Annotated[int, typer.Option(help="That each network is trained on, once.")] = 22500,
    held_out: Annotated[int, typer.Option(help="Other images, for the accuracy.")] = 5000,
) -> None:
    run = provenance.collect()
    model, known = load(weights), pictures.load(data)
    assert known is not None
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    test, train = known.taken(drawn[:held_out]), known.taken(drawn[held_out : held_out + images])
    inputs = train.taken(slice(512)).inputs()
    planner = elc_fx.Planner(model, inputs[:1], list(inputs.split(128)))
    batches = list(test.batches(250))
    rows: list[dict[str, Any]] = []
    if RESULT.exists():
        rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    seen = {frozenset(row["regions"]) for row in rows}
    seeds = itertools.count()
    for _ in terminal.tracked(range(len(rows), plans), lambda n: f"plan {n + 1}"):
        choices = new_plan(planner, budget, seeds, seen)
        plan = elc_fx.Plan(tuple(choice.candidate for choice in choices), planner.inputs)
        losses = dict(zip((c.candidate for c in planner.choices), planner.losses, strict=True))
        positions = [i for i, choice in enumerate(planner.choices) if choice in choices]
        together, network = planner.loss_together(positions), planner.collapse(plan)
        untrained = accuracy(network, batches)
        elc_fx.finetune(network, train.loader(128), teacher=model, epochs=1, progress=False)
        row = {
            "regions": [candidate.full_name for candidate in plan.candidates],
            "flops": planner.model.after(choices).flops / planner.model.original.flops,
            "sum": sum(losses[candidate] for candidate in plan.candidates),
            "together": together,
            "untrained": untrained,
            "trained": accuracy(network, batches),
        }
        rows.append(row)
        print({key: row[key] for key in ("flops", "sum", "together", "untrained", "trained")}, flush=True)
        provenance.store(RESULT, run, {"network": weights.stem, "budget": budget, "images": images, "rows": rows})
    print(table(rows))


def new_plan(planner: elc_fx.Planner, budget: float, seeds: Iterator[int], seen: set[frozenset[str]]) -> list[Choice]:
    """The next plan that is not among those that were seen."""
    while True:
        seed = next(seeds)
        choices = drawn_plan(planner, budget, random.Random(seed), POWERS[seed % len(POWERS)])
        names = frozenset(choice.candidate.full_name for choice in choices)
        if names not in seen:
            seen.add(names)
            return choices


def drawn_plan(planner: elc_fx.Planner, budget: float, generator: random.Random, power: float) -> list[Choice]:
    """A plan a little below the budget. power: how much more likely candidates with small losses come first."""
    limit = budget * planner.model.original.flops
    while True:
        # Sorted by u^(1/w), random numbers give each candidate its chance in proportion to its weight w.
        keys = [generator.random() ** (max(loss, 1e-6) ** power) for loss in planner.losses]
        order = [planner.choices[i] for i in sorted(range(len(keys)), key=keys.__getitem__, reverse=True)]
        taken = until_met(planner, order, limit)
        if taken is not None and planner.model.after(taken).flops >= (1 - NARROW) * limit:
            return taken


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Spearman's rank correlation with the accuracy after training, and the interval that holds 95 % of bootstraps."""
    trained = np.array([row["trained"] for row in rows])
    names = {
        "sum": "sum of the divergences of its candidates, each alone",
        "together": "divergence of the plan, measured as a whole",
        "untrained": "accuracy before training",
    }
    lines = []
    for key, name in names.items():
        values = np.array([row[key] for row in rows]) * (1 if key == "untrained" else -1)
        interval = bootstrap(
            (values, trained),
            lambda a, b: spearmanr(a, b).statistic,
            paired=True,
            vectorized=False,
            n_resamples=2000,
            rng=np.random.default_rng(0),
        ).confidence_interval
        correlation = spearmanr(values, trained).statistic
        lines.append([name, f"{correlation:.2f}", f"{interval.low:.2f} to {interval.high:.2f}"])
    spread = f"{min(trained):.1%} to {max(trained):.1%}"
    first = f"predicted by (accuracy of {len(rows)} plans: {spread})"
    return terminal.table(lines, (first, "rank correlation", "95 % interval"), style)


if __name__ == "__main__":
    terminal.run(main, __doc__)
