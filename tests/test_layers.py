"""Layers of all kinds: with hooks, parametrized, of classes of the user's, and the variants of torch's."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_untouched, check, opaque_reasons, snapshot
from networks import (
    Formula,
    Gate,
    RepVGGBlock,
    Standardised,
    Unary,
    assert_same,
    batch_norms,
    conv_bn,
    convolutions,
    flops,
    image,
    operators,
    quiet,
    ready,
)
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune

import elc_fx

Model = Callable[[], nn.Module]


# --- hooks ------------------------------------------------------------------------------------------------------------


def hooked(place: str) -> tuple[nn.Sequential, nn.Module]:
    """A small network, and the module of it that gets the hook."""
    model = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU(), RepVGGBlock(4, 4), nn.ReLU()))
    return model, model if place == "root" else model.get_submodule(place)


PLACES = ["root", "0", "0.0", "0.1", "1", "2", "2.dense", "2.point.0"]


@pytest.mark.parametrize("place", PLACES)
def test_forward_hook_runs_once_per_call_and_is_obeyed(place: str) -> None:
    model, module = hooked(place)
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append(args[0])
        return out * 2

    module.register_forward_hook(hook)
    assert_hook_is_kept(model, seen)


@pytest.mark.parametrize("place", PLACES)
def test_forward_pre_hook_runs_once_per_call_and_is_obeyed(place: str) -> None:
    model, module = hooked(place)
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(args[0] if args else kwargs["x"])
        return tuple(a + 1 for a in args), kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)
    assert_hook_is_kept(model, seen)


def assert_hook_is_kept(model: nn.Module, seen: list[Tensor]) -> None:
    x = image(2, 4, 5, 5)
    expected = model(x)
    wanted = seen.copy()
    for examples in (None, (x,)):
        compiled = elc_fx.compile(model, examples)
        for _ in range(2):
            seen.clear()
            assert_same(compiled(x), expected)
            assert len(seen) == len(wanted) == 1
            assert_same(seen[0], wanted[0])
    seen.clear()
    assert_same(model(x), expected)
    assert len(seen) == 1, "the model lost its hook, or it runs twice"


@pytest.mark.parametrize("place", ["root", "0.0", "2"])
def test_backward_hook_is_kept(place: str) -> None:
    model, module = hooked(place)
    seen: list[Tensor] = []
    module.register_full_backward_hook(lambda _, grad_in, grad_out: seen.append(grad_out[0]))
    compiled = elc_fx.compile(model)
    compiled(image(2, 4, 5, 5).requires_grad_()).sum().backward()
    assert len(seen) == 1


def test_hook_on_an_island_is_kept() -> None:
    model, calls = ready(Gate()), []
    model.register_forward_hook(lambda *_: calls.append("root"))
    model.block.register_forward_hook(lambda *_: calls.append("block"))
    compiled, x = elc_fx.compile(model), image(2, 4, 6, 6) + 1
    calls.clear()
    assert_same(compiled(x), model(x))
    assert calls == ["block", "root"] * 2


# --- parametrizations and subclasses ----------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def weight_normed(s: nn.Conv2d) -> None:
    parametrizations.weight_norm(s)


def old_weight_normed(s: nn.Conv2d) -> None:
    quiet(nn.utils.weight_norm, s)


def pruned(s: nn.Conv2d) -> None:
    prune.random_unstructured(s, "weight", 0.5)


def doubled_with_hook(s: nn.Conv2d) -> None:
    parametrize.register_parametrization(s, "weight", Doubled())
    parametrize.register_parametrization(s, "bias", Doubled())


PARAMETRIZATIONS: dict[str, Callable[[nn.Conv2d], Any]] = {
    "weight_norm": weight_normed,
    "spectral_norm": parametrizations.spectral_norm,
    "custom": doubled_with_hook,
    "old weight_norm": old_weight_normed,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruning": pruned,
}


@pytest.mark.parametrize("after", ["compiled at once", "after a call", "after training"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weight_is_what_the_model_computes_with(name: str, after: str) -> None:
    """In the old style the attribute `weight` is what the last call left there, and may be out of date."""
    layers = conv_bn(4, 4, bias=True)
    PARAMETRIZATIONS[name](layers[0])
    model, x = ready(nn.Sequential(layers, nn.ReLU())), image(2, 4, 5, 5)
    if after == "after a call":
        model(x)
    elif after == "after training":
        model.train()(x).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        model.eval()
    check(model, x)


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile", "_graph"])
def test_children_may_be_called_as_attributes_of_graph_modules_are(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, conv_bn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = getattr(self, name)(x)
            return y

    model = ready(Named())
    assert f"`{name}` would be in the place of what torch.fx keeps" in opaque_reasons(check(model, image(1, 4, 5, 5)))
    with pytest.raises(elc_fx.CaptureError, match=r"in the place of what torch\.fx keeps"):
        elc_fx.candidates(model, image(1, 4, 5, 5))
    nested = check(ready(nn.Sequential(Named())), image(1, 4, 5, 5))
    assert not opaque_reasons(nested) and not batch_norms(nested)


@pytest.mark.parametrize(
    "default",
    [F.relu, int, torch.tensor(2.0), nn.ReLU(), object()],
    ids=["function", "class", "tensor", "module", "object"],
)
def test_defaults_that_no_code_can_be_written_for(default: Any) -> None:
    class WithDefault(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = conv_bn(4, 4)

        def forward(self, x: Tensor, how: Any = default) -> Tensor:
            y: Tensor = self.block(x)
            return y

    compiled = check(ready(WithDefault()), image(1, 4, 5, 5))
    assert "nothing that torch.fx can write as code" in opaque_reasons(compiled) and not batch_norms(compiled)


SELECTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no channels": lambda s, x: s.a(x)[:, :0],
    "no channels, beside others": lambda s, x: torch.cat([s.a(x)[:, :0], s.b(x)], 1),
    "no rows": lambda s, x: s.a(x)[:, :, 20:],
}


@pytest.mark.parametrize("name", SELECTED)
def test_nothing_may_be_selected(name: str) -> None:
    model, x = ready(Unary(SELECTED[name], a=conv_bn(4, 4), b=conv_bn(4, 4))), image(2, 4, 5, 5)
    assert_same(elc_fx.compile(model, x)(x), model(x))
    if name != "no rows":  # where it is not known that the image is too small
        assert_same(elc_fx.compile(model)(x), model(x))


def test_lazy_batch_norms_stay() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    compiled, x = elc_fx.compile(model), image(2, 3, 5, 5, dtype=torch.float32)
    assert compiled(x).shape == (2, 4, 3, 3)
    assert is_lazy(model[1].running_mean)


def test_a_program_of_torch_export_is_told_apart_from_a_model_in_training_mode() -> None:
    program = torch.export.export(ready(conv_bn(4, 4)), (image(1, 4, 5, 5),)).module()
    with pytest.raises(elc_fx.InvalidInputError, match=r"program of torch\.export; pass the module"):
        elc_fx.compile(program)


def test_volumes_keep_their_memory_format() -> None:
    model = ready(conv_bn(4, 4, dims=3)).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    compiled, x = elc_fx.compile(model), image(1, 4, 5, 5, 5)
    assert next(compiled.parameters()).is_contiguous(memory_format=torch.channels_last_3d)
    assert_same(compiled(x), model(x))


def test_a_pooling_of_volumes_beside_a_convolution() -> None:
    model = ready(Unary(lambda s, x: s.a(x) + s.b(x), a=nn.Conv3d(4, 4, 3, padding=1), b=nn.AvgPool3d(3, 1, 1)))
    compiled = check(model, image(1, 4, 6, 6, 6))
    assert operators(compiled, image(1, 4, 6, 6, 6)) == {"convolution": 1}


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("times", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.times += 1
        return weight * self.times.clamp(max=1)


@pytest.mark.parametrize("kind", [Noisy, Remembering])
def test_weights_that_are_not_the_same_each_time_are_no_constants(kind: Callable[[], nn.Module]) -> None:
    layers = conv_bn(4, 4, bias=True)
    parametrize.register_parametrization(layers[0], "bias", kind())
    model, x = ready(nn.Sequential(layers, nn.ReLU())), image(2, 4, 5, 5)
    before, state = snapshot(model), torch.get_rng_state()
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, x)):
        assert "its parametrization" in str(elc_fx.report_of(compiled))
        torch.manual_seed(0)
        actual = compiled(x)
        torch.manual_seed(0)
        assert_same(actual, copy.deepcopy(model)(x))
        torch.set_rng_state(state)
    elc_fx.explain(model, x)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("examples", [False, True], ids=["without examples", "with examples"])
def test_a_bias_that_a_hook_computes_is_not_read_as_the_last_call_left_it(examples: bool) -> None:
    layers = conv_bn(4, 4, bias=True)
    quiet(nn.utils.weight_norm, layers[0], "bias", dim=None)
    model, x = ready(nn.Sequential(layers, nn.ReLU())), image(2, 4, 5, 5)
    with torch.no_grad():
        layers[0].bias_g.mul_(2)
    assert_same(elc_fx.compile(model, x if examples else None)(x), model(x))


def test_parametrized_weights_merge() -> None:
    for name in ("weight_norm", "spectral_norm", "custom"):
        layers = conv_bn(4, 4, bias=True)
        PARAMETRIZATIONS[name](layers[0])
        compiled = check(ready(nn.Sequential(layers, nn.ReLU())), image(2, 4, 5, 5))
        assert operators(compiled, image(2, 4, 5, 5)) == {"convolution": 1, "relu": 1}, name


class StandardizedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvolutionOfItsOwn(nn.Conv2d):
    """Does not override `forward`, but what it calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


class LaterCalled(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


class LoRALinear(nn.Linear):
    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.down, self.up = nn.Linear(features, 2, bias=False), nn.Linear(2, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class ShiftedBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class RenamedConv2d(nn.Conv2d):
    """Changes nothing."""


class WeightFromProperty(nn.Conv2d):
    @property
    def gain(self) -> float:
        return 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


SUBCLASSES: dict[str, Model] = {
    "standardized": lambda: nn.Sequential(StandardizedConv2d(4, 4, 3), nn.BatchNorm2d(4)),
    "_conv_forward": lambda: nn.Sequential(ConvolutionOfItsOwn(4, 4, 3), nn.BatchNorm2d(4)),
    "__call__": lambda: nn.Sequential(LaterCalled(4, 4, 3), nn.BatchNorm2d(4)),
    "linear": lambda: nn.Sequential(LoRALinear(5), nn.Linear(5, 5)),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), ShiftedBatchNorm(4)),
    "property": lambda: nn.Sequential(WeightFromProperty(4, 4, 3), nn.BatchNorm2d(4)),
    "renamed": lambda: nn.Sequential(RenamedConv2d(4, 4, 3), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclass_with_a_forward_of_its_own_computes_what_it_says(name: str) -> None:
    check(ready(SUBCLASSES[name]()), image(2, 4, 5, 5))


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclass_as_the_root_computes_what_it_says(name: str) -> None:
    check(ready(SUBCLASSES[name]())[0 if name != "batch norm" else 1], image(2, 4, 5, 5))


def test_subclass_that_changes_nothing_merges() -> None:
    assert not batch_norms(check(ready(SUBCLASSES["renamed"]()), image(2, 4, 5, 5)))


@pytest.mark.parametrize("where", ["root", "0", "1", "2"])
def test_forward_put_on_an_instance_is_obeyed(where: str) -> None:
    model = ready(nn.Sequential(*conv_bn(4, 4), RepVGGBlock(4, 4), nn.ReLU()))
    module = model if where == "root" else model.get_submodule(where)
    original = module.forward
    module.forward = types.MethodType(lambda self, x: original(x) * 2, module)
    check(model, image(2, 4, 5, 5))


def test_lambda_put_on_an_instance_is_obeyed() -> None:
    model = ready(nn.Sequential(*conv_bn(4, 4), nn.ReLU()))
    model[0].forward = lambda x: x * 3
    model[1].forward = lambda x: x + 1
    check(model, image(2, 4, 5, 5))


# --- variants of the layers -------------------------------------------------------------------------------------------


NORMS: dict[str, Model] = {
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "neither": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "large eps": lambda: nn.BatchNorm2d(4, eps=0.5),
    "no momentum": lambda: nn.BatchNorm2d(4, momentum=None),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance norm with running statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "no bias": lambda: without_bias(nn.BatchNorm2d(4)),
}


def without_bias(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.bias = None  # type: ignore[assignment]
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_norm_of_any_kind_after_and_before_a_convolution(name: str) -> None:
    for layers in ((nn.Conv2d(4, 4, 3), NORMS[name]()), (NORMS[name](), nn.Conv2d(4, 4, 3))):
        compiled = check(ready(nn.Sequential(*layers)), image(3, 4, 5, 5))
        batch_statistics = name in ("no running statistics", "neither")
        assert len(batch_norms(compiled)) == batch_statistics


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_keeps_its_border(mode: str) -> None:
    c = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    d = nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode=mode)
    point, wider = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5, padding=2, padding_mode=mode)
    models = {
        "batch norm after it": nn.Sequential(c, nn.BatchNorm2d(4)),
        "two in a row": nn.Sequential(c, d),
        "batch norm before it": nn.Sequential(nn.BatchNorm2d(4), c),
        "pointwise around it": nn.Sequential(point, c, point),
        "zeros after it": nn.Sequential(c, nn.Conv2d(4, 4, 3, padding=1)),
        "zeros before it": nn.Sequential(nn.Conv2d(4, 4, 1, padding=1), c),
        "beside zeros": Unary(lambda s, x: s.a(x) + s.b(x), a=c, b=nn.Conv2d(4, 4, 3, padding=1)),
        "beside a pointwise": Unary(lambda s, x: s.a(x) + s.b(x) + x, a=c, b=point),
        "beside a wider one": Unary(lambda s, x: s.a(x) + s.b(x), a=c, b=wider),
    }
    for name, model in models.items():
        compiled = check(ready(model), image(2, 4, 4, 5))
        check(model, image(1, 4, 3, 3))
        assert flops(compiled, image(1, 4, 4, 5)) <= flops(model, image(1, 4, 4, 5)), name
        if name.startswith("batch norm"):
            assert not batch_norms(compiled), name


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [2, 4, (2, 3), (1, 4)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_with_even_kernels(kernel: Any, padding: str) -> None:
    for dilation in (1, 2):
        c = nn.Conv2d(4, 4, kernel, padding=padding, dilation=dilation)
        for model in (
            nn.Sequential(c, nn.BatchNorm2d(4)),
            nn.Sequential(c, c),
            Unary(lambda s, x: s.bn(s.a(x) + s.b(x)), a=c, b=copy.deepcopy(c), bn=nn.BatchNorm2d(4)),
        ):
            for size in ((13, 13), (14, 17)):
                assert not batch_norms(check(ready(model), image(2, 4, *size)))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [2, 4])
def test_same_padding_of_other_modes(mode: str, kernel: int) -> None:
    layers = (nn.Conv2d(4, 4, kernel, padding="same", padding_mode=mode), nn.BatchNorm2d(4))
    assert not batch_norms(check(ready(nn.Sequential(*layers)), image(2, 4, 5, 6)))


ROOTS: dict[str, tuple[Model, tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 3, 2), (2, 4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 3), (2, 4, 5, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3), (2, 4, 5, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (2, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "Linear": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "ReLU": (lambda: nn.ReLU(inplace=True), (2, 4)),
    "Dropout": (lambda: nn.Dropout(), (2, 4)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (2, 4, 5, 5)),
    "Identity": (lambda: nn.Identity(), (2, 4)),
    "Sequential": (lambda: nn.Sequential(), (2, 4)),
    "Sequential of Sequentials": (lambda: nn.Sequential(nn.Sequential(), nn.Sequential()), (2, 4)),
    "no parameters": (lambda: Unary(lambda s, x: x), (2, 4)),
    "constant output": (lambda: Unary(lambda s, x: torch.ones(3)), (2, 4)),
    "no output": (lambda: Unary(lambda s, x: None), (2, 4)),
    "number as output": (lambda: Unary(lambda s, x: 3.5), (2, 4)),
    "module list in a root": (lambda: Unary(lambda s, x: s.l[0](x), l=nn.ModuleList([nn.Linear(4, 4)])), (2, 4)),
    "LSTM": (lambda: nn.LSTM(4, 3), (2, 5, 4)),
}


@pytest.mark.parametrize("name", ROOTS)
def test_root_of_any_kind_compiles(name: str) -> None:
    make, shape = ROOTS[name]
    compiled = check(ready(make()), image(*shape))
    assert str(elc_fx.report_of(compiled)) is not None


def test_model_without_inputs_compiles() -> None:
    model = ready(Formula(lambda s: s.c(s.latent), c=conv_bn(4, 4), latent=image(1, 4, 5, 5)))
    assert_same(elc_fx.compile(model)(), model())
    assert_same(elc_fx.compile(model, ())(), model())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Standardised(4, 4, 3, padding=1),
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 3, padding=1)),
        lambda: quiet(nn.utils.weight_norm, nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    ],
    ids=["standardised", "weight norm", "spectral norm", "old weight norm"],
)
def test_weights_that_are_computed_are_computed_once(layer: Any) -> None:
    model, x = ready(nn.Sequential(nn.ReLU(), layer(), nn.ReLU())), image(2, 4, 6, 6)
    plain = check(model, x)
    (made,) = convolutions(plain)
    assert set(dict(made.named_parameters())) == {"weight", "bias"} and not operators(plain, x).keys() & {
        "native_batch_norm",
        "div",
    }
    assert not [refusal for refusal in elc_fx.report_of(plain).refused if "statistics" in refusal.reason]


def test_a_transposed_convolution_may_pad_more_than_its_kernel() -> None:
    for kernel, padding, stride in ((2, 2, 1), (3, 4, 2), (1, 1, 1)):
        layers = nn.ConvTranspose2d(4, 4, kernel, stride=stride, padding=padding), nn.BatchNorm2d(4)
        assert not batch_norms(check(ready(nn.Sequential(*layers)), image(2, 4, 9, 9)))


@pytest.mark.parametrize(
    "layer", [lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), lambda: Standardised(4, 4, 1)]
)
def test_a_layer_that_is_called_often_stays_one(layer: Any) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        for _ in range(4):
            x = s.a(x).relu()
        return x

    model = ready(Unary(forward, a=layer()))
    result = check(model, image(2, 4, 3, 3))
    assert sum(p.numel() for p in result.parameters()) <= sum(p.numel() for p in model.parameters())


def test_the_weights_of_lazy_layers_may_be_asked() -> None:
    layers = {"layer": conv_bn(4, 4), "lazy": nn.LazyConv2d(3, 1)}
    model = Unary(lambda s, x: s.lazy(s.layer(x).to(s.lazy.weight.dtype)), **layers)
    assert len(elc_fx.report_of(elc_fx.compile(model.eval())).merged) == 1


SETTINGS_OF_SIZES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transposed convolution": lambda s, x: F.conv_transpose2d(x, s.w, stride=2, output_padding=x.shape[-1] % 2),
    "convolution": lambda s, x: F.conv2d(x, s.w, stride=(x.shape[-1] // 4, 1)),
    "divisor": lambda s, x: F.avg_pool2d(x, 2, divisor_override=x.shape[1]),
    "pooling": lambda s, x: F.avg_pool2d(x, [2, x.shape[-1] // 3]),
    "batch norm": lambda s, x: F.batch_norm(x, s.v[0], s.v[1], eps=x.shape[1] * 1e-4),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", SETTINGS_OF_SIZES)
def test_settings_may_be_computed_from_sizes(name: str, given: bool) -> None:
    model = ready(Unary(lambda s, x: s.c(SETTINGS_OF_SIZES[name](s, s.a(x))), a=conv_bn(4, 4), c=nn.Conv2d(4, 4, 1)))
    model.w, model.v = image(4, 4, 3, 3), image(2, 4).abs()
    x, other = image(2, 4, 9, 9), image(1, 4, 6, 8)
    compiled = elc_fx.compile(model, x if given else None)
    assert_same(compiled(x), model(x))
    assert_same(compiled(other), model(other))
    assert not batch_norms(compiled)
    assert any("settings are computed" in refusal.reason for refusal in elc_fx.report_of(compiled).refused)
