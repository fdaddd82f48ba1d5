"""What `measure` and `compare` count, on models small enough to count by hand."""

import copy
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elc_fx
from elc_fx import InvalidInputError, Measurement, TrainingModeError, compare, measure


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.function(self, *args, **kwargs)


def build(function: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    return Function(function, **parts).eval()


def conv(channels: int = 2, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2)


IMAGE = torch.randn(1, 2, 5, 5)


@pytest.mark.parametrize(
    ("layer", "shape", "flops"),
    [
        (nn.Conv1d(2, 3, 3), (1, 2, 6), 2 * 3 * 4 * (2 * 3)),
        (nn.Conv2d(2, 3, 3), (1, 2, 6, 5), 2 * 3 * (4 * 3) * (2 * 9)),
        (nn.Conv2d(2, 3, 3, padding="same"), (4, 2, 6, 5), 2 * 4 * 3 * (6 * 5) * (2 * 9)),
        (nn.Conv2d(2, 3, 3), (2, 6, 5), 2 * 3 * (4 * 3) * (2 * 9)),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 3, 3), 2 * 4 * 9),
        (nn.Conv3d(2, 3, 1), (1, 2, 2, 2, 2), 2 * 3 * 8 * 2),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (1, 2, 3, 3), 2 * 2 * 9 * (3 * 4)),
    ],
    ids=str,
)
def test_a_convolution_is_one_convolution_of_depth_one(layer: nn.Module, shape: tuple[int, ...], flops: int) -> None:
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    assert measure(layer.eval(), torch.randn(shape)) == Measurement(flops, parameters, convolutions=1, depth=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (2, 5, 4, 3)])
def test_a_linear_layer_is_of_depth_one(shape: tuple[int, ...], bias: bool) -> None:
    measured = measure(nn.Linear(3, 4, bias=bias).eval(), torch.randn(shape))
    assert measured == Measurement(2 * math.prod(shape) * 4, 12 + 4 * bias, convolutions=0, depth=1)


def test_a_linear_layer_on_a_permuted_input_is_of_depth_one() -> None:
    assert measure(nn.Linear(3, 4).eval(), torch.randn(2, 3, 5, 2).permute(0, 2, 3, 1)).depth == 1


def test_depth_is_the_longest_way_not_the_number_of_layers() -> None:
    residual = build(lambda m, x: m.a(x) + m.c(m.b(x)) + x, a=conv(), b=conv(), c=conv())
    measured = measure(nn.Sequential(residual, residual).eval(), IMAGE)
    assert (measured.depth, measured.convolutions) == (4, 6)


def test_shared_parameters_count_once_and_their_calls_count_each() -> None:
    shared = conv()
    tied = nn.Conv2d(2, 2, 3, padding=1)
    tied.weight = shared.weight
    measured = measure(build(lambda m, x: m.tied(m.a(m.a(x))), a=shared, tied=tied), IMAGE)
    assert measured == Measurement(3 * 2 * 2 * 25 * 18, 36 + 2 + 2, convolutions=3, depth=3)


def test_attention_is_no_layer_but_its_projections_are() -> None:
    """The fused kernel of eval mode hides its products: torch's counter alone gives it 0 FLOPs."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = build(lambda m, x: m.attention(x, x, x, need_weights=False)[0], attention=attention)
    projections, products = 2 * 5 * 8 * (24 + 8), 2 * (2 * 5 * 5 * 8)
    assert measure(model, torch.randn(1, 5, 8)) == Measurement(projections + products, 24 * 8 + 24 + 72, 0, depth=2)


def test_a_product_of_two_things_computed_from_the_input_is_no_layer() -> None:
    assert measure(build(lambda m, x: x @ x.transpose(-1, -2)), torch.randn(2, 3, 4)).depth == 0


def test_what_is_computed_from_weights_alone_adds_no_depth() -> None:
    code = torch.randn(1, 4)
    model = build(lambda m, x: torch.nn.functional.conv2d(x, m.hyper(code).view(2, 2, 1, 1)), hyper=nn.Linear(4, 4))
    assert measure(model, IMAGE).depth == 1


def test_in_place_writes_through_views_carry_the_depth() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        canvas = torch.zeros(1, 2, 5, 5)
        canvas[:, :1].add_(m.a(x)[:, 1:])
        torch._foreach_add_([canvas], 1.0)
        return m.b(canvas.relu_())

    assert measure(build(forward, a=conv(), b=conv()), IMAGE).depth == 2


def test_a_list_that_an_operation_overwrites_carries_the_depth() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        canvas = torch.zeros(1, 2, 5, 5)
        torch._foreach_add_([canvas], [m.a(x)])
        return m.b(canvas)

    assert measure(build(forward, a=conv(), b=conv()), IMAGE).depth == 2


def test_depth_passes_lists_and_operations_of_several_outputs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, dim=1)
        return m.b(torch.cat([right, left], dim=1))

    assert measure(build(forward, a=conv(), b=conv()), IMAGE).depth == 2


def test_a_model_that_runs_itself_in_inference_mode_is_measured_alike() -> None:
    layers = nn.Sequential(conv(), nn.Flatten(), nn.Linear(50, 3))
    model = build(lambda m, x: torch.inference_mode()(m.layers)(x), layers=layers)
    assert measure(model, IMAGE) == measure(layers.eval(), IMAGE)


@pytest.mark.filterwarnings("ignore:.*jit.trace:FutureWarning")
def test_torchscript_is_measured_alike() -> None:
    layers = nn.Sequential(conv(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(50, 3)).eval()
    assert measure(torch.jit.trace(layers, IMAGE), IMAGE) == measure(layers, IMAGE)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 9), min_size=1, max_size=3)), min_size=1, max_size=8))
def test_depth_of_a_random_graph_is_its_longest_path(steps: list[tuple[bool, set[int]]]) -> None:
    layer = conv(kernel=1)

    def forward(m: Any, x: Tensor) -> list[Tensor]:
        values = [x]
        for convolve, sources in steps:
            total = sum(values[i % len(values)] for i in sorted(sources))
            values.append(m.layer(total) if convolve else torch.relu(total))
        return values

    depths = [0]
    for convolve, sources in steps:
        depths.append(max(depths[i % len(depths)] for i in sources) + convolve)
    assert measure(build(forward, layer=layer), IMAGE).depth == max(depths)


def shifted(layer: nn.Linear, by: float) -> nn.Linear:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.bias += by
    return other.eval()


def test_errors_are_the_largest_difference_and_its_share_of_the_largest_value() -> None:
    a = nn.Linear(2, 2).eval()
    with torch.no_grad():
        a.weight.copy_(torch.eye(2))
        a.bias.zero_()
    result = compare(a, shifted(a, 0.5), torch.tensor([[1.0, -4.0]]))
    assert (result.max_abs_error, result.max_rel_error, result.dtype) == (0.5, 0.125, "float64")


def test_each_tensor_of_a_nested_output_has_its_own_scale() -> None:
    """Boxes of hundreds of pixels must not hide that scores below 1 are wrong."""
    a = build(lambda m, x: {"boxes": x * 1000, "scores": [x]})
    b = build(lambda m, x: {"boxes": x * 1000, "scores": [x * 1.5]})
    result = compare(a, b, torch.ones(2))
    assert (result.max_abs_error, result.max_rel_error) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("in_a", "in_b", "expected"),
    [
        (math.nan, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
        (math.nan, 1.0, math.inf),
        (1.0, math.nan, math.inf),
        (math.inf, -math.inf, math.inf),
        (math.inf, 1.0, math.inf),
    ],
)
def test_nan_and_infinity_equal_only_themselves(in_a: float, in_b: float, expected: float) -> None:
    a, b = (build(lambda m, x, v=v: torch.cat([x, torch.tensor([v])])) for v in (in_a, in_b))
    result = compare(a, b, torch.ones(2))
    assert (result.max_abs_error, result.max_rel_error) == (expected, expected)


def test_numbers_in_the_output_are_compared() -> None:
    result = compare(build(lambda m, x: (x, 3)), build(lambda m, x: (x, 5)), torch.ones(2))
    assert result.max_abs_error == 2


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_models_are_compared_as_they_are() -> None:
    a = nn.Linear(2, 2).to(torch.complex64).eval()
    result = compare(a, shifted(a, 3j), torch.zeros(1, 2, dtype=torch.complex64))
    assert result.max_abs_error == pytest.approx(3.0, rel=1e-6)
    assert result.dtype == "complex64"


def test_a_model_that_insists_on_float32_is_compared_in_float32() -> None:
    model = build(lambda m, x: m.layer(x.float()), layer=nn.Linear(2, 2))
    result = compare(model, model, torch.ones(1, 2))
    assert (result.max_abs_error, result.dtype) == (0.0, "float32")


def test_half_precision_models_are_compared_in_float64() -> None:
    """A difference of 1e-4 beside 1 is below the resolution of bfloat16."""
    a = build(lambda m, x: x + 1).bfloat16()
    b = build(lambda m, x: x + 1.0001).bfloat16()
    assert compare(a, b, torch.zeros(1, dtype=torch.bfloat16)).max_abs_error == pytest.approx(1e-4)


def test_on_meta_costs_are_counted_and_errors_are_unknown() -> None:
    model = nn.Conv2d(2, 3, 3, device="meta").eval()
    result = compare(model, model, torch.empty(1, 2, 5, 5, device="meta"))
    assert result.before == Measurement(2 * 3 * 9 * 18, 57, 1, 1)
    assert math.isnan(result.max_abs_error)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["max_rel_error"] == "nan"


def test_keyword_and_several_inputs() -> None:
    model = build(lambda m, x, y: m.layer(x) + y, layer=conv())
    given_by_name = compare(model, model, {"x": IMAGE, "y": IMAGE})
    assert given_by_name == compare(model, model, (IMAGE, IMAGE)) == compare(model, model, [IMAGE, IMAGE])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda m, x: (x,), r"output is \[2\] before, nothing after"),
        (lambda m, x: x[None], r"output is \[2\] before, \[1, 2\] after"),
        (lambda m, x: "nothing", "no tensors to compare, but str"),
    ],
)
def test_outputs_of_another_structure_are_refused(other: Callable[..., Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        compare(build(lambda m, x: x), build(other), torch.ones(2))


def test_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="example_inputs is a int"):
        compare(conv().eval(), conv().eval(), 3)  # type: ignore[arg-type]


def test_what_the_model_itself_raises_is_not_hidden_by_the_attempt_in_float64() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        compare(conv().eval(), conv().eval(), torch.ones(1, 7, 5, 5))


def test_both_models_see_the_same_random_numbers_and_the_callers_generator_is_left_alone() -> None:
    noisy = build(lambda m, x: x + torch.rand_like(x))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert compare(noisy, noisy, torch.ones(5)).max_abs_error == 0
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("run", [lambda model, x: compare(model, model, x), measure])
def test_the_models_and_the_inputs_are_left_as_they_were(run: Callable[..., Any]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.layer.calls += 1
        return m.layer(x.mul_(2))

    model = build(forward, layer=conv())
    model.layer.register_buffer("calls", torch.zeros(()))
    model.layer.weight.requires_grad_(False)
    before, x = copy.deepcopy(model.state_dict()), IMAGE.clone()
    run(model, x)
    assert torch.equal(x, IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_that_cannot_be_copied_is_compared_as_it_is() -> None:
    class Single(nn.Conv2d):
        def __deepcopy__(self, memo: object) -> Any:
            raise TypeError("there is one of it")

    model = Single(2, 4, 3).eval()
    result = compare(model, model, IMAGE)
    assert (result.max_abs_error, result.dtype) == (0.0, "float32")


def test_what_deepcopy_refuses_is_shared_and_the_model_keeps_its_state() -> None:
    class Counting(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(2, 4, 3)
            self.register_buffer("calls", torch.zeros(()))
            self.lock, self.history = threading.Lock(), (torch.ones(1, requires_grad=True) * 2,)

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    model = Counting().eval()
    measure(model, IMAGE)
    assert compare(model, model, IMAGE).dtype == "float64"
    assert model.calls == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_has_computed_is_compared_in_float64() -> None:
    model = nn.utils.weight_norm(conv()).eval()
    model(IMAGE)  # the weight has a history, which deepcopy refuses
    assert compare(model, model, IMAGE).dtype == "float64"


def test_modules_that_take_views_of_parameters_are_measured() -> None:
    """Torch's tracker of modules, which its counter of FLOPs brings along, fails on these under no_grad."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.norms = nn.Parameter(torch.ones(1, 1, 8)), Each(nn.LayerNorm(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(self.norms((x, self.token.expand(len(x), -1, -1))), 1)

    class Each(nn.Sequential):
        def forward(self, values: tuple[Tensor, ...]) -> list[Tensor]:
            return [super(Each, self).forward(value) for value in values]

    model = nn.Sequential(nn.Linear(4, 8), Tokens()).eval()
    assert elc_fx.measure(model, torch.randn(2, 3, 4)).flops == 2 * 2 * 3 * 4 * 8


def test_training_mode_is_refused_by_name() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(2))
    with pytest.raises(TrainingModeError, match=r"the model \(Sequential\) is in training mode"):
        compare(model, model, IMAGE)
    model.eval()
    model[1].train()
    with pytest.raises(TrainingModeError, match="`1` of the model"):
        measure(model, IMAGE)


def test_an_exported_program_is_comparable() -> None:
    """Its modules claim to be in training mode, and refuse .eval()."""
    model = nn.Sequential(conv(), nn.BatchNorm2d(2)).eval()
    result = compare(model, torch.export.export(model, (IMAGE,)).module(), IMAGE)
    assert result.max_abs_error == 0
    assert result.before == result.after


def test_the_table_shows_both_sides_and_their_ratio() -> None:
    text = str(compare(nn.Sequential(conv(), conv()).eval(), conv().eval(), IMAGE))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["FLOPs"] == ["3,600", "1,800", "50.0%"]
    assert rows["depth"] == ["2", "1", "50.0%"]
    assert "in float64" in text


def test_a_compiled_model_costs_less_and_computes_the_same() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(conv(), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)).double()
    result = compare(layers.eval(), elc_fx.compile(layers), IMAGE.double())
    assert result.max_rel_error < 1e-12
    assert (result.before.depth, result.after.depth) == (3, 2)
    assert result.after.flops < result.before.flops
