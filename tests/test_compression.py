"""`compile` with mode "decouple": all stages in a row, and what it says of arguments that do not go together."""

from __future__ import annotations

import copy
import pickle
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_run import Pictures, loader, network

import elc_fx
from elc_fx import compression
from elc_fx.planning import latency, sensitivity
from elc_fx.training.finetuning import Finetuning

HALF = elc_fx.Budget(flops=0.5)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model = network()
    elc_fx.finetune(model, loader(), epochs=3, progress=False)
    return model


def image() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8)


def tuning(**options: Any) -> elc_fx.FinetuneConfig:
    return elc_fx.FinetuneConfig(loader(256), epochs=4, progress=False, **options)


@pytest.mark.parametrize("backend", elc_fx.api.TIMED_BY)
def test_a_latency_is_measured_as_the_result_will_run(
    backend: Any, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()

    def measured(meter: latency.LatencyMeter, units: Sequence[Any]) -> list[float]:
        asked.add(meter.backend)
        return [1.0] * len(units)

    monkeypatch.setattr(latency.LatencyMeter, "_measured", measured)
    monkeypatch.setattr(latency.LatencyMeter, "_whole", lambda meter, choices: (2.0, 1.0))
    options: dict[str, Any] = {"budget": elc_fx.Budget(latency=0.9), "calibration": [image()], "backend": backend}
    elc_fx.compile(teacher, image()[:1], mode="decouple", **options)
    assert asked == {elc_fx.api.TIMED_BY[backend]}


@pytest.mark.parametrize("gates", [0.0, 0.5])
def test_what_was_planned_with_is_free_while_the_network_is_trained(
    gates: float, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    planners: list[weakref.ref[Any]] = []
    create, run = elc_fx.Planner.__init__, Finetuning.run

    def created(planner: elc_fx.Planner, *given: Any, **options: Any) -> None:
        create(planner, *given, **options)
        assert planner.sensitivity is not None
        planners.append(weakref.ref(planner.sensitivity))

    def running(training: Finetuning) -> Any:
        assert [reference() for reference in planners] == [None]
        return run(training)

    monkeypatch.setattr(elc_fx.Planner, "__init__", created)
    monkeypatch.setattr(Finetuning, "run", running)
    elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, finetune=tuning(gates=gates))
    assert planners


@pytest.mark.parametrize("gates", [0.0, 0.5])
def test_all_stages_give_a_network_within_the_budget_that_knows_its_task(teacher: nn.Module, gates: float) -> None:
    before = copy.deepcopy(teacher.state_dict())
    small = elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, finetune=tuning(gates=gates))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    comparison, report = elc_fx.compare(teacher, small, image()), elc_fx.report_of(small)
    assert comparison.after.flops <= 0.5 * comparison.before.flops
    assert report.totals.flops == (comparison.before.flops, comparison.after.flops)
    assert report.plan is not None and len(report.epochs) == 4 and "epoch" in str(report)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    torch.manual_seed(1)
    pictures = [Pictures(64)[i] for i in range(64)]
    x, y = torch.stack([p for p, _ in pictures]), torch.tensor([label for _, label in pictures])
    assert float((small(x).argmax(1) == y).float().mean()) > 0.8
    again = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(again(x), small(x))
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_without_fine_tuning_the_fitted_convolutions_stay(teacher: nn.Module) -> None:
    batches = [x for x, _ in loader()]
    small = elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, calibration=batches)
    collapsed = elc_fx.Planner(teacher, image(), batches, progress=False).collapse(elc_fx.report_of(small).plan)  # type: ignore[arg-type]
    torch.testing.assert_close(small(batches[0]), collapsed(batches[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gates", [0.0, 0.5])
def test_as_many_samples_are_used_as_a_planner_uses(
    gates: float, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else the batches hold."""
    monkeypatch.setattr(sensitivity, "SAMPLES", 16)
    monkeypatch.setattr(sensitivity, "NUMBERS", 4 * 16 * 3 * 8 * 8)
    read: list[tuple[sensitivity.Calibration, sensitivity.Calibration]] = []
    original = sensitivity.Calibration.read
    monkeypatch.setattr(sensitivity.Calibration, "read", lambda *given: read.append(original(*given)) or read[-1])
    lines: list[int] = []
    decouple = compression.decouple
    monkeypatch.setattr(
        compression,
        "decouple",
        lambda *given: lines.append(sum(len(*batch.values()) for batch in given[2])) or decouple(*given),
    )
    batches = ((torch.randn(8, 3, 8, 8), torch.zeros(1).expand(8, 3, 900, 900)) for _ in range(1000))
    options = {"finetune": tuning(gates=gates)} if gates else {}
    elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, calibration=batches, **options)
    assert [[sum(calibration.sizes) for calibration in pair] for pair in read] == [[16, 64]]
    assert sum(1 for _ in batches) == 1000 - 64 // 8
    assert lines == ([64] if gates else [])


def test_a_folder_keeps_losses_plan_and_checkpoint(teacher: nn.Module, tmp_path: Path) -> None:
    first = elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, finetune=tuning(folder=tmp_path))
    assert list(tmp_path.glob("losses-*")) and (tmp_path / "metrics.csv").exists()
    second = elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, finetune=tuning(folder=tmp_path))
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(first(x), second(x))


def test_the_same_call_goes_on_where_a_loader_has_a_generator_of_its_own(teacher: nn.Module, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(Pictures(64), 16, shuffle=True, generator=generator)
    state = generator.get_state()
    given: dict[str, Any] = {"finetune": elc_fx.FinetuneConfig(data, epochs=1, folder=tmp_path, progress=False)}
    results = [elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, **given) for _ in range(2)]
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(results[0](x), results[1](x))
    assert torch.equal(generator.get_state(), state)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_planned(teacher: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given: dict[str, Any] = {"finetune": tuning(folder=tmp_path / "file" / "run")}
    with pytest.raises(elc_fx.TrainingError, match="checkpoints cannot be kept"):
        elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, **given)


def _refuses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("of the loss")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (torch.full((16,), 10), {}, "classes go from 10 to 10"),
        (None, {}, "pass a loss of your own"),
        (torch.zeros(16, dtype=torch.long), {"loss": _refuses}, "the loss function does not run .* ZeroDivisionError"),
    ],
)
def test_what_cannot_be_trained_on_is_told_before_anything_is_planned(
    teacher: nn.Module, target: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compression, "Planner")
    tuning = elc_fx.FinetuneConfig([(torch.randn(16, 3, 8, 8), target)] * 4, epochs=1, progress=False, **options)
    with pytest.raises(elc_fx.InvalidInputError, match=message):
        elc_fx.compile(teacher, image(), mode="decouple", budget=HALF, finetune=tuning)


def test_data_that_can_be_gone_through_once_is_left_for_the_training(teacher: nn.Module) -> None:
    class Once:
        def __init__(self) -> None:
            self.left = iter(list(loader(64)))

        def __len__(self) -> int:
            return len(list(loader(64)))

        def __iter__(self) -> Any:
            return self.left

    data = Once()
    Finetuning(teacher, elc_fx.FinetuneConfig(data, epochs=1, progress=False)).check()
    assert len(list(data)) == len(data)


def test_what_a_module_does_in_training_only_is_told_when_it_is_collapsed(teacher: nn.Module) -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x) if self.training else x

    noisy = nn.Sequential(Noise(), teacher).eval()
    with pytest.warns(UserWarning, match="`Noise.forward` branches on self.training") as told:
        elc_fx.compile(noisy, image(), mode="decouple", budget=HALF, finetune=tuning())
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "decouple"}, "budget"),
        ({"mode": "decouple", "budget": HALF}, "calibration"),
        ({"mode": "decouple", "budget": 0.5, "calibration": [torch.zeros(1)]}, "budget"),
        ({"mode": "decouple", "budget": HALF, "finetune": 3}, "finetune"),
        ({"mode": "decouple", "budget": HALF, "calibration": []}, "no batches"),
        ({"budget": HALF}, "mode 'decouple'"),
        ({"mode": "fast"}, "'lossless' or 'decouple'"),
    ],
)
def test_arguments_that_do_not_go_together_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(elc_fx.InvalidInputError, match=message):
        elc_fx.compile(network(), image(), **given)


def test_example_inputs_are_needed_for_costs() -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="example_inputs"):
        elc_fx.compile(network(), mode="decouple", budget=HALF, calibration=[image()])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(a + b)
        return scores


@pytest.mark.parametrize("form", [tuple, dict])
def test_inputs_of_training_batches_are_calibrated_with_in_any_form(form: type) -> None:
    def given(a: torch.Tensor) -> Any:
        return (a, a) if form is tuple else {"a": a, "b": a}

    batches = [(given(x), y) for x, y in loader(64)]
    tuning = elc_fx.FinetuneConfig(batches, epochs=1, progress=False)
    small = elc_fx.compile(TwoInputs().eval(), given(image()), mode="decouple", budget=HALF, finetune=tuning)
    assert elc_fx.report_of(small).plan is not None


def test_data_that_draws_from_any_generator_leaves_the_callers_as_they_were(teacher: nn.Module) -> None:
    class Drawn(Pictures):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            picture, label = super().__getitem__(index)
            return picture + random.random() + float(np.random.rand()), label

    results, x = [], image()
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        tuning = elc_fx.FinetuneConfig(DataLoader(Drawn(64), 16, shuffle=True), epochs=1, progress=False)
        results.append(elc_fx.compile(teacher, x, mode="decouple", budget=HALF, finetune=tuning))
        assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
        assert torch.equal(states[2], torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*(r.state_dict().values() for r in results), strict=True))
