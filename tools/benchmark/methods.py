"""The ways to a cheaper network that are compared. Each gives a network to train, at about the same FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import elc_fx
from benchmark import HELD_OUT, pruning
from cifar_models import load
from elc_fx.matching.activations import activation_name, activation_of
from elc_fx.planning.latency import Backend
from elc_fx.training import data as pictures

RUNTIMES: list[str] = list(get_args(Backend))
BATCHES = [1, 64]  # whose time is measured
CALIBRATION, CALIBRATION_BATCH = 4096, 128
FROM_SCRATCH = {"learning_rate": 0.1}  # random weights need more than trained ones


_loaded = cache(pictures.load)


@dataclass(frozen=True)
class Task:
    """A trained network, images, a budget (share of the FLOPs) and a seed. cache: a folder for losses."""

    weights: Path
    data: Path
    budget: float
    seed: int
    cache: Path

    @cached_property
    def model(self) -> nn.Module:
        return load(self.weights)

    @cached_property
    def images(self) -> tuple[pictures.Images, pictures.Images]:
        """To train on, and held out."""
        images = _loaded(self.data)
        assert images is not None
        return images.split(HELD_OUT)

    @cached_property
    def calibration(self) -> list[Tensor]:
        drawn = torch.randperm(len(self.images[0]), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
        return list(self.images[0].taken(drawn).inputs().split(CALIBRATION_BATCH))

    @property
    def x(self) -> Tensor:
        return self.calibration[0][:1]

    def planner(self, images: int = 1, **options: Any) -> elc_fx.Planner:
        """images: of the example inputs, by which a time is that of so many at once."""
        x = self.calibration[0][:images]
        return elc_fx.Planner(self.model, x, self.calibration, cache=self.cache, **options)

    def plan(self, **options: Any) -> elc_fx.Plan:
        """Under the budget of FLOPs. options: as for `planner`."""
        return self.planner(**options).plan(elc_fx.Budget(flops=self.budget))


@dataclass(frozen=True)
class Method:
    """What it is, how its network is planned and made, and what of the training differs.

    plan: gives None where nothing is planned. epochs: times those of the others. activations: what it has instead of
    those of the original. prunes: so that its plan does not tell its layers.
    """

    what: str
    plan: Callable[[Task], elc_fx.Plan | None]
    network: Callable[[Task, Any], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 1
    activations: str = ""
    prunes: bool = False


def _unplanned(task: Task) -> None:
    """What is pruned, or left as it is, has no plan."""


def _planned_for_time(backend: Backend, images: int, task: Task) -> elc_fx.Plan:
    return task.planner(images, backend=backend).plan(elc_fx.Budget(latency=task.budget))


def _balanced(task: Task) -> elc_fx.Plan:
    """Half of what goes (as a factor) is layers, the other half is what a layer costs."""
    return task.planner().plan(elc_fx.Budget(flops=task.budget, depth=task.budget**0.5))


_planned = Task.plan
_uniform = partial(Task.plan, loss="uniform")
_unrehearsed = partial(Task.plan, rehearse=False)
_grown = partial(Task.plan, allow=lambda candidate: not candidate.kernels)  # of each candidate the form that adds up
_merges = partial(Task.plan, allow=lambda candidate: candidate.merges)
_shrinks = partial(Task.plan, allow=lambda candidate: not candidate.merges)


def fitted(task: Task, plan: elc_fx.Plan) -> fx.GraphModule:
    return task.planner(loss="uniform").collapse(plan)


def _with_slopes(task: Task, plan: elc_fx.Plan) -> fx.GraphModule:
    """What ReLUs give for negative values is learned as well: a factor for each channel, 0 at first."""
    network = fitted(task, plan)
    ShapeProp(network).propagate(task.x)
    for number, node in enumerate(list(network.graph.nodes)):
        activation = activation_of(network, node)
        if activation is None or activation_name(activation).lower() != "relu":
            continue
        network.add_submodule(f"slopes_{number}", nn.PReLU(node.meta["tensor_meta"].shape[1], init=0.0))
        with network.graph.inserting_after(node):
            sloped = network.graph.call_module(f"slopes_{number}", (node.args[0],))
        node.replace_all_uses_with(sloped)
        network.graph.erase_node(node)
    network.recompile()
    return network


def _decoupled(task: Task, plan: elc_fx.Plan) -> nn.Module:
    return elc_fx.decouple(task.model, plan, task.calibration)


def _random(task: Task, plan: elc_fx.Plan) -> nn.Module:
    network = fitted(task, plan)
    torch.manual_seed(task.seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def _pruned(multiple: int | None, task: Task, plan: None) -> nn.Module:
    train, _ = task.images
    return pruning.pruned(task.model, task.x, task.budget, pruning.chosen(), train, multiple)


def _planned_half_way(task: Task) -> elc_fx.Plan:
    """Half of what goes (as a factor) of the FLOPs."""
    return task.planner().plan(elc_fx.Budget(flops=task.budget**0.5))


def _fitted_and_pruned(task: Task, plan: elc_fx.Plan) -> nn.Module:
    network, (train, _) = fitted(task, plan), task.images
    left = task.budget * elc_fx.measure(task.model, task.x).flops / elc_fx.measure(network, task.x).flops
    return pruning.pruned(network, task.x, left, pruning.chosen(), train)


def _unchanged(task: Task, plan: None) -> nn.Module:
    return copy.deepcopy(task.model)


FOR_TIME = {
    f"elc-{backend}" + (f"-{images}" if images > 1 else ""): Method(
        f"the same; the budget is a share of the time under {backend}, images at once: {images}",
        partial(_planned_for_time, backend, images),
        fitted,
    )
    for images in BATCHES
    for backend in get_args(Backend)
}
METHODS = {
    "elc": Method("planned, fitted, trained", _planned, fitted),
    **FOR_TIME,
    "unrehearsed": Method("the same, planned without short trainings", _unrehearsed, fitted),
    "shrinks": Method("planned with single layers alone, whose kernels shrink: all layers stay", _shrinks, fitted),
    "features": Method(
        "as elc, and trained to give at the end of each region what the original gives there, too",
        _planned,
        fitted,
        {"features": 10.0},
    ),
    "slopes": Method(
        "as features, with a learned slope below 0 for each channel (PReLU) instead of each ReLU",
        _planned,
        _with_slopes,
        {"features": 10.0},
        activations="PReLU",
    ),
    "balanced": Method("as elc; the layers are limited too, to the square root of the budget", _balanced, fitted),
    "torch-pruning": Method("channels pruned by Torch-Pruning", _unplanned, partial(_pruned, None), prunes=True),
    "torch-pruning-8": Method("the same, all widths multiples of 8", _unplanned, partial(_pruned, 8), prunes=True),
    "both": Method(
        "elc down to the square root of the budget, the rest by Torch-Pruning",
        _planned_half_way,
        _fitted_and_pruned,
        prunes=True,
    ),
    "scratch": Method("the same layers as elc, random weights", _planned, _random, FROM_SCRATCH),
    "scratch-3x": Method("the same, three times as many epochs", _planned, _random, FROM_SCRATCH, 3),
    "uniform": Method("the fewest layers that meet the budget, without a plan", _uniform, fitted),
    "gates": Method("elc's plan, decoupled, gates closed over half of the steps", _planned, _decoupled, {"gates": 0.5}),
    "at-once": Method("elc's plan, decoupled, gates closed at once", _planned, _decoupled),
    "merges": Method(
        "planned without layers whose kernels shrink by themselves: all that goes is depth", _merges, fitted
    ),
    "unchanged": Method("the original, trained on in the same way, at any budget", _unplanned, _unchanged),
    "grown": Method("without kernel control: merged kernels keep all that the kernels add up to", _grown, fitted),
}
