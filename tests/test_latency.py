"""Latency: budgets kept, layers measured once, predictions that add up, and errors that help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_planner import network
from torch import nn

import elc_fx
from elc_fx.planning import latency
from elc_fx.planning.planner import Planner


def planner(**options: Any) -> Planner:
    return Planner(network(), torch.randn(1, 3, 8, 8), loss="uniform", progress=False, **options)


@pytest.fixture
def by_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock under which a layer takes one second for each of its weights, and everything else nothing."""

    def measured(self: latency.LatencyMeter, unit: Any) -> float:
        return float(sum(p.numel() for p in unit.make().parameters() if p.dim() > 1))

    monkeypatch.setattr(latency.LatencyMeter, "_measured", measured)
    weights = 3 * 6 * 9 + 8 * 36 * 9 + 24  # of `network`
    monkeypatch.setattr(latency, "seconds", lambda calls, blocks=1: [float(weights)] * len(calls))


@pytest.mark.usefixtures("by_weights")
def test_predictions_add_up_and_keep_the_budget() -> None:
    made = planner()
    plan = made.plan(elc_fx.Budget(latency=0.5))
    assert plan.prediction is not None and plan.candidates
    before, after = plan.prediction.before.latency, plan.prediction.after.latency
    saved = sum(c.parameters[0] - c.parameters[1] for c in plan.candidates)
    biases = sum(6 * (len(c.layers) - 1) for c in plan.candidates)
    assert before is not None and after == pytest.approx(before - saved + biases) and after <= 0.5 * before
    assert plan.prediction.latency is not None
    assert elc_fx.Plan.from_json(plan.to_json()) == plan
    assert "latency" in str(plan)


@pytest.mark.usefixtures("by_weights")
def test_an_impossible_latency_is_told_with_the_least() -> None:
    with pytest.raises(elc_fx.PlanError, match=r"latency: at most 1 ms wanted, .* ms is the least"):
        planner().plan(elc_fx.Budget(latency="1 ms"))


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino"])
def test_a_plan_keeps_a_latency_that_was_measured(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planner(backend=backend, cache=tmp_path)
    plan = made.plan(elc_fx.Budget(latency=0.7))
    assert plan.prediction is not None and plan.prediction.before.latency is not None
    assert 0 < (plan.prediction.after.latency or 0) <= 0.7 * plan.prediction.before.latency
    assert plan.prediction.latency is not None and min(plan.prediction.latency) > 0

    def never(self: latency.LatencyMeter, unit: Any) -> float:
        raise AssertionError(unit.key)

    monkeypatch.setattr(latency.LatencyMeter, "_measured", never)
    planner(backend=backend, cache=tmp_path).plan(elc_fx.Budget(latency=0.7))


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
    plan = made.plan(elc_fx.Budget(latency=1.0))
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
