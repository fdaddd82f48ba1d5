"""Arrows point one way: which modules import which."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

HOUSE = Path(__file__).parent.parent / "elc_fx"
ALONE = ("errors", "affine", "memory")  # modules of no stage
BELOW = {
    "errors": set(),
    "memory": {"errors"},
    "affine": {"errors"},
    "capturing": {*ALONE},
    "matching": {*ALONE, "capturing"},
    "merging": {*ALONE, "capturing", "matching", "comparison", "compiled", "report"},
}


def imports() -> nx.DiGraph:
    """An edge from each module to those that it imports, by their names without `elc_fx`."""
    parts = {file: file.relative_to(HOUSE).with_suffix("").parts for file in HOUSE.rglob("*.py")}
    names = {".".join(part for part in own if part != "__init__"): file for file, own in parts.items()}
    graph = nx.DiGraph()
    for name, file in names.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elc_fx"):
                package = str(node.module).removeprefix("elc_fx").lstrip(".")
                members = [f"{package}.{alias.name}".lstrip(".") for alias in node.names]
                graph.add_edges_from((name, member if member in names else package) for member in members)
    return graph


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imports()
    assert len(graph) > 70
    assert not list(nx.simple_cycles(graph))


def test_stages_know_nothing_of_those_after_them() -> None:
    for module, imported in imports().edges:
        stage, other = module.split(".")[0], imported.split(".")[0]
        assert stage not in BELOW or other == stage or other in BELOW[stage], f"{module} imports {imported}"
