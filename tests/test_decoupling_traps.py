"""What was once wrong with decoupling: each a plain case."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Standardised, Unary, assert_same, image, ready
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import elc_fx
from fuzz import check


def stack(*between: nn.Module) -> nn.Sequential:
    return ready(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *between, nn.Conv2d(4, 4, 3, padding=1)))


def decoupled(model: nn.Module, x: Tensor, *collapse: str) -> elc_fx.DecoupledModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*costs more than it saves")
        return elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=collapse or ("*",)))


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gate_that_others_write_is_obeyed() -> None:
    """Averaged models, loaders and synchronisation copy buffers without asking the module."""
    model, x = stack(nn.BatchNorm2d(4), nn.ReLU()), image(2, 3, 6, 6)
    net = decoupled(model, x, "*:5x5")
    closed = decoupled(model, x, "*:5x5")
    elc_fx.set_gate(closed, 0)
    for source, target in zip(closed.buffers(), net.buffers(), strict=True):
        target.copy_(source)
    assert_same(net(x), closed(x))
    assert_same(elc_fx.merge(net)(x), net(x))


def test_averaged_model_follows_the_gates() -> None:
    model, x = stack(nn.BatchNorm2d(4), nn.ReLU()), image(2, 3, 6, 6)
    net = decoupled(model, x, "*:5x5")
    average = AveragedModel(net)
    average.update_parameters(net)
    assert_same(average(x), net(x))
    elc_fx.set_gate(net, 0)
    average.update_parameters(net)
    assert_same(average(x), net(x))
    assert_same(elc_fx.merge(average.module)(x), net(x))


def test_functional_call_with_other_gates() -> None:
    model, x = stack(nn.ReLU()), image(2, 3, 6, 6)
    net = decoupled(model, x, "*:5x5")
    for value in (0.0, 0.25, 1.0, 0.0):
        other = pickle.loads(pickle.dumps(net))
        elc_fx.set_gate(other, value)
        assert_same(functional_call(net, dict(other.named_buffers()), (x,)), other(x))
    assert_same(net(x), model(x))


# --- batch norms -----------------------------------------------------------------------------------------------------


def test_one_value_per_channel_is_refused_as_torch_does() -> None:
    model = stack(nn.BatchNorm2d(4), nn.ReLU())
    net = decoupled(model, image(1, 3, 4, 4), "*:5x5").train()
    elc_fx.set_gate(net, 0.5)
    before = {name: value.clone() for name, value in net.named_buffers()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(image(1, 3, 1, 1))
    for name, value in net.named_buffers():
        assert value.isfinite().all() and ("running" not in name or torch.equal(value, before[name]))


def test_synchronised_batch_norm_between_rings_is_told() -> None:
    model = stack(nn.SyncBatchNorm(4), nn.ReLU())
    plan = elc_fx.Plan.of(model, image(1, 3, 4, 4), collapse=["*:5x5"])
    with pytest.warns(UserWarning, match="each process normalises with the statistics of its own batch"):
        elc_fx.decouple(model, plan)


# --- what tracing in eval mode records -------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """A head for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = stack(nn.ReLU()), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x)
        if self.training:
            return self.head(y), self.extra(y)
        return self.head(y)


class PassesTrainingOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = stack(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x), 0.5, training=self.training)


def test_branch_on_training_is_told() -> None:
    model, x = ready(Auxiliary()), image(2, 3, 5, 5)
    plan = elc_fx.Plan.of(model, x, collapse=["body"])
    with pytest.warns(UserWarning, match=r"`Auxiliary\.forward` branches on self\.training"):
        elc_fx.decouple(model, plan)


def test_training_passed_on_is_not_a_branch() -> None:
    model, x = ready(PassesTrainingOn()), image(2, 3, 5, 5)
    plan = elc_fx.Plan.of(model, x, collapse=["body:5x5"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*costs more than it saves")
        net = elc_fx.decouple(model, plan).train()
    assert (net(x) == 0).any()


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_with_unbatched_images() -> None:
    model, x = stack(nn.ReLU()), image(3, 6, 6)
    plan = elc_fx.Plan.of(model, x, collapse=["*:3x3"])
    one = elc_fx.decouple(model, plan, calibration=[x])
    batch = elc_fx.decouple(model, plan, calibration=[x[None]])
    for name, value in one.named_parameters():
        assert_same(value, batch.get_parameter(name))


@pytest.mark.parametrize("size", [(4, 4), (6, 5)])
@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_lines_of_unbatched_images(size: tuple[int, int], gate: float) -> None:
    """Also where the height happens to be the number of channels."""
    model, x = stack(nn.GELU()), image(3, *size)
    net = decoupled(model, x, "*:5x5")
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    elc_fx.set_gate(net, gate)
    assert_same(net(x), net(x[None])[0])
    if not gate:
        assert_same(elc_fx.merge(net)(x), net(x))


# --- parameters ------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64))
        self.last = nn.Parameter(torch.randn(2, 4, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.relu(F.conv2d(x, self.first, padding=1)), self.second, padding=1)
        return F.conv2d(F.relu(x), self.last)


@pytest.mark.parametrize("kernel", ["3x3", "5x5"])
def test_weights_of_functions_are_not_left_behind(kernel: str) -> None:
    model, x = Functional().eval(), image(2, 3, 6, 6)
    net = decoupled(model, x, f"conv2d..conv2d_1:{kernel}")
    assert_same(net(x), model(x))
    elc_fx.set_gate(net, 0.5)
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters()), [n for n, p in net.named_parameters() if p.grad is None]
    assert net.last.shape == (2, 4, 1, 1)


def test_a_shift_is_no_part_of_a_region() -> None:
    """A padding on one side that crops the other moves what is inside of the border, too."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.b(torch.relu(self.a(y))) + nn.functional.pad(y, [1, -1, 0, 0])

    model, x = Shifted().double().eval(), image(2, 3, 9, 9)
    for candidate in elc_fx.candidates(model, x):
        net = elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=[candidate.full_name]))
        assert_same(net(x), model(x))
        elc_fx.set_gate(net, 0.5)
        net(x)
        elc_fx.set_gate(net, 0)
        assert_same(elc_fx.merge(net)(x), net(x))


def test_layer_called_twice_is_told() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model, x = stack(nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU()), image(2, 3, 6, 6)
    plan = elc_fx.Plan.of(model, x, collapse=["*:1x1"])
    with pytest.warns(UserWarning, match="called more than once") as told:
        net = elc_fx.decouple(model, plan)
    assert told[0].filename == __file__
    assert_same(net(x), model(x))
    with pytest.warns(UserWarning, match="called more than once") as told:
        elc_fx.Planner(model, x, [x], loss="uniform").collapse(plan)
    assert told[0].filename == __file__


# --- activations -----------------------------------------------------------------------------------------------------


def acts_element_by_element(function: Callable[[Tensor], object]) -> bool:
    """Whether a function of torch's keeps the shape, changes values, and does not care in which order they stand."""
    x = image(2, 4, 5, 5)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, moved = function(x.clone()), function(x.flatten()[order].view_as(x))
    except Exception:  # of a hundred functions, most want other arguments
        return False
    if not isinstance(y, Tensor) or not isinstance(moved, Tensor) or y.shape != x.shape or moved.shape != x.shape:
        return False
    return not torch.equal(y, x) and torch.equal(moved.flatten(), y.flatten()[order])


RANDOM = ("dropout", "rrelu")  # by default in training mode, when called
SPELLINGS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(F, name)
        for name in dir(F)
        if callable(getattr(F, name)) and not name.startswith("_") and not any(word in name for word in RANDOM)
    },
    **{name: partial(getattr(F, name), threshold=0.1, value=0.2) for name in ("threshold", "threshold_")},
    "special.expit": torch.special.expit,
    "RReLU": nn.RReLU().eval(),
}
SPELLINGS = {name: function for name, function in SPELLINGS.items() if acts_element_by_element(function)}


def test_all_spellings_are_found() -> None:
    assert {"threshold", "threshold_", "leaky_relu_", "elu_", "hardtanh_", "logsigmoid", "RReLU"} <= SPELLINGS.keys()


class Spelled(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.norm(self.a(x))))


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_an_activation_trains_between_the_gates(name: str) -> None:
    model, x = ready(Spelled(SPELLINGS[name])), image(2, 3, 5, 5)
    net = decoupled(model, x)
    assert_same(net(x), model(x))
    elc_fx.set_gate(net, 0.5)
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_channels_of_a_prelu_are_axis_one_and_those_of_a_linear_layer_the_last() -> None:
    model = ready(nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 3)))
    assert len(elc_fx.candidates(model, image(2, 3))) == 1
    assert elc_fx.candidates(model, image(2, 4, 3)) == []


def test_what_is_not_elementwise_is_not_registered() -> None:
    layers: tuple[Any, ...] = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, 3)
    for layer in layers:
        with pytest.raises(elc_fx.InvalidInputError):
            elc_fx.register_activation(layer)


class AtTheEnd(nn.Module):
    """A region, and behind it something that is called in a way of its own."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.up, self.attention = nn.Upsample(scale_factor=2), nn.MultiheadAttention(36, 2)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, self.body(x))


@pytest.mark.parametrize(
    "end",
    [
        lambda self, y: self.up(input=y),
        lambda self, y: self.attention(query=y.flatten(2), key=y.flatten(2), value=y.flatten(2))[0],
    ],
)
def test_modules_called_by_keyword_do_not_stop_the_merge(end: Any) -> None:
    model, x = AtTheEnd(end).eval(), torch.randn(1, 3, 6, 6)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x, kernels={"body.0": 1}))
    elc_fx.set_gate(decoupled, 0)
    torch.testing.assert_close(elc_fx.merge(decoupled)(x), decoupled(x))


def serial() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()


def test_gates_are_where_the_model_is() -> None:
    model = serial()
    plan = elc_fx.Plan.of(model, torch.randn(1, 3, 6, 6), kernels={"0": 3, "2": 3})
    decoupled = elc_fx.decouple(model.to("meta"), plan)
    assert {value.device.type for value in decoupled.state_dict().values()} == {"meta"}


class ActNorm(nn.BatchNorm2d):
    """As timm writes it: batch norm and activation in one forward, which asks for the mode."""

    def forward(self, x: Tensor) -> Tensor:
        training = True if self.training else (self.running_mean is None) and (self.running_var is None)
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum or 0.0, self.eps
        )
        return torch.relu(y)


def test_no_warning_of_batch_norms_that_follow_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ActNorm(4), nn.Conv2d(4, 4, 3), ActNorm(4)).eval()
    x = torch.randn(4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x, kernels={"0": 1}))
    torch.testing.assert_close(decoupled.train()(x), model.train()(x))


def test_decoupling_in_inference_mode_gives_a_network_that_trains() -> None:
    model, x = serial(), torch.randn(1, 3, 6, 6)
    plan = elc_fx.Plan.of(model, x)
    with torch.inference_mode():
        decoupled = elc_fx.decouple(model, plan, [x])
    decoupled(x.clone()).sum().backward()
    elc_fx.set_gate(decoupled, 0)
    with torch.inference_mode():
        merged = elc_fx.merge(decoupled.eval())
    merged(x.clone()).sum().backward()


def test_a_module_may_be_called_plan() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.after(torch.relu(self.plan(x)))
            return y

    model, x = Named().eval(), torch.randn(1, 3, 6, 6)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x))
    assert torch.equal(decoupled(x), model(x))


def test_calibration_without_a_sample_is_refused() -> None:
    model, x = serial(), torch.randn(1, 3, 6, 6)
    with pytest.raises(elc_fx.InvalidInputError, match="no samples"):
        elc_fx.decouple(model, elc_fx.Plan.of(model, x), calibration=[x[:0]])


@pytest.mark.parametrize(
    ("stems", "body", "seed"),
    [
        # A layer that a module calls, which cannot be traced, and that the graph calls too, was changed in both places.
        (
            [[]],
            [
                ("opaque", [("conv", 4, 1, 1, True)]),
                ("cat", [[("again", 0), ("conv", 4, 3, 4, False)], [("conv", 4, 1, 1, True), ("again", 3)]]),
            ],
            101,
        ),
        # One value that is concatenated twice shared a ring, and the region was not found again.
        ([[]], [("cat", [[("conv", 4, 3, 1, False)], [], []])], 43),
        ([[]], [("cat", [[], [("conv", 4, 3, 4, False)], []])], 1049),
        # The type of what a region reads was not known any more, and so not what 0 + x is.
        ([[], []], [("sum", [[], [("conv", 4, 1, 2, False)]])], 3),
        # Neither were its channels, where no layer reads them first.
        ([[("cat", [[], [("dropout",), ("conv", 2, 1, 2, False)]])]], [], 20),
        ([[], []], [("sum", [[("scale",), ("conv", 8, 1, 4, False)], [("scale",)]])], 5001),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_found_by_fuzz(stems: list[Any], body: list[Any], seed: int) -> None:
    check(stems, body, seed=seed)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
def test_a_kernel_that_closes_before_its_padding_pads_what_the_original_pads(mode: str) -> None:
    for padding, dilation, stride in ((1, 1, 1), (3, 2, 2), (2, 1, 1)):
        conv = nn.Conv2d(3, 4, 3, stride, padding, dilation, padding_mode=mode)
        model, x = nn.Sequential(conv).double().eval(), torch.randn(2, 3, 8, 9, dtype=torch.float64)
        for candidate in elc_fx.candidates(model, x):
            decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("input",)))
            outputs = []
            for gate in (0.0, 1e-12):
                elc_fx.set_gate(decoupled, {"0": gate})
                outputs.append(decoupled(x))
            torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
            elc_fx.set_gate(decoupled, 0)
            torch.testing.assert_close(elc_fx.merge(decoupled)(x), decoupled(x), rtol=0, atol=1e-12)


def test_fitting_lines_leaves_generators_and_batches_as_they_are() -> None:
    model = ready(Unary(lambda s, x: s.c(F.relu(s.a(x.mul_(2)))), a=nn.Conv2d(3, 4, 3), c=nn.Conv2d(4, 4, 3)))
    x = image(2, 3, 8, 8)
    loader, kept = torch.utils.data.DataLoader([*x.clone()], 2, shuffle=True), x.clone()
    before = torch.get_rng_state()
    elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=["a..c"]), loader)
    assert torch.equal(torch.get_rng_state(), before)
    batches = [x, x.float()]
    elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=["a..c"]), batches)
    assert torch.equal(x, kept)


def test_hooks_are_no_part_of_a_merge() -> None:
    model, x = stack(nn.ReLU()), image(2, 3, 6, 6)

    def closed() -> elc_fx.DecoupledModule:
        net = decoupled(model, x, "*:3x3")
        elc_fx.set_gate(net, 0)
        return net.eval()

    for layer in ("0", "1", "2", "_0_region_input", "_2_region_output"):
        net = closed()
        net.get_submodule(layer).register_forward_pre_hook(lambda module, given: (2 * given[0],))
        with pytest.raises(elc_fx.NotAffineError, match=f"{layer}.*has hooks"):
            elc_fx.merge(net)
    net = closed()
    net.register_forward_hook(lambda module, given, output: 2 * output)
    with pytest.raises(elc_fx.InvalidInputError, match="has hooks"):
        elc_fx.merge(net)


class ByType(nn.Module):
    """What it does depends on what its tensors are, which tracing cannot know."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return (2 * y).view(self.shape) if torch.overrides.has_torch_function((y,)) else y


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (5, 5)])
def test_a_trace_of_another_function_is_not_decoupled(shape: tuple[int, ...]) -> None:
    model, x = ready(ByType(shape)), image(2, 3, 6, 6)
    for ask in (elc_fx.candidates, lambda m, x: elc_fx.Plan.of(m, x, collapse=["a..b:3x3"])):
        with pytest.raises(elc_fx.CaptureError, match="does not compute what the model computes"):
            ask(model, x)
    assert "does not compute" in str(elc_fx.explain(model, x))


class DroppingHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(x))


def test_a_plan_finds_its_regions_again_without_shapes() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.body(x).relu().mean((-2, -1))
        return s.a(x) + s.b(x)

    model = ready(Unary(forward, body=nn.Conv2d(3, 8, 3), a=DroppingHead(), b=DroppingHead()))
    x = image(2, 3, 6, 6)
    for candidate in elc_fx.candidates(model, x):
        decoupled = elc_fx.decouple(model, elc_fx.Plan((candidate,), ("x",)))
        assert_same(decoupled(x), model(x))


def test_code_that_computed_a_weight_goes_with_it() -> None:
    layers = Standardised(4, 6, 3, padding=1), nn.ReLU(), Standardised(6, 4, 1)
    model, x = ready(nn.Sequential(*layers)), image(2, 4, 5, 5)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=["conv2d..conv2d_1:3x3"]))
    assert_same(decoupled(x), model(x))
    decoupled.train()(x).sum().backward()
    assert all(p.grad is not None for name, p in decoupled.named_parameters() if not name.startswith("1."))  # its line
    elc_fx.set_gate(decoupled.eval(), 0)
    merged = elc_fx.merge(decoupled)
    assert_same(merged(x), decoupled(x))
    assert len(list(merged.parameters())) == 2 and not merged.graph.find_nodes(op="get_attr")


def test_a_region_of_images_may_begin_at_a_linear_layer() -> None:
    layers = nn.Linear(8, 8), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 4, 3)
    model, x = ready(nn.Sequential(*layers)), image(2, 4, 6, 8)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x))
    elc_fx.set_gate(decoupled, 0)
    assert_same(elc_fx.merge(decoupled)(x), decoupled(x))


def test_gates_of_functions_are_named_by_the_module_that_calls_them() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.b(F.pad(F.relu(self.a(F.pad(x, (2, 0)))), (2, 0))))

    model, x = ready(nn.Sequential(Causal(), Causal())), image(2, 4, 9)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=["0", "1"]))
    elc_fx.set_gate(decoupled, {"1.*": 0})
    gates = elc_fx.gates(decoupled)
    assert len(gates) == 6 and all(gate == (not name.startswith("1.")) for name, gate in gates.items())


def test_a_drop_path_with_hooks_is_a_boundary() -> None:
    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    a, b, c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    model, x = ready(nn.Sequential(a, nn.ReLU(), DropPath(), b, nn.ReLU(), c)), image(2, 4, 6, 6)
    assert elc_fx.Plan.of(model, x).candidates[0].layers == ("0", "3", "5")
    model[2].register_forward_hook(lambda module, inputs, output: output * 2)
    plan = elc_fx.Plan.of(model, x)
    assert [candidate.layers for candidate in plan.candidates] == [("3", "5")]
    decoupled = elc_fx.decouple(model, plan)
    elc_fx.set_gate(decoupled, 0)
    assert_same(elc_fx.merge(decoupled)(x), decoupled(x))
