"""Gates: what can be set, and the order in which a schedule closes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import assert_same, image, ready
from torch import Tensor, nn

import elc_fx


def network(depth: int = 3) -> elc_fx.DecoupledModule:
    """Regions of two convolutions, one after the other, kept apart by poolings."""
    parts: list[nn.Module] = []
    for i in range(depth):
        channels = 3 if i == 0 else 4
        parts += [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(1)]
    model = ready(nn.Sequential(*parts))
    return elc_fx.decouple(model, elc_fx.Plan.of(model, image(1, 3, 4, 4), collapse=["*:3x3"]))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def closing(module: nn.Module, **options: Any) -> list[set[int]]:
    """For each step of a schedule of 30, which of the three regions are on their way."""
    schedule = elc_fx.GateSchedule(module, 30, **options)
    steps = []
    for _ in range(30):
        schedule.step()
        values = list(elc_fx.gates(module).items())
        steps.append({int(name.split(".")[-1].split("_")[-1]) // 4 for name, gate in values if 0 < gate < 1})
    assert set(elc_fx.gates(module).values()) == {0.0}
    return steps


def test_without_overlap_regions_close_strictly_one_after_the_other() -> None:
    steps = closing(network(), order="depth", overlap=0)
    assert all(len(regions) <= 1 for regions in steps)
    order = [next(iter(regions)) for regions in steps if regions]
    assert order == sorted(order) and set(order) == {0, 1, 2}


@pytest.mark.parametrize("order", ["depth", "reverse depth", "cost"])
def test_order_holds_inside_of_a_wrapper(order: Any) -> None:
    assert closing(Wrapper(network()), order=order, overlap=0) == closing(network(), order=order, overlap=0)


@pytest.mark.parametrize("plan", [elc_fx.Plan(()), None], ids=["empty", "exact merges only"])
def test_nothing_to_gate(plan: elc_fx.Plan | None) -> None:
    model, x = ready(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1))), image(2, 3, 5, 5)
    net = elc_fx.decouple(model, plan or elc_fx.Plan.of(model, x))
    assert elc_fx.gates(net) == {}
    elc_fx.set_gate(net, 0)
    schedule = elc_fx.GateSchedule(net, 3, order="depth")
    schedule.step()
    with pytest.raises(elc_fx.InvalidInputError, match="no decoupling node is called"):
        elc_fx.set_gate(net, {"first": 0.5})
    assert_same(elc_fx.merge(net)(x), model(x))


def test_numbers_that_are_gates() -> None:
    net = network(1)
    for value in (0, 0.25, torch.tensor(0.25), 1):
        elc_fx.set_gate(net, value)
        assert set(elc_fx.gates(net).values()) == {float(value)}
    tensors = torch.tensor([0.1, 0.2]), torch.tensor([0.5]), torch.tensor(True), torch.tensor(1j)
    for wrong in (True, "1", None, -0.1, 1.1, float("nan"), *tensors, {0: 1.0}, {"*": None}):
        with pytest.raises(elc_fx.InvalidInputError):
            elc_fx.set_gate(net, wrong)  # type: ignore[arg-type]
    for steps in ("10", 10.0, True, None):
        with pytest.raises(elc_fx.InvalidInputError, match="total_steps"):
            elc_fx.GateSchedule(net, steps)  # type: ignore[arg-type]
    for overlap in ("1", None, True, torch.tensor([0.1, 0.2]), -0.1):
        with pytest.raises(elc_fx.InvalidInputError, match="overlap"):
            elc_fx.GateSchedule(net, 10, overlap=overlap)  # type: ignore[arg-type]
    for function in (lambda m: elc_fx.set_gate(m, 0), lambda m: elc_fx.GateSchedule(m, 10)):
        with pytest.raises(elc_fx.InvalidInputError, match="module is a str"):
            function("net")


@torch.no_grad()
def test_gates_move_however_an_average_is_kept() -> None:
    model = network()
    with_loop, averaged = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    schedule = elc_fx.GateSchedule(model, 3)
    for _ in range(3):
        schedule.step()
        averaged.update_parameters(model)
        for mine, others in zip(with_loop.buffers(), model.buffers(), strict=True):
            mine.data.copy_(others.data)
    x = image(2, 3, 6, 6)
    assert set(elc_fx.gates(with_loop).values()) == {0.0}
    assert_same(with_loop(x), model(x))
    assert_same(elc_fx.merge(with_loop)(x), model(x))
    assert list(elc_fx.gates(averaged).values()) == pytest.approx([1 / 3] * 6)
