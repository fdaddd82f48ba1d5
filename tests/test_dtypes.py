"""What is known of the types of values, asked of all functions of torch that its own tests have samples for."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, ready
from torch import Tensor, fx, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_map

import elc_fx
from elc_fx.capturing.answers import gives_tensor
from elc_fx.matching.constants import Constants
from elc_fx.matching.dtypes import Sort, settled_dtypes

SAMPLES = 6  # of each function, spread over those that there are


def calls(op: Any) -> Iterator[fx.Node]:
    """A node that calls the function in each of its spellings."""
    graph = fx.Graph()
    if (spelled := getattr(op.op, "__name__", "")) and spelled != "<lambda>":
        yield graph.call_function(op.op)
    if op.method_variant is not None and hasattr(Tensor, op.name):
        yield graph.call_method(op.name)
    if op.inplace_variant is not None and hasattr(Tensor, f"{op.name}_"):
        yield graph.call_method(f"{op.name}_")


def claims_of(call: fx.Node, arguments: Any, items: int) -> list[Any]:
    """What is claimed of the items of what a call gives, with float32 for each tensor of that type among its inputs."""
    graph = fx.Graph()

    def value(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        given = graph.placeholder(f"x{len(graph.nodes)}")
        return graph.call_method("float", (given,)) if argument.dtype == torch.float32 else given

    args, kwargs = tree_map(value, arguments)
    result = graph.create_node(call.op, call.target, args, kwargs)
    found = [graph.call_function(operator.getitem, (result, i)) for i in range(items)] or [result]
    module = fx.GraphModule({}, graph)
    nodes = dict(zip(graph.nodes, module.graph.nodes, strict=True))
    dtypes = settled_dtypes(module, Constants(module), set(), {})
    return [dtypes.get(nodes[node]) for node in found]


def is_said_to_give_a_tensor(call: fx.Node, arguments: Any) -> bool:
    graph = fx.Graph()
    args, kwargs = tree_map(lambda a: graph.placeholder("x") if isinstance(a, Tensor) else a, arguments)
    tensors = set(graph.nodes)
    return gives_tensor(nn.Module(), graph.create_node(call.op, call.target, args, kwargs), tensors)


@pytest.mark.parametrize("op", op_db, ids=lambda op: f"{op.name} {op.variant_test_name}".strip())
def test_claims_are_true(op: Any) -> None:
    if not op.supports_dtype(torch.float32, "cpu"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated functions
        samples = list(op.sample_inputs("cpu", torch.float32))
        for sample in samples[:: max(len(samples) // SAMPLES, 1)]:
            arguments = ((sample.input, *sample.args), sample.kwargs)
            for call in calls(op):
                fresh = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, arguments)
                try:
                    args, kwargs = fresh
                    called: Any = call.target
                    if call.op == "call_method":
                        called, args = getattr(args[0], called), args[1:]
                    result = called(*args, **kwargs)
                except (TypeError, RuntimeError, AttributeError):  # a spelling that does not take these
                    continue
                assert isinstance(result, Tensor) or not is_said_to_give_a_tensor(call, arguments), call.target
                several = isinstance(result, tuple | list)
                if several and not result:
                    continue
                claims = claims_of(call, arguments, len(result) if several else 0)
                for claim, actual in zip(claims, result if several else [result], strict=True):
                    check_claim(claim, actual, call)


def check_claim(claim: Any, actual: Any, call: fx.Node) -> None:
    dtype = actual.dtype if isinstance(actual, Tensor) else None
    inexact = dtype is not None and (dtype.is_floating_point or dtype.is_complex)
    if isinstance(claim, torch.dtype):
        assert dtype == claim, f"{call.target} gives {dtype}, claimed was {claim}"
    elif claim is not None:
        assert inexact == (claim is Sort.INEXACT), f"{call.target} gives {dtype}, claimed was {claim}"


class Layers(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a, self.c, self.l = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.gate, self.norm, self.flat = nn.Linear(8, 8), nn.BatchNorm2d(8), nn.Flatten()
        self.first = nn.Conv2d(4, 8, 3)
        self.lstm = nn.LSTM(36, 8)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1))
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(self, x)
        return y


def pooled(s: Any, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(s.a(x).relu(), 1)


def gated(s: Any, x: Tensor) -> Any:
    y = s.a(x).relu()
    gate = torch.sigmoid(s.gate(y.mean((2, 3)))).view(y.size(0), y.size(1), 1, 1)
    return s.c(s.norm(y * gate) * 0.5)


@pytest.mark.parametrize("given", [False, True], ids=["without examples", "with examples"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.l(pooled(s, x).view(x.size(0), -1) * 0.5),
        lambda s, x: s.l(s.flat(pooled(s, x)) * 0.5),
        gated,
        lambda s, x: s.c(F.interpolate(s.a(x), size=x.shape[2:]) * 0.5),
        lambda s, x: s.l(s.scale * F.relu(s.a(x).permute(0, 2, 3, 1)) ** 2 + s.shift),
        lambda s, x: s.c(F.pixel_shuffle(F.pixel_unshuffle(s.a(x), 2), 2) * 0.5),
        lambda s, x: s.c(s.a(x).relu().to(s.c.weight.dtype) * 0.5),
        lambda s, x: s.c(s.a(x).relu().to(x.device) * 0.5),
        lambda s, x: s.c((lambda y: y * (y > 0))(s.a(x)) * 0.5),
        lambda s, x: s.c(s.a(x).masked_fill(x.mean(1, keepdim=True) > 0, 1.0) * 0.5),
        lambda s, x: s.c(torch.where(s.a(x) > 0, s.a(x), s.shift) * 0.5),
        lambda s, x: s.l(s.a(x).flatten(2).max(2)[0] * 0.5),
        lambda s, x: s.l(s.lstm(s.a(x).flatten(2))[1][0][-1] * 0.5),
        lambda s, x: s.l(s.a(x).permute(2, 0, 3, 1)[1] * 0.5),
        lambda s, x: s.c(s.weighted(x) * 0.5),
        lambda s, x: s.c((s.a(x) + x.mean((1, 2, 3), keepdim=True)) * 0.5),  # whose type the input has
        lambda s, x: s.first((x / 255) * 2 - 1),
        lambda s, x: s.first(F.batch_norm(x, s.mean, s.variance) * 2 - 1),
    ],
)
def test_scales_behind_what_keeps_types_merge(forward: Any, given: bool) -> None:
    model = Layers(forward)
    model.register_buffer("mean", torch.ones(4))
    model.register_buffer("variance", torch.full((4,), 2.0))
    model, x = ready(model), image(2, 4, 6, 6)
    compiled = elc_fx.compile(model, x if given else None)
    assert_same(compiled(x), model(x))
    report = elc_fx.report_of(compiled)
    assert report.merged and not any("type" in refusal.reason for refusal in report.refused if given)


class Tempered(nn.MaxPool2d):
    """With a parameter that it does not use."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.temperature = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.a(x.byte() * 2.0),
        lambda s, x: s.c(s.a(x).flatten(2).argsort(2).view(2, 8, 6, 6) * 0.5),
        lambda s, x: s.c(F.max_pool2d(s.a(x), 3, 1, 1, return_indices=True)[1] * 0.5),
        lambda s, x: s.c(s.pool(s.a(x))[1] * 0.5),
        lambda s, x: s.a((x.permute(0, 1, 3, 2) > 0) * 0.5),
        lambda s, x: s.c(s.a(x).type_as(x > 0) * 0.5),
        lambda s, x: s.c(s.a(x).type(dtype="torch.ByteTensor") * 0.5),
        lambda s, x: s.c(operator.add(s.a(x).flatten(2).topk(36), (1,))[1].view(2, 8, 6, 6) * 0.5),
        lambda s, x: s.c((s.a(x).flatten(2).topk(36) * 2)[3].view(2, 8, 6, 6) * 0.5),
        lambda s, x: s.c(s.a(x).flatten(2).topk(36)[1:][0].view(2, 8, 6, 6) * 0.5),
        lambda s, x: s.c(torch.native_dropout(s.a(x), 0.5, False)[1] * 0.5),
        lambda s, x: s.a(x.byte() * s.a(x).nelement() * 0.5),
        lambda s, x: s.a(s.tempered(x.byte()) * 0.5),
        lambda s, x: s.c(s.a(x).to(x > 0) * 0.5),
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["without examples", "with examples"])
def test_scales_that_make_floats_of_others_stay(forward: Any, given: bool) -> None:
    model = Layers(forward)
    model.pool = nn.MaxPool2d(3, 1, 1, return_indices=True)
    model.tempered = Tempered(1)
    model, x = ready(model).float(), image(2, 4, 6, 6).float()
    assert_same(elc_fx.compile(model, x if given else None)(x), model(x), 1e-4)


def test_examples_of_bytes_tell_that_they_are_scaled_first() -> None:
    model, x = ready(Layers(lambda s, x: s.a(x * 2.0))).float(), torch.randint(0, 255, (2, 4, 6, 6), dtype=torch.uint8)
    for given in (None, x):
        compiled = elc_fx.compile(model, given)
        assert_same(compiled(x), model(x), 1e-4)
    (refusal,) = elc_fx.report_of(compiled).refused
    assert refusal.reason == "it makes floating-point numbers of others"


def test_examples_of_floats_tell_that_they_are_given() -> None:
    model, x = ready(Layers(lambda s, x: s.first(x * 2 - 1))), image(2, 4, 6, 6)
    assert not elc_fx.report_of(elc_fx.compile(model)).merged
    compiled = elc_fx.compile(model, x)
    assert len(elc_fx.report_of(compiled).merged) == 1
    assert_same(compiled(x), model(x))


def test_an_axis_that_is_computed_is_no_concatenation_of_channels() -> None:
    model = ready(Layers(lambda s, x: s.first(torch.cat([x, x], x.dim() - 4)) * 0.5))
    assert_same(elc_fx.compile(model)(x := image(2, 4, 6, 6)), model(x))


@pytest.mark.parametrize("name", sorted(name for name in dir(Tensor) if not name.startswith("_")))
def test_methods_that_give_no_tensors_are_none(name: str) -> None:
    """Those without arguments: what they give is no operand that decides a type."""
    x = torch.ones(2, 3)
    try:
        result = getattr(x, name)()
    except (TypeError, RuntimeError, AttributeError, AssertionError):  # those of other arguments, tensors, devices
        return
    call = fx.Graph().call_method(name)
    (claim,) = claims_of(call, ((x,), {}), 0)
    if not isinstance(result, tuple | list):
        check_claim(claim, result, call)


def test_a_parametrization_may_give_another_type() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.half()

    halved = nn.Conv2d(4, 8, 3, bias=False)
    nn.utils.parametrize.register_parametrization(halved, "weight", Half(), unsafe=True)
    model = Layers(lambda s, x: s.c(s.halved(x.half()) * s.scales)).float()
    model.halved, model.scales = halved, nn.Parameter(torch.ones(8, 1, 1))
    x = image(2, 4, 6, 6).float()
    assert_same(elc_fx.compile(model.eval())(x), model(x), 1e-3)


def test_a_plan_holds_though_examples_tell_more_than_the_graph() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = torch.index_select(dim=1, index=s.order, input=s.a(x))
        return s.c(s.d(y).relu() + y * 0.5)

    model = Layers(forward)
    model.d, model.order = nn.Conv2d(8, 8, 3, padding=1), torch.arange(8)
    model, x = ready(model), image(2, 4, 6, 6)
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x))
    assert_same(decoupled(x), model(x))


@pytest.mark.parametrize("constant", [torch.arange(8) % 2 == 0, torch.arange(8), torch.arange(8).float()])
def test_constants_of_narrower_types_merge(constant: Tensor) -> None:
    model = Layers(lambda s, x: s.c(s.a(x) * s.mask))
    model.mask = constant.view(8, 1, 1)
    model, x = ready(model), image(2, 4, 6, 6)
    compiled = elc_fx.compile(model)
    assert_same(compiled(x), model(x))
    assert len(elc_fx.report_of(compiled).merged) == 1


def test_inputs_are_normalised_in_the_first_layer() -> None:
    model = Layers(lambda s, x: s.first((x - s.mean) / s.deviation))
    model.register_buffer("mean", torch.rand(1, 4, 1, 1))
    model.register_buffer("deviation", torch.rand(1, 4, 1, 1) + 0.5)
    model, x = ready(model), image(2, 4, 6, 6)
    compiled = elc_fx.compile(model, x)
    assert_same(compiled(x), model(x))
    assert len(elc_fx.report_of(compiled).merged) == 1


@pytest.mark.parametrize("constant", [torch.arange(8) % 2 == 0, torch.arange(8) + 1, torch.rand(8).float() + 0.5])
@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.e(s.d(s.a(x) * s.q).relu()),
        lambda s, x: s.d((s.a(x) * s.q).relu()),
        lambda s, x: s.d(s.a(x).relu()) * s.q,
        lambda s, x: (lambda y: y * s.q + s.e(s.d(y).relu()))(s.a(x)),
    ],
)
def test_plans_with_constants_of_narrower_types_hold(forward: Any, constant: Tensor) -> None:
    check_plan(forward, constant.view(8, 1, 1))


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.d(s.a(x).relu()) * s.q,
        lambda s, x: s.e((s.d(s.a(x).relu()) * s.q).float()),
        lambda s, x: (lambda y: (y + s.e(s.d(y).relu()) * s.q).float())(s.a(x).relu()),
    ],
)
def test_plans_with_constants_of_wider_types_hold(forward: Any) -> None:
    check_plan(forward, torch.rand(8, 1, 1).double() + 0.5, torch.float32)


def check_plan(forward: Any, constant: Tensor, dtype: torch.dtype = torch.float64) -> None:
    model = Layers(forward)
    model.d, model.e = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    model, x = ready(model).to(dtype), image(2, 4, 6, 6).to(dtype)
    model.q = constant
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    plan = elc_fx.Plan.of(model, x)
    assert plan.candidates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merges that cost more
        decoupled = elc_fx.decouple(model, plan).eval()
    assert_same(decoupled(x), model(x), tolerance)
    elc_fx.set_gate(decoupled, 0)
    assert_same(elc_fx.merge(decoupled)(x), decoupled(x), tolerance)
