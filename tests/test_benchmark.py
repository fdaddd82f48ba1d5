"""tools/benchmark: what a row stores, and what its tables and plots say of stored rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import elc_fx
from benchmark import latencies, methods, pruning, rows, tables
from benchmark.methods import FOR_TIME, METHODS
from cifar_models import ResNet, load
from elc_fx.planning.latency import LatencyMeter


def row(method: str, accuracy: float, seed: int = 0) -> dict[str, Any]:
    before, after = {"flops": 200, "depth": 20}, {"flops": 100, "depth": 12}
    scores = {"test": [0.9, accuracy], "held_out": [0.5, accuracy], "before": before, "after": after}
    origin = {"provenance": {"date": "2026-01-02", "machine": {"cpu": "Abacus(R) of 1622"}}, "arithmetic": "float32"}
    return {"network": "net", "method": method, "budget": 0.5, "epochs": 5, "seed": seed, **scores, **origin}


def latency(name: str, runtime: str, speedup: float) -> dict[str, Any]:
    quartiles = [speedup - 0.1, speedup + 0.1]
    return {"network": "net", "row": name, "runtime": runtime, "batch": 1, "speedup": speedup, "quartiles": quartiles}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables.provenance, "RESULTS", tmp_path)
    rows = [row("torch-pruning", 0.87), row("elc", 0.88, 1), row("elc", 0.86)]
    rows.append({**row("grown", 0.0), "unreachable": "the budget cannot be met"})
    for name in ("test", "held_out", "before", "after"):
        del rows[-1][name]
    (tmp_path / "benchmark").mkdir()
    for number, own in enumerate(rows):
        (tmp_path / "benchmark" / f"{number}.json").write_text(json.dumps(own))
    times = [latency("original", "eager", 0.9), latency("net-elc-0.5-5-0", "eager", 2.0)]
    write_times(tmp_path / "benchmark_latency.json", times)
    return tmp_path


def write_times(file: Path, times: list[dict[str, Any]], date: str = "2026-01-03") -> None:
    file.write_text(json.dumps({"provenance": {"date": date}, "rows": times}))


def test_seeds_are_averaged_and_what_was_not_run_is_said(results: Path) -> None:
    lines = tables.accuracy_table(tables.stored()).splitlines()[2:]
    expected = [name for name in METHODS if name not in FOR_TIME]  # whose budgets are others
    by_method = dict(zip(expected, lines, strict=True))
    assert "87.00% (86.00%–88.00%)" in by_method["elc"] and "-3.00" in by_method["elc"] and "50.0%" in by_method["elc"]
    assert "87.00%" in by_method["torch-pruning"] and by_method["torch-pruning"].endswith("Abacus in float32")
    assert "cannot reach the budget" in by_method["grown"] and "not run" in by_method["scratch"]


def test_the_headline_has_what_people_would_use_with_its_speed(results: Path) -> None:
    header, _, *lines = tables.headline_table(tables.stored()).splitlines()
    assert "eager, 1" in header and len(lines) == 2
    elc, pruned = (line for line in lines)
    assert "elc" in elc and "87.00% (86.00%–88.00%)" in elc and elc.endswith("2.00×")
    assert "torch-pruning" in pruned and "×" not in pruned
    others = [{**row("elc", 0.85), "budget": 0.65}, {**row("elc-eager", 0.85), "budget": 0.5}]
    stored = [*tables.stored(), *others]
    assert tables.headline_table(stored).splitlines()[2:] == lines
    assert len(tables.speed_table(stored).splitlines()) == 2 + len(lines) + len(others)


def test_speeds_are_named_by_method_and_budget(results: Path) -> None:
    shown = tables.latency_table(tables.timed(tables.stored()))
    assert "elc, 50%" in shown and "2.00 (1.90–2.10)" in shown and "original" in shown and "eager, 1" in shown


def test_networks_of_the_same_layers_take_the_same_time(results: Path) -> None:
    plan = {"plan": {"candidates": ["a"]}}
    stored = [{**row("elc", 0.88), **plan}, {**row("elc", 0.89), **plan, "epochs": 10}]
    short, long = tables.speed_table(stored).splitlines()[2:]
    assert short.endswith("2.00×") and long.endswith("2.00×")
    assert rows.layers_of({**row("features", 0.9), **plan}) == rows.layers_of(stored[0])
    assert rows.layers_of({**row("slopes", 0.9), **plan}) != rows.layers_of(stored[0])  # other activations
    pruned = row("torch-pruning", 0.87)
    assert rows.layers_of({**pruned, "epochs": 10, "seed": 1}) == rows.layers_of(pruned) != rows.layers_of(stored[0])


def test_times_of_what_a_row_was_before_it_was_run_again_do_not_count(results: Path) -> None:
    write_times(results / "benchmark_latency.json", [latency("net-elc-0.5-5-0", "eager", 2.0)], date="2026-01-01")
    assert tables.timed(tables.stored()) == [] and "2.00" not in tables.speed_table(tables.stored())


def test_a_pruned_network_is_compared_with_the_best_that_is_as_fast(results: Path) -> None:
    stored = [row("torch-pruning", 0.87), row("elc", 0.89), row("balanced", 0.88), row("shrinks", 0.9)]
    pruned, elc, balanced, shrinks = (rows.stem_of(own) for own in stored)
    write_times(results / "benchmark_latency.json", [latency(pruned, "eager", 1.5), latency(elc, "eager", 1.4)])

    def points() -> str:
        (line,) = tables.versus_table(stored).splitlines()[2:]
        return line.split("87.00%")[1].removesuffix("not run").split("not run")[0].strip()

    assert points() == "slower"
    elsewhere = [latency(pruned, "eager", 1.2), latency(elc, "eager", 1.4), latency(balanced, "eager", 1.2)]
    write_times(results / "benchmark_latency_amd.json", [*elsewhere, latency(shrinks, "eager", 1.1)])
    assert points() == "+1.00"  # elc counts on the first processor, and shrinks is slower
    write_times(results / "benchmark_latency_xeon.json", [latency(pruned, "eager", 1), latency(shrinks, "eager", 2)])
    assert points() == "+1.00"


def test_points_at_equal_flops_and_lost_by_each_method(results: Path) -> None:
    stored = tables.stored()
    (line,) = tables.flops_table(stored).splitlines()[2:]
    assert line.split() == ["net", "50%", "5", "87.00%", "(1)", "+0.00", "(2)"]
    header, _, *lines = tables.ablation_table(stored).splitlines()
    assert "net, 50%" in header
    assert [" ".join(line.split()) for line in lines] == [
        "elc -3.00 (2)",
        "torch-pruning -3.00 (1)",
        "grown cannot reach the budget",
    ]


def test_a_plot_of_the_same_rows_is_the_same_file(results: Path) -> None:
    files = results / "a.svg", results / "b.svg"
    for file in files:
        tables.plot("net", tables.stored(), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "times as fast: eager, batch 1" in files[0].read_text()


def test_a_plot_has_every_method_that_was_run(results: Path) -> None:
    several = [name for name in METHODS if name not in FOR_TIME]
    tables.plot("net", [row(name, 0.8) for name in several], results / "all.svg")
    assert all(f">{name}<" in (results / "all.svg").read_text() for name in several)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a row of a network of 8 layers, and a few images."""
    for module in (rows, latencies):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(methods, "CALIBRATION", 32)
    monkeypatch.setattr(methods, "CALIBRATION_BATCH", 8)
    monkeypatch.setattr(pruning, "chosen", lambda: ("GroupMagnitude", "global"))
    torch.manual_seed(0)
    save_file(ResNet(1).state_dict(), tmp_path / "net.safetensors")
    for split, count in (("train", 6), ("test", 2)):
        for number in range(10 * count):
            file = tmp_path / "data" / split / str(number % 10) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()).save(file)
    files = {"weights": tmp_path / "net.safetensors", "data": tmp_path / "data", "runs": tmp_path / "runs"}
    return {**files, "budget": 0.6, "epochs": 1, "seed": 0}


def test_a_row_has_the_plan_that_made_its_network(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.train(method=["scratch", "uniform", "at-once", "torch-pruning"], **task)
    model, x = load(task["weights"]), torch.zeros(1, 3, 32, 32)
    for method in ("scratch", "uniform", "at-once", "torch-pruning"):
        stored = json.loads((tmp_path / "results" / f"net-{method}-0.6-1-0.json").read_text())
        network = torch.export.load(tmp_path / "runs" / f"net-{method}-0.6-1-0" / "model.pt2").module(
            check_guards=False
        )
        assert network(x).shape == (1, 10) and 0 <= stored["test"][1] <= 1 and len(stored["history"]) == 1
        assert stored["arithmetic"] in ("bfloat16", "float32")
        share = stored["after"]["flops"] / stored["before"]["flops"]
        if method == "torch-pruning":
            assert stored["plan"] is None and 0.6 <= share < 0.63
            continue
        decoupled = elc_fx.decouple(model, elc_fx.Plan.from_json(json.dumps(stored["plan"])))
        elc_fx.set_gate(decoupled, 0)
        assert elc_fx.measure(elc_fx.merge(decoupled), x).flops == stored["after"]["flops"] and share <= 0.6
    row = tmp_path / "results" / "net-scratch-0.6-1-0.json"
    with pytest.raises(typer.BadParameter, match="'uniform' is not planned as 'scratch' is"):
        rows.train(method=["gates", "uniform"], plan=row, **task)
    with pytest.raises(typer.BadParameter, match="no plan of net for a budget of"):
        rows.train(method=["gates"], plan=row, **{**task, "budget": 0.5})
    assert json.loads(rows._plan_of(row, "net", 0.6, ["gates"]).to_json()) == json.loads(row.read_text())["plan"]
    kept, names = latencies._networks(task["weights"], task["runs"], None, list(METHODS))
    assert names.keys() == {*kept, "net-scratch-0.6-1-0", "net-uniform-0.6-1-0", "net-at-once-0.6-1-0"}
    shutil.rmtree(task["runs"])
    again, made_again = latencies._networks(task["weights"], task["runs"], task["data"], list(METHODS))
    assert made_again == names
    for name, network in kept.items():
        layers = [[tuple(value.shape) for value in found.state_dict().values()] for found in (network, again[name])]
        assert layers[0] == layers[1]
    file = tmp_path / "results" / "net-uniform-0.6-1-0.json"
    stored = json.loads(file.read_text())
    stored["after"]["flops"] *= 2
    file.write_text(json.dumps(stored))
    assert (
        "net-uniform-0.6-1-0" not in latencies._networks(task["weights"], task["runs"], task["data"], list(METHODS))[1]
    )
    assert "net-uniform-0.6-1-0 is not timed" in capsys.readouterr().out
    rows.train(method=["scratch"], **task)
    assert "net-scratch-0.6-1-0 is there" in capsys.readouterr().out


def test_a_plan_for_the_time_of_many_images_makes_its_network(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatencyMeter, "_measured", lambda meter, units: [float(unit.numbers) for unit in units])
    monkeypatch.setattr(LatencyMeter, "_whole", lambda meter, choices: (2.0, 1.0))
    rows.train(method=["elc-eager-64"], **{**task, "budget": 0.7})
    stored = json.loads((tmp_path / "results" / "net-elc-eager-64-0.7-1-0.json").read_text())
    assert stored["plan"]["candidates"] and stored["after"]["flops"] < stored["before"]["flops"]


def test_what_is_fitted_may_be_pruned_as_well(task: dict[str, Any]) -> None:
    made = methods.Task(task["weights"], task["data"], task["budget"], task["seed"], task["runs"])
    plan = made.planner(loss="uniform").plan(elc_fx.Budget(flops=0.6**0.5))
    before, fitted, pruned = (
        elc_fx.measure(network, made.x)
        for network in (made.model, methods.fitted(made, plan), methods._fitted_and_pruned(made, plan))
    )
    assert 0.6 <= pruned.flops / before.flops < 0.63 < fitted.flops / before.flops <= 0.6**0.5
    assert pruned.parameters < fitted.parameters and pruned.depth == fitted.depth
    row = {**task, "network": "net", "method": "both", "plan": json.loads(plan.to_json()), "after": pruned.to_dict()}
    assert rows.layers_of(row) != rows.layers_of({**row, "after": fitted.to_dict()})


def test_slopes_begin_as_relus(task: dict[str, Any]) -> None:
    made = methods.Task(task["weights"], task["data"], task["budget"], task["seed"], task["runs"])
    plan, x = made.plan(loss="uniform"), made.calibration[0]
    plain, sloped = methods.fitted(made, plan), methods._with_slopes(made, plan)
    assert torch.equal(plain(x), sloped(x))
    kinds = [type(sloped.get_submodule(str(n.target))) for n in sloped.graph.find_nodes(op="call_module")]
    assert torch.nn.PReLU in kinds and torch.nn.ReLU not in kinds
    assert not [node for node in sloped.graph.nodes if "relu" in str(node.target) and node.op == "call_function"]


def test_a_budget_out_of_reach_is_a_row_too(task: dict[str, Any], tmp_path: Path) -> None:
    rows.train(method=["grown"], **{**task, "budget": 0.01})
    stored = json.loads((tmp_path / "results" / "net-grown-0.01-1-0.json").read_text())
    assert "the budget cannot be met" in stored["unreachable"] and "test" not in stored
