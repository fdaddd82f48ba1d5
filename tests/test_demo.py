"""The demo: real digits, a trained network, and the promise that compiling changes no prediction."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from elc_fx import demo
from elc_fx.cli import app


@pytest.fixture(autouse=True)
def _few_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TIMED_ROUNDS", 5)


@pytest.fixture
def _exact_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "COMPRESSED", {})


def test_a_short_demo_is_shown_as_json_and_changes_no_prediction(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--epochs", "2", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    exact = shown["exact"]
    assert (exact["test_images"], exact["differing_predictions"]) == (450, 0)
    assert exact["before"]["accuracy"] == exact["after"]["accuracy"] > 0.8
    assert exact["comparison"]["max_rel_error"] < 1e-5
    convolutions = [exact["comparison"][side]["convolutions"] for side in ("before", "after")]
    assert convolutions == [24, 6]
    for one in shown["compressed"]:
        flops, depth = ([one["comparison"][side][key] for side in ("before", "after")] for key in ("flops", "depth"))
        assert flops[1] <= 0.5 * flops[0] and depth[1] < depth[0]
        assert len(one["report"]["epochs"]) == demo.FINETUNE_EPOCHS
    assert all("<svg" in Path(page).read_text(encoding="utf-8") for page in shown["pages"]) and shown["pages"]
    assert "training" in result.stderr


def test_half_of_the_flops_cost_half_a_point_at_most() -> None:
    digits = demo.Digits.load()
    original = demo.trained_network(digits, demo.EPOCHS, 0, demo.plain_network)
    small = demo.at_half_the_flops("A plain network", original, digits, 0)
    assert small.comparison.after.flops <= 0.5 * small.comparison.before.flops
    assert small.after.accuracy >= small.before.accuracy - 0.005


@pytest.mark.usefixtures("_exact_only")
def test_a_compiler_that_changes_predictions_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = demo.compile

    def wrong(model: nn.Module, *arguments: object) -> nn.Module:
        result = compiled(model, *arguments)  # type: ignore[arg-type]
        with torch.no_grad():
            result.get_submodule("8").bias.add_(torch.arange(10) * 5.0)
        return result

    monkeypatch.setattr(demo, "compile", wrong)
    result = CliRunner().invoke(app, ["demo", "--epochs", "1", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "images differently" in result.stderr
    assert "predictions differ" in result.stdout


def test_the_split_is_the_same_each_time_and_holds_every_digit() -> None:
    first, second = demo.Digits.load(), demo.Digits.load()
    assert torch.equal(first.test_images, second.test_images)
    assert first.train_images.shape == (1347, 1, 8, 8)
    assert (float(first.train_images.min()), float(first.train_images.max())) == (0.0, 1.0)
    assert int(first.test_labels.bincount().min()) >= 43


def test_the_seed_decides_the_network_and_leaves_the_callers_random_numbers_alone() -> None:
    digits = demo.Digits.load()
    small = demo.Digits(*(part[:64] for part in vars(digits).values()))

    def trained(seed: int) -> torch.Tensor:
        return demo.trained_network(small, 1, seed, demo.network)(small.test_images)

    state = torch.random.get_rng_state()
    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_times_are_of_the_models_in_their_order() -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(200):
                x = x + 1
            return x

    fast, slow = demo.interleaved_times([nn.Identity(), Slow()], torch.zeros(10), rounds=9)
    assert fast.upper_quartile < slow.lower_quartile
    assert slow.lower_quartile <= slow.median <= slow.upper_quartile


def test_reports_that_cannot_be_written_are_told_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "trained_network", None)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "elc-fx: error: reports cannot be written to" in result.stderr and "--debug" not in result.stderr


def test_zero_epochs_are_refused() -> None:
    result = CliRunner().invoke(app, ["demo", "--epochs", "0"])
    assert result.exit_code == 2
