"""Inputs and outputs of every form, type and layout, and the mode that a model is in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_or_refused, check
from networks import (
    DiverseBranchBlock,
    Frozen,
    Named,
    Record,
    RepVGGBlock,
    Unary,
    assert_same,
    batch_norms,
    conv_bn,
    convolutions,
    image,
    operators,
    pair,
    per_channel,
    randomize_,
    ready,
    small_net,
)
from torch import Tensor, nn

import elc_fx

Model = Callable[[], nn.Module]


# --- training mode ----------------------------------------------------------------------------------------------------


def test_root_in_training_mode_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(elc_fx.TrainingModeError, match=r"eval\(\)") as caught:
        elc_fx.compile(small_net())
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, elc_fx.ElcError)


@pytest.mark.parametrize("place", ["0", "0.1", "1", "2", "2.dense"])
def test_submodule_in_training_mode_inside_an_eval_root(place: str) -> None:
    """It computes batch statistics, and counts them: the result must do both, and the model must not be touched."""
    model = ready(nn.Sequential(conv_bn(4, 4), nn.Dropout(0.0), RepVGGBlock(4, 4), nn.ReLU()))
    model.get_submodule(place).train()
    before = copy.deepcopy(model.state_dict())
    x = image(3, 4, 5, 5)
    for examples in (None, (x,)):
        compiled = elc_fx.compile(model, examples)
        assert_same(dict(model.state_dict()), dict(before), 0.0)
        assert_same(compiled(x), copy.deepcopy(model)(x))
        assert model.get_submodule(place).training


def test_dropout_in_training_mode_still_drops() -> None:
    model = ready(nn.Sequential(conv_bn(4, 4), nn.Dropout(0.5), nn.ReLU()))
    model[1].train()
    compiled, x = elc_fx.compile(model), image(3, 4, 5, 5)
    torch.manual_seed(7)
    expected = model(x)
    torch.manual_seed(7)
    assert_same(compiled(x), expected)


# --- inputs and outputs -----------------------------------------------------------------------------------------------


OUTPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "tuple": lambda s, x: (s.a(x), s.b(x)),
    "list": lambda s, x: [s.a(x), s.b(x)],
    "dict": lambda s, x: {"out": s.a(x), "aux": s.b(x)},
    "nested": lambda s, x: {"maps": [s.a(x), (s.b(x), x)], "size": x.shape[2], "name": "two", "none": None},
    "named tuple": lambda s, x: Named(s.a(x), s.b(x)),
    "input itself": lambda s, x: (x, s.a(x)),
    "one value twice": lambda s, x: [s.a(x)] * 2,
    "shape": lambda s, x: (s.a(x).shape, s.b(x)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_structure(name: str) -> None:
    assert not batch_norms(check(ready(pair(OUTPUTS[name])), image(2, 4, 5, 5)))


class Wraps(nn.Module):
    """Returns an object of the user's own class."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, conv_bn(4, 4), conv_bn(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.kind(first=self.a(x), second=self.b(x))


@pytest.mark.parametrize("kind", [Record, Frozen])
def test_outputs_of_a_class_of_the_users(kind: type) -> None:
    model, x = ready(Wraps(kind)), image(2, 4, 5, 5)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
        actual, expected = compiled(x), model(x)
        assert type(actual) is kind
        assert_same(vars(actual), vars(expected))
        assert not batch_norms(compiled)


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 4), conv_bn(2, 4)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return F.relu(self.a(rgb) + self.b(depth))


def test_several_inputs() -> None:
    model, rgb, depth = ready(SeveralInputs()), image(1, 3, 5, 5), image(1, 2, 5, 5)
    for examples in (None, (rgb, depth), {"depth": depth, "rgb": rgb}):
        compiled = elc_fx.compile(model, examples)
        assert_same(compiled(rgb, depth), model(rgb, depth))
        assert_same(compiled(depth=depth, rgb=rgb), model(rgb, depth))
        assert not batch_norms(compiled)


def test_containers_as_inputs() -> None:
    model = ready(Unary(lambda s, x: s.a(x["image"]) + s.b(x["list"][0]), a=conv_bn(4, 4), b=conv_bn(4, 4)))
    batch = {"image": image(1, 4, 5, 5), "list": [image(1, 4, 5, 5, seed=1)]}
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (batch,))):
        assert_same(compiled(batch), model(batch))
        assert not batch_norms(compiled)


def test_example_inputs_in_every_form() -> None:
    model, x = ready(small_net()), image(2, 3, 6, 6)
    for examples in (x, (x,), [x], {"input": x}):
        compiled = elc_fx.compile(model, examples)
        assert_same(compiled(x), model(x))
        assert_same(compiled(input=x), model(x))


UNBATCHED: dict[str, Model] = {
    "chain": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.ReLU()),
    "sum": lambda: Unary(lambda s, x: s.a(x) + s.b(x) + x, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1)),
    "strided slice": lambda: Unary(lambda s, x: s.a(x) + x[..., ::2, ::2], a=nn.Conv2d(4, 4, 3, 2, padding=1)),
    "channel of ones": lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1)),
    "concatenation along the rows": lambda: Unary(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3)
    ),
    "a constant of four axes": lambda: Unary(
        lambda s, x: s.a(x) * s.gamma.view(1, -1, 1, 1), a=nn.Conv2d(4, 4, 3), gamma=per_channel(4)
    ),
    "slices of three axes": lambda: Unary(lambda s, x: s.a(x)[:, ::2, ::2] + x[:, ::2, ::2], a=conv_bn(4, 4, 3)[0]),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched_input_is_right_or_refused(name: str) -> None:
    """Convolutions take one sample without a batch axis too, and then axis 1 is not the channels."""
    model, x = ready(UNBATCHED[name]()), image(4, 6, 5)
    assert_same(elc_fx.compile(model, (x,))(x), model(x))
    assert_same_or_refused(elc_fx.compile(model), model, x)


def test_linear_before_batch_norm_of_another_axis() -> None:
    """BatchNorm1d normalises axis 1, which is the last one only where there are two."""
    model = ready(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    sequence, rows = image(3, 4, 6), image(3, 6)
    assert_same(elc_fx.compile(model, (sequence,))(sequence), model(sequence))
    assert_same(elc_fx.compile(model, (rows,))(rows), model(rows))


def test_linear_before_batch_norm_without_examples_is_right_or_refused() -> None:
    model = ready(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    compiled = elc_fx.compile(model)
    assert_same(compiled(image(3, 6)), model(image(3, 6)))
    assert_same_or_refused(compiled, model, image(3, 4, 6))


def test_linear_of_a_feature_map_is_no_convolution() -> None:
    model = ready(nn.Sequential(nn.Linear(6, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)))
    check(model, image(2, 4, 4, 6))


def test_sum_that_broadcasts_is_right_or_refused() -> None:
    """Branches of different sizes add where one of them is 1; one convolution would give something else there."""
    model = ready(Unary(lambda s, x: s.a(x) + F.avg_pool2d(x, 2), a=conv_bn(4, 4, 3, stride=2)))
    for example in (None, image(2, 4, 4, 4), image(2, 4, 3, 3)):
        compiled = elc_fx.compile(model, example)
        if example is not None:
            assert_same(compiled(example), model(example))
        for size in ((4, 4), (8, 6)):
            assert_same(compiled(image(2, 4, *size)), model(image(2, 4, *size)))
        for size in ((3, 3), (2, 3), (3, 2)):
            assert_same_or_refused(compiled, model, image(2, 4, *size))


def test_gate_that_broadcasts_stays_right() -> None:
    for gate in (nn.Conv2d(4, 1, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))):
        check(ready(Unary(lambda s, x: s.a(x) + s.gate(x), a=nn.Conv2d(4, 4, 1), gate=gate)), image(2, 4, 3, 3))


def test_sum_of_one_channel_and_many_stays_right() -> None:
    check(ready(Unary(lambda s, x: x + s.a(x), a=nn.Conv2d(4, 1, 3, padding=1))), image(2, 4, 3, 3))
    check(ready(Unary(lambda s, x: x + s.a(x), a=nn.Conv2d(1, 4, 3, padding=1))), image(2, 1, 3, 3))


def test_scale_along_another_axis_is_not_per_channel() -> None:
    """A vector of four numbers scales columns, not channels, even where there are four of each."""
    for shape in ((4,), (4, 1), (1, 4), (4, 4), (2, 1, 1, 1), (4, 4, 4), (2, 4, 1, 1), (1, 1, 1, 1, 1)):
        gamma = nn.Parameter(torch.ones(shape))
        check(ready(Unary(lambda s, x: s.a(x) * s.gamma + s.gamma, a=conv_bn(4, 4), gamma=gamma)), image(2, 4, 4, 4))


POOLS: dict[str, nn.Module] = {
    "ceil_mode": nn.AvgPool2d(2, 2, ceil_mode=True),
    "count_include_pad=False": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "divisor_override": nn.AvgPool2d(3, 1, 1, divisor_override=5),
    "maximum": nn.MaxPool2d(3, 1, 1),
    "adaptive": nn.AdaptiveAvgPool2d((4, 4)),
    "power average": nn.LPPool2d(1, 3, 1),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_of_every_kind_stays_right(name: str) -> None:
    for size in ((4, 4), (5, 5)):
        pool, x = POOLS[name], image(2, 4, *size)
        check(ready(nn.Sequential(nn.Conv2d(4, 4, 1), pool, nn.BatchNorm2d(4))), x)
        if pool(x).shape == x.shape:
            check(ready(Unary(lambda s, x: s.a(x) + s.pool(x), a=conv_bn(4, 4), pool=pool)), x)


def test_padding_with_a_value_keeps_it() -> None:
    for mode in ({"value": 1.5}, {"mode": "reflect"}, {"mode": "replicate"}, {"mode": "circular"}, {"value": None}):
        model = ready(
            Unary(lambda s, x, mode=mode: s.b(F.pad(s.a(x), (1, 2, 0, 1), **mode)), a=conv_bn(4, 4), b=conv_bn(4, 4))
        )
        check(model, image(2, 4, 4, 5))
    check(ready(Unary(lambda s, x: F.pad(s.a(x), (0, 0, 0, 0, 1, 2), value=2.0), a=conv_bn(4, 4))), image(2, 4, 4, 5))


SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: x[:, :, 1::2, 1::2],
    "end": lambda x: x[:, :, : x.shape[2] // 2],
    "fixed end": lambda x: x[:, :, :3, :3],
    "far end": lambda x: x[:, :, :100],
    "negative start": lambda x: x[:, :, -3:],
    "batch": lambda x: x[::2],
    "channels": lambda x: x[:, 1:3],
    "channels reordered": lambda x: x[:, [3, 1, 2, 0]],
    "channels flipped": lambda x: x.flip(1),
    "mask": lambda x: x[:, torch.tensor([True, False, True, True])],
    "new axis": lambda x: x[:, None, :, 0],
    "one row": lambda x: x[:, :, 1],
    "focus": lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_stay_right(name: str) -> None:
    model = ready(Unary(lambda s, x: SLICES[name](s.a(x)) * 2 - SLICES[name](x + 1), a=conv_bn(4, 4)))
    for size in ((4, 4), (6, 8)):
        check(model, image(4, 4, *size))


# --- types, devices, layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_type_of_weights_and_outputs_is_kept(dtype: torch.dtype, tolerance: float) -> None:
    model = randomize_(nn.Sequential(RepVGGBlock(4, 4), nn.ReLU(), *conv_bn(4, 4), nn.Flatten(), nn.Linear(100, 3)))
    model = model.eval().to(dtype)
    compiled = check(model, image(2, 4, 5, 5).to(dtype), tolerance=tolerance)
    assert {p.dtype for p in compiled.parameters()} == {dtype}
    assert not batch_norms(compiled)


def test_mixed_types_stay_right() -> None:
    """Batch norm in float32 over half-precision convolutions, as mixed precision leaves it."""
    norm = nn.BatchNorm2d(4)
    model = randomize_(nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.ReLU())).eval().to(torch.bfloat16)
    norm.float()
    x = image(2, 4, 5, 5).to(torch.bfloat16)
    expected = model(x)
    actual = elc_fx.compile(model)(x)
    assert actual.dtype == expected.dtype
    assert_same(actual, expected, 5e-2)


def test_complex_weights_keep_their_imaginary_part() -> None:
    for dtype, tolerance in ((torch.complex64, 1e-5), (torch.complex128, 1e-12)):
        layers = (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 3), nn.Flatten(), nn.Linear(27, 30), nn.Linear(30, 4))
        model = randomize_(nn.Sequential(*layers).to(dtype)).eval()
        x = torch.complex(image(2, 3, 5, 5), image(2, 3, 5, 5, seed=1)).to(dtype)
        check(model, x, tolerance=tolerance)
        summed = Unary(lambda s, x: s.a(x) * 2j + s.b(x), a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 4, 1))
        check(randomize_(summed.to(dtype)).eval(), x, tolerance=tolerance)


def test_weights_too_large_for_their_type_are_not_merged() -> None:
    """A tiny variance makes a scale of 1e4, and weights of 10 become infinite in float16; apart, they do not."""
    model = randomize_(nn.Sequential(*conv_bn(4, 4), nn.ReLU())).eval()
    with torch.no_grad():
        model[0].weight.fill_(20.0)
        model[1].running_var.fill_(1e-7)
        model[1].eps = 1e-8
        model[1].running_mean.zero_()
    x = torch.full((2, 4, 5, 5), 1e-3).half()
    assert model.half()(x).isfinite().all()
    check(model, x, tolerance=1e-2)


def test_weights_that_are_not_finite_do_not_spread() -> None:
    for value in (float("inf"), float("nan")):
        model = ready(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
        with torch.no_grad():
            model[1].weight[0] = value
        compiled, x = elc_fx.compile(model), image(2, 4, 5, 5)
        assert torch.equal(compiled(x).isfinite(), model(x).isfinite())
        assert_same(compiled(x)[:, 1:], model(x)[:, 1:])


def test_model_on_meta_has_shapes_only() -> None:
    with torch.device("meta"):
        model = nn.Sequential(RepVGGBlock(4, 6), nn.ReLU(), DiverseBranchBlock(6, 6), nn.Conv2d(6, 2, 1)).eval()
        x = torch.empty(2, 4, 5, 5)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
        y = compiled(x)
        assert y.is_meta and y.shape == (2, 2, 5, 5)
        assert all(p.is_meta for p in compiled.parameters())
        assert not batch_norms(compiled)


def test_channels_last_is_kept() -> None:
    last = torch.channels_last
    model = ready(nn.Sequential(RepVGGBlock(4, 6), nn.ReLU(), conv_bn(6, 5))).to(memory_format=last)
    compiled, x = elc_fx.compile(model), image(2, 4, 5, 6).to(memory_format=last)
    assert_same(compiled(x), model(x))
    assert compiled(x).is_contiguous(memory_format=last) and model(x).is_contiguous(memory_format=last)
    for layer in convolutions(compiled):
        assert layer.weight.is_contiguous(memory_format=last)


def test_gradients_flow_as_before() -> None:
    model = ready(nn.Sequential(RepVGGBlock(4, 4), nn.Tanh(), conv_bn(4, 4)))
    compiled = elc_fx.compile(model)
    gradients = []
    for network in (model, compiled):
        x = image(2, 4, 5, 5).requires_grad_()
        network(x).square().sum().backward()
        gradients.append(x.grad)
    assert_same(gradients[1], gradients[0])
    assert all(p.requires_grad and p.is_leaf and p.grad is not None for p in compiled.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4))).requires_grad_(False)
    compiled = elc_fx.compile(model)
    assert not any(p.requires_grad for p in compiled.parameters())
    assert not compiled(image(1, 4, 5, 5)).requires_grad


@pytest.mark.parametrize(
    "prepared",
    [
        lambda x: x.permute(0, 3, 1, 2) / 255,
        lambda x: (x.permute(0, 3, 1, 2) > 100) * 0.5,
        lambda x: F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1)) * torch.tensor(0.5),
        lambda x: x.permute(0, 3, 1, 2).contiguous().mul(0.1),
    ],
    ids=["quotient", "comparison", "padding", "product"],
)
def test_images_in_bytes_become_numbers_before_the_first_layer(prepared: Any) -> None:
    model = Unary(lambda s, x: s.a(prepared(x)), a=conv_bn(4, 4)).eval()
    x = torch.randint(0, 255, (2, 5, 5, 4), dtype=torch.uint8)
    for result in (elc_fx.compile(model), elc_fx.compile(model, x)):
        assert_same(result(x), model(x), 1e-6)
        assert not batch_norms(result)


@pytest.mark.parametrize(
    "scaled",
    [
        lambda x: x.float() / 255,
        lambda x: x.to(torch.float32).sub(0.5).mul(2),
        lambda x: F.pad(x.float(), (1, 1, 1, 1)) * 0.5,
    ],
    ids=["float", "to", "padding"],
)
def test_a_scale_of_what_was_converted_merges(scaled: Any) -> None:
    model = Unary(lambda s, x: s.b(scaled(s.a(x.float()).relu())), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 3)).eval()
    result = elc_fx.compile(model, image(2, 4, 6, 6, dtype=torch.float32))
    assert elc_fx.report_of(result).merged


def test_a_scale_that_would_widen_the_input_of_a_layer_stays() -> None:
    model = Unary(lambda s, x: s.a(x.half().float().relu() * s.scale), a=nn.Conv2d(4, 4, 1).double())
    model.register_buffer("scale", torch.full((1,), 2.0, dtype=torch.float64))
    check(model.eval(), image(2, 4, 5, 5))


def test_a_linear_layer_and_a_convolution_may_read_one_value() -> None:
    layers = {"linear": nn.Linear(8, 8), "conv": nn.Conv2d(2, 4, 1)}
    check(ready(Unary(lambda s, x: (s.linear(x + x), s.conv(x + x)), **layers)), image(2, 2, 8, 8))
    check(ready(Unary(lambda s, x: (lambda y: (s.linear(y), s.conv(y)))(x + x), **layers)), image(2, 2, 8, 8))


@pytest.mark.parametrize("last", [lambda y: y * 2.0, lambda y: y + y, lambda y: F.pad(y, (1, 1))])
def test_two_axes_may_be_channels_and_space(last: Any) -> None:
    model = ready(Unary(lambda s, x: last(s.a(x)), a=nn.Conv1d(4, 4, 3, padding=1)))
    check(model, image(4, 7))
    check(model, image(2, 4, 7))


def test_numbers_of_a_concatenation_are_known_without_examples() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = torch.cat([s.a(x), s.b(x)], 1)
        return F.batch_norm(y, s.bn.running_mean, s.bn.running_var)

    parts = {"a": nn.Conv2d(4, 2, 3), "b": nn.Conv2d(4, 6, 3), "bn": nn.BatchNorm2d(8)}
    result = check(ready(Unary(forward, **parts)), image(2, 4, 5, 5))
    assert operators(result, image(2, 4, 5, 5)) == {"convolution": 1}


def test_sizes_that_are_computed_with_are_no_refusals() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        n, c, h, w = s.a(x).shape
        return s.a(x).reshape(n, c * 2, h // 2, w) + x.size(0) * 2 + x.shape[1]

    result = check(ready(Unary(forward, a=nn.Conv2d(4, 4, 1))), image(2, 4, 4, 4))
    assert not [r for r in elc_fx.report_of(result).refused if "not known" in r.reason]


def test_advice_to_give_examples_is_for_those_who_gave_none() -> None:
    model = ready(Unary(lambda s, x: (s.a(x), F.avg_pool2d(x.exp(), 2)), a=nn.Conv2d(4, 4, 1)))
    without, given = elc_fx.compile(model), elc_fx.compile(model, image(2, 4, 4, 4))
    assert "give example_inputs" in str(elc_fx.report_of(without))
    assert "give example_inputs" not in str(elc_fx.report_of(given))


def test_norms_take_other_types_than_their_own() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.last(s.norm(s.first(x)).relu() * s.scale)

    parts = {"first": nn.Conv2d(4, 4, 1).bfloat16(), "norm": nn.GroupNorm(2, 4), "last": nn.Conv2d(4, 4, 1)}
    model = Unary(forward, **parts)
    model.register_buffer("scale", torch.full((1, 1, 1), 2.0))
    x = image(2, 4, 3, 3, dtype=torch.bfloat16)
    for result in (elc_fx.compile(model.eval()), elc_fx.compile(model.eval(), x)):
        assert_same(result(x), model(x), 1e-6)
