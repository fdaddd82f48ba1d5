"""What decoupling gives and costs: the FLOPs of collapsed networks, and the time of a training step.

    python tools/bench_decouple.py flops --weights resnet56.safetensors --weights vgg16.safetensors
    python tools/bench_decouple.py training-step

`flops` collapses every residual block of the CIFAR networks, respectively every stage between two poolings, into one
3×3 convolution, closes the gates and merges, and counts the FLOPs with torch's own counter. `training-step` times
forward, backward and optimiser step of ResNet-20 with every block decoupled beside those of the original, in float32
and under bfloat16 autocast, at gates 1, 0.5 and 0: with one 3×3 convolution left of each block, which needs no rings,
and with both kernels kept (5×5, with a stride 7×7), which does. Each stores docs/results/decouple_SECTION.json.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import elc_fx
import provenance
import terminal
from cifar_models import ResNet, load
from timing import Timing, side_by_side

GATES = (1.0, 0.5, 0.0)
PLANS = {"3×3, no rings": False, "5×5 and 7×7, rings": True}
BATCH = 128


def collapsing(model: nn.Module, inputs: Tensor, *, keep_all: bool = False) -> elc_fx.Plan:
    """Every residual block, or every run of convolutions between two poolings, into one convolution.

    3×3 each, or with all kernels kept, as large as they grow.
    """
    if not isinstance(model, ResNet):
        return elc_fx.Plan.of(model, inputs, collapse=["features.*:3x3"])
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(len(model.layer1))]
    if keep_all:
        candidates = elc_fx.candidates(model, inputs, longest=1)
        blocks = [[c.full_name for c in candidates if c.name == block][-1] for block in blocks]
    return elc_fx.Plan.of(model, inputs, collapse=blocks)


def collapsed_flops(weights: Path) -> dict[str, Any]:
    """The FLOPs of one image before and after, and how exact the merge is."""
    model = load(weights)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plan = collapsing(model, x)
    decoupled = elc_fx.decouple(model, plan)
    elc_fx.set_gate(decoupled, 0)
    merged = elc_fx.merge(decoupled)
    before, after = elc_fx.measure(model, (x,)), elc_fx.measure(merged, (x,))
    return {
        "network": weights.stem,
        "regions": len(plan.candidates),
        "flops": (before.flops, after.flops),
        "planned": before.flops - sum(c.flops[0] - c.flops[1] for c in plan.candidates),
        "depth": (before.depth, after.depth),
        "parameters": (before.parameters, after.parameters),
        "merge_error": elc_fx.compare(decoupled, merged, (x,)).max_rel_error,
    }


def flops_table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    headers = ("network", "regions", "FLOPs before", "after", "change", "planned", "depth", "merge error")
    cells = [
        (
            row["network"],
            row["regions"],
            f"{row['flops'][0]:,}",
            f"{row['flops'][1]:,}",
            f"{100 * (row['flops'][1] / row['flops'][0] - 1):+.1f} %",
            f"{row['planned']:,}",
            "{} → {}".format(*row["depth"]),
            f"{row['merge_error']:.0e}",
        )
        for row in rows
    ]
    return terminal.table(cells, headers, style)


def training_steps(rings: bool, half: bool, repeats: int) -> dict[str, Timing]:
    """The original's training step, and those of the decoupled network at each gate, side by side."""
    torch.manual_seed(0)
    model = ResNet(3).eval()
    images = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two 3×3 into 5×5 costs more, and is here to be timed
        decoupled = elc_fx.decouple(model, collapsing(model, images[:1], keep_all=rings))
    networks = {"original": model}
    for gate in GATES:
        networks[f"gate {gate:g}"] = copy_at(decoupled, gate)
    return side_by_side({name: step_of(network, images, labels, half) for name, network in networks.items()}, repeats)


def copy_at(decoupled: elc_fx.DecoupledModule, gate: float) -> nn.Module:
    copied = copy.deepcopy(decoupled)
    elc_fx.set_gate(copied, gate)
    return copied


def step_of(network: nn.Module, images: Tensor, labels: Tensor, half: bool) -> Callable[[], None]:
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps_table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    headers = ("blocks become", "arithmetic", "original [ms]", *(f"gate {gate:g}" for gate in GATES))
    cells = []
    for row in rows:
        times = row["seconds"]
        base = times["original"]["median"]
        ratios = [
            "{:.2f}× ({:.2f}–{:.2f})".format(
                *(times[f"gate {g:g}"][k] / base for k in ("median", "fastest", "slowest"))
            )
            for g in GATES
        ]
        cells.append((row["plan"], row["arithmetic"], f"{1000 * base:.0f}", *ratios))
    return terminal.table(cells, headers, style)


app = typer.Typer(add_completion=False, rich_markup_mode=None, help=terminal.verbatim(__doc__), no_args_is_help=True)


@app.command()
def flops(
    weights: Annotated[list[Path], typer.Option(help="A weight file of cifar_models; may be given several times.")],
) -> None:
    """FLOPs of the networks with every block, respectively stage, collapsed into one 3×3 convolution."""
    origin = provenance.collect()
    rows = [collapsed_flops(path) for path in terminal.tracked(weights, lambda path: path.name)]
    print(flops_table(rows))
    provenance.store(provenance.RESULTS / "decouple_flops.json", origin, {"rows": rows})


@app.command()
def training_step(
    repeats: Annotated[int, typer.Option(help="Steps of each network.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Time of a training step of the decoupled ResNet-20 beside the original's."""
    torch.set_num_threads(threads)
    origin = provenance.collect()
    rows = []
    cases = [(plan, rings, half) for plan, rings in PLANS.items() for half in (False, True)]
    for plan, rings, half in terminal.tracked(cases, lambda case: case[0]):
        timings = training_steps(rings, half, repeats)
        seconds = {name: asdict(timing) for name, timing in timings.items()}
        rows.append({"plan": plan, "arithmetic": "bfloat16 autocast" if half else "float32", "seconds": seconds})
    print(steps_table(rows))
    provenance.store(provenance.RESULTS / "decouple_training_step.json", origin, {"threads": threads, "rows": rows})


if __name__ == "__main__":
    app()
