"""Latency: budgets kept, layers measured once, predictions that add up, and errors that help."""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_planner import data, network
from torch import nn

import elc_fx
from elc_fx.capturing.identity import described
from elc_fx.planning import latency
from elc_fx.planning import planner as planning
from elc_fx.planning.budget import cost_text
from elc_fx.planning.cost import LatencyModel
from elc_fx.planning.planner import Planner


def planner(**options: Any) -> Planner:
    return Planner(network(), torch.randn(1, 3, 8, 8), loss="uniform", progress=False, **options)


CALL = 100.0


def saved_weights(candidates: Sequence[elc_fx.Candidate]) -> int:
    """Biases are none."""
    return sum(c.parameters[0] - c.parameters[1] - 6 * (len(c.layers) - 1) for c in candidates)


@pytest.fixture
def by_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock under which a layer takes one second for each of its weights, and any call `CALL` more."""

    def measured(self: latency.LatencyMeter, units: Sequence[Any]) -> list[float]:
        return [float(sum(p.numel() for p in unit.make().parameters() if p.dim() > 1)) for unit in units]

    monkeypatch.setattr(latency.LatencyMeter, "_measured", measured)
    weights = 3 * 6 * 9 + 8 * 36 * 9 + 24  # of `network`
    monkeypatch.setattr(
        latency.LatencyMeter,
        "_whole",
        lambda self, choices: (CALL + weights, CALL + weights - saved_weights([c.candidate for c in choices])),
    )


@pytest.mark.usefixtures("by_weights")
def test_predictions_add_up_and_keep_the_budget() -> None:
    made = planner()
    plan = made.plan(elc_fx.Budget(latency=0.5))
    assert plan.prediction is not None and plan.candidates
    before, after = plan.prediction.before.latency, plan.prediction.after.latency
    assert before is not None and after is not None and after <= 0.5 * before
    assert (before, after) == pytest.approx(plan.prediction.latency)
    assert elc_fx.Plan.from_json(plan.to_json()) == plan
    assert "latency" in str(plan)


@pytest.mark.usefixtures("by_weights")
@pytest.mark.parametrize("corrections", [0, planning.CORRECTIONS])
def test_choices_that_were_timed_too_fast_are_made_again(corrections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner takes for fast is slower in the network: without corrections the plan is above its limit."""
    right = latency.LatencyMeter._measured

    def measured(self: latency.LatencyMeter, units: Sequence[Any]) -> list[float]:
        times = zip(units, right(self, units), strict=True)
        return [time * (0.3 if "1×3" in unit.key else 1.0) for unit, time in times]

    monkeypatch.setattr(latency.LatencyMeter, "_measured", measured)
    monkeypatch.setattr(planning, "CORRECTIONS", corrections)
    plan = planner().plan(elc_fx.Budget(latency=0.4))
    assert plan.prediction is not None and plan.prediction.latency is not None
    predicted = (plan.prediction.after.latency or 0) / (plan.prediction.before.latency or 1)
    taken = plan.prediction.latency[1] / plan.prediction.latency[0]
    assert predicted == pytest.approx(taken, rel=0.05)
    assert (taken <= 0.4) is bool(corrections)


@pytest.mark.usefixtures("by_weights")
@pytest.mark.parametrize(("seed", "limit", "calibrated"), [(3, 0.4, False), (7, 0.3, False), (2, 0.8, True)])
def test_of_networks_that_were_all_predicted_wrongly_one_that_keeps_the_limit_is_taken(
    seed: int, limit: float, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = latency.LatencyMeter._whole

    def whole(self: latency.LatencyMeter, choices: Any) -> tuple[float, float]:
        before, after = right(self, choices)
        share = random.Random(f"{seed}{','.join(choice.key for choice in choices)}").uniform(-0.2, 0.2)
        return before, after * (1 + share if choices else 1)

    monkeypatch.setattr(latency.LatencyMeter, "_whole", whole)
    options: dict[str, Any] = {"calibration": data()} if calibrated else {"loss": "uniform"}
    made = Planner(network(), torch.zeros(1, 3, 8, 8), progress=False, **options)
    prediction = made.plan(elc_fx.Budget(latency=limit)).prediction
    assert prediction is not None and prediction.latency is not None
    assert (prediction.after.latency or 0) <= limit * (prediction.before.latency or 0)
    assert prediction.latency[1] <= 1.06 * limit * prediction.latency[0]


@pytest.mark.usefixtures("by_weights")
def test_networks_that_are_all_slower_than_the_limit_are_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.LatencyMeter, "_whole", lambda self, choices: (2.0, 2.6))
    with pytest.raises(elc_fx.PlanError, match=r"latency: at most 2,000 ms wanted, .* the fastest takes 2,600 ms"):
        planner().plan(elc_fx.Budget(flops=0.5, latency=1.0))


@pytest.mark.usefixtures("by_weights")
def test_plans_do_not_depend_on_the_budgets_before() -> None:
    made, budgets = planner(), [elc_fx.Budget(flops=0.5), elc_fx.Budget(latency=0.5), elc_fx.Budget(flops=0.7)]
    plans = [made.plan(budget) for budget in budgets]
    assert [planner().plan(budget) for budget in reversed(budgets)] == plans[::-1]
    assert plans[2].prediction is not None and plans[2].prediction.latency is None  # no budget limits it


@pytest.mark.usefixtures("by_weights")
def test_limits_hold_where_merges_save_nothing_of_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.LatencyMeter, "_whole", lambda self, choices: (1e-5, 1.1e-5))
    with pytest.raises(elc_fx.PlanError, match="latency: at most"):
        planner().plan(elc_fx.Budget(latency=0.95))


@pytest.mark.parametrize(("value", "text"), [(1.0, "1,000 ms"), (0.0123456, "12.3 ms"), (1e-5, "0.01 ms")])
def test_latencies_are_written_out(value: float, text: str) -> None:
    assert cost_text("latency", value) == text


@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4), st.lists(st.floats(0.0, 1.2), min_size=2, max_size=2))
def test_what_sums_take_and_what_they_may_be(saved: list[float], taken: list[float]) -> None:
    """Networks that were measured are predicted as they were; more layers of others never take less; limits are met."""
    choices: Any = [SimpleNamespace(key=str(i), candidate=SimpleNamespace(nodes=[f"n{i}"])) for i in range(4)]
    nodes, merged = {f"n{i}": time for i, time in enumerate(saved)}, dict.fromkeys("0123", 0.0)
    model = LatencyModel(2 * sum(saved), nodes, merged).through(choices, before=2.0, after=0.5)
    assert (model.after([]), model.after(choices)) == pytest.approx((2.0, 0.5))
    for count, share in enumerate(taken, 1):
        model = model.knowing(choices[:count], 0.5 + share)
    assert [model.after(choices[:count]) for count in (1, 2)] == pytest.approx([0.5 + share for share in taken])
    falling = [model.after(choices[:count]) for count in (0, 3, 4)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(falling))
    for limit in (0.2, 0.5, 0.9, 1.4, 2.0, 3.0):
        for over in (-0.1, -1e-6, 0.0, 1e-6, 0.1):
            total = model.allowed(limit) + over
            one: Any = [SimpleNamespace(key="one", candidate=SimpleNamespace(nodes=["n"]))]
            after = replace(model, nodes={"n": model.whole - total}, choices={"one": 0.0}).after(one)
            assert after <= limit + 1e-9 if over <= 0 else after >= limit - 1e-9


def test_the_original_takes_what_it_takes_however_it_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without candidates is no faster for being measured faster."""
    monkeypatch.setattr(latency.LatencyMeter, "_whole", lambda self, choices: (2.0, 1.0))
    network, x = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(1, 3, 8, 8)
    made = Planner(network, x, loss="uniform", progress=False)
    plan = made.plan(elc_fx.Budget(latency=1.0))
    assert plan.prediction is not None and plan.prediction.after.latency == plan.prediction.before.latency == 2.0
    with pytest.raises(elc_fx.PlanError, match="latency: at most"):
        made.plan(elc_fx.Budget(latency=0.9))


@pytest.mark.usefixtures("by_weights")
def test_an_impossible_latency_is_told_with_the_least() -> None:
    with pytest.raises(elc_fx.PlanError, match=r"latency: at most 1 ms wanted, .* ms is the least"):
        planner().plan(elc_fx.Budget(latency="1 ms"))


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino"])
def test_a_plan_keeps_a_latency_that_was_measured(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(calls: Sequence[latency.Call], blocks: int = latency.BLOCKS) -> list[float]:
        """Runs all, but goes by no clock, since other work on the machine would decide whether the test passes."""
        for call in calls:
            call()
        return [2.0, 1.0] if blocks == latency.WHOLE_BLOCKS else [1.0, 2.0]

    monkeypatch.setattr(latency, "seconds", seconds)
    monkeypatch.setattr(planning, "CORRECTIONS", 0)
    made = planner(backend=backend, cache=tmp_path, longest=1, largest_kernel=1)
    plan = made.plan(elc_fx.Budget(latency=0.7))
    assert plan.prediction is not None and plan.prediction.before.latency is not None
    assert 0 < (plan.prediction.after.latency or 0) <= 0.7 * plan.prediction.before.latency
    assert plan.prediction.latency == (2.0, 1.0)

    def never(self: latency.LatencyMeter, given: Sequence[Any]) -> Any:
        raise AssertionError([one.key for one in given])

    for measure in ("_measured", "_whole"):
        monkeypatch.setattr(latency.LatencyMeter, measure, never)
    again = planner(backend=backend, cache=tmp_path, longest=1, largest_kernel=1)
    assert again.plan(elc_fx.Budget(latency=0.7)) == plan


def chain(count: int) -> tuple[nn.Module, list[torch.Tensor]]:
    layers = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(count)]
    return nn.Sequential(*layers).eval(), [torch.randn(1, 4, 8, 8)]


class Pairs(nn.Module):
    """Layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, stride=2), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [self.first(x), self.second(y)]


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino"])
def test_what_is_exported_together_runs_as_what_is_exported_alone(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[Any] = []
    right = latency.onnx_model
    monkeypatch.setattr(latency, "onnx_model", lambda *given: exports.append(given) or right(*given))
    pairs = Pairs().eval(), [torch.randn(2, 4, 8, 8), torch.randn(3, 5)]
    networks = [chain(2), pairs, chain(3)]
    calls = latency.runners(networks, backend)
    assert len(exports) == (backend in latency.RUNS)
    for (layers, inputs), call in zip(networks, calls, strict=True):
        expected = latency.runner(layers, inputs, "eager")()
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        given: Any = call()
        actual = [given] if isinstance(given, torch.Tensor) else [torch.as_tensor(value) for value in given]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_is_refused_among_others_is_named() -> None:
    class Refused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("not this one")

    with pytest.raises(elc_fx.LatencyError, match=r"(?s)onnxruntime does not run this network: .*not this one"):
        latency.runners([chain(1), (Refused(), [torch.zeros(1)])], "onnxruntime")


def test_a_part_that_is_a_constant_is_exported_alone() -> None:
    """The exporter computes it beforehand, and a model without a node for its output is none."""

    class Zeros(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    exports: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        right = latency.onnx_model
        patch.setattr(latency, "onnx_model", lambda *given: exports.append(1) or right(*given))
        calls = latency.runners([chain(1), (Zeros(), [torch.ones(3)]), chain(2)], "onnxruntime")
    assert len(exports) == 2
    given: Any = calls[1]()
    (zeros,) = given
    assert zeros.tolist() == [0, 0, 0]


sizes = st.tuples(*(st.integers(0, 2 * latency.MOST_NUMBERS // 2**shift) for shift in (0, 5, 5)), st.booleans())


@given(st.lists(sizes, max_size=30))
def test_layers_are_measured_in_groups_that_are_not_too_large(given: list[tuple[int, int, int, bool]]) -> None:
    units = [
        latency._Unit(str(i), (((size,), torch.float32),), nn.Identity, shared, weights=weights, outputs=outputs)
        for i, (weights, size, outputs, shared) in enumerate(given)
    ]
    groups = list(latency._grouped(units))
    assert sorted(unit.key for group in groups for unit in group) == sorted(unit.key for unit in units)
    for group in groups:
        assert len(group) == 1 or all(unit.shared for unit in group)
        assert len(group) == 1 or sum(unit.numbers for unit in group) <= latency.MOST_NUMBERS
        assert len(group) <= latency.TOGETHER
    assert all(unit.copies == 1 or unit.copies * unit.weights <= latency.MOST_NUMBERS for unit in units)


def test_what_a_layer_gives_counts_too() -> None:
    """One channel becomes many: several such layers at once would take far more memory than what they read."""
    model = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 3, padding=1)).eval()
    made = Planner(model, torch.randn(1, 1, 32, 32), loss="uniform", backend="onnxruntime", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        groups: list[list[Any]] = []
        patch.setattr(latency.LatencyMeter, "_whole", lambda meter, choices: (2.0, 1.0))
        patch.setattr(
            latency.LatencyMeter, "_measured", lambda meter, units: groups.append(list(units)) or [1.0] * len(units)
        )
        made.plan(elc_fx.Budget(latency="3 s"))
    first = next(unit for group in groups for unit in group if unit.layer and unit.inputs[0][0][1] == 1)
    assert first.outputs == 64 * 32 * 32


def test_layers_of_every_kind_are_measured() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(5, 4), nn.ConvTranspose1d(4, 4, 2, 2)
            self.a, self.b = nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.Conv1d(8, 4, 3, padding=1)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, indices: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            x = self.up(self.embed(indices).transpose(1, 2) * scale)
            return (self.b(torch.relu(self.norm(self.a(x)))) + x).mean(2)

    inputs = (torch.zeros(1, 6, dtype=torch.int64), torch.ones(1))
    made = Planner(Mixed().eval(), inputs, loss="uniform", progress=False)
    plan = made.plan(elc_fx.Budget(latency="1 s"))
    assert plan.prediction is not None and (plan.prediction.before.latency or 0) > 0


def test_an_unknown_backend_is_told() -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="'eager', 'compile', 'onnxruntime', 'openvino'"):
        planner(backend="tensorrt")


@pytest.mark.parametrize(("runtime", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_runtime_names_the_extra(runtime: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(elc_fx.MissingPackageError, match=rf"elc_fx\[{extra}\]"):
        latency.runner(nn.ReLU(), [torch.zeros(1)], runtime)


@pytest.mark.parametrize(
    ("text", "limit"), [("latency=0.5", 1.0), ("latency=12 ms", 0.012), ("latency=1.5s", 1.5), ("latency=3us", 3e-6)]
)
def test_budgets_of_latency(text: str, limit: float) -> None:
    original = elc_fx.Costs(1, 1, 1, latency=2.0)
    assert elc_fx.Budget.parse(text).limits(original)["latency"] == pytest.approx(limit)


@pytest.mark.parametrize("wrong", [2, "12", "12 MFLOPs", 0, -1.0, "0 ms"])
def test_latencies_without_a_unit_are_told(wrong: Any) -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="12 ms"):
        elc_fx.Budget(latency=wrong)


class Optional(nn.Module):
    """With arguments that are no tensors, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, power: float = 2.0) -> torch.Tensor:
        y: torch.Tensor = self.body(x) ** power
        return y if mask is None else y * mask


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("given", [{}, {"mask": torch.ones(4), "power": 3.0}])
def test_inputs_that_are_no_tensors(backend: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.LatencyMeter, "_measured", lambda self, units: [1e-4] * len(units))
    inputs = {"x": torch.randn(1, 3, 8, 8), **given}
    plan = Planner(Optional().eval(), inputs, loss="uniform", backend=backend, progress=False).plan(
        elc_fx.Budget(latency="1 s")
    )
    assert plan.prediction is not None and plan.prediction.latency is not None


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets every graph that is compiled, for a backend that does nothing."""
    graphs: list[Any] = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def test_what_the_caller_compiled_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = counting(monkeypatch)
    function, x = torch.compile(lambda x: 3 * x + 1), torch.randn(2, 4)
    function(x)
    for _ in range(12):  # torch compiles the same code eight times, and then runs it as it is
        latency.runner(nn.Sequential(nn.Linear(4, 4)), [x], "compile")()
    assert len(graphs) == 13
    function(x)
    assert len(graphs) == 13


def test_an_error_while_a_network_is_compiled_is_told() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no such thing")

    for backend in ("compile", "eager"):
        with pytest.raises(elc_fx.LatencyError, match=f"{backend} does not run this network"):
            latency.runner(Broken(), [torch.zeros(1)], backend)  # type: ignore[arg-type]


class Slow(nn.Module):
    """No trace can enter it, and its text does not say how long it takes."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = [times]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times[0] if x.sum() < 1e9 else 0):
            x = x.sin()
        return x


def test_modules_that_look_alike_are_measured_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attentions = [nn.MultiheadAttention(8, heads) for heads in (2, 4)]
    assert repr(attentions[0]) == repr(attentions[1])
    assert described(attentions[0]) != described(attentions[1])
    holders: list[Any] = [nn.Identity(), nn.Identity()]
    for holder in holders:
        holder.functions = (object(), 1)  # whose text is an address, another one in each process
    assert described(holders[0]) == described(holders[1])
    measured: list[str] = []

    def note(self: latency.LatencyMeter, units: Sequence[Any]) -> list[float]:
        measured.extend(unit.key for unit in units)
        return [1.0] * len(units)

    monkeypatch.setattr(latency.LatencyMeter, "_measured", note)
    for _ in range(2):
        model = nn.Sequential(network()[:4], nn.MaxPool2d(2), Slow(1), Slow(9)).eval()
        planner = Planner(model, torch.randn(1, 3, 8, 8), loss="uniform", cache=tmp_path, progress=False)
        planner.plan(elc_fx.Budget(latency="100 s"))
    slow = [key for key in measured if key.startswith(("_2 ", "_3 "))]
    assert len(slow) == 4 and len(set(slow)) == 2
    assert len(measured) == len(set(measured)) + 2  # all else is found in the cache
