"""How well latencies are predicted: plans under latency budgets against the networks that they leave behind.

    OMP_NUM_THREADS=1 python tools/bench_latency.py --weights resnet20.safetensors --weights resnet56.safetensors

For each network, backend and budget, the planner predicts the latency of its plan, and then the whole network is
measured anew, in turns with the original. Batch norms are folded in both. Stores docs/results/plan_latency.json; a
network and backend that is measured again replaces its rows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import elc_fx
import provenance
import terminal
from cifar_models import load
from elc_fx.planning.latency import LatencyMeter

BUDGETS = (0.8, 0.65, 0.5, 0.4, 0.3)
BACKENDS = ("eager", "compile", "onnxruntime")
RESULT = provenance.RESULTS / "plan_latency.json"


def measured(weights: Path, backend: Any, batch: int) -> list[dict[str, Any]]:
    inputs = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    planner, rows = elc_fx.Planner(load(weights), inputs, loss="uniform", backend=backend), []
    choices = {choice.candidate: choice for choice in planner.choices}
    for budget in BUDGETS:
        plan = planner.plan(elc_fx.Budget(latency=budget))
        prediction = plan.prediction
        assert prediction is not None
        chosen = [choices[candidate] for candidate in plan.candidates]
        before, after = LatencyMeter(planner.graph, backend).whole(chosen)
        rows.append(
            {
                "network": weights.stem,
                "backend": backend,
                "batch": batch,
                "budget": budget,
                "flops": prediction.after.flops / prediction.before.flops,
                "predicted": prediction.after.latency / prediction.before.latency * before,
                "original": before,
                "measured": after,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Predicted and measured milliseconds, and how far the prediction is off."""
    lines = [
        [
            row["network"],
            row["backend"],
            f"{row['budget']:.0%}",
            f"{row['flops']:.1%}",
            *(f"{1000 * row[key]:.3f}" for key in ("original", "predicted", "measured")),
            f"{row['predicted'] / row['measured'] - 1:+.1%}",
        ]
        for row in rows
    ]
    headers = (
        "network",
        "backend",
        "budget",
        "FLOPs left",
        "original [ms]",
        "predicted [ms]",
        "measured [ms]",
        "error",
    )
    return terminal.table(lines, headers, style)


def main(
    weights: Annotated[list[Path], typer.Option(help="A weight file of a CIFAR network; several times for several.")],
    backend: Annotated[list[str], typer.Option(help="Several times for several.")] = list(BACKENDS),  # noqa: B006
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 1,
) -> None:
    run = provenance.collect()
    jobs = [(path, name) for path in weights for name in backend]
    rows = [row for path, name in terminal.tracked(jobs, str) for row in measured(path, name, batch)]
    kept = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    again = {(row["network"], row["backend"], row["batch"]) for row in rows}
    old = [row for row in kept if (row["network"], row["backend"], row["batch"]) not in again]
    provenance.store(RESULT, run, {"rows": [*old, *rows]})
    print(table(rows))


if __name__ == "__main__":
    terminal.run(main, __doc__)
