"""The explanation: what would merge, what could, what not, and why, without anything being changed."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict

import pytest
import torch
import torchvision
from networks import image, randomize_
from torch import Tensor, nn
from typer.testing import CliRunner

import elc_fx
from elc_fx.cli import app

X = torch.randn(1, 3, 16, 16)


def chain() -> nn.Module:
    """Two convolutions that merge exactly, an activation, one more, a pooling that rounds up, one that stands alone."""
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
    ]
    return randomize_(nn.Sequential(*layers, nn.Conv2d(4, 2, 1))).eval()


def test_it_says_of_every_layer_what_can_become_of_it() -> None:
    explanation = elc_fx.explain(chain(), X)
    assert explanation.layers == ("0", "1", "3", "5")
    assert [region.nodes for region in explanation.report.merged] == [("0", "1")]
    assert {layer for c in explanation.candidates for layer in c.layers} == {"0", "1", "3"}
    assert not any(c.layers in (("0",), ("3",)) for c in explanation.smallest)  # a smaller kernel merges nothing
    assert "Could have a smaller kernel, and stay: 2 layers." in str(explanation)
    assert [str(r) for r in explanation.alone] == ["5: it reads `4`, and it gives the output"]


def test_of_layers_that_can_only_shrink_no_merge_is_told() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(4, 4, 3)).eval()
    explanation = elc_fx.explain(pooled, X)
    assert explanation.candidates and not explanation.smallest
    told = "Could merge after decoupling: nothing. Could have a smaller kernel, and stay: 2 layers."
    assert told in str(explanation) and "saves" not in str(explanation)


def test_of_max_poolings_that_a_layer_can_take_with_it_that_is_told() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)).eval()
    explanation = elc_fx.explain(pooled, X)
    (smallest,) = explanation.smallest
    assert smallest.full_name == "0..2:4x4" and smallest.poolings == smallest.activations == ("2",)
    assert "in the way: 1 activation, 1 max pooling, 0 paddings." in str(explanation)


def test_of_merges_that_save_nothing_that_is_told() -> None:
    grows = nn.Sequential(nn.Conv2d(16, 2, 1), nn.ReLU(), nn.Conv2d(2, 16, 1)).eval()
    explanation = elc_fx.explain(grows, torch.randn(1, 16, 8, 8))
    assert explanation.candidates and not explanation.smallest
    assert "1 region, 1 candidate; in the way: 1 activation, 0 paddings.\nNone saves FLOPs" in str(explanation)
    assert "smaller kernel" not in str(explanation)


def test_the_smallest_candidates_save_and_have_nothing_in_common() -> None:
    explanation = elc_fx.explain(torchvision.models.resnet18(weights=None).eval(), torch.randn(1, 3, 64, 64))
    names = [candidate.full_name for candidate in explanation.smallest]
    assert {"conv1..maxpool:7x7", "layer1.0:3x3"} < set(names) and len(names) == 9
    nodes = [node for candidate in explanation.smallest for node in candidate.nodes]
    assert len(nodes) == len(set(nodes)) and all(candidate.saves for candidate in explanation.smallest)


def test_it_prints_itself_and_holds_plain_numbers() -> None:
    explanation = elc_fx.explain(chain(), X)
    text = str(explanation)
    assert text.startswith("Sequential: 4 convolutions and linear layers, depth 4, ")
    for part in ("Merges exactly (elc_fx.compile): 1 region", "Could merge after decoupling", "Merges with nothing:"):
        assert part in text
    assert json.loads(json.dumps(explanation.to_dict()))["layers"] == ["0", "1", "3", "5"]


def test_reasons_are_told_once_with_their_places() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.convs[0](x)
            return torch.relu(y) + torch.sigmoid(self.convs[1](y))

    explanation = elc_fx.explain(randomize_(Forks()).eval(), X)
    ((reason, where),) = explanation.reasons.items()
    assert "feeds" in reason and where == ("convs.0",)
    assert "Does not merge exactly, because\n  `convs.0`: not merged with `convs.1`" in str(explanation)


def test_without_inputs_nothing_is_said_of_what_shapes_decide() -> None:
    explanation = elc_fx.explain(chain())
    assert explanation.report.merged and not explanation.candidates
    assert "After decoupling: give example inputs" in str(explanation)


def test_a_model_that_cannot_be_traced_is_explained_too() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) if x.sum() > 0 else x

    explanation = elc_fx.explain(randomize_(Branches()).eval(), X)
    assert len(explanation.report.merged) == 1 and explanation.report.opaque
    assert "cannot be traced" in str(explanation)


@pytest.mark.parametrize("name", ["class", 'a"b', "a\\nb", "a\nb", "a\0b", "a\ud800b", "ﬁ"])
def test_names_that_cannot_be_written_as_code_are_told(name: str) -> None:
    """torch.fx writes `self.class`, and quotes without escaping: a SyntaxError, or code that reads something else."""
    model = randomize_(nn.Sequential(OrderedDict({name: nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)}))).eval()
    assert elc_fx.explain(model, X).no_candidates
    torch.testing.assert_close(elc_fx.compile(model, X)(X), model(X))
    with pytest.raises(elc_fx.CaptureError, match="cannot write code that reads"):
        elc_fx.diff(model, model)


@pytest.mark.parametrize("name", ["1x1", "a b", "слой", "<b>", "a'b", "\u202ename"])
def test_names_that_are_no_identifiers_are_names(name: str) -> None:
    model = randomize_(nn.Sequential(OrderedDict({name: nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)}))).eval()
    assert elc_fx.explain(model, X).report.merged
    assert elc_fx.diff(model, elc_fx.compile(model, X), X).counts["merged"] == 1


def test_torchscript_is_left_as_it_is() -> None:
    script = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval())
    assert "it is a TorchScript module" in str(elc_fx.explain(script, X))
    with pytest.raises(elc_fx.CaptureError, match="it is a TorchScript module"):
        elc_fx.diff(script, script)
    inside = elc_fx.explain(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), script).eval(), X)
    assert len(inside.report.merged) == 1 and inside.no_candidates is None


@pytest.mark.filterwarnings("ignore:.*jit.script:FutureWarning", "ignore:.*jit.script:DeprecationWarning")
def test_what_compile_and_merge_return_can_be_scripted() -> None:
    model = randomize_(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3))).eval()
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, X, collapse=["0..3"]))
    elc_fx.set_gate(decoupled, 0)
    for made in (elc_fx.compile(model, X), elc_fx.merge(decoupled)):
        torch.testing.assert_close(torch.jit.script(made)(X), made(X))


def test_what_merges_exactly_needs_no_decoupling() -> None:
    explanation = elc_fx.explain(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), torch.randn(2, 3))
    assert len(explanation.report.merged) == 1 and not explanation.candidates and not explanation.alone


def test_nothing_is_changed() -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    elc_fx.explain(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_input_gets_a_clear_error() -> None:
    with pytest.raises(elc_fx.TrainingModeError):
        elc_fx.explain(chain().train(), X)
    with pytest.raises(elc_fx.InvalidInputError, match="model is a str"):
        elc_fx.explain("resnet18")  # type: ignore[arg-type]
    with pytest.raises(elc_fx.InvalidInputError, match="does not run"):
        elc_fx.explain(chain(), torch.randn(1, 5, 16, 16))


def test_the_command_prints_it() -> None:
    result = CliRunner().invoke(app, ["explain", "torchvision:resnet18", "--input", "1x3x64x64"])
    assert result.exit_code == 0 and "Could merge after decoupling" in result.stdout
    result = CliRunner().invoke(app, ["explain", "torchvision:resnet18", "--json"])
    assert json.loads(result.stdout)["report"]["merged"]


def test_a_layer_whose_kernel_could_shrink_is_alone_all_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3)).eval()
    explanation = elc_fx.explain(model, image(1, 4, 9, 9, dtype=torch.float32))
    assert [refusal.where for refusal in explanation.alone] == ["0", "2"] and explanation.candidates
