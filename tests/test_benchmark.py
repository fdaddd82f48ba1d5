"""tools/benchmark: what its tables and plots say of stored rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark import tables
from benchmark.methods import FOR_TIME, METHODS


def row(method: str, accuracy: float, seed: int = 0) -> dict[str, Any]:
    before, after = {"flops": 200, "depth": 20}, {"flops": 100, "depth": 12}
    scores = {"test": [0.9, accuracy], "held_out": [0.5, accuracy], "before": before, "after": after}
    return {"network": "net", "method": method, "budget": 0.5, "epochs": 5, "seed": seed, **scores}


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
    (tmp_path / "benchmark_latency.json").write_text(json.dumps({"rows": times}))
    return tmp_path


def test_seeds_are_averaged_and_what_was_not_run_is_said(results: Path) -> None:
    lines = tables.accuracy_table(tables.stored()).splitlines()[2:]
    expected = [name for name in METHODS if name not in FOR_TIME]  # whose budgets are others
    by_method = dict(zip(expected, lines, strict=True))
    assert "87.00% (86.00%–88.00%)" in by_method["elc"] and "-3.00" in by_method["elc"] and "50.0%" in by_method["elc"]
    assert "87.00%" in by_method["torch-pruning"]
    assert "cannot reach the budget" in by_method["grown"] and "not run" in by_method["scratch"]


def test_the_headline_has_what_people_would_use_with_its_speed(results: Path) -> None:
    header, _, *lines = tables.headline_table(tables.stored()).splitlines()
    assert "eager, 1" in header and len(lines) == 2
    elc, pruned = (line for line in lines)
    assert "elc" in elc and "87.00% (86.00%–88.00%)" in elc and elc.endswith("2.00×")
    assert "torch-pruning" in pruned and "×" not in pruned


def test_speeds_are_named_by_method_and_budget(results: Path) -> None:
    shown = tables.latency_table(tables._latencies())
    assert "elc, 50%" in shown and "2.00 (1.90–2.10)" in shown and "original" in shown and "eager, 1" in shown


def test_a_plot_of_the_same_rows_is_the_same_file(results: Path) -> None:
    files = results / "a.svg", results / "b.svg"
    for file in files:
        tables.plot("net", tables.stored(), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "times as fast: eager, batch 1" in files[0].read_text()
