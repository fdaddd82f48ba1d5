"""Candidates and plans: names, patterns, costs, JSON, and errors that say what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bench_decouple
import elc_fx
from cifar_models import VGG16, ResNet

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(3).eval()


def named(model: nn.Module, **keywords: int) -> dict[str, elc_fx.Candidate]:
    return {c.full_name: c for c in elc_fx.candidates(model, IMAGE, **keywords)}


def test_blocks_branches_and_runs_of_blocks_are_candidates(resnet: nn.Module) -> None:
    found = named(resnet)
    for name in ("layer1.0:1x1", "layer1.0:3x3", "layer1.0:5x5", "layer1.0.conv1..layer1.0.conv2:3x3", "layer1:3x3"):
        assert name in found, name
    assert "layer1.1.conv1..layer2.0.conv2:3x3" in found
    block, branch = found["layer1.0:3x3"], found["layer1.0.conv1..layer1.0.conv2:3x3"]
    assert block.layers == branch.layers == ("layer1.0.conv1", "layer1.0.conv2")
    assert set(branch.nodes) < set(block.nodes)
    assert block.flops[1] * 2 == block.flops[0] and block.saves
    assert len(block.activations) == 1 and len(block.kernels) == 1 and not block.paddings and block.ring == 0
    both = found["layer1.0:5x5"]
    assert len(both.paddings) == 1 and both.ring == 1 and not both.saves
    assert found["layer2.0:3x3"].result == "3×3 16→32 stride 2 padding 1"


def test_the_convolution_with_a_stride_keeps_its_kernel(resnet: nn.Module) -> None:
    """Else the first one."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)).eval()
    candidate = named(model)["0..2:3x3"]
    assert candidate.kernels == (("_0", (1, 1)),)
    assert named(resnet)["layer1.0:3x3"].kernels == (("layer1_0_conv2", (1, 1)),)
    plan = elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0"], kernels={"layer1.0.conv1": 1, "layer1.0.conv2": 3})
    assert plan.candidates[0].kernels == (("layer1_0_conv1", (1, 1)),)
    with pytest.raises(elc_fx.PlanError, match="cannot keep 5"):
        elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0"], kernels={"layer1.0.conv1": 5})


def test_a_layer_by_itself_can_have_a_smaller_kernel(resnet: nn.Module) -> None:
    """It keeps its activation, and so its depth; only a name with a kernel stands for it."""
    found = named(resnet)
    alone = [c for c in found.values() if c.layers == ("layer1.0.conv1",)]
    assert [c.full_name for c in alone] == [f"layer1.0.conv1:{kernel}" for kernel in ("1x1", "1x3", "3x1")]
    assert [c.flops[0] // c.flops[1] for c in alone] == [9, 3, 3]
    assert all(c.activations == c.paddings == () and c.nodes == ("layer1_0_bn1", "layer1_0_conv1") for c in alone)
    assert not any(c.layers == ("linear",) for c in found.values())
    large = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    kernels = [c.kernel_size for c in elc_fx.candidates(large, IMAGE) if c.layers == ("0",)]
    assert sorted(kernels) == [(1, 1), (1, 3), (1, 5), (3, 1), (3, 3), (3, 5), (5, 1), (5, 3)]
    plan = elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0.conv1:1x3", "layer2.0.conv2:1x1"])
    assert [c.result for c in plan.candidates] == ["1×3 16→16 padding 0×1", "1×1 32→32"]
    assert elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0.conv?:1x1"]).candidates[0].layers == (
        "layer1.0.conv1",
        "layer1.0.conv2",
    )
    for name in ("layer1.0.conv1", "layer1.0.conv1*"):
        with pytest.raises(elc_fx.PlanError, match=r"`layer1\.0\.conv1` is one layer; say .*: `layer1\.0\.conv1:1x1`"):
            elc_fx.Plan.of(resnet, IMAGE, collapse=[name])


@pytest.mark.parametrize("size", [6, 7, 8, 9])
def test_a_kernel_beyond_the_largest_can_shrink_below_it(size: int) -> None:
    """1×7 has fewer taps than 3×3, and is too long."""
    model = nn.Sequential(nn.Conv2d(3, 4, size)).eval()
    found = elc_fx.candidates(model, IMAGE, largest_kernel=5)
    assert [c.kernel_size for c in found] == [(1, 1), (1, 3), (3, 1), (3, 3)]


def test_the_number_of_layers_in_a_row_is_capped(resnet: nn.Module) -> None:
    few, more = named(resnet, longest=1), named(resnet, longest=2)
    assert set(few) < set(more)
    assert max(len(c.layers) for c in few.values()) == 2


def test_patterns_names_and_what_is_kept(resnet: nn.Module) -> None:
    def names(**keywords: object) -> list[str]:
        return [c.full_name for c in elc_fx.Plan.of(resnet, IMAGE, **keywords).candidates]  # type: ignore[arg-type]

    assert names(collapse=["layer1.*"]) == ["layer1:3x3"]
    assert names(collapse=["layer?.0.*"]) == ["layer1.0:3x3", "layer2.0:3x3", "layer3.0:3x3"]
    assert names(collapse=["layer1.0:1x1", "layer3.2:5x5"]) == ["layer1.0:1x1", "layer3.2:5x5"]
    assert names(collapse=["layer1.*"], keep=["layer1.1"]) == ["layer1.0:3x3", "layer1.2:3x3"]
    (everything,) = elc_fx.Plan.of(resnet, IMAGE).candidates
    assert len(everything.layers) == 19


def test_what_cannot_be_planned_is_an_error_that_says_why(resnet: nn.Module) -> None:
    for collapse, message in (
        (["layer1.0", "layer1.*"], "overlap"),
        (["layer9.*"], "no candidate is called `layer9"),
        (["layer1.0:4x4"], "can be 1x1, 3x3, 5x5, not 4x4"),
    ):
        with pytest.raises(elc_fx.PlanError, match=message):
            elc_fx.Plan.of(resnet, IMAGE, collapse=collapse)
    with pytest.raises(elc_fx.PlanError, match="no layer is called `laier1`"):
        elc_fx.Plan.of(resnet, IMAGE, keep=["laier1"])
    with pytest.raises(elc_fx.InvalidInputError, match="sequence of names"):
        elc_fx.Plan.of(resnet, IMAGE, collapse="layer1.*")  # type: ignore[arg-type]
    with pytest.raises(elc_fx.TrainingModeError):
        elc_fx.candidates(ResNet(1), IMAGE)
    with pytest.raises(elc_fx.InvalidInputError):
        elc_fx.candidates("resnet", IMAGE)  # type: ignore[arg-type]


def test_a_plan_is_stored_as_json_and_checked_against_its_model(resnet: nn.Module) -> None:
    plan = elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.*", "layer2.1"])
    restored = elc_fx.Plan.from_json(plan.to_json())
    assert restored == plan and hash(restored) == hash(plan)
    elc_fx.decouple(resnet, restored)
    assert "layer1:3x3" in str(plan) and "2 regions" in str(plan)
    with pytest.raises(elc_fx.PlanError, match="another model"):
        elc_fx.decouple(VGG16().eval(), plan)
    with pytest.raises(elc_fx.PlanError, match="another model"):
        elc_fx.decouple(ResNet(1).eval(), plan)
    data = json.loads(plan.to_json())
    del data["candidates"][0]["nodes"]
    for text in ("{", "[]", "{}", '{"format": 99}', '{"format": 1}', json.dumps(data)):
        with pytest.raises(elc_fx.InvalidInputError):
            elc_fx.Plan.from_json(text)


def test_the_list_prints_as_a_table_and_as_json(resnet: nn.Module) -> None:
    found = elc_fx.candidates(resnet, IMAGE)
    assert "layer3.2:5x5" in str(found) and "FLOPs before" in str(found)
    assert [elc_fx.Candidate.from_dict(data) for data in json.loads(found.to_json())] == list(found)
    assert str(elc_fx.Candidates()) == "No candidates."


def test_linear_layers_are_candidates() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 4)).double().eval()
    x = torch.randn(5, 7, 8, dtype=torch.float64)
    (candidate,) = elc_fx.candidates(model, x)
    assert candidate.full_name == "0..3:linear"
    assert candidate.flops == (2 * 35 * (8 * 32 + 32 * 4), 2 * 35 * 8 * 4)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x))
    torch.testing.assert_close(decoupled(x), model(x), rtol=0, atol=0)
    elc_fx.set_gate(decoupled, 0)
    torch.testing.assert_close(elc_fx.merge(decoupled)(x), decoupled(x))


def test_squeeze_and_excitation_is_a_boundary() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
            z: Tensor = self.b(y)
            return z

    assert not elc_fx.candidates(Gated().eval(), IMAGE)


@pytest.mark.parametrize(("model", "change"), [(ResNet(9), -0.508), (VGG16(), -0.783)])
def test_the_flops_are_those_of_the_arithmetic_on_paper(model: nn.Module, change: float) -> None:
    model.eval()
    plan = bench_decouple.collapsing(model, IMAGE)
    decoupled = elc_fx.decouple(model, plan)
    elc_fx.set_gate(decoupled, 0)
    before, after = (elc_fx.measure(m, (IMAGE,)).flops for m in (model, elc_fx.merge(decoupled)))
    assert after / before - 1 == pytest.approx(change, abs=5e-4)
    assert before - after == sum(c.flops[0] - c.flops[1] for c in plan.candidates)


def test_a_kernel_named_twice_must_agree(resnet: nn.Module) -> None:
    kept = {"layer1.0.conv1": 1, "layer1.0.conv2": 3}
    assert elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0:3x3"], kernels=kept).candidates
    with pytest.raises(elc_fx.PlanError, match="becomes 3x3"):
        elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0:1x1"], kernels=kept)
    for wrong in ({"layer1.0.conv1": 3.0}, {"layer1.0.conv1": "3"}, {"layer1.0.conv1": None}):
        with pytest.raises(elc_fx.InvalidInputError, match="expected a whole number"):
            elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0"], kernels=wrong)  # type: ignore[arg-type]
    for names in (5, [("layer1.0.conv1", 1)], {1: 3}):
        with pytest.raises(elc_fx.InvalidInputError, match="kernels is"):
            elc_fx.Plan.of(resnet, IMAGE, kernels=names)  # type: ignore[arg-type]


def test_names_may_be_repeated_and_come_from_a_generator(resnet: nn.Module) -> None:
    once = elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0"], keep=["conv1"])
    assert elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0", "layer1.0:3x3"], keep=["conv1"]) == once
    assert elc_fx.Plan.of(resnet, IMAGE, collapse=(n for n in ["layer1.0"]), keep=iter(["conv1"])) == once
    with pytest.raises(elc_fx.InvalidInputError, match="collapse is None"):
        elc_fx.Plan.of(resnet, IMAGE, collapse=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", ["3", 0, -1, 2.0, True])
def test_counts_out_of_range(resnet: nn.Module, count: int) -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="longest is"):
        elc_fx.candidates(resnet, IMAGE, longest=count)
    with pytest.raises(elc_fx.InvalidInputError, match="longest is"):
        elc_fx.Plan.of(resnet, IMAGE, longest=count)
    with pytest.raises(elc_fx.InvalidInputError, match="largest_kernel is"):
        elc_fx.candidates(resnet, IMAGE, largest_kernel=count)


def test_a_plan_is_for_the_same_layers_inside_too() -> None:
    def model(act: nn.Module, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), act, nn.Conv2d(width, 4, 3, padding=1)).eval()

    plan = elc_fx.Plan.of(model(nn.ReLU()), IMAGE)
    assert elc_fx.decouple(model(nn.ReLU(inplace=True)), plan)
    with pytest.raises(elc_fx.PlanError, match=r"stands 1: Sigmoid, the plan says 1: ReLU"):
        elc_fx.decouple(model(nn.Sigmoid()), plan)
    with pytest.raises(elc_fx.PlanError, match=r"in `0\.\.2` stands 0: 3×3 3→8"):
        elc_fx.decouple(model(nn.ReLU(), 8), plan)


def test_a_damaged_plan_is_an_error(resnet: nn.Module) -> None:
    good = json.loads(elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0", "layer1.1"]).to_json())
    for key in (*good, *good["candidates"][0]):
        for value in (None, -1, 0.5, "x", [1], [[1]], {"a": 1}, "missing"):
            bad = json.loads(json.dumps(good))
            holder = bad if key in bad else bad["candidates"][1]
            if value == "missing":
                del holder[key]
            elif type(value) is type(holder[key]) is str or (key, value) == ("kernel_size", [1]):
                continue  # of the right kind
            else:
                holder[key] = value
            with pytest.raises(elc_fx.InvalidInputError):
                elc_fx.Plan.from_json(json.dumps(bad))
    for text in (None, 5, "[" * 100_000):
        with pytest.raises(elc_fx.InvalidInputError):
            elc_fx.Plan.from_json(text)  # type: ignore[arg-type]


def test_a_plan_whose_candidates_overlap_cannot_be_made(resnet: nn.Module) -> None:
    found = named(resnet)
    for names in (("layer1.0:3x3", "layer1:3x3"), ("layer1.0:3x3", "layer1.0:1x1")):
        with pytest.raises(elc_fx.PlanError, match="overlap"):
            elc_fx.Plan(tuple(found[name] for name in names))


def test_a_plan_predicts_a_loss_for_each_candidate(resnet: nn.Module) -> None:
    x = torch.randn(8, 3, 8, 8)
    good = json.loads(elc_fx.plan(resnet, x[:1], elc_fx.Budget(flops=0.9), [x], loss="uniform").to_json())
    good["prediction"]["losses"].pop()
    with pytest.raises(elc_fx.InvalidInputError, match="losses"):
        elc_fx.Plan.from_json(json.dumps(good))


@pytest.mark.parametrize("kept", [[1], [], [0, 0], [5, 5]])
def test_kernels_of_a_plan_that_its_layers_cannot_keep(resnet: nn.Module, kept: list[int]) -> None:
    data = json.loads(elc_fx.Plan.of(resnet, IMAGE, collapse=["layer1.0"]).to_json())
    for kernels in ([["layer1_0_conv2", kept]], [["layer1_0_conv2", [1, 1]], ["conv9", [1, 1]]]):
        data["candidates"][0]["kernels"] = kernels
        with pytest.raises(elc_fx.PlanError, match="cannot keep the kernels"):
            elc_fx.decouple(resnet, elc_fx.Plan.from_json(json.dumps(data)))


def test_a_plan_needs_a_name_for_each_input() -> None:
    class AnyNumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, *images: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(images[0])))
            return y

    with pytest.raises(elc_fx.InvalidInputError, match=r"takes \*images.*wrap the model"):
        elc_fx.Plan.of(AnyNumber().eval(), (IMAGE,))


def test_a_name_with_a_colon_is_a_name() -> None:
    layers = nn.ModuleDict({"in:a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 1)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d = layers

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.d["b"](torch.relu(self.d["in:a"](x)))
            return y

    plan = elc_fx.Plan.of(Net().eval(), IMAGE, collapse=["d.in:a:1x1"])
    assert [candidate.kernel_size for candidate in plan.candidates] == [(1, 1)]


@pytest.mark.parametrize("wrong", ["lazy", "parallel", "distributed"])
def test_models_that_would_change_or_only_pass_on_are_told(wrong: str) -> None:
    layers = nn.Sequential(nn.LazyConv2d(8, 3) if wrong == "lazy" else nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)).eval()
    if wrong == "distributed":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = {"parallel": nn.DataParallel, "distributed": DistributedDataParallel}.get(wrong, nn.Sequential)(layers)
    finally:
        if wrong == "distributed":
            dist.destroy_process_group()
    model.eval()
    for ask in (elc_fx.candidates, elc_fx.compile, elc_fx.explain):
        with pytest.raises(elc_fx.InvalidInputError, match=r"lazy layers|model\.module"):
            ask(model, IMAGE)
    for ask in (elc_fx.compile, elc_fx.explain, elc_fx.merge) if wrong != "lazy" else ():
        with pytest.raises(elc_fx.InvalidInputError, match=r"model\.module"):
            ask(model)
    assert model(IMAGE).shape[1] == 8
