"""What fine-tuning settings are worth: one plan of a network, trained in many ways for the same number of steps.

    python tools/bench_finetune.py --weights resnet20.safetensors --data cifar10-jpeg.tar.xz

Every variant differs from the defaults of `elc_fx.FinetuneConfig` in what its name says. Choices are made by the
accuracy on a held-out part of the training set, which the original has seen in its own training, so the figures are
higher than on test images. The result is stored after each variant; what is there is not run again.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import elc_fx
import provenance
import terminal
from cifar_models import load
from elc_fx.planning.fitting import Substitute
from elc_fx.training import data as pictures

RESULT = provenance.RESULTS / "finetune.json"
# start: "fitted" convolutions with a batch norm behind each; the same with filters "unscaled", as long as the fit made
# them; "bare" ones; "factors" of the decoupled network; "random".
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "learning rate 0.05": {"learning_rate": 0.05},
    "learning rate 0.01": {"learning_rate": 0.01},
    "learning rate 0.005": {"learning_rate": 0.005},
    "factors, gates closed at once": {"start": "factors"},
    "batches of 64": {"batch": 64},
    "features too, weight 1": {"features": 1.0},
    "features too, weight 10": {"features": 10.0},
    "features too, weight 100": {"features": 100.0},
    "temperature 2": {"temperature": 2.0},
    "no batch norm behind fitted convolutions": {"start": "bare"},
    "filters as long as the fit made them": {"start": "unscaled"},
    "factors, gates closed over half": {"start": "factors", "gates": 0.5},
    "no distillation": {"distillation": 0.0},
    "moving average 0.99": {"ema": 0.99},
    "random weights": {"start": "random", "learning_rate": 0.05},
    "distillation only": {"distillation": 1.0},
    "weight decay 1e-4": {"weight_decay": 1e-4},
    "factors, gates closed by depth": {"start": "factors", "gates": 0.5, "gate_order": "depth"},
    "learning rate 0.1": {"learning_rate": 0.1},
    "temperature 8": {"temperature": 8.0},
}


def network(start: str, model: nn.Module, plan: elc_fx.Plan, fitted: nn.Module, batches: Any) -> nn.Module:
    """What a variant trains. fitted: the plan's convolutions, of which it gets its own."""
    if start == "factors":
        return elc_fx.decouple(model, plan, batches)
    collapsed = copy.deepcopy(fitted)
    for module in collapsed.modules():
        if isinstance(module, Substitute) and start == "bare":
            module.norm = nn.Identity()
        if isinstance(module, Substitute) and isinstance(module.norm, nn.BatchNorm2d) and start == "unscaled":
            unscale(module)
        if start == "random" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return collapsed


@torch.no_grad()
def unscale(fitted: Substitute) -> None:
    """Makes the filters again as long as if the batch norm behind them were folded, without changing the output."""
    convolution: Any = fitted.layer
    norm: Any = fitted.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    convolution.weight.mul_(scale.view(-1, 1, 1, 1))
    norm.running_mean.mul_(scale)
    norm.running_var.mul_(scale.square())
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())


def main(
    weights: Annotated[Path, typer.Option(help="A weight file of a CIFAR network.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    budget: Annotated[float, typer.Option(help="Share of the FLOPs.")] = 0.5,
    plan: Annotated[Path | None, typer.Option(help="A row of the benchmark, whose plan is taken.")] = None,
    calibration: Annotated[int, typer.Option(help="Images that convolutions are fitted to.")] = 512,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 2,
    images: Annotated[int, typer.Option(help="That are trained on.")] = 22500,
    held_out: Annotated[int, typer.Option(help="Other training images, for the accuracy.")] = 5000,
    variant: Annotated[list[str] | None, typer.Option(help="A setting; several times for several.")] = None,
    result: Annotated[Path, typer.Option(help="Where it is stored.")] = RESULT,
) -> None:
    if unknown := set(variant or ()) - set(VARIANTS):
        raise typer.BadParameter(f"no setting {min(unknown)!r}; there are {', '.join(VARIANTS)}")
    run = provenance.collect()
    setting = {"network": weights.stem, "budget": budget, "epochs": epochs, "images": images, "held_out": held_out}
    setting |= {"plan": plan and plan.name, "calibration": calibration}
    rows = _stored(result, setting, run.commit)
    model, known = load(weights), pictures.load(data)
    assert known is not None
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    test, train = known.taken(drawn[:held_out]), known.taken(drawn[held_out : held_out + images])
    batches = list(train.taken(slice(calibration)).inputs().split(128))
    # Losses are measured to plan only.
    planner = elc_fx.Planner(model, batches[0][:1], batches, loss="uniform" if plan else "auto")
    chosen = _stored_plan(plan) if plan else planner.plan(elc_fx.Budget(flops=budget))
    fitted = planner.collapse(chosen)
    left = [name for name in dict.fromkeys(variant or VARIANTS) if name not in {row["variant"] for row in rows}]
    for name in terminal.tracked(left):
        options = dict(VARIANTS[name])
        torch.manual_seed(0)
        trained = network(options.pop("start", "fitted"), model, chosen, fitted, batches)
        untrained = pictures.accuracy(trained.eval(), test)
        loader = train.loader(options.pop("batch", 128))
        history = elc_fx.finetune(trained, loader, teacher=model, epochs=epochs, progress=False, **options)
        speed = history.epochs[-1].images_per_second
        rows.append({"variant": name, "before": untrained, "after": pictures.accuracy(trained, test), "speed": speed})
        print(rows[-1], flush=True)
        provenance.store(result, run, {**setting, "rows": rows})
    print(table(rows))


def _stored_plan(row: Path) -> elc_fx.Plan:
    return elc_fx.Plan.from_json(json.dumps(json.loads(row.read_text(encoding="utf-8"))["plan"]))


def _stored(result: Path, setting: Mapping[str, Any], commit: str | None) -> list[dict[str, Any]]:
    """The variants that were run before, in the same setting and at the same commit."""
    if not result.exists():
        return []
    stored = json.loads(result.read_text(encoding="utf-8"))
    found = {**{key: stored.get(key) for key in setting}, "commit": stored["provenance"]["commit"]}
    if differing := [key for key, value in {**setting, "commit": commit}.items() if found[key] != value]:
        raise typer.BadParameter(f"{result} was run with another {differing[0]}; give another file as --result")
    rows: list[dict[str, Any]] = stored["rows"]
    return rows


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """The variants, from best to worst."""
    default = next((row["after"] for row in rows if row["variant"] == "defaults"), float("nan"))
    lines = [
        [row["variant"], f"{row['before']:.1%}", f"{row['after']:.2%}", f"{100 * (row['after'] - default):+.2f}"]
        for row in sorted(rows, key=lambda row: -row["after"])
    ]
    return terminal.table(lines, ("setting", "before training", "after", "points"), style)


if __name__ == "__main__":
    terminal.run(main, __doc__)
