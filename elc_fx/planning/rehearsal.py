"""Rehearsal: what a plan loses when its network has been trained for a short time, which no loss before training tells.

Training makes up for much of what a fit loses, and for less of what is gone with layers; for how much less differs from
network to network. So the networks of plans that leave more and fewer layers are trained alike, with what fine-tuning
does by default, on some hundred calibration samples, to give what the original gives. That needs no labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.capturing.copying import clone
from elc_fx.capturing.inputs import fresh
from elc_fx.errors import InvalidInputError
from elc_fx.matching.serial import SerialGraph
from elc_fx.planning.cost import Choice
from elc_fx.planning.sensitivity import KEPT, Sensitivity, divergence, numbers_of, part_of, samples_of
from elc_fx.training.finetuning import FinetuneConfig, optimizer_of, share_of_rate
from elc_fx.training.losses import distance, of_classes
from elc_fx.workarounds import SoundConvolutions

EPOCHS = 4
ORDERS = 3  # in which the same is trained: losses after one training differ by some per cent with the order
MOST = 64  # samples of one step, at most: some hundred samples then make some dozen steps;
INNER = 2**28  # and fewer where the values of all nodes, which gradients need, would be more numbers
LEAST = 8  # samples of one step, at least: of fewer, batch norms have no statistics
ENOUGH = 200  # samples to train on: after fewer, what is lost is mostly chance


class Rehearsal:
    """Of networks that all begin with one sensitivity's original, on its calibration batches."""

    def __init__(self, graph: SerialGraph, sensitivity: Sensitivity) -> None:
        self.graph_module = graph.graph_module
        self.sensitivity = sensitivity
        calibration = sensitivity.calibration
        most = min(MOST, max(LEAST, int(INNER / _inner_numbers(graph))))
        batches = (calibration.batches[i] for i in calibration.fitted_on)
        pieces = (piece for batch in batches for piece in _pieces(batch, most))
        self.pieces = [piece for piece in pieces if samples_of(piece) >= LEAST]
        self.given: dict[int, Any] = {}  # by the original, for each

    @property
    def tells(self) -> bool:
        """Whether there is enough to train on, and no module draws random numbers, which would count as losses."""
        return sum(map(samples_of, self.pieces)) >= ENOUGH and not self.sensitivity.draws

    @torch.inference_mode(False)
    @torch.no_grad()
    def loss(self, choices: Sequence[Choice]) -> float:
        """After the training, on the samples that are judged on: the mean of trainings in different orders.

        Infinite where something is not finite that was. Raises whatever the model's own layers do where they cannot be
        trained, and InvalidInputError where there is nothing to train on.
        """
        if not self.pieces:
            raise InvalidInputError(f"no batch to train on has {LEAST} samples")
        fitted = self.sensitivity.fitted(choices)
        losses, finite = [], _finite(fitted)
        for order in range(ORDERS):
            network = clone(fitted, {})
            self.train(network, torch.Generator().manual_seed(order))
            if finite - _finite(network):
                return math.inf
            losses.append(self.sensitivity.loss_of(network.eval()))
        return sum(losses) / ORDERS

    def train(self, network: fx.GraphModule, order: torch.Generator) -> None:
        """In place. order: of the steps."""
        network.train()
        for module in network.modules():
            if isinstance(module, nn.SyncBatchNorm):  # which would wait for processes that do not train
                module.eval()
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = optimizer_of(parameters, FinetuneConfig.learning_rate, FinetuneConfig.weight_decay)
        steps = EPOCHS * len(self.pieces)
        share = partial(share_of_rate, total=steps, warmup=FinetuneConfig.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        orders = [torch.randperm(len(self.pieces), generator=order, device="cpu") for _ in range(EPOCHS)]
        with SoundConvolutions():
            for i in self.sensitivity.shown(torch.cat(orders).tolist(), "short training", steps):
                wanted = self._wanted(i)
                with torch.enable_grad():
                    loss = distance(network(*fresh(self.pieces[i])), wanted, self._temperature(wanted))
                    # Not `backward`, which also writes to parameters that a module of the user's reads from elsewhere.
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                nn.utils.clip_grad_norm_(parameters, FinetuneConfig.clip)
                optimizer.step()
                schedule.step()

    def _wanted(self, i: int) -> Any:
        """What the original gives for a piece; kept, since it is wanted in each epoch, unless that were too much."""
        if i in self.given:
            return self.given[i]
        output = fresh(self.graph_module(*fresh(self.pieces[i])))  # no view of more, nor of what changes
        if numbers_of(output) * len(self.pieces) <= KEPT:
            self.given[i] = output
        return output

    def _temperature(self, output: Any) -> float | None:
        """Of what the loss "auto" takes for classes; a function of the user's may take it for anything."""
        classes = self.sensitivity.loss is divergence and of_classes(output)
        return FinetuneConfig.temperature if classes else None


def _finite(network: nn.Module) -> set[str]:
    """The names of values in which nothing is infinite or NaN, as some of the user's may be from the beginning."""
    values = network.state_dict().items()
    return {name for name, value in values if isinstance(value, Tensor) and value.isfinite().all()}


def _inner_numbers(graph: SerialGraph) -> float:
    """What all nodes together give for one sample."""
    given = [shape for node, shape in graph.shapes.items() if node.op == "placeholder" and shape]
    numbers = sum(math.prod(shape) for node, shape in graph.shapes.items() if node.op != "get_attr")
    return max(1.0, numbers / max(1, given[0][0] if given else 1))


def _pieces(batch: Sequence[Any], most: int) -> list[list[Any]]:
    """Of about equal sizes, of at least LEAST samples if there are so many."""
    size = samples_of(batch)
    count = max(1, min(math.ceil(size / most), size // LEAST))
    bounds = [size * i // count for i in range(count + 1)]
    return [part_of(batch, start, stop) for start, stop in itertools.pairwise(bounds)]
