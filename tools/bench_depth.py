"""How planning time grows with depth: CIFAR ResNets of 20 to 110 layers with random weights, and where the time goes.

    python tools/bench_depth.py

For each depth: the losses of all candidates, and one plan at half of the FLOPs; and of the losses, how much went into
the fits (windows, factors, solutions), into the rest of the network behind each candidate, and into all else, as is the
network before the candidates, once. Stores docs/results/plan_depth.json.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any
from unittest import mock

import torch
import typer

import elc_fx
import provenance
import terminal
from cifar_models import ResNet
from elc_fx.planning.fitting import Windows
from elc_fx.planning.sensitivity import Walk

BATCHES = 4
BLOCKS = (3, 5, 7, 9, 18)  # a stage
RESULT = provenance.RESULTS / "plan_depth.json"
PARTS = {"rest": (Walk, "output_with"), "windows": (Windows, "of"), "solutions": (Windows, "fit")}


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds that the parts take, while this is open."""
    spent = dict.fromkeys(PARTS, 0.0)

    def clock(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, attribute, clock(name, getattr(owner, attribute))))
        yield spent


def measured(blocks: int, samples: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ResNet(blocks)
    images = torch.randn(samples, 3, 32, 32)
    model.train()
    with torch.no_grad():
        model(images[:256])  # so that batch norms have statistics
    model.eval()
    with clocked() as spent:
        start = time.perf_counter()
        planner = elc_fx.Planner(model, images[:1], list(images.split(-(-samples // BATCHES))))
        tables = time.perf_counter() - start
        parts = dict(spent)
    start = time.perf_counter()
    planner.plan(elc_fx.Budget(flops=0.5))
    plan = time.perf_counter() - start
    return {"depth": 6 * blocks + 2, "candidates": len(planner.choices), "tables": tables, "plan": plan, "parts": parts}


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Seconds, and shares of those that the losses take."""
    lines = []
    for row in rows:
        parts, whole = row["parts"], row["tables"]
        fits = parts["windows"] + parts["solutions"]
        shares = [parts["rest"] / whole, fits / whole, 1 - (parts["rest"] + fits) / whole]
        lines.append(
            [row["depth"], row["candidates"], f"{whole:.0f}", *(f"{s:.0%}" for s in shares), f"{row['plan']:.0f}"]
        )
    headers = ("layers", "candidates", "losses [s]", "rest of the network", "fits", "all else", "one plan [s]")
    return terminal.table(lines, headers, style)


def main(samples: Annotated[int, typer.Option(help="Calibration images.", min=16)] = 128) -> None:
    run = provenance.collect()
    rows = [measured(blocks, samples) for blocks in terminal.tracked(BLOCKS, lambda n: f"{6 * n + 2} layers")]
    provenance.store(RESULT, run, {"samples": samples, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    terminal.run(main, __doc__)
