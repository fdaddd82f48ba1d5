"""What was found broken once, each by its smallest model."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, conv_bn, image, ready
from torch import Tensor, fx, nn

import elc_fx


class CalledTwice(nn.Module):
    """Calls a module as a whole, and a layer inside it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.attention(x, x, x)
        return y, self.last(self.attention.out_proj(x))


def test_a_layer_inside_a_module_that_is_called_whole_is_not_replaced_there() -> None:
    model, x = CalledTwice().eval(), torch.randn(2, 5, 8)
    expected = model(x)
    compiled = elc_fx.compile(model)
    for result in (model(x), compiled(x)):
        torch.testing.assert_close(result, expected)


class Concatenation(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        return torch.cat([self.a(x), self.b(x), self.c(y), self.d(y)], self.axis)


def test_concatenations_keep_their_axis() -> None:
    x = torch.randn(2, 4, 9, 9)
    model = Concatenation(-3).eval()
    compiled = elc_fx.compile(model)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x[0]), model(x[0]))
    model = Concatenation(1).eval()
    torch.testing.assert_close(elc_fx.compile(model, x[0])(x[0]), model(x[0]))
    with pytest.raises(AssertionError, match="4 axes"):
        elc_fx.compile(model)(x[0])


class Formula(nn.Module):
    def __init__(self, formula: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.formula = formula
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def test_a_scale_of_an_input_that_may_be_integers_stays() -> None:
    model = Formula(lambda s, x: s.c(x / 255), c=nn.Conv2d(3, 8, 4, 4)).eval()
    x = torch.randint(0, 255, (1, 3, 8, 8), dtype=torch.uint8)
    for examples in (None, x):
        torch.testing.assert_close(elc_fx.compile(model, examples)(x), model(x))


def test_branches_whose_sizes_never_agree_do_not_merge() -> None:
    model = Formula(lambda s, x: s.a(x) + s.b(x), a=nn.Conv2d(4, 4, 1, 2), b=nn.Conv2d(4, 4, 5, 2)).eval()
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(elc_fx.compile(model)(x), model(x))


def test_an_operation_behind_a_deep_network_does_not_recurse_through_it() -> None:
    layers = nn.Sequential(*[layer for _ in range(300) for layer in (nn.Conv2d(2, 2, 1), nn.ReLU())])
    elc_fx.compile(Formula(lambda s, x: s.layers(x) + 1.0, layers=layers).eval())


class Nested(nn.Module):
    """Residuals inside residuals."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(2, 2, 1) for _ in range(depth)])
        self.up = nn.ModuleList([nn.Conv2d(2, 2, 1) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            kept.append(x)
            x = layer(x)
        for layer in self.up:
            x = layer(x) + kept.pop()
        return x


def test_deeply_nested_residuals_compile() -> None:
    model, x = Nested(300).double().eval(), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(elc_fx.compile(model)(x), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) + 3000)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self.norm(F.conv2d(x, w))


def test_constants_are_verified_as_the_model_computes_them() -> None:
    model, x = Standardised().eval(), torch.randn(1, 4, 5, 5)
    compiled = elc_fx.compile(model)
    assert len(elc_fx.report_of(compiled).merged) == 1
    torch.testing.assert_close(compiled(x), model(x))


@torch.fx.wrap
def add(input: Tensor, other: Tensor) -> Tensor:
    return torch.maximum(input, other)


@torch.fx.wrap
def relu(input: Tensor) -> Tensor:
    return input * input


relu.__module__ = "torchnets"


def test_nor_is_one_of_a_package_whose_name_begins_like_torchs() -> None:
    layers = {"a": nn.Conv2d(4, 4, 3), "pool": nn.MaxPool2d(2), "b": nn.Conv2d(4, 4, 1)}
    model, x = Formula(lambda s, x: s.b(s.pool(relu(s.a(x)))), **layers).eval(), torch.randn(1, 4, 8, 8)
    found = elc_fx.candidates(model, x)
    assert not any(candidate.activations for candidate in found)
    for candidate in found:
        assert torch.equal(elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",)))(x), model(x))


def test_a_users_function_is_not_torchs_of_the_same_name() -> None:
    model = Formula(lambda s, x: add(s.a(x), s.b(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(elc_fx.compile(model, verify=False)(x), model(x))


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, x: s.a(x.tensors if hasattr(x, "tensors") else x),
        lambda s, x: s.a(getattr(x, "tensors", x)),
        lambda s, x: s.a(x) * 2 if callable(x) else s.a(x),
    ],
    ids=["hasattr", "getattr", "callable"],
)
def test_questions_about_attributes_are_not_answered_by_stand_ins(formula: Any) -> None:
    model, x = Formula(formula, a=nn.Conv2d(4, 4, 1)).eval(), torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(elc_fx.compile(model)(x), model(x))


class SubclassedDropout(nn.Dropout):
    pass


def test_a_dropout_subclass_hands_on_its_input() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = s.c(x).relu()
        dropped = s.drop(kept)
        dropped *= 2.0
        return s.last(dropped), kept

    layers = {"c": nn.Conv2d(4, 4, 3, padding=1), "drop": SubclassedDropout(0.1), "last": nn.Conv2d(4, 4, 3)}
    model, x = Formula(forward, **layers).eval(), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(elc_fx.compile(model)(x), model(x))


def test_a_complex_scale_is_not_made_real() -> None:
    model = Formula(lambda s, x: s.c(x) * s.j, c=nn.Conv2d(2, 2, 1)).eval()
    model.register_buffer("j", torch.tensor(1j))
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(elc_fx.compile(model)(x), model(x))


def test_one_channel_that_is_broadcast_to_many_stays_one() -> None:
    model = Formula(lambda s, x: s.c(x * s.g), c=nn.Conv2d(8, 8, 3)).eval()
    model.register_parameter("g", nn.Parameter(torch.randn(8, 1, 1)))
    x = torch.randn(1, 1, 5, 5)
    torch.testing.assert_close(elc_fx.compile(model)(x), model(x))


class Doubled(nn.Sequential):
    def __call__(self, *arguments: Any) -> Any:
        return 2 * super().__call__(*arguments)


@pytest.mark.parametrize("kind", [fx.symbolic_trace, copy.deepcopy, lambda m: Doubled(*m).eval()])
def test_what_is_called_in_a_way_of_its_own_is_compiled_with_example_inputs_too(kind: Any) -> None:
    """Every GraphModule has a `__call__`, which only makes tracebacks readable."""
    torch.manual_seed(0)
    model = kind(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())
    x = torch.randn(2, 3, 6, 6)
    compiled = elc_fx.compile(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in compiled.modules())
    torch.testing.assert_close(compiled(x), model(x))


def test_a_call_of_its_own_with_two_arguments_is_left_alone_with_the_reason() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

        def __call__(self, x: Tensor, y: Tensor) -> Any:
            return 2 * super().__call__(x, y)

    model, x = Sum().eval(), torch.ones(3)
    compiled = elc_fx.compile(model, (x, x))
    assert torch.equal(compiled(x, x), model(x, x))
    assert "__call__" in elc_fx.report_of(compiled).opaque[0].reason


def test_layers_that_get_their_input_by_name_merge_as_others() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(input=self.conv(input=x))
            return y

    model, x = Named().eval(), torch.randn(1, 3, 6, 6)
    compiled = elc_fx.compile(model, x)
    assert len(elc_fx.report_of(compiled).merged) == 1
    torch.testing.assert_close(compiled(x), model(x))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(*conv_bn(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y if y.sum() > 0 else -y


def test_a_module_that_is_opaque_and_has_parts_that_others_call() -> None:
    """Found by tools/fuzz.py, seed 250: its compiled children lack the paths by which its parts are called."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.opaque = Untraceable()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.opaque.block[-1](self.opaque(x))
            return y

    model, x = ready(Shares()), image(2, 3, 8, 8)
    with torch.no_grad():
        assert_same(elc_fx.compile(model, x)(x), model(x))


def test_merged_layers_have_memory_of_their_own(tmp_path: Path) -> None:
    """Found by tools/fuzz.py, seed 1246: in float64 two layers had one bias, which was the caller's, too."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(4, 4, 3, padding=1), nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return torch.cat([self.conv(self.scale * y), y], 1)

    model, x = ready(Again()), image(2, 4, 8, 8)
    compiled = elc_fx.compile(model, x)
    pointers = [p.data_ptr() for network in (model, compiled) for p in network.parameters()]
    assert len(pointers) > 3 and len(set(pointers)) == len(pointers)
    elc_fx.save(compiled, tmp_path / "net.elc")
    with torch.no_grad():
        assert_same(elc_fx.load(tmp_path / "net.elc")(x), model(x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_what_is_compiled_keep_its_report(copied: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.kept(x))
            return y

    compiled, x = elc_fx.compile(Net().eval()), torch.randn(1, 3, 9, 9)
    for again in (copied(compiled), copied(copied(compiled))):
        assert torch.equal(again(x), compiled(x))
        assert elc_fx.report_of(again) == elc_fx.report_of(compiled)


@pytest.mark.parametrize(
    "write",
    [
        lambda z: operator.add(z.chunk(2, 1), (z,))[-1].add_(1),
        lambda z: operator.add((z,), z.chunk(2, 1))[0].add_(1),
        lambda z: (z.chunk(2, 1) * 2)[0].add_(1),
        lambda z: torch.ops.aten.add_.Tensor(z, torch.ones(())),
        lambda z: torch.relu_(input=z),
        lambda z: nn.init.constant_(z, 1.0),
        lambda z: nn.init.constant_(tensor=z, val=1.0),
    ],
    ids=["behind", "before", "repeated", "overload", "keyword", "initialised", "initialised by keyword"],
)
def test_nothing_merges_across_a_write_however_it_is_spelled(write: Any) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        z = F.gelu(s.z(x))
        y = s.a(z)
        write(z)
        return F.gelu(y + s.b(z))

    layers = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "zab"}
    model, x = Formula(forward, **layers).eval(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(elc_fx.compile(model, verify=False)(x), model(x))


def test_an_average_pooling_counts_among_the_kernels_of_a_region() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AvgPool2d(4), nn.Conv2d(8, 8, 1)).eval()
    assert [c.full_name for c in elc_fx.explain(model, torch.randn(1, 8, 16, 16)).smallest] == ["0..3:4x4"]


def test_what_gives_an_ordered_dict_has_poolings_to_merge() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return OrderedDict(out=self.p(F.relu(self.a(x))))

    assert any(candidate.poolings for candidate in elc_fx.candidates(Named().eval(), torch.randn(1, 3, 9, 9)))


class Towers(nn.Module):
    """Two linear layers side by side, concatenated along an axis."""

    def __init__(self, axis: int, between: nn.Module) -> None:
        super().__init__()
        self.axis, self.between = axis, between
        self.a, self.b, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.cat([self.between(self.a(x)), self.b(x)], dim=self.axis))
        return y


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (2, 3, 5, 8)], ids=len)
@pytest.mark.parametrize("last", [-1, 0], ids=["from the back", "from the front"])
def test_linear_layers_are_concatenated_along_the_last_axis_however_it_is_counted(
    shape: tuple[int, ...], last: int
) -> None:
    axis, x = last or len(shape) - 1, torch.randn(shape)
    model = Towers(axis, nn.Identity()).eval()
    compiled = elc_fx.compile(model, x)
    assert len(elc_fx.report_of(compiled).merged) == 1
    torch.testing.assert_close(compiled(x), model(x))
    model = Towers(axis, nn.ReLU()).eval()
    names = [candidate.full_name for candidate in elc_fx.candidates(model, x) if candidate.saves]
    assert "a..last:linear" in names
    for name in names:  # without examples, decouple knows of no axes what the plan knew
        decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=[name]))
        torch.testing.assert_close(decoupled(x), model(x))
        elc_fx.set_gate(decoupled, 0)
        torch.testing.assert_close(elc_fx.merge(decoupled)(x), decoupled(x))


def test_a_sum_in_place_that_only_reads_what_a_region_gives_overwrites_none_of_it() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.c = nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.b = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.relu(self.stem(x))
            a, c, b = self.a(y), self.c(y), self.b(y)
            b += a
            return F.relu(b), F.relu(c + y)

    model, x = ready(Beside()), image(2, 3, 12, 12)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=["a:1x3", "c:1x1"]))
    assert_same(decoupled(x), model(x))
    elc_fx.set_gate(decoupled, 0)
    assert_same(elc_fx.merge(decoupled)(x), decoupled(x))


@pytest.mark.parametrize("writes", [True, False])
def test_a_region_with_a_shortcut_beside_another_that_reads_the_same(writes: bool) -> None:
    class Gated(nn.Module):
        writes: bool

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.c, self.g = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.stem(x))
            h, gate = self.c(y), self.g(y)
            return F.relu(h + y) * torch.sigmoid(F.relu(gate, inplace=self.writes))

    model, x = ready(Gated()), image(2, 3, 12, 12)
    model.writes = writes
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=["c:1x1", "g:1x3"]))
    assert_same(decoupled(x), model(x))
    elc_fx.set_gate(decoupled, 0)
    assert_same(elc_fx.merge(decoupled)(x), decoupled(x))


def test_parameters_from_which_a_weight_is_computed_go_with_its_layer() -> None:
    """As in weight standardisation."""

    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(input, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)

    first, second = Standardised(3, 16, 3), Standardised(16, 16, 3)
    model, x = ready(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(16, 4, 1))), image(2, 3, 9, 9)
    planner = elc_fx.Planner(model, x, [x], loss="uniform")
    plan = planner.plan(elc_fx.Budget(flops=0.3))
    (candidate,) = plan.candidates
    assert candidate.parameters == (16 * 16 * 9 + 16, 16 * 16 + 16)
    decoupled = elc_fx.decouple(model, plan)
    elc_fx.set_gate(decoupled, 0)
    assert plan.prediction is not None
    assert plan.prediction.after.params == elc_fx.measure(elc_fx.merge(decoupled), x).parameters
    planner.plan(elc_fx.Budget(params=0.5))  # which can be met
