"""Rehearsal: what a plan loses when its network has been trained for a short time, which no loss before training tells.

Training makes up for much of what a fit loses, and for less of what is gone with layers; for how much less differs from
network to network. So the networks of plans that leave more and fewer layers are trained alike, with what fine-tuning
does by default, on some hundred calibration samples, to give what the original gives. That needs no labels.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.errors import InvalidInputError
from elc_fx.inputs import fresh
from elc_fx.planning.cost import Choice
from elc_fx.planning.sensitivity import Sensitivity, part_of, samples_of
from elc_fx.serial import SerialGraph
from elc_fx.training import MOMENTUM, FinetuneConfig, distance, share_of_rate

EPOCHS = 4
ORDERS = 3  # in which the same is trained: losses after one training differ by some per cent with the order
STEP = 64  # samples of one step, at most: a few hundred then make some dozen steps;
INNER = 2**28  # and fewer where the values of all nodes, which gradients need, would be more numbers


class Rehearsal:
    """Of networks that all begin with one sensitivity's original, on its calibration batches."""

    def __init__(self, graph: SerialGraph, sensitivity: Sensitivity) -> None:
        self.sensitivity = sensitivity
        calibration = sensitivity.calibration
        most = min(STEP, max(1, int(INNER / _inner_numbers(graph))))
        batches = (calibration.batches[i] for i in calibration.fitted_on)
        pieces = (piece for batch in batches for piece in _pieces(batch, most))
        self.pairs = [(piece, graph.graph_module(*fresh(piece))) for piece in pieces]  # with what the original gives

    def loss(self, choices: Sequence[Choice]) -> float:
        """After the training, on the samples that nothing was fitted to; infinite where it cannot be trained.

        The mean of trainings that differ in the order of the steps.
        """
        fitted = self.sensitivity.fitted(choices)
        losses = []
        for order in range(ORDERS):
            network = copy.deepcopy(fitted)
            try:
                self._train(network, torch.Generator().manual_seed(order))
            except (RuntimeError, InvalidInputError) as error:  # without gradients, or of no floating point numbers
                warnings.warn(f"plans are not compared after a short training: {error}", stacklevel=2)
                return math.inf
            network.eval()
            losses.append(self.sensitivity.loss_of(network))
        return sum(losses) / ORDERS

    @torch.enable_grad()
    def _train(self, network: fx.GraphModule, order: torch.Generator) -> None:
        # A batch norm has no statistics of one sample.
        network.train(min(samples_of(piece) for piece, _ in self.pairs) > 1)
        parameters = [p for p in network.parameters() if p.requires_grad]
        options: dict[str, Any] = {"momentum": MOMENTUM, "nesterov": True, "weight_decay": FinetuneConfig.weight_decay}
        optimizer = torch.optim.SGD(parameters, FinetuneConfig.learning_rate, **options)
        steps = EPOCHS * len(self.pairs)
        share = partial(share_of_rate, total=steps, warmup=FinetuneConfig.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        drawn = torch.cat([torch.randperm(len(self.pairs), generator=order) for _ in range(EPOCHS)]).tolist()
        for i in self.sensitivity.shown(drawn, "short training", steps):
            piece, wanted = self.pairs[i]
            output = network(*fresh(piece))
            distance(output, wanted, FinetuneConfig.temperature if _of_classes(wanted) else None).backward()
            nn.utils.clip_grad_norm_(parameters, FinetuneConfig.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def _inner_numbers(graph: SerialGraph) -> float:
    """What all nodes together give for one sample."""
    given = [shape for node, shape in graph.shapes.items() if node.op == "placeholder" and shape]
    numbers = sum(math.prod(shape) for node, shape in graph.shapes.items() if node.op != "get_attr")
    return max(1.0, numbers / max(1, given[0][0] if given else 1))


def _pieces(batch: Sequence[Any], most: int) -> list[list[Any]]:
    """Of about equal sizes."""
    size = samples_of(batch)
    count = math.ceil(size / most)
    bounds = [size * i // count for i in range(count + 1)]
    return [part_of(batch, start, stop) for start, stop in itertools.pairwise(bounds)]


def _of_classes(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
