"""Max poolings that become part of the convolution before them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomize_
from torch import Tensor, nn

import elc_fx
from elc_fx.capturing.capture import capture
from elc_fx.capturing.inputs import ExampleInputs
from elc_fx.matching.activations import MODULES, never_falls
from elc_fx.matching.pooling import max_pooling_of, put_poolings_back
from elc_fx.matching.serial import SerialGraph, serial_capture
from elc_fx.planning import sensitivity

X = torch.randn(4, 3, 12, 13)


def network(activation: nn.Module | None = None, pooling: nn.Module | None = None) -> nn.Sequential:
    """Three convolutions with batch norms and activations, a max pooling behind the second, a classifier."""
    act = activation or nn.ReLU(inplace=True)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((3, 4), (4, 6), (6, 6))):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), copy.deepcopy(act)]
        layers += [pooling or nn.MaxPool2d(2)] if i == 1 else []
    return randomize_(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))).eval()


class Functional(nn.Module):
    """A convolution, an activation and a max pooling; the pooling as `pool` spells it."""

    def __init__(self, pool: Callable[[Tensor], Tensor], dims: int = 2) -> None:
        super().__init__()
        self.pool = pool
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 3, padding=1)
        self.last = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.pool(torch.relu(self.conv(x))))
        return y


def names(graph: torch.fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "functional": (lambda x: F.max_pool2d(x, 2), 2),
    "rounded up": (lambda x: F.max_pool2d(x, 3, 1, 1, ceil_mode=True), 2),  # which it need not be
    "padded": (lambda x: F.max_pool2d(x, 3, 2, 1), 2),
    "keywords": (lambda x: F.max_pool2d(x, kernel_size=(2, 3), stride=2), 2),
    "torch": (lambda x: torch.max_pool2d(x, [2, 2], [2, 1]), 2),
    "1-d": (lambda x: F.max_pool1d(x, 3, 2), 1),
    "3-d": (lambda x: torch.max_pool3d(x, 2), 3),
    "3-d, padded": (lambda x: torch.max_pool3d(x, 2, 2, (0, 1, 1)), 3),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_however_it_is_spelled_it_merges(spelling: str) -> None:
    pool, dims = SPELLINGS[spelling]
    model = Functional(pool, dims).double().eval()
    x = torch.randn(2, 3, *(7, 8, 9)[:dims], dtype=torch.float64)
    pooled = [c for c in elc_fx.candidates(model, x) if c.layers == ("conv",) and c.poolings]
    assert pooled and all(c.poolings == c.activations and c.merges and not c.removed for c in pooled)
    for candidate in pooled:
        decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",)), [x])
        assert torch.equal(decoupled(x), model(x))
        elc_fx.set_gate(decoupled, 0)
        for size in (7, 10, 11):
            z = torch.randn(2, 3, *(size, size + 1, size)[:dims], dtype=torch.float64)
            torch.testing.assert_close(elc_fx.merge(decoupled)(z), decoupled(z), rtol=0, atol=1e-12)


def test_of_a_concatenation_too() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.pool = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3), nn.MaxPool2d(2)
            self.last = nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.pool(F.relu(torch.cat([self.a(x), self.b(x)], 1))))
            return y

    model = Beside().double().eval()
    pooled = [c for c in elc_fx.candidates(model, X.double()) if c.poolings]
    assert {c.layers for c in pooled} == {("a", "b"), ("a", "b", "last")}
    for candidate in pooled:
        decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",)))
        elc_fx.set_gate(decoupled, 0)
        torch.testing.assert_close(elc_fx.merge(decoupled)(X.double()), decoupled(X.double()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_and_under_autocast(dims: int, autocast: bool) -> None:
    model = Functional((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](2, padding=1), dims).eval()
    x = torch.randn(2, 3, *(6, 7, 8)[:dims])
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    candidate = next(c for c in elc_fx.candidates(model, x) if c.poolings)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",)), [x])
        for gate in (1.0, 0.5, 0.0):
            elc_fx.set_gate(decoupled, gate)
            assert decoupled(x).dtype == torch.bfloat16 and decoupled(x).isfinite().all()


def test_the_whole_kernel_and_the_window_give_the_kernel_that_the_algebra_says() -> None:
    found = {c.full_name: c for c in elc_fx.candidates(network(), X) if c.name == "3..6"}
    assert list(found) == ["3..6:2x2", "3..6:2x4", "3..6:4x2", "3..6:4x4"]
    assert found["3..6:4x4"].result == "4×4 4→6 stride 2 padding 1" and not found["3..6:4x4"].kernels
    before, after = found["3..6:4x4"].flops
    assert before == 4 * 2 * 9 * 4 * 6 * 12 * 13 and after == 4 * 2 * 16 * 4 * 6 * 6 * 6
    assert found["3..6:4x4"].operations[-1] == "6: max pooling 2×2 stride 2×2"


def test_a_pooling_whose_windows_are_not_known_is_a_boundary() -> None:
    boundaries = (
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((2, 2), (1, 2), ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(1, 2),
        nn.AdaptiveMaxPool2d(3),
    )
    for pooling in boundaries:
        model = network(pooling=pooling)
        assert not any(c.poolings for c in elc_fx.candidates(model, X)), pooling
        captured = serial_capture(model).graph_module
        assert all(max_pooling_of(captured, node) is None for node in captured.graph.nodes)


def test_where_it_pads_that_is_in_the_plan() -> None:
    plain, padded = network(pooling=nn.MaxPool2d(3, 3)), network(pooling=nn.MaxPool2d(3, 3, 1))
    plan = elc_fx.Plan.of(padded, X, collapse=["3..6:5x5"])
    assert plan.candidates[0].result == "5×5 4→6 stride 3 padding 2"
    assert plan.candidates[0].operations[-1] == "6: max pooling 3×3 stride 3×3 padding 1×1"
    with pytest.raises(elc_fx.PlanError):
        elc_fx.decouple(plain, plan)


def test_the_border_of_a_pooling_is_no_candidate_for_the_maximum_while_rings_are_computed() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(*layers).double().eval()
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, X.double(), collapse=["0..3:9x9"]))
    seen: dict[str, Tensor] = {}
    decoupled.get_submodule("2").register_forward_hook(lambda module, inputs, output: seen.update(pooled=output))
    elc_fx.set_gate(decoupled, {"3_padding": 0.5})
    decoupled(X.double())
    wanted = model[:3](X.double())
    low, high = decoupled.get_submodule("2").ring_out[0]
    assert low > 0 and high > 0
    assert torch.equal(seen["pooled"], F.pad(wanted, (low, high, low, high)))


def test_the_first_layer_of_a_residual_network_takes_its_pooling_with_it() -> None:
    """An addition in place of what another layer gave is no view of the pooling, though it is overwritten."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.relu, self.pool = nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.relu(self.stem(x)))
            y = self.conv(x)
            y += x
            out: Tensor = self.relu(y)
            return out

    model, x = Net().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = {c.full_name: c for c in elc_fx.candidates(model, x) if c.layers == ("stem",) and c.poolings}
    assert found["stem..pool:7x7"].result == "7×7 3→4 stride 4 padding 3"
    decoupled = elc_fx.decouple(model, elc_fx.Plan((found["stem..pool:7x7"],), ("x",)), [x])
    assert torch.equal(decoupled(x), model(x))
    decoupled.train()(x).sum().backward()
    elc_fx.set_gate(decoupled.eval(), 0)
    torch.testing.assert_close(elc_fx.merge(decoupled)(x), decoupled(x), rtol=0, atol=1e-12)


def test_a_layer_that_only_scales_may_stand_alone_or_before_a_pooling() -> None:
    scales = nn.Conv2d(3, 3, 1, groups=3)
    for layers, names in (([nn.SiLU()], []), ([nn.MaxPool2d(2), nn.Conv2d(3, 3, 3)], ["0..1:2x2"])):
        planner = elc_fx.Planner(nn.Sequential(scales, *layers).eval(), X, loss="uniform", progress=False)
        assert [c.candidate.full_name for c in planner.choices if c.candidate.layers == ("0",)] == names


def test_a_pooling_with_a_hook_stays_where_it_is() -> None:
    model, seen = network(), list[Tensor]()
    model[6].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert not any(c.poolings for c in elc_fx.candidates(model, X))
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, X, collapse=["0..3:3x3"]))
    seen.clear()
    decoupled(X)
    assert seen and seen[0].min() >= 0  # behind the ReLU


# The activation behind the pooling.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_that_never_fall_do_not(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-9, 9, 20001), 0.01 * torch.randn(20000)]).to(dtype).sort().values
    rising = []
    for activation in sorted(MODULES, key=lambda m: m.__name__):
        module = activation(0.1, 0.0) if activation is nn.Threshold else activation()
        captured = capture(nn.Sequential(nn.Identity(), module).eval(), leaves=tuple(MODULES)).graph_module
        if any(never_falls(captured, node) for node in captured.graph.nodes):
            rising.append(activation.__name__)
            assert (module(x).diff() >= 0).all()
    assert rising == ["Hardtanh", "ReLU", "ReLU6"]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, True),
    "in place": (lambda x: F.relu_(x), True),
    "method": (lambda x: x.relu(), True),
    "bounded": (lambda x: F.hardtanh(x, -0.3, 0.5), True),
    "clamp": (lambda x: x.clamp(-0.3, 0.5), False),  # whose gradient at a bound depends on the version of torch
    "leaky": (F.leaky_relu, False),  # it never falls, but its gradients would round otherwise
    "silu": (F.silu, False),
    "threshold": (lambda x: F.threshold(x, 0.1, 3.0), False),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_goes_behind_the_pooling_where_that_changes_nothing(function: str) -> None:
    act, goes = FUNCTIONS[function]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.pool(act(self.conv(x)))
            return y

    model = Model().eval()
    captured = serial_capture(model).graph_module
    order = names(captured.graph)
    assert (order.index("pool") == order.index("conv") + 1) == goes
    x = X.clone()
    x[0, 0, 3, 3] = torch.nan
    assert torch.equal(captured(x).nan_to_num(), model(x).nan_to_num()) and captured(x).isnan().any()


@torch.fx.wrap
def clip(x: Tensor) -> Tensor:
    return -x.abs()


class Tent(nn.ReLU6):
    def forward(self, x: Tensor) -> Tensor:
        return -x.abs()


def test_of_activations_of_the_users_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elc_fx.matching.activations, "FUNCTIONS", {clip})
    monkeypatch.setattr(elc_fx.matching.activations, "MODULES", {*MODULES, Tent})
    monkeypatch.setattr(elc_fx.matching.serial, "MODULES", {*MODULES, Tent})

    class Clipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return clip(x)

    for act in (Clipped(), Tent()):
        model = network(act)
        decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, X, collapse=["0..3:3x3"]))
        assert torch.equal(decoupled(X), model(X))
        assert not any(c.poolings and c.layers == ("3",) for c in elc_fx.candidates(model, X))


def test_gradients_at_gate_one_are_the_originals_to_the_bit() -> None:
    for act in (nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.4, 0.3), nn.LeakyReLU(0.1)):
        for pooling in (nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, 1)):
            model = network(act, pooling)
            pooled = [c for c in elc_fx.candidates(model, X) if c.poolings and len(c.layers) == 1]
            plan = elc_fx.Plan((pooled or elc_fx.candidates(model, X))[-1:], ("input",))
            gradients = []
            for own in (copy.deepcopy(model).train(), elc_fx.decouple(model, plan).train()):
                x = X.clone().requires_grad_()
                own(x).square().sum().backward()
                gradients.append([x.grad, *(p.grad for p in own.parameters() if p.grad is not None)])
            assert all(map(torch.equal, *gradients)), (act, pooling)


class Overwriting(nn.Module):
    """What comes behind the pooling writes into its output, or into a view of it."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write, self.pool = write, nn.MaxPool2d(2)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.gelu(self.b(self.write(self.pool(F.relu(self.a(x)))))))
        return y


def added(x: Tensor) -> Tensor:
    x += 1
    return x.mul_(2)


@torch.fx.wrap
def opaque(x: Tensor) -> Tensor:
    return x.mul_(torch.sigmoid(x.detach()))


@pytest.mark.parametrize("write", [added, lambda x: x.sigmoid_(), lambda x: x.view(-1, 4, 5, 5).tanh_(), opaque])
def test_what_is_overwritten_behind_the_pooling_can_be_trained_still(write: Callable[[Tensor], Tensor]) -> None:
    model = Overwriting(write).eval()
    for candidate in elc_fx.candidates(model, X):
        decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",))).train()
        assert torch.equal(decoupled(X), model(X))
        decoupled(X).sum().backward()


class Joined(Overwriting):
    """The pooling is in a tuple, through which it is overwritten."""

    in_place = True

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(F.relu(self.a(x)))
        parts = self.b(pooled).chunk(2, 1)
        if self.in_place:
            parts += (pooled,)
        else:
            parts = operator.add(parts, (pooled,))
        y: Tensor = self.c(F.gelu(self.write(parts[-1])))
        return y


@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_overwritten_through_a_tuple_can_be_trained_still(in_place: bool) -> None:
    model = Joined(added).eval()
    model.in_place = in_place
    for candidate in elc_fx.candidates(model, X):
        decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",))).train()
        assert torch.equal(decoupled(X), model(X))
        decoupled(X).sum().backward()


def test_what_an_activation_read_may_be_overwritten_before_the_pooling() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            rectified = F.relu(y)
            y += 1
            out: Tensor = self.pool(rectified) + y
            return out

    model = Model().eval()
    captured = serial_capture(model).graph_module
    assert names(captured.graph).index("pool") < names(captured.graph).index("relu")
    assert torch.equal(captured(X), model(X))
    put_poolings_back(captured)
    captured.recompile()
    assert names(captured.graph).index("relu") < names(captured.graph).index("pool")
    assert torch.equal(captured(X), model(X))


def test_a_volume_may_be_smaller_than_the_window() -> None:
    model, x = Functional(nn.MaxPool3d(3, 2, 1), 3).eval(), torch.randn(2, 3, 2, 8, 8)
    candidate = next(c for c in elc_fx.candidates(model, x) if c.poolings)
    decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",)), [x])
    elc_fx.set_gate(decoupled, 0)
    torch.testing.assert_close(elc_fx.merge(decoupled)(x), decoupled(x))


def test_what_a_hook_sees_is_what_it_saw() -> None:
    model, kept = network(), list[Tensor]()
    model[4].register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(X)
    elc_fx.decouple(model, elc_fx.Plan.of(model, X, collapse=["0:1x1"]))(X)
    order = names(serial_capture(model).graph_module.graph)
    assert order.index("_5") < order.index("_6") and len(kept) > 1
    assert all(torch.equal(kept[0], other) for other in kept)


def test_poolings_that_nothing_merges_with_stay_behind_their_activations() -> None:
    model, batches = network(), list(torch.randn(4, 32, 3, 12, 13))
    plan = elc_fx.Plan.of(model, X, collapse=["0..3:3x3"])
    planner = elc_fx.Planner(model, X, batches, loss="uniform", progress=False)
    for own in (elc_fx.decouple(model, plan), planner.collapse(plan)):
        order = names(own.graph)
        assert order.index("_5") < order.index("_6")
        changes = elc_fx.diff(model, own, X).changes
        assert all(c.kind == "kept" for c in changes if {layer.place for layer in c.before} & {"5", "6", "7"})


def test_poolings_in_a_row_are_all_put_back() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 1), nn.Conv2d(4, 4, 3)]
    captured = serial_capture(nn.Sequential(*layers).eval()).graph_module
    assert names(captured.graph)[1:-1] == ["_0", "_2", "_3", "_1", "_4"]
    put_poolings_back(captured)
    assert names(captured.graph)[1:-1] == ["_0", "_1", "_2", "_3", "_4"]
    captured.graph.lint()


def test_functions_that_overwrite_what_convolutions_give_are_no_obstacle() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(F.relu(F.conv2d(x, self.weight), inplace=True), 2)
            return F.relu(F.conv2d(y, self.last), inplace=True)

    assert "conv2d..max_pool2d:4x4" in {c.full_name for c in elc_fx.candidates(Model().eval(), X)}


class Shared(nn.Module):
    """One pooling module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.pool(self.relu(self.b(self.pool(self.relu(self.a(x)))))))
        return y


def test_a_pooling_that_is_called_twice_is_told_apart() -> None:
    model = Shared().eval()
    nodes = {c.name: c.nodes for c in elc_fx.candidates(model, X)}
    assert nodes["a..b"] == ("a", "b", "pool", "relu") and nodes["b..pool"] == ("b", "pool_1")
    assert nodes["a..pool"] == ("a", "b", "pool", "pool_1", "relu") and nodes["a..pool@pool"] == ("a", "pool")
    for name in ("a..pool@pool", "b..pool"):
        decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, X, collapse=[name]))
        elc_fx.set_gate(decoupled, 0)
        changes = elc_fx.diff(model, elc_fx.merge(decoupled), X).changes
        pools = [c for c in changes if any(layer.place == "pool" for layer in (*c.before, *c.after))]
        assert sum(c.kind == "kept" for c in pools) == 1 and not any(c.kind == "inserted" for c in pools)


def test_the_diff_says_that_a_pooling_was_merged() -> None:
    model, batches = network(), list(torch.randn(4, 32, 3, 12, 13))
    plan = elc_fx.Plan.of(model, X, collapse=["3..6"])
    decoupled = elc_fx.decouple(model, plan)
    elc_fx.set_gate(decoupled, 0)
    collapsed = elc_fx.Planner(model, X, batches, loss="uniform", progress=False).collapse(plan)
    for own in (elc_fx.merge(decoupled), collapsed, elc_fx.compile(collapsed, X)):
        changes = elc_fx.diff(model, own, X).changes
        (merged,) = (c for c in changes if c.kind == "merged" and "3" in {layer.place for layer in c.before})
        assert {layer.place for layer in merged.before} >= {"3", "6"} and len(merged.after) <= 2
        (activation,) = (c for c in changes if "5" in {layer.place for layer in (*c.before, *c.after)})
        assert activation.kind == "kept"  # as it stands behind the pooling, which is gone


def test_an_activation_that_others_read_or_that_overwrites_what_others_see_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.pool = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.act(self.conv(x))
            return self.pool(y), y

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.pool(self.act(x))
            return y

    for model in (Read().eval(), Overwrites().eval()):
        order = names(serial_capture(model).graph_module.graph)
        assert order.index("act") < order.index("pool")
    x = X.clone()
    serial_capture(Overwrites().eval()).graph_module(x)
    assert x.min() >= 0  # as the model does


# What is fitted, and planned.


def test_the_line_is_that_of_the_mean_of_each_window() -> None:
    model = network()
    (candidate,) = (c for c in elc_fx.candidates(model, X) if c.full_name == "3..6:4x4")
    decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("input",)), [X])
    node: Any = decoupled.get_submodule("6")
    y = model[:5](X)
    mean, largest = F.avg_pool2d(y, 2), F.max_pool2d(y, 2)
    for channel in range(6):
        design = torch.stack([mean[:, channel].flatten(), torch.ones(4 * 6 * 6)], 1).double()
        line = torch.linalg.lstsq(design, largest[:, channel].flatten().double().unsqueeze(1)).solution.flatten()
        torch.testing.assert_close(torch.stack([node.slope[channel], node.offset[channel]]).double(), line)
    fresh: Any = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("input",))).get_submodule("6")
    assert torch.equal(fresh.slope, torch.ones(6)) and torch.equal(fresh.offset, torch.zeros(6))


def test_what_a_pooling_and_a_relu_cut_off_need_not_be_matched() -> None:
    model = network()
    graph = SerialGraph.of(model, ExampleInputs.of(model, X))
    calibration, _ = sensitivity.Calibration.read(graph, [X], None)
    measured = sensitivity.Sensitivity(graph, calibration, None, progress=False)
    nodes = {node.name: node for node in graph.graph_module.graph.nodes}
    assert measured._flat(nodes["_4"]) == measured._flat(nodes["_6"]) == (0.0, torch.inf)


def test_patterns_stand_for_what_is_between_max_poolings() -> None:
    model = network()
    plan = elc_fx.Plan.of(model, X, collapse=["*:3x3"])
    assert [c.full_name for c in plan.candidates] == ["0..3:3x3"]
    for name in ("3..6", "0..6"):  # the largest kernel that its layers have, with the pooling behind them
        (named,) = elc_fx.Plan.of(model, X, collapse=[name]).candidates
        assert named.full_name == f"{name}:4x4"
    large = nn.Sequential(nn.Conv2d(3, 4, 7), nn.MaxPool2d(2)).eval()
    (wide,) = elc_fx.Plan.of(large, X, collapse=["0..1"]).candidates
    assert wide.full_name == "0..1:8x8"
    (named,) = elc_fx.Plan.of(model, X, collapse=["0..7:4x4"]).candidates
    assert named.poolings == ("6",)  # whoever names it gets it, though the planner does not look there


def test_where_merges_across_a_pooling_are_what_is_missing_that_is_said() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()]
    said, model = "merges of layers with a max pooling between them are not planned", nn.Sequential(*layers).eval()
    with pytest.raises(elc_fx.PlanError, match=said):
        elc_fx.plan(model, X, elc_fx.Budget(depth=0.5), loss="uniform")
    with pytest.raises(elc_fx.PlanError) as refused:  # for which these would not help
        elc_fx.plan(model, X, elc_fx.Budget(flops=1e-5), loss="uniform")
    assert said not in str(refused.value)


def test_a_pooling_in_a_branch_is_not_at_the_end_whatever_its_place() -> None:
    class Reduction(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first, self.stem, self.conv, self.pool = (
                first,
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 2, 2),
                nn.MaxPool2d(2),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            branches = [self.pool(y), self.conv(y)]
            return torch.cat(branches if self.first else branches[::-1], 1)

    for first in (False, True):
        planner = elc_fx.Planner(Reduction(first).eval(), X, loss="uniform", progress=False)
        assert not any(choice.candidate.poolings for choice in planner.choices)


def test_a_plan_with_a_pooling_is_planned_stored_collapsed_and_trained() -> None:
    torch.manual_seed(0)
    model, batches = network(), list(torch.randn(6, 32, 3, 12, 13))
    planner = elc_fx.Planner(model, X, batches, allow=lambda c: bool(c.poolings), rehearse=False, progress=False)
    assert {c.candidate.poolings for c in planner.choices} == {("6",)}
    assert not any("6" in c.candidate.layers for c in planner.choices) and planner.choices
    plan = planner.plan(elc_fx.Budget(flops=0.7))
    assert elc_fx.Plan.from_json(plan.to_json()) == plan
    small = planner.collapse(plan)
    assert small(X).shape == model(X).shape
    measured = elc_fx.measure(elc_fx.compile(small, X), X)
    assert plan.prediction is not None and measured.flops == plan.prediction.after.flops
    assert not any(isinstance(m, nn.MaxPool2d) for m in small.modules())
    data = [(x, torch.randint(5, (32,))) for x in batches]
    for trained in (small, elc_fx.decouple(model, plan, batches)):
        history = elc_fx.finetune(trained, data, teacher=model, epochs=2, features=1.0, progress=False)
        assert history.epochs[-1].loss < history.epochs[0].loss


def test_windows_that_are_too_much_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every source and kernel: with poolings there are many. The losses are the same."""
    model, batches = network(), list(torch.randn(4, 16, 3, 12, 13))
    kept: list[int] = []
    fitted = sensitivity.Sensitivity._fitted

    def noted(self: Any, choice: Any, read: Any, given: Any, windows: Any) -> Any:
        result = fitted(self, choice, read, given, windows)
        kept.append(len(windows))
        return result

    monkeypatch.setattr(sensitivity.Sensitivity, "_fitted", noted)
    losses = elc_fx.Planner(model, X, batches, progress=False).losses
    assert max(kept) > 1
    kept.clear()
    monkeypatch.setattr(sensitivity, "KEPT", 1)
    assert elc_fx.Planner(model, X, batches, progress=False).losses == losses and max(kept) == 1
