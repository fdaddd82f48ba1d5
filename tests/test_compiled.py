"""The caller's model stays as it was, and the result is a module like any other; a wrong one is an error."""

from __future__ import annotations

import copy
import io
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_untouched, check, snapshot, storages
from networks import (
    PUBLISHED,
    SHARED,
    BatchNormThenPad,
    Defaults,
    DiverseBranchBlock,
    Gate,
    Remembers,
    RepVGGBlock,
    Unary,
    UNetDecoder,
    assert_same,
    batch_norms,
    conv_bn,
    flops,
    image,
    operators,
    per_channel,
    quiet,
    ready,
    resnet20,
    sharing,
    small_net,
)
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import elc_fx
from elc_fx.affine import AffineMap
from elc_fx.merging import fusion

Model = Callable[[], nn.Module]


# --- determinism, and the caller's model ------------------------------------------------------------------------------


def test_same_model_gives_same_graph_and_same_bits() -> None:
    names = ("RepVGG", "ACNet, 5×5, stride 2", "DBB, depthwise", "MobileOne, depthwise", "RepViT", "RepConv, identity")
    model = ready(nn.Sequential(*(layer for n in names for layer in (PUBLISHED[n].make(), nn.ReLU()))))
    x = image(2, 4, 5, 5)
    results = []
    for _ in range(3):
        torch.manual_seed(random.randrange(1000))
        compiled = elc_fx.compile(copy.deepcopy(model), (x,))
        results.append((str(compiled.code), {k: v.clone() for k, v in compiled.state_dict().items()}, compiled(x)))
    for other in results[1:]:
        assert_same(list(other), list(results[0]), 0.0)


def test_global_random_state_is_not_touched() -> None:
    model = ready(Unary(lambda s, x: s.a(x) + torch.randn(3, 1, 1), a=conv_bn(3, 3)))
    before, ours = torch.get_rng_state(), random.getstate()
    elc_fx.compile(model)
    elc_fx.compile(ready(resnet20()), image(1, 3, 8, 8))
    assert random.getstate() == ours
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    ready(resnet20())  # initialises weights, which draws
    assert torch.equal(torch.get_rng_state(), after)


def test_global_settings_are_not_touched() -> None:
    before = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        torch.get_num_threads(),
    )
    elc_fx.compile(ready(small_net()), image(1, 3, 5, 5))
    now = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mkldnn.enabled, torch.get_num_threads())
    assert before == now


class WritesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.block(x) * self.steps


def hooked_net() -> nn.Module:
    model = small_net()
    model[0].register_forward_hook(lambda *_: None)
    return model


UNTOUCHED: dict[str, Model] = {
    "network": lambda: small_net((4, 4, 4)),
    "constants": lambda: Unary(lambda s, x: s.a(x) + torch.ones(4, 1, 1), a=conv_bn(4, 4)),
    "remembers": Remembers,
    "writes a buffer": WritesBuffer,
    "island": Gate,
    "island that remembers": lambda: nn.Sequential(Gate(), Remembers()),
    "block": lambda: DiverseBranchBlock(4, 4),
    "hooks": lambda: nn.Sequential(nn.Conv2d(4, 3, 1), hooked_net()),
    "shared": lambda: sharing(SHARED["tied weights"]),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    "old weight norm": lambda: nn.Sequential(quiet(nn.utils.weight_norm, nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    "bare layer": lambda: nn.Conv2d(4, 4, 3),
    "unused layer": lambda: Unary(lambda s, x: s.a(x), a=conv_bn(4, 4), unused=nn.Linear(3, 3)),
    "weight read": lambda: Unary(
        lambda s, x: s.b(s.a(x.to(s.a.weight.dtype)).relu()), a=nn.Conv2d(4, 4, 1), b=conv_bn(4, 4)
    ),
    "weight of a merged layer read": lambda: Unary(lambda s, x: s.a(x) * s.a[0].weight.sum(), a=conv_bn(4, 4)),
    "statistics read": lambda: Unary(
        lambda s, x: s.a(F.batch_norm(x, s.a.running_mean, s.a.running_var).relu()), a=nn.BatchNorm2d(4)
    ),
}


@pytest.mark.parametrize("examples", [False, True], ids=["without examples", "with examples"])
@pytest.mark.parametrize("name", UNTOUCHED)
def test_model_is_untouched(name: str, examples: bool) -> None:
    model = ready(UNTOUCHED[name]())
    next(iter(model.parameters()), per_channel(1)).requires_grad_(False)
    before = snapshot(model)
    compiled = elc_fx.compile(model, image(2, 4, 5, 5) if examples else None)
    elc_fx.explain(model, image(2, 4, 5, 5))
    assert_untouched(model, before)
    assert not storages(model) & storages(compiled), "the result shares storage with the model"
    with torch.no_grad():
        compiled.train()
        for tensor in [*compiled.parameters(), *compiled.buffers()]:
            tensor.zero_()
    assert_untouched(model, before)


def test_unused_layer_is_no_obstacle() -> None:
    check(ready(UNTOUCHED["unused layer"]()), image(2, 4, 5, 5))


def test_random_numbers_in_forward_stay_random() -> None:
    def constant_noise(s: Any, x: Tensor) -> Tensor:
        return s.a(x) + torch.randn(4, 1, 1)

    for forward in (constant_noise, lambda s, x: s.a(x) + torch.rand_like(x), lambda s, x: s.a(x * random.random())):
        model, x = ready(Unary(forward, a=conv_bn(4, 4))), image(2, 4, 5, 5)
        for examples in (None, (x,)):
            compiled = elc_fx.compile(model, examples)
            for seed in (1, 2):
                results = []
                for network in (model, compiled):
                    torch.manual_seed(seed)
                    random.seed(seed)
                    results.append(network(x))
                assert_same(results[1], results[0])
            assert not torch.equal(compiled(x), compiled(x))


def weight_made_by(formula: Callable[[Tensor], Tensor]) -> nn.Module:
    """A convolution whose weight is made of a parameter, and its batch norm."""
    p, norm = nn.Parameter(torch.randn(4, 4) / 4), nn.BatchNorm2d(4)
    return ready(Unary(lambda s, x: s.norm(F.conv2d(x, formula(s.p).reshape(4, 4, 1, 1))), p=p, norm=norm))


@pytest.mark.parametrize(
    "formula",
    [lambda p: F.gumbel_softmax(p), lambda p: F.rrelu(p, training=True), lambda p: F.dropout(p), torch.rand_like],
    ids=["gumbel_softmax", "rrelu", "dropout", "rand_like"],
)
def test_random_numbers_of_a_parameter_stay_random(formula: Callable[[Tensor], Tensor]) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    model = ready(Unary(lambda s, x: s.a(x) * formula(s.p)[0].view(1, 4, 1, 1), a=conv_bn(4, 4), p=p))
    x = image(2, 4, 5, 5)
    torch.manual_seed(5)
    following = torch.rand(3)
    torch.manual_seed(5)
    compiled = elc_fx.compile(model)
    assert torch.equal(torch.rand(3), following)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        assert_same(compiled(x), expected)


@pytest.mark.parametrize("formula", [lambda p: F.normalize(p, dim=1), lambda p: p.T], ids=["normalize", "T"])
def test_a_weight_that_is_computed_of_a_parameter_merges(formula: Callable[[Tensor], Tensor]) -> None:
    assert not batch_norms(check(weight_made_by(formula), image(2, 4, 5, 5)))


def test_a_weight_that_takes_many_steps_to_make_merges_in_linear_time() -> None:
    def orthogonal(p: Tensor) -> Tensor:  # each value is read four times: 4²⁰ ways from the first to the last
        p = p / p.norm()
        for _ in range(20):
            p = 1.5 * p - 0.5 * (p @ p.T) @ p
        return p

    def deep(p: Tensor) -> Tensor:
        for _ in range(sys.getrecursionlimit()):
            p = torch.tanh(p)
        return p

    for formula in (orthogonal, deep):
        assert not batch_norms(check(weight_made_by(formula), image(2, 4, 5, 5)))


class OwnReLU(nn.ReLU):
    """torch's, by another name."""


@pytest.mark.parametrize("activation", [F.leaky_relu, F.hardswish, F.relu6, nn.Softsign(), nn.Hardshrink(), OwnReLU()])
def test_activations_pass_on_how_many_channels_there_are(activation: Any) -> None:
    scale = nn.Parameter(torch.rand(4, 1, 1))
    a, b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    model = ready(Unary(lambda s, x: s.b(s.act(s.a(x)) * s.scale), a=a, b=b, act=activation, scale=scale))
    assert len(elc_fx.report_of(check(model, image(2, 3, 9, 9))).merged) == 1


def test_random_numbers_in_a_submodule_stay_random() -> None:
    noise = Unary(lambda s, x: x + torch.randn(4, 1, 1))
    model, x = ready(nn.Sequential(conv_bn(4, 4), noise, conv_bn(4, 4))), image(2, 4, 5, 5)
    compiled = elc_fx.compile(model)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert_same(compiled(x), expected)
    assert not batch_norms(compiled)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.calls = RepVGGBlock(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.block(x) + self.calls


@pytest.mark.parametrize("examples", [False, True], ids=["without examples", "with examples"])
@pytest.mark.parametrize("make", [Counts, WritesBuffer, lambda: nn.Sequential(Counts(), nn.ReLU(), WritesBuffer())])
def test_forward_with_a_side_effect_keeps_it(make: Model, examples: bool) -> None:
    model, x = ready(make()), image(2, 4, 5, 5)
    model(x)
    compiled = elc_fx.compile(model, (x,) if examples else None)
    for _ in range(3):
        assert_same(compiled(x), model(x))
    assert not batch_norms(compiled)


# --- the result -------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "pickle, deepcopy": lambda m: copy.deepcopy(pickled(m)),
    "deepcopy, pickle": lambda m: pickled(copy.deepcopy(m)),
    "pickle twice": lambda m: pickled(pickled(m)),
    "torch.save": saved,
    "to": lambda m: copy.deepcopy(m).to(torch.float64),
}


COPIED: dict[str, Model] = {
    "graph": lambda: nn.Sequential(RepVGGBlock(4, 4), nn.ReLU(), nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1)),
    "island": Gate,
    "leaf inside": lambda: nn.Sequential(Gate(), nn.ReLU(), BatchNormThenPad(4, 1)),
    "optional argument": lambda: UNetDecoder(4, 4),
    "default argument": Defaults,
    "constants": lambda: nn.Sequential(RepVGGBlock(4, 4), Remembers(), nn.AvgPool2d(2, ceil_mode=True)),
}


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.parametrize("how", COPIES)
def test_result_and_its_report_survive_a_copy(name: str, how: str) -> None:
    model, x = ready(COPIED[name]()), image(2, 4, 6, 6)
    compiled = elc_fx.compile(model)
    twin = COPIES[how](compiled)
    assert_same(twin(x), compiled(x), 0.0)
    assert str(elc_fx.report_of(twin)) == str(elc_fx.report_of(compiled))
    assert elc_fx.report_of(twin).merged == elc_fx.report_of(compiled).merged


def test_copy_of_the_result_is_independent() -> None:
    compiled, x = elc_fx.compile(ready(small_net())), image(1, 3, 5, 5)
    before = compiled(x)
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same(compiled(x), before, 0.0)


def test_result_moves_with_to() -> None:
    layers = (RepVGGBlock(4, 12), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1), UNTOUCHED["constants"]())
    model = ready(nn.Sequential(*layers[:3], nn.Conv2d(12, 4, 1), layers[3]))
    compiled, x = elc_fx.compile(model), image(2, 4, 5, 5)
    expected = model(x)
    assert_same(compiled.to(torch.float32)(x.float()).double(), expected, 1e-4)
    assert {p.dtype for p in compiled.parameters()} == {torch.float32}
    assert compiled.to("meta")(x.float().to("meta")).shape == expected.shape


def test_state_dict_of_the_result_loads() -> None:
    model, other = ready(small_net(), 0), ready(small_net(), 1)
    first, second = elc_fx.compile(model), elc_fx.compile(other)
    first.load_state_dict(second.state_dict())
    assert_same(first(image(1, 3, 5, 5)), other(image(1, 3, 5, 5)))


def test_compiling_a_result_again_changes_nothing() -> None:
    model, x = ready(nn.Sequential(RepVGGBlock(4, 4), nn.ReLU(), DiverseBranchBlock(4, 4))), image(2, 4, 5, 5)
    once = elc_fx.compile(model)
    twice = elc_fx.compile(once)
    assert_same(twice(x), model(x))
    assert flops(twice, x) == flops(once, x)
    traced = elc_fx.compile(fx.symbolic_trace(ready(nn.Sequential(RepVGGBlock(4, 4), nn.ReLU()))))
    assert operators(traced, x) == {"convolution": 1, "relu": 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_result_runs_under_torch_compile(backend: str) -> None:
    layers = (RepVGGBlock(4, 12), nn.ReLU(inplace=True), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1))
    model = ready(nn.Sequential(*layers))
    compiled = torch.compile(elc_fx.compile(model), backend=backend, fullgraph=True)
    for x in (image(2, 4, 5, 5), image(3, 4, 6, 5)):
        assert_same(compiled(x), model(x))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_result_exports_with_a_dynamic_batch() -> None:
    layers = (RepVGGBlock(4, 12), nn.ReLU(inplace=True), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1))
    model = ready(
        nn.Sequential(*layers, nn.Conv2d(12, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    )
    x = image(2, 4, 6, 6)
    for examples in (None, (x,)):
        exported = torch.export.export(
            elc_fx.compile(model, examples), (x,), dynamic_shapes=({0: torch.export.Dim("n")},)
        )
        for batch in (2, 5):
            sample = image(batch, 4, 6, 6, seed=batch)
            assert_same(exported.module()(sample), model(sample))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_result_with_a_bound_default_exports() -> None:
    model, x = ready(UNetDecoder(4, 4)), image(2, 4, 5, 5)
    exported = torch.export.export(elc_fx.compile(model, (x,)), (x,))
    assert_same(exported.module()(x), model(x))


def test_result_runs_in_inference_mode() -> None:
    model, x = ready(small_net()), image(1, 3, 5, 5)
    compiled = elc_fx.compile(model)
    with torch.inference_mode():
        assert_same(compiled(x), model(x))


def test_compiling_in_inference_mode_or_without_gradients() -> None:
    model, x = ready(small_net()), image(1, 3, 5, 5)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            compiled = elc_fx.compile(model, (x,))
            assert_same(compiled(x), model(x))
        compiled(given := x.clone().requires_grad_()).sum().backward()
        assert given.grad is not None


def test_default_dtype_and_device_do_not_reach_the_result() -> None:
    model, x = (
        ready(nn.Sequential(RepVGGBlock(4, 12), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1))),
        image(1, 4, 5, 5),
    )
    with torch.device("meta"):
        compiled = elc_fx.compile(model)
    assert_same(compiled(x), model(x))
    torch.set_default_dtype(torch.float16)
    try:
        compiled = elc_fx.compile(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(compiled(x), model(x))


class KeywordAfterDefault(nn.Module):
    """An input without a default behind one that has one, as only Python's keyword-only arguments allow."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(3, 4)

    def forward(self, x: Tensor, scale: float | None = None, *, y: Tensor) -> Tensor:
        z: Tensor = self.block(x)
        return (z if scale is None else z * scale) + y


@pytest.mark.parametrize("examples", [False, True], ids=["without examples", "with examples"])
def test_required_keyword_after_a_default(examples: bool) -> None:
    """The root stays as it is, its children are compiled."""
    model = ready(KeywordAfterDefault())
    x = image(2, 3, 5, 5)
    given = {"x": x, "y": torch.ones(2, 4, 5, 5)}
    compiled = elc_fx.compile(model, given if examples else None)
    assert_same(compiled(**given), model(**given))
    assert_same(compiled(**given, scale=2.0), model(**given, scale=2.0))
    assert len(elc_fx.report_of(compiled).merged) == 1
    assert "`y` has no default and comes after `scale`" in str(elc_fx.report_of(compiled).opaque[0])


def test_required_keyword_after_a_default_has_no_candidates() -> None:
    model = ready(KeywordAfterDefault())
    with pytest.raises(elc_fx.CaptureError, match="give example_inputs with `scale`"):
        elc_fx.candidates(model, {"x": image(2, 3, 5, 5), "y": torch.ones(2, 4, 5, 5)})


# --- verification -----------------------------------------------------------------------------------------------------


def without_bias_of_the_second(first: AffineMap, second: AffineMap) -> AffineMap:
    """A sum of maps as somebody might get it wrong."""
    return ADD(first, second if second.bias is None else replace(second, bias=torch.zeros_like(second.bias)))


ADD = AffineMap.__add__


@pytest.mark.parametrize("examples", [False, True], ids=["without examples", "with examples"])
def test_wrong_merge_is_an_error_that_names_the_first_region(monkeypatch: pytest.MonkeyPatch, examples: bool) -> None:
    model = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU(), RepVGGBlock(4, 4), nn.ReLU(), RepVGGBlock(4, 4)))
    x = image(2, 4, 5, 5)
    monkeypatch.setattr(AffineMap, "__add__", without_bias_of_the_second)
    with pytest.raises(elc_fx.VerificationError, match=r"`2\.") as caught:
        elc_fx.compile(model, (x,) if examples else None)
    assert isinstance(caught.value, elc_fx.ElcError)
    unverified = elc_fx.compile(model, (x,) if examples else None, verify=False)
    assert not torch.allclose(unverified(x), model(x))


@pytest.mark.parametrize(
    ("computed", "given"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")]
)
def test_outputs_agree_to_the_digits_that_they_were_computed_with(computed: str, given: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.b(s.a(x).relu())
        return y.to(getattr(torch, given))

    dtype = getattr(torch, computed)
    model = ready(Unary(forward, a=conv_bn(4, 32), b=conv_bn(32, 4))).to(dtype)
    x = image(2, 4, 7, 7).to(dtype)
    assert torch.finfo(dtype).eps ** 0.5 > elc_fx.report_of(elc_fx.compile(model, x)).totals.error > 0  # type: ignore[operator]


@pytest.mark.parametrize("how", ["autocast", "products", "rounded"])
def test_a_network_that_computes_in_a_coarser_type_agrees_to_its_digits(how: str) -> None:
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(conv_bn(4, 32), nn.ReLU(), conv_bn(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            if how == "rounded":
                return self.layers(x).to(torch.bfloat16).float()  # type: ignore[no-any-return]
            y = self.layers(x) if how == "products" else x
            with torch.autocast("cpu", torch.bfloat16):
                return (y @ y.mT if how == "products" else self.layers(y)).float()  # type: ignore[no-any-return]

    model = ready(Coarse()).float()
    compiled = elc_fx.compile(model, image(8, 4, 48, 48, dtype=torch.float32))
    assert not batch_norms(compiled)
    error = elc_fx.report_of(compiled).totals.error
    assert error is not None and torch.finfo(torch.float32).eps ** 0.5 < error < torch.finfo(torch.bfloat16).eps ** 0.5


def test_wrong_result_is_an_error_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each region looked right by itself."""
    model, x = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU(), RepVGGBlock(4, 4))), image(2, 4, 5, 5)
    monkeypatch.setattr(AffineMap, "__add__", without_bias_of_the_second)
    monkeypatch.setattr(fusion, "verify_merge", lambda *_: None)
    with pytest.raises(elc_fx.VerificationError):
        elc_fx.compile(model, (x,))
