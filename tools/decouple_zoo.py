"""Decouples and merges torchvision's networks: random maximal plans, and single candidates, in float64.

    python tools/decouple_zoo.py                      into docs/results/decouple_zoo.json
    python tools/decouple_zoo.py --only 'resnet*'

For each plan: at gate 1 the outputs are compared with the original's, at gate 0 those of the merged network with the
decoupled one's, at the planned size and at one never seen before. Random batch-norm statistics and parameters. Exits 1
if anything fails or differs by more than 1e-9.
"""

import fnmatch
import random
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import elc_fx
import provenance
import terminal
from zoo import build, family_of, unsettle

NETWORKS = (
    *("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "regnet_y_400mf", "convnext_tiny"),
    "googlenet",
)
TOLERANCE = 1e-9
SIZE, OTHER_SIZE = (64, 64), (71, 83)
LONGEST = 2  # blocks in a row
LARGEST_KERNEL = 5  # dense 7×7 kernels of 2,048 channels take minutes each in float64


def check(name: str, plans: int, singles: int) -> dict[str, Any]:
    """One network; errors are the largest over all plans."""
    torch.manual_seed(0)
    chance = random.Random(0)
    model = build(family_of(name), name)
    unsettle(model, (torch.randn(4, 3, *SIZE),))
    model = model.double()
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    start = time.perf_counter()
    candidates = elc_fx.candidates(model, x, longest=LONGEST, largest_kernel=LARGEST_KERNEL)
    seconds = time.perf_counter() - start
    chosen = [maximal(chance.sample(candidates, len(candidates))) for _ in range(plans)]
    chosen += [[candidate] for candidate in chance.sample(candidates, min(singles, len(candidates)))]
    original = model(x)
    errors = [errors_of(model, elc_fx.Plan(tuple(some), ("x",)), x, original) for some in chosen]
    return {
        "network": name,
        "candidates": len(candidates),
        "seconds": seconds,
        "plans": plans,
        "singles": len(chosen) - plans,
        "most_regions": max(map(len, chosen)),
        "error_open": max(e[0] for e in errors),
        "error_merged": max(e[1] for e in errors),
    }


def maximal(candidates: Sequence[elc_fx.Candidate]) -> list[elc_fx.Candidate]:
    """The candidates in turn, as far as they overlap with none before."""
    used: set[str] = set()
    chosen = []
    for candidate in candidates:
        if not used & set(candidate.nodes):
            chosen.append(candidate)
            used |= set(candidate.nodes)
    return chosen


def errors_of(model: nn.Module, plan: elc_fx.Plan, x: Tensor, original: Tensor) -> tuple[float, float]:
    """Relative errors: of the decoupled network at gate 1, and of the merged one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random plans merge what costs more
        decoupled = elc_fx.decouple(model, plan)
    opened = relative(decoupled(x), original)
    if elc_fx.gates(decoupled):
        elc_fx.set_gate(decoupled, 0)
    merged = elc_fx.merge(decoupled)
    other = torch.randn(1, 3, *OTHER_SIZE, dtype=torch.float64)
    return opened, max(relative(merged(value), decoupled(value)) for value in (x, other))


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    headers = ("network", "candidates", "listed in [s]", "plans", "error at gate 1", "error of the merge")
    cells = [
        (
            row["network"],
            row["candidates"],
            f"{row['seconds']:.1f}",
            f"{row['plans']} maximal (up to {row['most_regions']} regions), {row['singles']} single",
            f"{row['error_open']:.0e}",
            f"{row['error_merged']:.0e}",
        )
        for row in rows
    ]
    return terminal.table(cells, headers, style)


def main(
    only: Annotated[str, typer.Option(help="A pattern over the names of the networks.")] = "*",
    plans: Annotated[int, typer.Option(help="Random maximal plans for each network.")] = 4,
    singles: Annotated[int, typer.Option(help="Random single candidates for each network.")] = 8,
) -> None:
    origin = provenance.collect()
    names = fnmatch.filter(NETWORKS, only)
    with torch.no_grad():
        rows = [check(name, plans, singles) for name in terminal.tracked(names)]
    print(table(rows))
    if only == "*":
        provenance.store(provenance.RESULTS / "decouple_zoo.json", origin, {"rows": rows})
    if not all(max(row["error_open"], row["error_merged"]) <= TOLERANCE for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    terminal.run(main, __doc__)
