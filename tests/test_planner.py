"""The planner as a user calls it: budgets met, losses measured, resumed, corrected, and errors that help."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import flops, image, ready
from torch import Tensor, nn

import elc_fx
from elc_fx.planning import planner as planning
from elc_fx.planning import rehearsal, sensitivity, stored
from elc_fx.planning.candidates import serial_graph
from elc_fx.planning.planner import ALIKE, Planner
from elc_fx.planning.solve import Solution
from elc_fx.training.finetuning import distance

HUGE = 10**400  # that no float can be


def repr_of(value: Any) -> str:
    return f"{value!r:.20}"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.b(torch.relu(self.a(x))) + x)
        return y


def network() -> nn.Sequential:
    parts = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *(Block(6) for _ in range(4))]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    ready(model)
    return model.float()


def data(batches: int = 2) -> list[Tensor]:
    return [image(16, 3, 8, 8, seed=i, dtype=torch.float32) for i in range(batches)]


def planner(**options: Any) -> Planner:
    return Planner(network(), data()[0][:1], data(), progress=False, **options)


@pytest.mark.parametrize("budget", [{"flops": 0.6}, {"depth": 6}, {"params": 0.7, "flops": 0.8}])
def test_the_merged_network_keeps_the_budget_to_the_number(budget: dict[str, float]) -> None:
    model, x = network(), data()[0][:1]
    plan = elc_fx.plan(model, x, elc_fx.Budget(**budget), data(), progress=False)
    assert plan.prediction is not None and plan.candidates
    decoupled = elc_fx.decouple(model, plan)
    elc_fx.set_gate(decoupled, 0)
    merged = elc_fx.merge(decoupled)
    measured, after = elc_fx.measure(merged, x), plan.prediction.after
    assert (measured.flops, measured.parameters, measured.depth) == (after.flops, after.params, after.depth)
    limits = elc_fx.Budget(**budget).limits(plan.prediction.before)
    assert all(getattr(after, name) <= limit for name, limit in limits.items())
    assert flops(model, x) == plan.prediction.before.flops
    assert elc_fx.Plan.from_json(plan.to_json()) == plan
    assert "loss" in str(plan) and "FLOPs" in str(plan)


def test_a_loss_is_that_of_the_network_with_the_fitted_convolution() -> None:
    """Fitted on the first batch, and judged on the second, by a run of the whole network."""
    first, second = data()
    made, other = planner(), Planner(network(), first[:1], [first], progress=False)
    assert made.sensitivity is not None and other.sensitivity is not None
    assert [choice.key for choice in made.choices] == [choice.key for choice in other.choices]
    model = network().requires_grad_(False)
    expected = model(second)
    for choice, fitted_on, loss in zip(made.choices, other.choices, made.losses, strict=True):
        assert made.sensitivity.together([choice]) == pytest.approx(loss, rel=1e-5, abs=1e-9)
        collapsed = other.sensitivity.collapsed([fitted_on])
        with torch.no_grad():
            found = float(sensitivity.divergence(collapsed(second), expected))
        assert found == pytest.approx(loss, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("sizes", "judged"),
    [
        *(([7], [0]), ([7] * 2, [1]), ([7] * 4, [3]), ([7] * 8, [3, 7]), ([7] * 9, [3, 7])),
        *(([64, 64, 64, 1], [2]), ([128, 128, 1], [1]), ([1000, 24], [1]), ([1, 128, 128, 128, 128], [3])),
    ],
)
def test_what_batches_are_judged_on(sizes: list[int], judged: list[int]) -> None:
    fitted_on, judged_on = sensitivity._split(sizes)
    assert judged_on == judged
    assert sorted({*fitted_on, *judged_on}) == list(range(len(sizes)))
    assert len(sizes) == 1 or not {*fitted_on} & {*judged_on}


def test_large_batches_are_cut_so_that_some_are_judged_on() -> None:
    """As of a loader whose batches are as large as all samples that are used."""
    model, x = network(), image(40, 3, 8, 8, dtype=torch.float32)
    large, small = ([*x.split(size)] for size in (40, 8))
    made, other = (Planner(model, x[:1], given, samples=32, progress=False) for given in (large, small))
    assert made.sensitivity is not None and made.sensitivity.calibration.sizes == [8] * 4
    assert made.losses == other.losses


def test_samples_count_alike_in_batches_of_all_sizes() -> None:
    model, x = network(), image(32, 3, 8, 8, dtype=torch.float32)
    made = Planner(model, x[:1], [*x.split((8, 8, 8, 7, 1))], progress=False)
    assert made.sensitivity is not None
    calibration = made.sensitivity.calibration
    calibration.fitted_on, calibration.judged = [0, 1, 2], [3, 4]
    apart = made.sensitivity.together(made.choices[:1])
    calibration.batches, calibration.sizes = [[part] for part in x.split(8)], [8] * 4
    calibration.judged = [3]
    assert made.sensitivity.together(made.choices[:1]) == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize(("keep", "walks"), [(0, [1, 1, 1, 1, 1]), (20_000, None), (10**9, [1, 0, 0.45, 0, 0])])
def test_sets_measured_one_after_the_other_lose_what_they_lose_alone(
    keep: int, walks: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of the original changes nothing; where all is kept, it is run only up to what is new."""
    monkeypatch.setattr(sensitivity, "KEPT", keep)
    made, steps, step = planner(), list[Any](), sensitivity._step
    measuring, by_name = made.sensitivity, {choice.candidate.full_name: choice for choice in made.choices}
    assert measuring is not None
    first, middle, last = (by_name[name] for name in ("0:1x1", "3:3x3", "5:3x3"))
    sets = [[first, last], [first], [first, middle], [first, middle, last], [first, last]]
    alone = [measuring.together(choices) for choices in sets]
    assert not measuring.kept
    monkeypatch.setattr(sensitivity, "_step", lambda walks, node: (steps.append(node), step(walks, node)))
    taken = []
    with measuring.keeping():
        for choices, expected in zip(sets, alone, strict=True):
            steps.clear()
            assert measuring.together(choices) == expected
            assert sum(map(sensitivity.numbers_of, measuring.kept.values())) <= keep
            taken.append(len(steps) / len(measuring.nodes))
    assert walks is None or taken == pytest.approx(walks, abs=0.05)
    assert not measuring.kept


def test_convolutions_are_fitted_to_the_model_as_it_is_now() -> None:
    """Nothing that was kept for a plan outlives it: the model may have changed since."""
    model, batches = network(), data(1)
    made = Planner(model, batches[0][:1], batches, progress=False)
    plan = made.plan(elc_fx.Budget(flops=0.7))
    torch.manual_seed(1)
    model.load_state_dict(ready(network()).state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1 * torch.randn_like(parameter))
        model.train()(batches[0])
        model.eval()
    again = Planner(model, batches[0][:1], batches, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(made.collapse(plan)(batches[0]), again.collapse(plan)(batches[0]))


def test_a_loss_that_writes_into_what_it_is_given_changes_nothing_else() -> None:
    def written(output: Tensor, expected: Tensor) -> Tensor:
        return expected.sub_(output).square_().mean()

    def read(output: Tensor, expected: Tensor) -> Tensor:
        return (expected - output).square().mean()

    writing, reading = (planner(loss=loss) for loss in (written, read))
    assert writing.losses == reading.losses
    assert writing.plan(elc_fx.Budget(flops=0.6)) == reading.plan(elc_fx.Budget(flops=0.6))


class Writing(nn.Module):
    """No trace can enter it; it writes into what it reads, and counts."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.writes, self.calls = writes, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x.mul_(0.5) if self.writes else x * 0.5) if x.sum() < math.inf else x


@torch.library.custom_op("elc_fx_tests::halved_", mutates_args=["x"])
def halved_(x: Tensor) -> Tensor:
    x.mul_(0.5)
    return x.clone()


class Operator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = torch.ops.elc_fx_tests.halved_(x)
        return halved


@pytest.mark.parametrize("foreign", [Operator, functools.partial(Writing, writes=True)])
def test_nothing_is_kept_where_code_runs_that_is_not_torchs(foreign: Any) -> None:
    model = nn.Sequential(*network()[:4], foreign(), *network()[4:]).eval()
    made = Planner(model, data()[0][:1], data(), progress=False)
    assert made.sensitivity is not None
    with made.sensitivity.keeping():
        losses = [made.sensitivity.together(made.choices[-2:-1]) for _ in range(3)]
        assert not made.sensitivity.kept and losses[0] == losses[1] == losses[2]


def test_an_output_that_is_not_finite_is_told() -> None:
    """Also where it is on what the network is judged on; else it would seem that no candidate can be chosen."""
    model, x = network(), data()[0][:1]
    for wrong in (float("nan"), float("inf")):
        for batches in ([x * wrong, x], [x, x * wrong]):
            with pytest.raises(elc_fx.InvalidInputError, match="finite"):
                Planner(model, x, batches, progress=False)


@pytest.mark.parametrize(
    ("size", "samples", "measured", "fitted"),
    [(8, None, 1024, 4096), (2**11, None, 1024, 1280), (2**13, None, 341, 341), (2**13, 400, 400, 400), (8, 3, 3, 12)],
)
def test_fewer_samples_of_large_inputs_are_used(size: int, samples: int | None, measured: int, fitted: int) -> None:
    model = ready(nn.Sequential(nn.Conv1d(24, 2, 1), nn.ReLU(), nn.Conv1d(2, 2, 1))).float()
    batches = (torch.zeros(1, 1, 1).expand(128, 24, size) for _ in range(40))
    graph = serial_graph(model, torch.zeros(1, 24, size))
    both = sensitivity.Calibration.read(graph, batches, samples)
    for calibration, expected in zip(both, (measured, fitted), strict=True):
        assert [len(values[0]) for values in calibration.batches] == calibration.sizes
        assert sum(calibration.sizes) == expected


def test_beyond_what_is_measured_no_batch_is_used_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = serial_graph(network(), data()[0][:1])
    batches = [image(size, 3, 8, 8, dtype=torch.float32) for size in (30, 7, 7, 7, 7, 40, 7)]

    def sizes(samples: int) -> list[list[int]]:
        return [list(made.sizes) for made in sensitivity.Calibration.read(graph, iter(batches), samples)]

    assert sizes(12) == [[3] * 4, [3] * 10 + [2, 2, 3] * 2]  # of 48 at most
    assert sizes(28) == [[7] * 4, [7] * 8 + [6, 7, 7, 6, 7, 7] + [7]]  # two that are left of the first batch are not
    monkeypatch.setattr(sensitivity, "LARGEST", 20 * 6 * 8 * 8)  # 20 samples of what the first layer gives
    assert sizes(12) == [[3] * 4, [3] * 4 + [2, 3, 3]]
    assert sizes(24) == [[6] * 4, [6] * 4]


def test_samples_are_counted_wherever_an_input_holds_them() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, xs: list[Tensor]) -> Tensor:
            y: Tensor = self.body(xs[0] + xs[1])
            return y

    batches = ({"xs": [x, x / 2]} for x in data(1) * 100)
    made = Planner(Nested().eval(), {"xs": [data()[0][:1]] * 2}, batches, samples=20, progress=False)
    assert [sum(calibration.sizes) for calibration in made.calibrations] == [20, 80]
    assert made.losses and sum(1 for _ in batches) > 90


def test_inputs_without_samples_do_not_count() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, scales: list[Tensor], x: Tensor, table: Tensor) -> Tensor:
            y: Tensor = self.body(x * scales[0]) + table.sum()
            return y

    model, table = Scaling().eval(), torch.zeros(1000, 1000)
    batches = [{"scales": [torch.ones(1)], "x": x, "table": table} for x in data(6)]
    made = Planner(model, {**batches[0], "x": data()[0][:1]}, batches, samples=64, progress=False)
    assert [calibration.sizes for calibration in made.calibrations] == [[16] * 4, [16] * 6]
    assert sensitivity._growth(made.graph) == pytest.approx(1e6 / (3 * 8 * 8))


def test_what_is_not_finite_beyond_what_is_measured_is_told() -> None:
    x = image(64, 3, 8, 8, dtype=torch.float32)
    for wrong in (float("nan"), float("inf")):
        x[40, 0, 3, 3] = wrong
        made = Planner(network(), x[:1], list(x.split(16)), samples=16, progress=False)
        with pytest.raises(elc_fx.InvalidInputError, match="not finite"):
            made.collapse(made.plan(elc_fx.Budget(flops=0.5)))


def test_a_loader_is_free_once_it_is_read() -> None:
    class Loader(list[Tensor]):
        pass

    losses: list[Any] = ["auto", "uniform"]
    for loss in losses:
        loader = Loader(data())
        free = weakref.ref(loader)
        made = Planner(network(), data()[0][:1], loader, loss=loss, progress=False)
        assert made.calibrations
        del loader
        assert free() is None


def test_a_plan_that_is_there_is_collapsed_without_measuring_losses() -> None:
    made, x = planner(), data()[1]
    plan = made.plan(elc_fx.Budget(flops=0.6))
    other = planner(loss="uniform", longest=1)
    assert other.sensitivity is None
    assert torch.equal(other.collapse(plan)(x), made.collapse(plan)(x))
    batches = iter(data())
    assert Planner(network(), x[:1], batches, loss="uniform").plan(elc_fx.Budget(flops=0.6)).candidates
    assert len(list(batches)) == len(data()), "a plan by given losses reads no batches"


def test_the_choice_is_fitted_to_more_samples_than_it_was_measured_on() -> None:
    model, x, fresh = network(), image(64, 3, 8, 8, dtype=torch.float32), image(256, 3, 8, 8, seed=9)
    few, more = (Planner(model, x[:1], [given], samples=16, progress=False) for given in (x[:16], x))
    assert few.losses == more.losses
    plan = few.plan(elc_fx.Budget(flops=0.5))
    assert plan == more.plan(elc_fx.Budget(flops=0.5))
    with torch.no_grad():
        wanted = model(fresh.float())
        apart = [float((made.collapse(plan)(fresh.float()) - wanted).square().mean()) for made in (few, more)]
    assert apart[1] < apart[0]


def test_a_fit_to_few_windows_is_not_taken_for_a_good_one() -> None:
    """With fewer windows than weights a convolution meets any targets, on the batches that it is fitted to."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten()]
    model, batches = (
        ready(nn.Sequential(*layers, nn.Linear(64 * 4, 5))).float(),
        [torch.randn(8, 3, 2, 2) for _ in range(2)],
    )
    options: Any = {"progress": False}
    honest, blind = (Planner(model, batches[0][:1], given, **options) for given in (batches, batches[:1]))
    names = [choice.candidate.full_name for choice in honest.choices]
    assert honest.losses[names.index("2:1x1")] > 2 * blind.losses[names.index("2:1x1")]


def test_nothing_of_the_callers_is_changed() -> None:
    model, batches = network(), data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copies = [batch.clone() for batch in batches]
    elc_fx.plan(model, batches[0][:1], elc_fx.Budget(flops=0.6), batches, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_the_plan_measured_together_is_no_worse_than_the_first_choice() -> None:
    for budget in (elc_fx.Budget(flops=0.8), elc_fx.Budget(flops=0.6), elc_fx.Budget(flops=0.45)):
        once, often = (planner(refinements=n, rehearse=False).plan(budget) for n in (0, 8))
        assert once.prediction and often.prediction
        assert once.prediction.together is not None and often.prediction.together is not None
        assert often.prediction.together <= once.prediction.together + 1e-9


def test_pareto_is_plan_after_plan() -> None:
    model, x = network(), data()[0][:1]
    budgets = [elc_fx.Budget(flops=f) for f in (0.9, 0.7, 0.5)]
    curve = elc_fx.pareto(model, x, budgets, data(), progress=False)
    assert curve == [elc_fx.plan(model, x, budget, data(), progress=False) for budget in budgets]
    losses = [plan.prediction.together for plan in curve if plan.prediction and plan.prediction.together is not None]
    assert len(losses) == len(curve) and losses == sorted(losses)


@pytest.mark.parametrize("kind", ["uniform", "table", "function"])
def test_other_losses(kind: str) -> None:
    model, x = network(), data()[0][:1]
    losses: dict[str, Any] = {
        "uniform": "uniform",
        "table": {"2:3x3": 1.0, "3:3x3": 0.5, "4:3x3": 2.0},
        "function": lambda output, expected: (output - expected).abs().max(),
    }
    plan = elc_fx.plan(model, x, elc_fx.Budget(flops=0.8), data(), loss=losses[kind], progress=False)
    assert plan.candidates and plan.prediction
    if kind == "table":
        assert [c.full_name for c in plan.candidates] == ["3:3x3", "2:3x3"][:1] or plan.prediction.losses == (1.0, 0.5)
        with pytest.raises(elc_fx.PlanError, match="which is no candidate"):
            elc_fx.plan(model, x, elc_fx.Budget(flops=0.8), loss={"9:3x3": 1.0})
    if kind == "uniform":
        assert elc_fx.plan(model, x, elc_fx.Budget(flops=0.8), loss="uniform") == plan


def many(size: int = 96) -> list[Tensor]:
    """Batches that are enough for short trainings."""
    return [image(size, 3, 8, 8, seed=i, dtype=torch.float32) for i in range(384 // size)]


def rehearsing(model: nn.Module | None = None, batches: list[Tensor] | None = None, **options: Any) -> Planner:
    batches = many() if batches is None else batches
    options = {"refinements": 0, "progress": False, **options}
    return Planner(network() if model is None else model, batches[0][:1], batches, **options)


def test_the_plan_loses_no_more_than_others_with_more_layers_after_a_short_training() -> None:
    model, budget = network(), elc_fx.Budget(flops=0.45)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = rehearsing(model)
    first = rehearsing(rehearse=False).plan(budget).prediction
    plan = made.plan(budget)
    assert plan.prediction and first and first.rehearsed is None and plan.prediction.rehearsed
    layers = [sum(made.choices[i].candidate.removed for i in chosen) for chosen in made.rehearsed]
    assert layers == sorted(set(layers), reverse=True) and layers[-1] == 0 and len(layers) == 3
    assert plan.prediction.rehearsed <= (1 + ALIKE) * min(made.rehearsed.values())
    assert first.together == made.measured[next(iter(made.rehearsed))]
    assert "after a short training" in str(plan) and elc_fx.Plan.from_json(plan.to_json()) == plan
    (chosen,) = [chosen for chosen, loss in made.rehearsed.items() if loss == plan.prediction.rehearsed]
    assert plan.candidates == tuple(made.choices[i].candidate for i in made._in_order(chosen))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert rehearsing().plan(budget) == plan  # the training is the same each time


def test_a_plan_does_not_depend_on_the_budgets_before() -> None:
    made, budget, deep = rehearsing(), elc_fx.Budget(flops=0.45), elc_fx.Budget(flops=0.45, depth=4)
    made.plan(budget)
    again = made.plan(deep)
    assert again == rehearsing().plan(deep)


def test_what_is_lost_after_a_short_training_is_that_of_the_fitted_network_trained() -> None:
    """Less than before on what it was trained on, and measured on the batch that nothing was fitted to."""
    made = rehearsing()
    chosen = made.plan(elc_fx.Budget(flops=0.45)).candidates
    positions = [i for i, choice in enumerate(made.choices) if choice.candidate in chosen]
    assert made.sensitivity is not None
    fitted = made.sensitivity.fitted([made.choices[i] for i in positions])
    *seen, unseen = many()
    with torch.no_grad():
        expected = network()(torch.cat(seen))
        loss = sensitivity.divergence(fitted(torch.cat(seen)), expected)
        assert made.sensitivity.loss_of(fitted) == pytest.approx(made.loss_together(positions), rel=1e-4)
        found = []
        for order in range(rehearsal.ORDERS):
            trained = copy.deepcopy(fitted)
            made._rehearsal().train(trained, torch.Generator().manual_seed(order))
            assert sensitivity.divergence(trained.eval()(torch.cat(seen)), expected) < loss
            found.append(float(sensitivity.divergence(trained(unseen), network()(unseen))))
    assert made.loss_after_training(positions) == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_a_short_training_begins_with_nothing_of_what_is_judged_on() -> None:
    *seen, unseen = many()
    fitted = []
    for judged in (unseen, 2 * unseen):
        made = rehearsing(batches=[*seen, judged])
        assert made.sensitivity is not None and made.sensitivity.calibration.judged == [len(seen)]
        fitted.append(made.sensitivity.fitted(made.choices[:1]).state_dict())
    for name, value in fitted[0].items():
        assert torch.equal(value, fitted[1][name]), name


class Detached(nn.Module):
    """Has no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x).detach()
        return y


@pytest.mark.parametrize(
    ("model", "broken", "reason"),
    [(Detached().eval(), 10.0, "RuntimeError"), (network(), 0.0, "it makes the losses of 3 plans, at most")],
)
def test_where_a_short_training_tells_nothing_the_least_loss_without_counts(
    model: nn.Module, broken: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "BROKEN", broken)
    made = rehearsing(model)
    with pytest.warns(UserWarning, match=f"not compared after a short training.* bear: {reason}") as told:
        plan = made.plan(elc_fx.Budget(flops=0.45))
    assert len(told) == 1
    assert plan.prediction and plan.prediction.rehearsed is None
    assert plan.prediction.together == min(made.measured.values())


def test_of_plans_as_good_after_the_training_the_one_with_fewest_layers_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for slight in (0.5 * ALIKE, 2 * ALIKE):
        made = rehearsing()
        losses = iter([1 + slight, 2.0, 1.0])
        monkeypatch.setattr(made, "loss_after_training", lambda _, losses=losses: next(losses))
        finalists = [Solution((i,), 0.0, 0.0) for i in range(3)]
        made.measured = {(i,): 1.0 for i in range(3)}
        found.append(made._rehearsed_best(finalists))
    assert found == [(finalists[0], 1 + 0.5 * ALIKE), (finalists[2], 1.0)]


@pytest.mark.parametrize(
    ("before", "after", "borne"),
    [
        ([1.0, 1.0], [9.0, 8.0], True),
        ([0.1, 1.0], [9.0, 8.0], True),  # as much as any of them lost before
        ([1.0, 1.0], [9.0, 11.0], False),
        ([1e-12, 1e-11], [1e-6, 1e-7], True),  # exact merges, but for rounding
        ([1.0, math.inf], [1.0, math.inf], False),
    ],
)
def test_a_training_is_too_rough_that_multiplies_the_largest_loss(
    before: list[float], after: list[float], borne: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, losses = rehearsing(), iter(after)
    monkeypatch.setattr(made, "loss_after_training", lambda _: next(losses))
    finalists = [Solution((i,), 0.0, 0.0) for i in range(2)]
    made.measured = {(i,): loss for i, loss in enumerate(before)}
    best = after if borne else before
    chosen = finalists[best.index(min(best))]
    with nullcontext() if borne else pytest.warns(UserWarning, match="it makes the losses of 2 plans, at most"):
        assert made._rehearsed_best(finalists) == (chosen, min(after) if borne else None)


def test_nothing_is_compared_where_no_plan_can_leave_more_layers() -> None:
    made = rehearsing()
    made.plan(elc_fx.Budget(depth=made.model.original.depth - 1))
    assert len(made.measured) == 1 and not made.rehearsed


def test_what_is_judged_on_is_not_trained_on() -> None:
    *seen, _ = many()
    (pieces,) = zip(*rehearsing()._rehearsal().pieces, strict=True)
    assert torch.equal(torch.cat(pieces), torch.cat(seen))


class Masked(nn.Module):
    """Has a buffer that is not finite."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.register_buffer("mask", torch.full((4,), -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return torch.maximum(y, self.mask)


def test_values_of_the_models_own_may_be_infinite() -> None:
    made = rehearsing(Masked().eval())
    assert math.isfinite(made.loss_after_training([0]))


def test_a_network_that_training_breaks_loses_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rehearsing()
    monkeypatch.setattr(rehearsal.FinetuneConfig, "learning_rate", math.nan)
    assert made.loss_after_training([0]) == math.inf


@pytest.mark.parametrize("loss", ["auto", lambda output, expected: (output - expected).square().mean()])
def test_what_a_function_of_the_users_measures_is_not_taken_for_classes(
    loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    temperatures = set()

    def recorded(output: Any, wanted: Any, temperature: float | None) -> Tensor:
        temperatures.add(temperature)
        return distance(output, wanted, temperature)

    monkeypatch.setattr(rehearsal, "distance", recorded)
    rehearsing(loss=loss).loss_after_training([0])
    assert temperatures == {elc_fx.FinetuneConfig.temperature if loss == "auto" else None}


@pytest.mark.parametrize("kept", [True, False])
def test_the_original_is_run_once_for_each_step_of_the_first_epoch(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless what it gives were too much to keep."""
    monkeypatch.setattr(rehearsal, "KEPT", rehearsal.KEPT if kept else 0)
    made = rehearsing()
    practice = made._rehearsal()
    runs = []
    made.graph.graph_module.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    practice.loss(made.choices[:1])
    judged = rehearsal.ORDERS * len(made.calibrations[0].judged)
    assert len(runs) == judged + len(practice.pieces) * (1 if kept else rehearsal.EPOCHS * rehearsal.ORDERS)


@pytest.mark.parametrize(("size", "sizes"), [(7, [7]), (8, [8]), (20, [10, 10]), (50, [8, 8, 9, 8, 8, 9])])
def test_no_sample_is_left_out_because_steps_are_small(size: int, sizes: list[int]) -> None:
    assert [len(piece[0]) for piece in rehearsal._pieces([torch.zeros(size, 3)], 8)] == sizes


class Answering(nn.Module):
    """Gives each time what it holds, filled anew: a view of more than it gives."""

    held: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.register_buffer("held", torch.zeros(512, 100), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.training:
            return y
        with torch.no_grad():
            self.held[: len(x), :4] = y
        return self.held[: len(x), :4]


def test_what_is_kept_of_the_original_is_no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    practice = rehearsing()._rehearsal()
    monkeypatch.setattr(practice, "graph_module", Answering().eval())
    with torch.no_grad():
        for position in range(len(practice.pieces)):
            practice._wanted(position)
        for position, piece in enumerate(practice.pieces):
            kept = practice.given[position]
            torch.testing.assert_close(kept, network()(*piece))
            assert kept.untyped_storage().nbytes() == kept.nbytes


def test_the_collapsed_network_computes_with_its_own_weights_inside_of_autocast() -> None:
    found = []
    for cached in (False, True):
        made, x = rehearsing(loss="uniform"), many()[0]
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            collapsed = made.collapse(made.plan(elc_fx.Budget(flops=0.45)))
            found.append(collapsed(x))
        assert {value.dtype for value in collapsed.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(*found)


def test_inside_of_autocast_the_trained_weights_count() -> None:
    """Autocast keeps what it has cast until the outermost context ends: the weights of the first step."""
    found = []
    for cached in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            found.append(rehearsing(loss=lambda a, b: (a.float() - b.float()).square().mean()).loss_after_training([0]))
    assert found[0] == found[1]


def test_what_cannot_be_trained_on_or_was_not_measured_is_told() -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="no batch to train on has 8 samples"):
        rehearsing(batches=many(size=4)[:8]).loss_after_training([0])
    given = planner(loss="uniform")
    for measure in (given.loss_together, given.loss_after_training):
        with pytest.raises(elc_fx.InvalidInputError, match="was given its losses"):
            measure([0])


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


@pytest.mark.parametrize("batches", [data(), many(4)], ids=["few", "small batches"])
def test_of_few_samples_or_small_batches_nothing_is_trained(batches: list[Tensor]) -> None:
    made = rehearsing(batches=batches)
    assert made.plan(elc_fx.Budget(flops=0.45)).candidates and not made.rehearsed


def test_with_noise_nothing_is_trained() -> None:
    made = rehearsing(nn.Sequential(Noisy(), network()).eval())
    assert made.plan(elc_fx.Budget(flops=0.45)).candidates and not made.rehearsed


SCALE = nn.Parameter(torch.ones(()))


class Elsewhere(nn.Module):
    """Reads a parameter that is not its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * SCALE


def test_parameters_from_elsewhere_get_no_gradients() -> None:
    rehearsing(nn.Sequential(Elsewhere(), network()).eval()).loss_after_training([0])
    assert SCALE.grad is None


class UsedFourTimes(nn.Module):
    """Uses a layer four times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for _ in range(4):
            x = torch.relu(self.again(x))
        y: Tensor = self.last(x.mean((2, 3)))
        return y


def test_layers_count_whatever_their_names() -> None:
    named = nn.ModuleDict({"a: x": nn.Conv2d(3, 4, 3), "b: y": nn.Conv2d(4, 3, 3)})

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = named

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.m["b: y"](torch.relu(self.m["a: x"](x)))
            return y

    found = elc_fx.candidates(Named().eval(), torch.zeros(1, 3, 8, 8))
    assert {(c.removed, c.merges) for c in found if len(c.layers) == 2} == {(1, True)}


def test_each_use_of_a_layer_counts() -> None:
    made = planner(loss="uniform")
    assert {choice.candidate.removed for choice in made.choices if not choice.candidate.merges} == {0}
    deep = Planner(UsedFourTimes().eval(), data()[0][:1], loss="uniform", allow=lambda candidate: not candidate.merges)
    plan = deep.plan(elc_fx.Budget(flops=0.6))
    assert plan.prediction and plan.prediction.after.depth == plan.prediction.before.depth == 6
    free = Planner(UsedFourTimes().eval(), data()[0][:1], loss="uniform")
    assert max(choice.candidate.removed for choice in free.choices) >= 3


def test_without_fine_tuning_no_plan_is_chosen_by_what_training_leaves() -> None:
    model, x = network(), many()[0][:1]
    options: dict[str, Any] = {"mode": "decouple", "budget": elc_fx.Budget(flops=0.45)}
    pairs = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in many()]
    finetune = elc_fx.FinetuneConfig(pairs, epochs=1, progress=False)
    kinds: list[dict[str, Any]] = [{"calibration": many()}, {"finetune": finetune}]
    plans = [elc_fx.report_of(elc_fx.compile(model, x, **options, **kind)).plan for kind in kinds]
    predictions = [plan.prediction for plan in plans if plan is not None and plan.prediction is not None]
    assert [prediction.rehearsed is not None for prediction in predictions] == [False, True]


@pytest.mark.parametrize("merging", [True, False])
def test_only_what_is_allowed_is_measured_and_chosen(merging: bool, tmp_path: Path) -> None:
    free, budget = planner(), elc_fx.Budget(flops=0.7)
    asked: list[elc_fx.Candidate] = []

    def allow(candidate: elc_fx.Candidate) -> bool:
        asked.append(candidate)
        return candidate.merges == merging

    made = planner(allow=allow, cache=tmp_path)
    alone = {choice.key: loss for choice, loss in zip(free.choices, free.losses, strict=True)}
    assert asked == [choice.candidate for choice in free.choices]
    assert 0 < len(made.choices) < len(free.choices)
    assert made.losses == [alone[choice.key] for choice in made.choices]
    (file,) = tmp_path.iterdir()
    assert len(file.read_text().strip().splitlines()) == len(made.choices)
    plan = made.plan(budget)
    assert plan.candidates and {candidate.merges for candidate in plan.candidates} == {merging}
    assert plan.prediction
    assert (plan.prediction.after.depth < plan.prediction.before.depth) == merging


def test_a_table_may_name_what_is_not_allowed() -> None:
    table = {choice.candidate.full_name: 1.0 for choice in planner(loss="uniform").choices}
    made = planner(loss=table, allow=lambda candidate: candidate.merges)
    assert made.losses == [1.0] * len(made.choices) and len(made.choices) < len(table)


def test_a_budget_that_what_is_allowed_cannot_keep_is_told() -> None:
    for options in ({"loss": "uniform"}, {}):
        with pytest.raises(elc_fx.PlanError, match="allow more, longer or larger candidates"):
            planner(allow=lambda candidate: False, **options).plan(elc_fx.Budget(flops=0.9))


def test_losses_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = planner(cache=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[: len(lines) // 2]) + '\n["cut o', encoding="utf-8")  # killed while it wrote
    measured: list[str] = []
    original = stored.StoredTable.__setitem__

    def note(self: stored.StoredTable, name: str, loss: float) -> None:
        measured.append(name)
        original(self, name, loss)

    monkeypatch.setattr(stored.StoredTable, "__setitem__", note)
    resumed = planner(cache=tmp_path)
    assert resumed.losses == pytest.approx(full.losses) and 0 < len(measured) < len(full.losses)
    measured.clear()
    assert planner(cache=tmp_path).losses == resumed.losses and not measured
    Planner(network(), data()[0][:1], data(1), progress=False, cache=tmp_path)  # other data, another table
    assert len(measured) == len(full.losses)


def test_what_plans_lose_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = elc_fx.Budget(flops=0.45)
    plan = rehearsing(cache=tmp_path).plan(budget)
    assert plan.prediction and plan.prediction.rehearsed

    def again(*args: object) -> float:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(sensitivity.Sensitivity, "together", again)
    monkeypatch.setattr(rehearsal.Rehearsal, "loss", again)
    assert rehearsing(cache=tmp_path).plan(budget) == plan


@pytest.mark.parametrize(
    "limit", [{"flops": 0.001}, {"params": 0.001}, {"depth": "1 layer"}, {"flops": 0.001, "latency": 0.5}]
)
def test_a_budget_that_cannot_be_met_is_told_before_anything_is_measured(
    limit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: object) -> None:
        raise AssertionError("losses were measured")

    monkeypatch.setattr(sensitivity.Sensitivity, "each_alone", measured)
    with pytest.raises(elc_fx.PlanError, match="is the least"):
        elc_fx.plan(network(), data()[0][:1], elc_fx.Budget(**limit), data(), progress=False)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    model, x = network(), data()[0][:1]
    with pytest.raises(elc_fx.PlanError, match=r"at most .* FLOPs wanted, .* FLOPs is the least .*`_8`|no candidate"):
        elc_fx.plan(model, x, elc_fx.Budget(flops=0.001), loss="uniform")
    with pytest.raises(elc_fx.PlanError, match="depth: at most 1 layers wanted"):
        elc_fx.plan(model, x, elc_fx.Budget(depth="1 layer"), loss="uniform")


def test_bad_arguments() -> None:
    model, x = network(), data()[0][:1]
    budget = elc_fx.Budget(flops=0.8)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"calibration": None}, "pass batches"),
        ({"calibration": []}, "no batches"),
        ({"calibration": 5}, "expected batches"),
        ({"calibration": [5]}, "a calibration batch is a int"),
        ({"calibration": [{"other": x}]}, "no input `input"),
        ({"calibration": data(), "loss": "best"}, "expected 'auto'"),
        ({"calibration": data(), "samples": 0}, "samples is 0"),
        ({"calibration": data(), "longest": "3"}, "longest is"),
        ({"calibration": [torch.zeros(2, 5, 8, 8)]}, "does not fit the model"),
        ({"calibration": data(), "example_inputs": torch.zeros(2, 5, 8, 8)}, "does not run on the example_inputs"),
        ({"calibration": data(), "model": network().to("meta"), "example_inputs": x.to("meta")}, "on the meta device"),
    )
    for arguments, message in wrong:
        with pytest.raises(elc_fx.InvalidInputError, match=message):
            elc_fx.plan(**{"model": model, "example_inputs": x, "budget": budget, **arguments})
    with pytest.raises(elc_fx.InvalidInputError, match=r"expected an elc_fx\.Budget"):
        elc_fx.plan(model, x, 0.5, data())  # type: ignore[arg-type]
    with pytest.raises(elc_fx.TrainingModeError):
        elc_fx.plan(network().train(), x, budget, data())


TWO = """
import json, sys
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_planner import planner
dist.init_process_group("gloo")
losses = planner().losses
if dist.get_rank() == 0:
    print(json.dumps(losses))
dist.destroy_process_group()
"""


def run_in_two(text: str, folder: Path) -> str:
    """What two processes of one job print."""
    script = folder / "two.py"
    script.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    printed = run_in_two(TWO.format(tests=str(Path(__file__).parent)), tmp_path)
    assert json.loads(printed.strip().splitlines()[-1]) == pytest.approx(planner().losses, rel=1e-3, abs=1e-7)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_the_collapsed_network_is_the_one_that_was_measured() -> None:
    batches = data(1)  # more would be fitted to and judged on apart
    made = Planner(network(), batches[0][:1], batches, longest=2, progress=False)
    plan = made.plan(elc_fx.Budget(flops=0.4))
    assert plan.prediction is not None and len(plan.candidates) > 1
    collapsed, model = made.collapse(plan), network()
    with torch.no_grad():
        losses = [float(sensitivity.divergence(collapsed(x), model(x))) for x in batches]
    assert sum(losses) / len(losses) == pytest.approx(plan.prediction.together, rel=1e-4)
    assert elc_fx.measure(collapsed, data()[0][:1]).flops == plan.prediction.after.flops


def test_a_plan_of_another_model_is_not_collapsed() -> None:
    made, plan = planner(loss="uniform"), elc_fx.Plan.of(network(), data()[0][:1])
    text: Any = plan.to_json()
    other = nn.Sequential(*network()[:-1], nn.Linear(6, 7)).eval()
    other[0] = nn.Conv2d(3, 6, 3)
    with pytest.raises(elc_fx.PlanError, match="another model"):
        Planner(other, data()[0][:1], data(), loss="uniform").collapse(plan)
    with pytest.raises(elc_fx.PlanError, match="overlap"):
        made.collapse(elc_fx.Plan((*plan.candidates, made.choices[0].candidate), plan.inputs))
    with pytest.raises(elc_fx.InvalidInputError, match="plan is a str"):
        made.collapse(text)
    with pytest.raises(elc_fx.InvalidInputError, match="calibration is None"):
        Planner(network(), data()[0][:1], loss="uniform").collapse(plan)


def test_inputs_that_are_no_batches_stay_whole() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network(), nn.Linear(4, 2)

        def forward(self, x: Tensor, table: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.body(x)) + table.sum(0)}

    model = TwoInputs().eval()
    table = torch.ones(40, 2)
    batches = [{"x": x, "table": table} for x in data()]
    made = Planner(model, {"x": data()[0][:1], "table": table}, batches, samples=20, progress=False)
    assert made.sensitivity is not None
    shapes = [[tuple(v.shape) for v in batch] for batch in made.sensitivity.calibration.batches]
    assert shapes == [[(4, 3, 8, 8), (40, 2)]] * 5
    assert made.plan(elc_fx.Budget(flops=0.7)).candidates


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.body(x)
        return y if scale is None else y * scale


def test_labels_of_a_loader_are_no_input() -> None:
    """A batch begins with the inputs that have no default, for `plan` as for `decouple`."""
    model, x = Scaled().eval(), data()[0][:1]
    loader = [(batch, torch.arange(len(batch))) for batch in data()]
    plan = elc_fx.plan(model, x, elc_fx.Budget(flops=0.6), loader, progress=False)
    assert plan == elc_fx.plan(model, x, elc_fx.Budget(flops=0.6), data(), progress=False)
    with_labels, without = (elc_fx.decouple(model, plan, calibration=given) for given in (loader, data()))
    for name, value in with_labels.named_parameters():
        assert torch.equal(value, without.get_parameter(name))


def test_names_do_not_mix_up_stored_losses(tmp_path: Path) -> None:
    """A candidate's name depends on which others there are."""
    for longest in (1, 3, 6):
        stored, fresh = planner(longest=longest, cache=tmp_path), planner(longest=longest)
        assert stored.losses == pytest.approx(fresh.losses, rel=1e-4, abs=1e-9)


# Found by trying what may be passed wrongly.


@pytest.mark.parametrize(
    "value", [float("inf"), float("nan"), 0, -1, True, "", "12 ms", "-3 M", [1], 10**400, "9" * 5000]
)
def test_what_no_budget_is(value: Any) -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="flops of a budget"):
        elc_fx.Budget(flops=value)


def test_a_text_without_a_unit_is_the_number_that_it_spells() -> None:
    original = elc_fx.Costs(1000, 100, 10)
    assert elc_fx.Budget(flops="5e2", depth="5e-1").limits(original) == {"flops": 500, "depth": 5}
    assert elc_fx.Budget.parse("params=1.2E-1 k").limits(original) == {"params": 0.12e3}
    assert elc_fx.Budget(flops="0.5", depth="4").limits(original) == {"flops": 500, "depth": 4}
    for whole in (elc_fx.Budget(depth=1.0), elc_fx.Budget(depth="1.0"), elc_fx.Budget.parse("depth=1.0")):
        assert whole.limits(original) == {"depth": 10}
    for one in (elc_fx.Budget(depth="1 layer"), elc_fx.Budget.parse("depth=1 layer")):
        assert one.limits(original) == {"depth": 1}
    for ambiguous in (lambda: elc_fx.Budget(depth=1), lambda: elc_fx.Budget.parse("depth=1")):
        with pytest.raises(elc_fx.InvalidInputError, match=r'"1 layer", or 1\.0'):
            ambiguous()
    assert elc_fx.Budget(flops=1).limits(original) == {"flops": 1000}
    assert elc_fx.Budget(depth=0.29).limits(elc_fx.Costs(1, 1, 100)) == {"depth": 29}


@pytest.mark.parametrize("given", [float("nan"), -1.0, "x", torch.zeros(3), None])
def test_a_loss_function_that_gives_no_loss_is_told(given: Any) -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    with pytest.raises(elc_fx.InvalidInputError, match="the loss function gives"):
        elc_fx.plan(model, x, elc_fx.Budget(flops=0.7), [x], loss=lambda output, expected: given, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"refinements": -1}, "refinements"), ({"refinements": "x"}, "refinements"), ({"cache": 3}, "cache")),
        ({"allow": "merges"}, "allow is 'merges', expected a function of a candidate"),
        ({"rehearse": 4}, "rehearse is 4, expected True or False"),
    ],
)
def test_options_that_are_out_of_range_are_told(options: dict[str, Any], message: str) -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(elc_fx.InvalidInputError, match=message):
        elc_fx.plan(network(), x, elc_fx.Budget(flops=0.7), [x], progress=False, **options)


def test_one_budget_is_not_several() -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="budgets is a Budget"):
        elc_fx.pareto(network(), torch.randn(1, 3, 8, 8), elc_fx.Budget(flops=0.5), loss="uniform")  # type: ignore[arg-type]


def test_a_cache_that_is_damaged_or_a_file(tmp_path: Path) -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    given: dict[str, Any] = {"cache": tmp_path / "cache", "progress": False}
    plan = elc_fx.plan(model, x, elc_fx.Budget(flops=0.7), [x], **given)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes() + b'\xff\xfe["a"\n["x", "nan"]\n[1]\nnull\n')
    assert elc_fx.plan(model, x, elc_fx.Budget(flops=0.7), [x], **given) == plan
    (tmp_path / "file").write_text("mine")
    with pytest.raises(elc_fx.InvalidInputError, match="nothing can be kept"):
        elc_fx.plan(model, x, elc_fx.Budget(flops=0.7), [x], cache=tmp_path / "file", progress=False)


def test_latencies_leave_the_callers_random_numbers_as_they_were() -> None:
    model, x = network(), torch.randn(1, 3, 8, 8)
    state = torch.get_rng_state()
    elc_fx.plan(model, x, elc_fx.Budget(latency="1 s"), loss="uniform", progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_impossible_budget_names_the_layers_as_people_do() -> None:
    """A smaller kernel leaves the depth as it is: where that is limited, such candidates do not help."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(elc_fx.PlanError, match=r"1 layers wanted, 2 layers is .*; no candidate merges `0`, `2`;"):
        elc_fx.plan(model, x, elc_fx.Budget(depth=0.5), loss="uniform")
    with pytest.raises(elc_fx.PlanError, match=r"at most 33 FLOPs wanted.*; no candidate covers `2`;"):
        elc_fx.plan(model, x, elc_fx.Budget(flops="33.7 FLOPs"), loss="uniform")


# Found by a fresh view.


class Flattened(nn.Module):
    """With a size between its layers, which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.pool, self.hidden, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.features(x))
        y = y.view(y.size(0), -1)
        scores: Tensor = self.head(torch.relu(self.hidden(y)))
        return scores


def test_latencies_of_a_network_that_computes_with_sizes() -> None:
    x = torch.randn(1, 3, 12, 12)
    plan = elc_fx.plan(Flattened().eval(), x, elc_fx.Budget(latency="1 s"), loss="uniform", progress=False)
    assert plan.prediction is not None and plan.prediction.latency is not None


@pytest.mark.parametrize("pair", [(nn.ReLU(), nn.Tanh()), (nn.LeakyReLU(0.01), nn.LeakyReLU(0.5))])
def test_losses_of_other_activations_are_not_found_in_the_cache(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    x, losses = torch.randn(8, 3, 8, 8), []
    for cache in (tmp_path, None):
        for activation in pair if cache else pair[1:]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 6, 3), activation, nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 3))
            made = Planner(model.eval(), x, [x], cache=cache, progress=False)
            losses.append(made.losses)
    assert losses[1] == losses[2] != losses[0]


def test_a_collapsed_network_is_in_eval_mode_and_keeps_its_budget_when_compiled() -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 3, padding=1)).eval()
    x = torch.randn(4, 3, 8, 8)
    made = Planner(model, x, [x], progress=False)
    collapsed = made.collapse(made.plan(elc_fx.Budget(params=808)))
    assert not any(module.training for module in collapsed.modules())
    assert elc_fx.measure(elc_fx.compile(collapsed, x), x).parameters <= 808


@pytest.mark.parametrize("loss", [None, 0, ["auto"]])
def test_what_is_no_loss_is_not_taken_for_one(loss: Any) -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(elc_fx.InvalidInputError, match="expected 'auto'"):
        elc_fx.plan(network(), x, elc_fx.Budget(flops=0.7), [x], loss=loss, progress=False)


def test_an_empty_plan_says_what_the_network_costs() -> None:
    plan = elc_fx.plan(network(), torch.randn(1, 3, 8, 8), elc_fx.Budget(depth=1.0), loss="uniform")
    assert not plan.candidates
    assert "met without a merge" in str(plan) and "depth 10 layers → 10 layers (100.0%)" in str(plan)


def test_losses_of_any_size_and_kind_of_number() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    made = Planner(model, x, [x], loss=lambda a, b: 1e150 * (a - b).double().abs().sum(), progress=False)
    assert made.plan(elc_fx.Budget(flops=0.6)).candidates
    with pytest.raises(elc_fx.PlanError, match=r"\d+ of \d+ candidates are never chosen"):
        Planner(model, x, loss={made.choices[0].candidate.full_name: 1.0}).plan(elc_fx.Budget(flops=0.2))
    table = {choice.candidate.full_name: np.float32(1) for choice in made.choices}
    assert Planner(model, x, loss=table).plan(elc_fx.Budget(flops=0.6)).candidates
    for wrong in (True, np.bool_(True), HUGE, "1", float("nan")):
        with pytest.raises(elc_fx.InvalidInputError, match="expected a number from 0 on"):
            Planner(model, x, loss=table | {made.choices[0].candidate.full_name: wrong})


@pytest.mark.parametrize("wrong", [HUGE, -1, True, "nan", [1], {"a": 1}, None, float("nan")], ids=repr_of)
def test_a_damaged_number_in_a_cache_is_measured_again(wrong: Any, tmp_path: Path) -> None:
    made = planner(cache=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    damaged = [
        json.dumps([lines[0][0], wrong]),
        json.dumps([[lines[1][0]], 1]),
        "[" * 10_000,
        "\0\1",
        '{"a": 1, "b": 2}',
    ]
    file.write_text("\n".join([*damaged, *(json.dumps(line) for line in lines[2:])]), encoding="utf-8")
    assert planner(cache=tmp_path).losses == pytest.approx(made.losses)


def test_a_cache_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    planner(cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.jsonl")
    file.unlink()
    file.mkdir()  # a folder in the place of the file
    for cache in (tmp_path / "cache", "nul\0l", tmp_path / ("x" * 300)):
        with pytest.raises(elc_fx.InvalidInputError, match="nothing can be kept in"):
            planner(cache=cache)


def test_a_module_that_writes_into_its_input_changes_nothing_of_the_callers() -> None:
    losses = []
    for writes in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Writing(writes=writes), *network(), Writing(writes=writes)).eval()
        batches = data()
        made = Planner(model, batches[0][:1].clone(), batches, progress=False)
        made.plan(elc_fx.Budget(flops=0.6))
        assert all(torch.equal(a, b) for a, b in zip(batches, data(), strict=True)) and model[0].calls == 0
        losses.append(made.losses)
    assert losses[0] == losses[1]


def test_calibration_images_of_several_sizes_and_empty_batches() -> None:
    model, x = network(), torch.randn(1, 3, 8, 8)
    batches = [torch.randn(4, 3, 8, 8), torch.randn(0, 3, 8, 8), torch.randn(5, 3, 12, 10)]
    made = Planner(model, x, batches, progress=False)
    plan = made.plan(elc_fx.Budget(flops=0.6))
    assert plan.candidates and plan == Planner(model, x, batches[::2], progress=False).plan(elc_fx.Budget(flops=0.6))
    assert made.collapse(plan)(x).shape == (1, 4)
    with pytest.raises(elc_fx.InvalidInputError, match="empty ones only"):
        Planner(model, x, [batches[1]], progress=False)


def test_another_default_device() -> None:
    """As on a machine with torch.set_default_device("cuda"), and the model elsewhere."""
    model, x, batches = network(), torch.randn(1, 3, 8, 8), data()
    plan = elc_fx.plan(model, x, elc_fx.Budget(flops=0.6), batches, progress=False)
    with torch.device("meta"):
        assert elc_fx.plan(model, x, elc_fx.Budget(flops=0.6), batches, progress=False) == plan


def test_samples_without_a_batch_axis() -> None:
    """Which no batch norm takes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    x = torch.randn(3, 8, 8)
    planner = Planner(model, x, [torch.randn(3, 8, 8) for _ in range(8)], progress=False)
    plan = planner.plan(elc_fx.Budget(flops=0.5))
    assert plan.candidates and planner.collapse(plan)(x).shape == model(x).shape


class Repeated(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


def test_each_call_of_a_layer_counts() -> None:
    """Merging both calls of a convolution takes one layer out of two, though both are of one module."""
    model, x = Repeated().eval(), torch.randn(2, 3, 8, 8)
    planner = Planner(model, x, loss="uniform")
    losses = {choice.candidate.full_name: loss for choice, loss in zip(planner.choices, planner.losses, strict=True)}
    assert losses["conv:3x3"] == 2 and losses["conv@conv_1:1x3"] == 1


ONE_CLOCK = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch.distributed as dist
import elc_fx
from elc_fx.planning import latency
from test_planner import planner
dist.init_process_group("gloo")
rank = dist.get_rank()

def seconds(calls, blocks=1):
    assert rank == 0, "the other process has a clock of its own"
    return [2.0 - i for i in range(len(calls))]

latency.seconds = seconds

def measured(meter, units):
    return [seconds([0])[0] * sum(p.numel() for p in unit.make().parameters()) for unit in units]

latency.LatencyMeter._measured = measured
made = planner()
plan = made.plan(elc_fx.Budget(latency=0.7))
Path({folder!r}, f"plan-{{rank}}.json").write_text(plan.to_json())
try:
    made.plan(elc_fx.Budget(latency="1 us"))
except elc_fx.PlanError as error:
    Path({folder!r}, f"error-{{rank}}").write_text(str(error))
dist.destroy_process_group()
"""


def test_two_processes_go_by_the_clock_of_the_first(tmp_path: Path) -> None:
    run_in_two(ONE_CLOCK.format(tests=str(Path(__file__).parent), folder=str(tmp_path)), tmp_path)
    plans, errors = (
        [(tmp_path / name.format(rank)).read_text() for rank in (0, 1)] for name in ("plan-{}.json", "error-{}")
    )
    assert plans[0] == plans[1] and elc_fx.Plan.from_json(plans[0]).candidates
    assert errors[0] == errors[1] and "latency: at most" in errors[0]
