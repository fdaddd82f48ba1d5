"""The diff: every layer of both networks once, what became of it, and what is said of networks that cannot be read."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Unary, image, randomize_, ready
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from typer.testing import CliRunner

import elc_fx
from elc_fx.cli import app
from elc_fx.deploying import exporting
from elc_fx.report.alignment import aligned
from elc_fx.report.drawing import to_dot, to_svg
from elc_fx.report.network import Layer, Network
from elc_fx.report.rows import layout

X = torch.randn(1, 3, 32, 32)


def block_network(blocks: int = 2) -> nn.Module:
    """A stem and residual blocks, with random numbers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

    return randomize_(nn.Sequential(nn.Conv2d(3, 8, 3), *(Block() for _ in range(blocks)), nn.MaxPool2d(2))).eval()


def model_of(name: str, seed: int = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomize_(torchvision.models.get_model(name, weights=None), seed).eval()


def become(diff: elc_fx.Diff) -> dict[tuple[str, ...], tuple[str, ...]]:
    """What was not kept: places before, and after."""
    return {
        tuple(layer.place for layer in change.before): tuple(layer.place for layer in change.after)
        for change in diff.changes
        if change.kind != "kept"
    }


def accounted(diff: elc_fx.Diff) -> bool:
    """Whether every layer of both networks is in exactly one change."""
    return all(
        sorted(layer.name for change in diff.changes for layer in getattr(change, side))
        == sorted(layer.name for layer in getattr(diff, side).layers)
        for side in ("before", "after")
    )


# Properties.

OPERATIONS = ["conv", "relu", "add", "pool"]


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Random graphs, some of whose layers have numbers, names in common, or origins in common."""
    layers = [Layer("x", "x", "input", "input", ())]
    for i in range(draw(st.integers(0, 25))):
        operation = draw(st.sampled_from(OPERATIONS))
        sources = draw(st.lists(st.sampled_from([layer.name for layer in layers]), min_size=1, max_size=3, unique=True))
        heavy = operation == "conv"
        place = draw(st.sampled_from([f"{operation}{i}", f"{operation}{i + 1}", "shared"]))
        origin = tuple(draw(st.lists(st.sampled_from([f"conv{n}" for n in range(25)]), max_size=3))) if heavy else ()
        kind = "convolution" if heavy else "other"
        state = draw(st.sampled_from(["a", "b", f"{i}"])) if heavy else None
        layers.append(Layer(f"n{i}", place, kind, operation, tuple(sources), origin=origin, state=state))
    layers.append(Layer("output", "output", "output", "output", (layers[-1].name,)))
    return Network("random", tuple(layers))


@settings(deadline=None, max_examples=150)
@given(networks(), networks())
def test_every_layer_of_any_two_networks_is_in_exactly_one_group(before: Network, after: Network) -> None:
    groups = aligned(before, after)
    for side, network in enumerate((before, after)):
        assert sorted(i for group in groups for i in group[side]) == list(range(len(network.layers)))


@settings(deadline=None, max_examples=150)
@given(networks())
def test_a_network_beside_itself_is_kept_layer_by_layer(network: Network) -> None:
    plain = Network("plain", tuple(Layer(**{**vars(x), "place": x.name, "origin": ()}) for x in network.layers))
    assert sorted(aligned(plain, plain)) == [((i,), (i,)) for i in range(len(plain.layers))]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(["conv", "norm", "relu", "point"]), min_size=1, max_size=12), st.booleans())
def test_what_compile_merges_the_diff_says_it_merged(kinds: list[str], exported: bool) -> None:
    makers = {
        "conv": lambda: nn.Conv2d(3, 3, 3),
        "norm": lambda: nn.BatchNorm2d(3),
        "relu": nn.ReLU,
        "point": lambda: nn.Conv2d(3, 3, 1),
    }
    model = randomize_(nn.Sequential(*(makers[kind]() for kind in kinds))).eval()
    compiled = elc_fx.compile(model, X)
    diff = elc_fx.diff(model, pickle.loads(pickle.dumps(compiled)), X)
    assert accounted(diff)
    merged = {tuple(r.nodes) for r in elc_fx.report_of(compiled).merged if len(r.nodes) > 1}
    assert {before for before in become(diff) if len(before) > 1} == merged
    assert diff.counts["inserted"] == diff.counts["removed"] == 0


# What became of layers.


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "googlenet", "mobilenet_v2"])
def test_a_compiled_network_has_its_merges_and_nothing_else(name: str) -> None:
    model = model_of(name)
    x = torch.randn(1, 3, 64, 64)
    compiled = elc_fx.compile(model, x)
    diff = elc_fx.diff(model, compiled, x)
    assert accounted(diff)
    assert diff.counts["merged"] == len(elc_fx.report_of(compiled).merged)
    assert diff.counts["kept"] + diff.counts["merged"] == len(diff.changes)
    assert not any(change.retrained for change in diff.changes if change.kind == "kept")
    assert elc_fx.diff(model, model, x).is_empty
    back = elc_fx.diff(compiled, model, x)
    assert accounted(back) and back.counts["split"] == diff.counts["merged"]


def test_a_decoupled_network_has_its_nodes_and_a_merged_one_its_regions() -> None:
    model = block_network()
    plan = elc_fx.Plan.of(model, X, collapse=["1", "2"])
    decoupled = elc_fx.decouple(model, plan)
    diff = elc_fx.diff(model, decoupled, X)
    assert accounted(diff) and diff.counts["removed"] == diff.counts["merged"] == 0
    assert {change.name for change in diff.changes if change.kind == "changed"} >= {"1.conv2", "1.relu", "2.conv2"}
    elc_fx.set_gate(decoupled, 0)
    merged = elc_fx.merge(decoupled)
    inner = ("1.conv1", "1.bn1", "1.relu", "1.conv2", "1.bn2", "add")
    assert become(elc_fx.diff(model, merged, X))[inner] == ("1.conv1",)
    twice = copy.deepcopy(elc_fx.compile(merged, X))
    found = elc_fx.diff(model, twice, X)
    assert accounted(found) and become(found)[inner] == ("1.conv1",) and len(become(found)) == 2


def test_the_network_of_a_plan_knows_its_regions_and_their_losses() -> None:
    model = block_network(3)
    batches = [torch.randn(16, 3, 32, 32)]
    small = elc_fx.compile(model, X, mode="decouple", budget=elc_fx.Budget(flops=0.7), calibration=batches)
    plan = elc_fx.report_of(small).plan
    assert plan is not None and plan.prediction is not None
    diff = elc_fx.diff(model, small, X)
    assert accounted(diff)
    merged = {change.loss for change in diff.changes if change.loss is not None}
    assert merged == set(plan.prediction.losses)
    for candidate in plan.candidates:
        (change,) = (c for c in diff.changes if set(candidate.layers) <= {layer.place for layer in c.before})
        assert change.kind == "merged" and len(change.after) == 1


def test_sums_that_another_trace_counts_anew_do_not_mix_up_the_regions() -> None:
    """In the collapsed network the second block's sum is called as the first block's was in the original."""
    model = block_network(2)
    plan = elc_fx.Plan.of(model, X, collapse=["1:1x1", "2.conv1..2.conv2:1x1"])
    planner = elc_fx.Planner(model, X, [torch.randn(8, 3, 32, 32)], progress=False)
    small = elc_fx.compile(planner.collapse(plan), X)
    found = become(elc_fx.diff(model, small, X))
    assert [len(before) for before in found] == [7, 6]  # the stem goes into the first
    assert all(len(after) == 1 for after in found.values())


def test_inserted_and_removed_blocks_are_told_from_merged_ones() -> None:
    small, large = model_of("resnet18"), model_of("resnet34", seed=1)
    diff = elc_fx.diff(small, large)
    assert diff.counts == {"kept": 71, "merged": 0, "split": 0, "changed": 0, "inserted": 56, "removed": 0}
    assert all(change.retrained for change in diff.changes if change.name == "layer1.0.conv1")
    assert elc_fx.diff(large, small).counts["removed"] == 56


def test_without_names_and_origins_the_structure_tells() -> None:
    """The same network written anew, with other names and numbers, and one activation in another place."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    before = nn.Sequential(*layers).eval()
    other = copy.deepcopy(layers)
    other[4] = nn.Hardswish()
    after = randomize_(nn.ModuleDict({f"part{i}": layer for i, layer in enumerate(other)})).eval()
    after.forward = lambda x: [x := layer(x) for layer in after.values()][-1]  # type: ignore[method-assign]
    diff = elc_fx.diff(before, after, X)
    assert accounted(diff)
    assert become(diff) == {("4",): ("part4",)} and diff.counts["changed"] == 1


def test_a_fold_of_batch_norms_by_others_is_a_merge() -> None:
    model = model_of("resnet18")
    fused = fuse(copy.deepcopy(model))
    diff = elc_fx.diff(model, fused, X)
    assert (diff.counts["merged"], diff.counts["removed"], diff.counts["kept"]) == (20, 0, 31)


def test_unrelated_networks_are_removed_and_inserted() -> None:
    diff = elc_fx.diff(model_of("alexnet"), model_of("densenet121"), torch.randn(1, 3, 64, 64))
    assert accounted(diff)
    assert diff.counts["removed"] > 10 and diff.counts["inserted"] > 400 and diff.counts["merged"] == 0


def test_another_constant_is_a_change() -> None:
    def model(slope: float, factor: float) -> nn.Module:
        class Scaled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.flatten(x, 1) * factor

        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(slope), Scaled()).eval()

    before, after = model(0.1, 2.0), model(0.2, 3.0)
    diff = elc_fx.diff(before, after, X)
    assert [change.kind for change in diff.changes] == ["kept", "kept", "changed", "kept", "changed", "kept"]
    assert "~ 1: LeakyReLU(negative_slope=0.1)\n~ → 1: LeakyReLU(negative_slope=0.2)\n" in str(diff)
    assert "~ mul: mul(·, 2.0)\n~ → mul: mul(·, 3.0)" in str(diff)
    assert not diff.is_empty


def test_a_module_that_is_called_twice_is_two_layers() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv).eval()
    assert [c.kind for c in elc_fx.diff(model, copy.deepcopy(model), X).changes] == ["kept"] * 5


def test_saved_programs_keep_what_their_layers_stand_for(tmp_path: Path) -> None:
    model = block_network()
    compiled, file = elc_fx.compile(model, X), tmp_path / "net.pt2"
    exporting.save(exporting.export(compiled, (X,)), file)
    loaded = exporting.load(file)
    assert loaded.origins == {"1.conv1": ["1.conv1", "1.bn1"], "1.conv2": ["1.conv2", "1.bn2"]} | {
        "2.conv1": ["2.conv1", "2.bn1"],
        "2.conv2": ["2.conv2", "2.bn2"],
    }
    diff = elc_fx.diff(model, loaded)
    assert become(diff) == become(elc_fx.diff(model, compiled, X))
    assert (diff.before.flops, diff.after.flops) == tuple(elc_fx.measure(m, X).flops for m in (model, compiled))
    assert become(elc_fx.diff(model, torch.export.export(compiled, (X,)))) == become(diff)  # without: names tell


def test_programs_with_inputs_by_name_are_run_on_them() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
            return self.conv(x) if scale is None else self.conv(x) * scale

    model, inputs = Scaled().eval(), {"x": X, "scale": torch.ones(1)}
    program = torch.export.export(model, (), inputs)
    diff = elc_fx.diff(model, program)
    assert diff.is_empty and diff.before.flops == diff.after.flops == 2 * 9 * 32 * 32
    assert elc_fx.diff(program, program, {"scale": torch.ones(1), "x": X}).is_empty
    with pytest.raises(elc_fx.InvalidInputError, match="the program has an input `scale`"):
        elc_fx.diff(program, program, {"x": X})


# Costs and forms.


def test_flops_are_those_that_are_measured() -> None:
    model = block_network()
    compiled = elc_fx.compile(model, X)
    diff, comparison = elc_fx.diff(model, compiled, X), elc_fx.compare(model, compiled, X)
    assert (diff.before.flops, diff.after.flops) == (comparison.before.flops, comparison.after.flops)
    assert sum(change.flops[0] or 0 for change in diff.changes) == comparison.before.flops
    assert (diff.before.parameters, diff.after.parameters) == (
        comparison.before.parameters,
        comparison.after.parameters,
    )
    assert elc_fx.diff(model, compiled).before.flops is None


def test_neither_network_changes() -> None:
    model = block_network()
    compiled = elc_fx.compile(model, X)
    before = [copy.deepcopy(m.state_dict()) for m in (model, compiled)]
    elc_fx.diff(model, compiled, X)
    for m, state in zip((model, compiled), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())


def test_the_text_is_short_where_nothing_changed() -> None:
    model = block_network()
    plan = elc_fx.Plan.of(model, X, collapse=["1"])
    decoupled = elc_fx.decouple(model, plan)
    elc_fx.set_gate(decoupled, 0)
    text = str(elc_fx.diff(model, elc_fx.merge(decoupled), X, names=("a", "b")))
    assert text.splitlines()[0] == "a (18 layers) → b (13 layers): 12 kept, 1 merged"
    assert "» → 1.conv1: 3×3 8→8 padding 1\n»   2,073,600 → 1,036,800 FLOPs\n" in text
    assert "  … 8 kept\n" in text


def test_the_picture_is_well_formed_and_has_every_layer() -> None:
    model = block_network()
    diff = elc_fx.diff(model, elc_fx.compile(model, X), X, names=("<a>", '"b" & c'))
    picture = ElementTree.fromstring(to_svg(diff))
    circles = picture.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(diff.before.layers) + len(diff.after.layers)
    text = to_dot(diff)
    assert text.count("[label=") == len(circles) and text.count("{") == text.count("}")
    assert '\\"b\\" & c' in text


def test_a_picture_holds_any_name() -> None:
    """XML may hold no control characters, however they are escaped; paths of files are longer than there is room."""
    model = nn.Sequential(OrderedDict({"a\x07": nn.Conv2d(3, 3, 1)})).eval()
    picture = ElementTree.fromstring(to_svg(elc_fx.diff(model, model, names=("\x00", "x" * 300))))
    texts = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["\ufffd", f"…{'x' * 39}"] and "a\ufffd " in texts


def test_lanes_join_each_layer_with_what_it_reads() -> None:
    diff = elc_fx.diff(block_network(), block_network())
    drawn = layout(diff)
    assert drawn.lanes == (2, 2)
    cells = {pair[0].layer.name: pair[0] for block in drawn.blocks for pair in block.rows if pair[0].layer}
    assert cells["_1_conv1"].lane == 1 and cells["_1_conv1"].passing == (0,)  # beside the shortcut
    assert cells["add"].arriving == (0, 1) and cells["add"].lane == 0
    assert not cells["output"].leaves


@pytest.mark.parametrize("kind", ["same", "compiled", "other"])
def test_it_takes_about_linear_time(kind: str) -> None:
    def seconds(length: int) -> float:
        def network(seed: int) -> Network:
            operations = ["conv", "norm", "relu"] if seed % 2 == 0 else ["conv", "relu"]
            layers = [Layer("x", "x", "input", "input", ())]
            for i in range(length):
                operation = operations[i % len(operations)]
                kinds = {"conv": "convolution", "norm": "normalisation", "relu": "activation"}
                sources = (layers[-1].name, *([layers[-6].name] if i % 6 == 5 else []))
                place, state = (f"{operation}{i}", f"{i}.{seed}") if operation != "relu" else (f"n{i}", None)
                origin = (place, f"norm{i + 1}") if kind == "compiled" and seed and operation == "conv" else ()
                place = place if kind != "other" else f"{seed}.{place}"
                layers.append(Layer(f"n{i}", place, kinds[operation], operation, sources, origin=origin, state=state))
            return Network("", tuple(layers))

        before, after = network(0), network(0 if kind == "same" else 1)
        gc.collect()
        start = time.process_time()
        aligned(before, after)
        return time.process_time() - start

    seconds(100)
    short, long = min(seconds(1000) for _ in range(3)), seconds(8000)
    assert long < 8 * 5 * short  # quadratic would be 64 times


def test_what_was_made_is_a_graph_without_loops() -> None:
    diff = elc_fx.diff(model_of("googlenet"), model_of("googlenet"))
    graph = nx.DiGraph((s, layer.name) for layer in diff.before.layers for s in layer.sources)
    assert nx.is_directed_acyclic_graph(graph)


# Errors, and the command line.


def test_bad_input_gets_a_clear_error(tmp_path: Path) -> None:
    model = block_network()
    with pytest.raises(elc_fx.InvalidInputError, match="a network is a str"):
        elc_fx.diff(model, "net.pt2")  # type: ignore[arg-type]
    with pytest.raises(elc_fx.TrainingModeError):
        elc_fx.diff(block_network().train(), model)
    with pytest.raises(elc_fx.InvalidInputError, match="does not run on the example_inputs"):
        elc_fx.diff(model, model, torch.randn(1, 4, 8, 8))
    with pytest.raises(elc_fx.InvalidInputError, match="expected two texts"):
        elc_fx.diff(model, model, names=("before",))  # type: ignore[arg-type]
    with pytest.raises(elc_fx.InvalidInputError, match=r"channels instead$"):  # of torch.fx nothing
        elc_fx.diff(model, fx.symbolic_trace(nn.Conv2d(4, 4, 1)).eval(), X)
    diff = elc_fx.diff(model, model)
    with pytest.raises(elc_fx.InvalidInputError, match=r"ends in .png, expected .html, .svg, .dot"):
        elc_fx.draw(diff, tmp_path / "diff.png")
    with pytest.raises(elc_fx.ExportError, match="cannot write"):
        elc_fx.draw(diff, tmp_path / "nowhere" / "diff.svg")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["diff", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_missing_and_damaged_files_are_told(tmp_path: Path) -> None:
    good, bad, other = tmp_path / "good.pt2", tmp_path / "bad.pt2", tmp_path / "other.pt2"
    exporting.save(exporting.export(block_network(), (X,)), good)
    bad.write_bytes(good.read_bytes()[:-3000])
    torch.save({"weight": torch.zeros(3)}, other)
    for file, message in ((tmp_path / "none.pt2", "there is no file"), (bad, "damaged"), (other, "no program")):
        code, out, err = run(good, file)
        assert (code, out) == (1, "") and message in err and len(err.splitlines()) == 1


def test_the_command_shows_and_draws(tmp_path: Path) -> None:
    files = [tmp_path / f"diff.{suffix}" for suffix in ("html", "svg", "dot")]
    code, out, _ = run("torchvision:resnet18", "--input", "1x3x64x64", *(f"--draw={file}" for file in files))
    assert code == 0 and "31 kept, 20 merged" in out and "» → layer1.0.conv1: 3×3 64→64 padding 1" in out
    assert all(file.stat().st_size > 5000 for file in files)
    shown = json.loads(run("torchvision:resnet18", "torchvision:resnet34", "--json")[1])
    assert {change["kind"] for change in shown["changes"]} == {"kept", "inserted"}
    assert run("torchvision:resnet18", "--draw", tmp_path / "diff.png")[0] == 2
    assert "give one of the two" in run("torchvision:resnet18", "torchvision:resnet34", "--plan", "p.json")[2]


def test_a_plan_is_shown_before_it_is_carried_out(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    plan = tmp_path / "plan.json"
    plan.write_text(elc_fx.Plan.of(model, torch.randn(1, 3, 64, 64), collapse=["layer1.*"]).to_json())
    code, out, err = run("torchvision:resnet18", "--plan", plan, "--input", "1x3x64x64")
    assert code == 0, err
    assert "1 merged" in out and "75,497,472 → 18,874,368 FLOPs" in out
    plan.write_text("{}")
    assert "not a plan" in run("torchvision:resnet18", "--plan", plan)[2]


def test_the_tool_is_the_command() -> None:
    tool = Path(__file__).parent.parent / "tools" / "graph_diff.py"
    command = [sys.executable, str(tool), "torchvision:alexnet", "torchvision:alexnet"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[0].endswith("kept")


class Wired(nn.Module):
    """Three layers whose values are put together in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        ways: dict[str, Any] = {
            "c + b": lambda: c + b,
            "b + c": lambda: b + c,
            "c + a": lambda: c + a,
            "c - b": lambda: c - b,
            "b - c": lambda: b - c,
            "c * b": lambda: c * b,
            "b * c": lambda: b * c,
            "c + 2 b": lambda: torch.add(c, b, alpha=2),
            "b + 2 c": lambda: torch.add(b, c, alpha=2),
            "c, b, c": lambda: torch.cat([c, b, c]),
            "c, b, b": lambda: torch.cat([c, b, b]),
            "c and b": lambda: {"one": c, "two": b},
            "b and c": lambda: {"one": b, "two": c},
            "c and b, turned": lambda: {"two": b, "one": c},
        }
        return ways[self.how]()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("c + b", "c + b", True),
        ("c + b", "b + c", True),
        ("c * b", "b * c", True),
        ("c and b", "c and b, turned", True),
        ("c + b", "c + a", False),
        ("c - b", "b - c", False),
        ("c + 2 b", "b + 2 c", False),
        ("c, b, c", "c, b, b", False),
        ("c and b", "b and c", False),
    ],
)
def test_layers_that_read_others_differ(one: str, other: str, same: bool) -> None:
    before, after = Wired(one).eval(), Wired(other).eval()
    after.load_state_dict(before.state_dict())
    diff = elc_fx.diff(before, after, X)
    assert diff.is_empty == same == ("reading other layers" not in str(diff))


def test_a_network_has_the_weights_of_its_own_export() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    assert elc_fx.diff(model, exporting.export(model, [X])).is_empty


def test_other_weights_are_told_where_kept_layers_are_not_shown() -> None:
    before = block_network(6)
    after = copy.deepcopy(before)
    with torch.no_grad():
        list(after.parameters())[len(list(after.parameters())) // 2].mul_(2)
    text = str(elc_fx.diff(before, after, X))
    assert "1 of them with other weights" in text.splitlines()[0]
    assert "1 with other weights" in text.partition("\n")[2] or "(other weights)" in text


def test_a_padding_that_is_written_as_another_is_no_change() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return torch.relu(s.bn(s.conv(F.pad(x, (2, 0)))))

    model, x = ready(Unary(forward, conv=nn.Conv1d(4, 4, 3), bn=nn.BatchNorm1d(4))), image(2, 4, 9)
    kinds = [change.kind for change in elc_fx.diff(model, elc_fx.compile(model, x), x).changes]
    assert "changed" not in kinds
