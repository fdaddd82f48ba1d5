"""Is a network that was merged exactly ever slower? Networks in turns with their originals, under several runtimes.

    OMP_NUM_THREADS=1 python tools/bench_runtimes.py                   six networks, four runtimes, batches of 1 and 32
    OMP_NUM_THREADS=1 python tools/bench_runtimes.py --model resnet18 --runtime eager

Models are torchvision's, or else timm's (RepVGG and MobileOne, with all of their branches). Stores
docs/results/runtimes.json after each measurement; what is measured again replaces its row.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast, get_args

import torch
import typer
from torch import nn

import elc_fx
import provenance
import terminal
from elc_fx.planning.latency import Backend, rounds, runner
from zoo import TIMM, build, family_of

MODELS = ["resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "repvgg_a0", "mobileone_s0"]
RUNTIMES: list[str] = list(get_args(Backend))
BATCHES = [1, 32]
BLOCKS = 15  # of each network, in turns
RESULT = provenance.RESULTS / "runtimes.json"


def built(name: str) -> nn.Module:
    try:
        family = family_of(name)
    except KeyError:
        family = TIMM
    return build(family, name)


def measured(name: str, model: nn.Module, backend: Backend, batch: int, size: int, blocks: int) -> dict[str, Any]:
    """Seconds of the original and of its exact merge, and how many times as fast the merge is, block by block."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    compiled = elc_fx.compile(model, verify=False)
    before, after = rounds([runner(network, [x], backend) for network in (model, compiled)], blocks)
    low, median, high = statistics.quantiles([a / b for a, b in zip(before, after, strict=True)], n=4)
    return {
        "model": name,
        "runtime": backend,
        "batch": batch,
        "size": size,
        "layers": list(elc_fx.report_of(compiled).totals.layers),
        "seconds": [statistics.median(before), statistics.median(after)],
        "speedup": median,
        "quartiles": [low, high],
    }


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """How many times as fast as the original: median and quartiles. One line for each model and batch."""
    runtimes = [name for name in RUNTIMES if any(row["runtime"] == name for row in rows)]
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        line = cells.setdefault((row["model"], row["batch"]), {"layers": "{} → {}".format(*row["layers"])})
        line[row["runtime"]] = "{:.2f} ({:.2f}–{:.2f})".format(row["speedup"], *row["quartiles"])
    lines = [[*key, line["layers"], *(line.get(name, "") for name in runtimes)] for key, line in cells.items()]
    return terminal.table(lines, ("model", "batch", "layers", *runtimes), style)


def main(
    model: Annotated[list[str], typer.Option(help="Of torchvision or timm; several times for several.")] = MODELS,
    runtime: Annotated[list[str], typer.Option(help="Several times for several.")] = RUNTIMES,
    batch: Annotated[list[int], typer.Option(help="Images at a time; several times for several.")] = BATCHES,
    size: Annotated[int, typer.Option(help="Of the images.", min=32)] = 224,
    blocks: Annotated[int, typer.Option(help="Of each network, in turns.", min=3)] = BLOCKS,
) -> None:
    run = provenance.collect()
    models = {name: built(name) for name in model}
    jobs = [(name, backend, count) for name in model for count in batch for backend in runtime]
    rows: dict[Any, Mapping[str, Any]] = {}
    for name, backend, count in terminal.tracked(jobs, str):
        row = measured(name, models[name], cast(Backend, backend), count, size, blocks)
        kept = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
        rows = {_key(old): old for old in kept} | {_key(row): row}
        provenance.store(RESULT, run, {"rows": list(rows.values())})
    print(table(list(rows.values())))


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["model"], row["runtime"], row["batch"]


if __name__ == "__main__":
    terminal.run(main, __doc__)
