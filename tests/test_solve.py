"""The choice under a budget against brute force, and its costs against those of merged networks."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import image, ready
from torch import Tensor, nn

import elc_fx
from elc_fx.matching.serial import SerialGraph
from elc_fx.planning import solve as solving
from elc_fx.planning.budget import Budget, Costs
from elc_fx.planning.cost import CostModel, choices_of
from elc_fx.planning.planner import Planner
from elc_fx.planning.solve import Problem, solve

# --- the solver against brute force ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A choice over nodes first … last of a graph."""

    candidate: Any
    source: str
    output: str


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A chain of layers with skips past some of them, parameters that layers share, and spans that may nest."""
    count = draw(st.integers(2, 7))
    names = ["input", *(f"n{i}" for i in range(count))]
    layers = {"input": 0, **{name: draw(st.integers(0, 2)) for name in names[1:]}}
    sources: dict[str, tuple[str, ...]] = {"input": ()}
    for i, name in enumerate(names[1:], 1):
        sources[name] = (names[i - 1],)
    end = draw(st.integers(1, count))
    sources["beside"], layers["beside"] = (names[draw(st.integers(0, end - 1))],), draw(st.integers(0, 3))
    sources["join"], layers["join"] = ("beside", names[count]), 0
    groups = [(draw(st.integers(0, 9)), frozenset([name])) for name in names[1:]]
    if draw(st.booleans()):
        groups.append((draw(st.integers(1, 9)), frozenset(draw(st.sets(st.sampled_from(names[1:]), min_size=2)))))
    spans = []
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(1, count))
        last = draw(st.integers(first, count))
        inside = names[first : last + 1]
        if sources["beside"][0] in inside[:-1]:  # a region has one output
            continue
        candidate = SimpleNamespace(
            nodes=tuple(inside),
            removed=draw(st.integers(0, 3)),
            flops=(draw(st.integers(0, 20)), draw(st.integers(0, 10))),
            parameters=(0, draw(st.integers(0, 6))),
        )
        spans.append(Span(candidate, names[first - 1], names[last]))
    losses = [
        draw(st.integers(0, 30)) / 10 * draw(st.sampled_from([1e-6, 1.0, 1e4])) if draw(st.integers(0, 9)) else math.inf
        for _ in spans
    ]
    original = Costs(100, sum(n for n, _ in groups), 0)
    reads = {name: dict.fromkeys(read, layers[name]) for name, read in sources.items()}
    model = CostModel(original, reads, tuple(groups))
    limits: dict[str, float] = {}
    if draw(st.booleans()):
        limits["flops"] = draw(st.integers(60, 100))
    if draw(st.booleans()):
        limits["params"] = draw(st.integers(0, max(original.params, 1)))
    if draw(st.booleans()) or not limits:
        limits["depth"] = draw(st.integers(0, 8))
    pairs = itertools.combinations(range(len(spans)), 2)
    together = {pair: draw(st.integers(-5, 10)) / 10 for pair in pairs if draw(st.booleans())}
    if draw(st.booleans()):  # what is gained together hides small losses
        together = {}
    removed = draw(st.integers(0, 4)) if draw(st.booleans()) else math.inf
    return Problem(spans, losses, model, limits, together, removed)  # type: ignore[arg-type]


def by_brute_force(problem: Problem) -> float | None:
    best: float | None = None
    for count in range(len(problem.choices) + 1):
        for chosen in itertools.combinations(range(len(problem.choices)), count):
            nodes = [name for i in chosen for name in problem.choices[i].candidate.nodes]
            costs = problem.model.after([problem.choices[i] for i in chosen])
            loss = sum(problem.losses[i] for i in chosen)
            loss += sum((problem.together or {}).get(pair, 0.0) for pair in itertools.combinations(chosen, 2))
            kept = all(getattr(costs, name) <= limit for name, limit in problem.limits.items())
            kept &= sum(problem.choices[i].candidate.removed for i in chosen) <= problem.removed
            if len(set(nodes)) == len(nodes) and kept and math.isfinite(loss):
                best = loss if best is None else min(best, loss)
    return best


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_choice_is_the_best_there_is(problem: Problem) -> None:
    expected = by_brute_force(problem)
    if expected is None:
        with pytest.raises(elc_fx.PlanError, match="the budget cannot be met"):
            solve(problem)
        return
    solution = solve(problem)
    assert solution.loss == pytest.approx(expected, rel=1e-6, abs=1e-12) and solution.gap == pytest.approx(0, abs=1e-9)
    costs = problem.model.after([problem.choices[i] for i in solution.chosen])
    assert all(getattr(costs, name) <= limit for name, limit in problem.limits.items())
    assert sum(problem.choices[i].candidate.removed for i in solution.chosen) <= problem.removed


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


def of_blocks(count: int) -> Planner:
    model = nn.Sequential(*(Block(4) for _ in range(count))).eval()
    return Planner(model, torch.randn(1, 4, 8, 8), loss="uniform", progress=False)


def test_a_deep_network_is_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that are all alike, which leave nothing to branch on: the relaxation itself has to be tight."""
    monkeypatch.setattr(solving, "SECONDS", 5.0)
    planner = of_blocks(75)
    for budget, loss in ((Budget(depth=14), 150), (Budget(depth=0.297), 116), (Budget(depth=0.5, flops=0.6), 82)):
        prediction = planner.plan(budget).prediction
        assert prediction is not None and prediction.gap == 0 and sum(prediction.losses) == loss


def out_of_time(found: bool) -> Any:
    """HiGHS, as if its time were over: before it finds anything, or with a gap of a half."""

    def milp(*args: Any, **options: Any) -> Any:
        result = scipy.optimize.milp(*args, **options)
        result.status, result.mip_gap, result.message = 1, 0.5, "Time limit reached."
        if not found:
            result.x = None
        return result

    return milp


def test_out_of_time_is_not_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = of_blocks(3)
    monkeypatch.setattr(solving, "milp", out_of_time(found=False))
    with pytest.raises(elc_fx.PlanError, match=r"found no choice .* within 60 s; there may be one all the same"):
        planner.plan(Budget(depth=4))
    monkeypatch.setattr(solving, "milp", out_of_time(found=True))
    prediction = planner.plan(Budget(depth=4)).prediction
    assert prediction is not None and prediction.gap == 0.5 and "up to 50.0% from the best" in str(prediction)


def test_the_least_is_said_to_be_between_what_is_proven_and_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = of_blocks(3)

    def milp(*args: Any, **options: Any) -> Any:
        result = scipy.optimize.milp(*args, **options)
        return out_of_time(found=True)(*args, **options) if result.status == 0 else result

    monkeypatch.setattr(solving, "milp", milp)
    with pytest.raises(elc_fx.PlanError, match=r"0\.3 layers wanted, 0\.5 layers to 1 layers is the least"):
        planner.plan(Budget(depth=0.05))


def test_losses_as_large_as_numbers_can_be() -> None:
    planner = of_blocks(3)
    planner.losses = [1.7e308] * len(planner.choices)
    assert planner.plan(Budget(depth="1 layer")).candidates


@pytest.mark.parametrize("smallest", [1e-6, 1e-9, 1e-12])
def test_small_losses_are_told_apart_next_to_large_ones(smallest: float) -> None:
    planner = of_blocks(4)
    alone = [i for i, choice in enumerate(planner.choices) if len(choice.candidate.layers) == 2]
    planner.losses = [1e4] * len(planner.choices)
    for rank, i in enumerate(reversed(alone)):
        planner.losses[i] = smallest * (1 + rank / 10)
    plan = planner.plan(Budget(depth=7))
    assert plan.prediction is not None and plan.prediction.gap == 0
    assert plan.prediction.losses == (smallest,)


# --- costs against those that are counted ----------------------------------------------------------------------------


class Shared(nn.Module):
    """A convolution that is called inside of a region and outside, a functional one, a PReLU and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(4), nn.PReLU(4)
        self.weight = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(self.act(self.norm(self.stem(x)))))
        x = F.max_pool2d(x, 2)
        x = torch.relu(F.conv2d(torch.relu(self.shared(x)), self.weight, padding=1, groups=4)) + x
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.down = nn.BatchNorm2d(6), nn.Conv2d(4, 6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.norm(self.a(x)))) + self.down(x))


class Attending(nn.Module):
    """Attention, which has a layer more than modules that are layers; a branch that no symbolic trace can enter, with
    layers side by side; and parameters that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.opaque, self.attention = Opaque(), nn.MultiheadAttention(8, 2, batch_first=True)
        self.weight, self.head = nn.Parameter(torch.randn(8, 6)), nn.Linear(6, 3)
        self.unread, self.never = nn.Parameter(torch.randn(7)), nn.Linear(3, 3)

    def forward(self, input: Tensor) -> Tensor:
        y = self.opaque(self.b(torch.relu(self.a(input)))).flatten(2).transpose(1, 2)
        y = self.attention(y, y, y)[0] + y
        scores: Tensor = self.head(y.mean(1) @ self.weight)
        return scores


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x) + self.q(x) if x.sum() > 0 else self.p(x) - self.q(x)


NETWORKS = {
    "attending": (Attending, (2, 3, 6, 6)),
    "shared": (Shared, (2, 3, 8, 8)),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Residual(), nn.Flatten()),
        (2, 3, 8, 8),
    ),
    "audio": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 5), nn.GELU(), nn.Conv1d(4, 4, 3, groups=2), nn.ReLU()),
        (3, 2, 16),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_costs_are_those_of_the_merged_network(name: str) -> None:
    make, shape = NETWORKS[name]
    model, x = ready(make()), image(*shape)
    graph = SerialGraph.of(model, elc_fx.capturing.inputs.ExampleInputs.of(model, x))
    costs = CostModel.of(model, x, graph)
    found = choices_of(graph, longest=4, largest_kernel=7)
    before = elc_fx.measure(model, x)
    assert found and costs.original == Costs(before.flops, before.parameters, before.depth)
    for chosen in ([], *([choice] for choice in found)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decoupled = elc_fx.decouple(
                model, elc_fx.Plan(tuple(c.candidate for c in chosen), ("x" if name == "shared" else "input",))
            )
        elc_fx.set_gate(decoupled, 0)
        measured = elc_fx.measure(elc_fx.merge(decoupled), x)
        predicted = costs.after(chosen)
        assert predicted == Costs(measured.flops, measured.parameters, measured.depth), chosen


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_budgets_are_fractions_or_absolute() -> None:
    original = Costs(2_000_000, 1000, 20)
    assert Budget(flops=0.5).limits(original) == {"flops": 1_000_000}
    assert Budget(flops="1.5 MFLOPs", depth=12).limits(original) == {"flops": 1_500_000, "depth": 12}
    assert Budget(params="0.5k").limits(original) == {"params": 500}
    assert Budget.parse("flops=0.45, depth=12") == Budget(flops=0.45, depth=12)
    assert Budget.parse("flops=30MFLOPs").limits(original) == {"flops": 30e6}
    wrong: list[dict[str, Any]] = [{}, {"flops": 0}, {"flops": -1}, {"flops": 1.5}, {"flops": "many"}, {"flops": True}]
    wrong += [{"depth": [3]}, {"flops": "5 ms"}, {"flops": float("nan")}, {"flops": 3.5}]
    for fields in wrong:
        with pytest.raises(elc_fx.InvalidInputError):
            Budget(**fields)
    for text in ("", "flops", "flops=", "size=3", "flops=0.5,flops=0.4", "flops=0..5"):
        with pytest.raises(elc_fx.InvalidInputError):
            Budget.parse(text)
