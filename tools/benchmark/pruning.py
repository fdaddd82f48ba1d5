"""Channel pruning by Torch-Pruning (https://pypi.org/project/torch-pruning), to a share of the FLOPs."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import elc_fx
import provenance
import terminal
from benchmark import HELD_OUT
from cifar_models import load
from elc_fx.training import data as pictures

RESULT = provenance.RESULTS / "benchmark_importance.json"
IMPORTANCES = ("GroupMagnitude", "GroupTaylor", "BNScale", "LAMP", "FPGM")
SCOPES = ("global", "local")  # one ranking of all layers, or one for each
TOLERANCE = 0.03  # of the FLOPs: a channel that a whole stage shares is 2 % of them
BISECTIONS = 20


def pruned(
    model: nn.Module,
    x: Tensor,
    share: float,
    importance: tuple[str, str],
    images: pictures.Images,
    multiple: int | None = None,
) -> nn.Module:
    """A copy of the model with fewer channels; its FLOPs are the share of the model's, or up to `TOLERANCE` more.

    multiple: of what the widths are multiples, which runtimes are faster with.
    """
    wanted = share * elc_fx.measure(model, x).flops
    low, high = 0.0, 0.95
    best: tuple[int, nn.Module] | None = None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        network = _at(model, x, ratio, importance, images, multiple)
        flops = elc_fx.measure(network, x).flops
        if flops >= wanted and (best is None or flops < best[0]):
            best = flops, network
        low, high = (ratio, high) if flops > wanted else (low, ratio)
    if best is None or best[0] / wanted - 1 > TOLERANCE:
        raise RuntimeError(
            f"pruning comes within {best[0] / wanted - 1:.1%} of the FLOPs only" if best else "no network"
        )
    return best[1]


def _at(
    model: nn.Module,
    x: Tensor,
    ratio: float,
    importance: tuple[str, str],
    images: pictures.Images,
    multiple: int | None,
) -> nn.Module:
    import torch_pruning

    network = copy.deepcopy(model).eval().requires_grad_(True)
    name, scope = importance
    judge = getattr(torch_pruning.importance, f"{name}Importance")()
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
    pruner = torch_pruning.pruner.BasePruner(
        network, x, importance=judge, pruning_ratio=ratio, global_pruning=scope == "global", ignored_layers=last,
        max_pruning_ratio=0.9, round_to=multiple,
    )  # fmt: skip
    if name == "GroupTaylor":
        inputs, labels = next(images.taken(slice(256)).batches(256))
        F.cross_entropy(network(inputs), labels).backward()
    pruner.step()
    return network.requires_grad_(True)


def chosen() -> tuple[str, str]:
    """The importance that did best in `choose`. Raises FileNotFoundError where none was measured."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    best = max(rows, key=lambda row: row["after"])
    return best["importance"], best["scope"]


def choose(
    weights: Annotated[Path, typer.Option(help="A weight file of a CIFAR network.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    share: Annotated[float, typer.Option(help="Of the FLOPs.")] = 0.5,
    images: Annotated[int, typer.Option(help="That are trained on, once.")] = 11250,
) -> None:
    """Which importance Torch-Pruning does best with: a quarter of an epoch each, accuracy on held-out training images.

    Stores docs/results/benchmark_importance.json.
    """
    run = provenance.collect()
    model, known = load(weights), pictures.load(data)
    assert known is not None
    train, kept = known.split(HELD_OUT)
    rows: list[dict[str, Any]] = []
    for name, scope in terminal.tracked(list(itertools.product(IMPORTANCES, SCOPES)), str):
        torch.manual_seed(0)
        network = pruned(model, kept.taken(slice(1)).inputs(), share, (name, scope), train)
        loader = train.taken(slice(images)).loader(128)
        before = pictures.accuracy(network.eval(), kept)
        elc_fx.finetune(network, loader, teacher=model, epochs=1, progress=False)
        rows.append({"importance": name, "scope": scope, "before": before, "after": pictures.accuracy(network, kept)})
        print(rows[-1], flush=True)
        provenance.store(RESULT, run, {"network": weights.stem, "share": share, "images": images, "rows": rows})
