"""What must not go wrong: one test for each promise, named after it."""

from __future__ import annotations

import contextlib
import copy
import cProfile
import functools
import gc
import io
import operator
import pickle
import random
import re
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from networks import (
    PUBLISHED,
    BatchNormThenPad,
    DiverseBranchBlock,
    Formula,
    RepVGGBlock,
    Unary,
    UNetDecoder,
    assert_same,
    batch_norms,
    conv_bn,
    convolutions,
    flops,
    image,
    operators,
    pair,
    per_channel,
    quiet,
    randomize_,
    ready,
    resnet20,
    small_net,
)
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_map_only

import elc_fx
from elc_fx import fusion
from elc_fx.affine import AffineMap
from elc_fx.questions import questions_of

Model = Callable[[], nn.Module]


def check(model: nn.Module, *inputs: Tensor, tolerance: float = 1e-9) -> nn.Module:
    """Compiles without and with example inputs; either result equals the model. Returns the first."""
    with_examples = elc_fx.compile(model, tuple(x.clone() for x in inputs))
    compiled = elc_fx.compile(model)
    for result in (with_examples, compiled):
        ours, theirs = [x.clone() for x in inputs], [x.clone() for x in inputs]
        assert_same(result(*ours), model(*theirs), tolerance)
        for mine, original, given in zip(ours, theirs, inputs, strict=True):
            assert torch.equal(mine, original) or torch.equal(mine, given), "an argument was overwritten"
    return compiled


def assert_same_or_refused(compiled: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """A call that is unlike the example inputs is answered rightly or not at all."""
    expected = model(*args, **kwargs)
    try:
        actual = compiled(*args, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, elc_fx.ElcError):
        return
    assert_same(actual, expected)


def opaque_reasons(compiled: nn.Module) -> str:
    return "\n".join(f"{refusal.where}: {refusal.reason}" for refusal in elc_fx.report_of(compiled).opaque)


# --- tracing must not take the wrong side ----------------------------------------------------------------------------


def join(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else x + skip


def join_deeply(x: Tensor, skip: Tensor | None) -> Tensor:
    return join(x, skip)


class Optional(nn.Module):
    """A block, and a second input that may be absent. The question is asked by `joined`."""

    def __init__(self, joined: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.block, self.joined = RepVGGBlock(4, 4), joined

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.block(self.joined(self.block(x), skip))


def joined_by_match(x: Tensor, skip: Tensor | None) -> Tensor:
    match skip:
        case None:
            return x
        case _:
            return x + skip


def joined_by_type(x: Tensor, skip: Tensor | None) -> Tensor:
    return x + skip if type(skip) is Tensor else x


def joined_by_exception(x: Tensor, skip: Any) -> Tensor:
    try:
        return x + skip
    except TypeError:
        return x


def joined_by_loop(x: Tensor, skip: Tensor | None) -> Tensor:
    for other in [x, skip]:
        if other is not None and other is not x:
            x = x + other
    return x


def joined_by_operator(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if operator.is_(skip, None) else x + skip


def joined_by_walrus(x: Tensor, skip: Tensor | None) -> Tensor:
    return x + other if (other := skip) is not None else x


def joined_by_suppress(x: Tensor, skip: Any) -> Tensor:
    with contextlib.suppress(TypeError):
        x = x + skip
    return x


QUESTIONS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "is None": lambda x, skip: x if skip is None else x + skip,
    "is not None": lambda x, skip: x + skip if skip is not None else x,
    "== None": lambda x, skip: x if skip == None else x + skip,  # noqa: E711
    "in (None,)": lambda x, skip: x if skip in (None,) else x + skip,
    "isinstance": lambda x, skip: x + skip if isinstance(skip, Tensor) else x,
    "isinstance, beside torch": lambda x, skip: torch.where(x > 0, x, 0.0) + skip if isinstance(skip, Tensor) else x,
    "isinstance by map": lambda x, skip: x + skip if all(map(isinstance, (x, skip), (Tensor, Tensor))) else x,
    "torch.typename": lambda x, skip: x + skip if "Tensor" in torch.typename(skip) else x,
    "tree_map_only": lambda x, skip: x + tree_map_only(Tensor, lambda v: 2 * v, (x, skip))[0],
    "torch.is_tensor": lambda x, skip: x + skip if torch.is_tensor(skip) else x,
    "type": joined_by_type,
    "match": joined_by_match,
    "except": joined_by_exception,
    "suppress": joined_by_suppress,
    "hasattr": lambda x, skip: x + skip if hasattr(skip, "shape") else x,
    "callable": lambda x, skip: x + skip if callable(getattr(skip, "add", None)) else x,
    "comprehension": lambda x, skip: sum(v for v in (x, skip) if v is not None),  # type: ignore[misc]
    "any": lambda x, skip: x if any(v is None for v in (x, skip)) else x + skip,
    "filter": lambda x, skip: sum(filter(lambda v: v is not None, (x, skip))),  # type: ignore[arg-type]
    "loop": joined_by_loop,
    "walrus": joined_by_walrus,
    "operator.is_": joined_by_operator,
    "helper": join,
    "helper of a helper": join_deeply,
}


ASKED_BY_TORCH: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "where": lambda s, x: s.last(torch.where(x > 0, x, 0.0)),
    "where of numbers": lambda s, x: s.last(torch.where(x > 0, 1.0, 0.5).to(x.dtype)),
    "cat of chunks": lambda s, x: s.last(torch.cat(x.chunk(2, 1), 1)),
    "stack of splits": lambda s, x: s.last(torch.stack(torch.split(x, 2, 1)).sum(0).repeat(1, 2, 1, 1)),
}


@pytest.mark.parametrize("name", ASKED_BY_TORCH)
@pytest.mark.parametrize("nested", [False, True])
def test_what_torch_itself_asks_of_a_value_does_not_stop_tracing(name: str, nested: bool) -> None:
    def computed(module: Any, x: Tensor) -> Tensor:
        return ASKED_BY_TORCH[name](module, module.norm(module.first(x)))

    parts = {"first": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4), "last": nn.Conv2d(4, 4, 1)}
    model: nn.Module = Unary(computed, **parts)
    compiled = check(ready(nn.Sequential(model) if nested else model), image(2, 4, 6, 6))
    assert not opaque_reasons(compiled) and not batch_norms(compiled)


def test_nothing_of_the_caller_is_kept() -> None:
    """Neither by the hook that knows who asks, nor by the frames that it saw."""

    class Large:
        pass

    def caller() -> Any:
        large, model = Large(), ready(Unary(ASKED_BY_TORCH["where"], last=nn.Conv2d(4, 4, 1)))
        elc_fx.compile(model)
        return weakref.ref(large)

    gc.collect()
    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
    assert sys.getprofile() is None


def test_a_profiler_goes_on_with_its_work() -> None:
    model = ready(Unary(ASKED_BY_TORCH["where"], last=nn.Conv2d(4, 4, 1)))
    profile, x = cProfile.Profile(), image(1, 4, 5, 5)
    profile.enable()
    try:
        before = sys.getprofile()
        compiled = elc_fx.compile(model)
        assert sys.getprofile() is before
    finally:
        profile.disable()
    assert any("capture" in str(entry.code) for entry in profile.getstats())
    assert_same(compiled(x), model(x))


@pytest.mark.parametrize("name", QUESTIONS)
def test_optional_argument_is_never_decided_by_tracing(name: str) -> None:
    model = ready(Optional(QUESTIONS[name]))
    x, skip = image(2, 4, 5, 5), image(2, 4, 5, 5, seed=1)
    without, with_one, with_both = (elc_fx.compile(model, e) for e in (None, (x,), (x, skip)))
    assert_same(without(x), model(x))
    assert_same(with_one(x), model(x))
    assert_same(with_both(x, skip), model(x, skip))
    for compiled in (without, with_one, with_both):
        assert_same_or_refused(compiled, model, x)
        assert_same_or_refused(compiled, model, x, None)
        assert_same_or_refused(compiled, model, x, skip)
        assert_same_or_refused(compiled, model, x, skip=skip)
        assert not batch_norms(compiled)


DECIDED_BY: dict[str, Callable[[Any, Tensor], bool]] = {
    "set": lambda s, x: x.shape[-1] in {5, 16},
    "key": lambda s, x: {5: True}.get(x.shape[-1], False),
    "key of an attribute": lambda s, x: {"cpu": True}.get(x.device.type, False),
    "several in a set": lambda s, x: len({x.shape[-1], x.shape[-2]}) == 1,
    "dtype in a set": lambda s, x: x.dtype in {torch.float64},
    "dtype is": lambda s, x: x.dtype is torch.float64,
    "text": lambda s, x: f"{x.shape[-1]}" == "5",
    "text of an attribute": lambda s, x: str(x.device).startswith("cpu"),
    "representation": lambda s, x: "64" in repr(x.dtype),
    "identity": lambda s, x: x.contiguous() is x,
    "identity of a variable": lambda s, x: (y := s.first(x)) is not x and y is not s,
}


@pytest.mark.parametrize("name", DECIDED_BY)
def test_what_values_are_is_never_decided_by_stand_ins(name: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.first(x) if DECIDED_BY[name](s, x) else s.second(x)
        return y

    model = ready(Unary(forward, first=conv_bn(4, 4), second=conv_bn(4, 4)))
    model.asks = DECIDED_BY[name]  # the code that may run is found through attributes
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, image(2, 4, 5, 5))):
        for size in ((5, 5), (6, 6), (5, 6), (6, 5)):
            assert_same(compiled(image(2, 4, *size)), model(image(2, 4, *size)))
        assert re.search("looks up a traced value|the text of a traced value|the same object", opaque_reasons(compiled))


MISSING = object()


def added(x: Tensor, y: Any = MISSING) -> Tensor:
    if y is MISSING:
        y = x * 2
    return x + y  # type: ignore[no-any-return]


def averaged(x: Tensor) -> Tensor:
    factor: Any = False
    if factor is False:
        factor = x.mean()
    return x * factor  # type: ignore[no-any-return]


def told_apart_by_a_call(x: Tensor, mode: Any = 3) -> Tensor:
    pick = str
    return 2 * x if mode is pick(3) else x


@pytest.mark.parametrize("function", [added, averaged, told_apart_by_a_call])
def test_what_is_no_traced_value_may_be_known_by_identity(function: Callable[[Tensor], Tensor]) -> None:
    model = ready(Unary(lambda s, x: s.block(function(x)), block=conv_bn(4, 4)))
    assert not opaque_reasons(check(model, image(1, 4, 5, 5)))


IDENTITIES: dict[str, tuple[Callable[..., Any], set[tuple[str, str]]]] = {
    "two variables": (lambda x, y: x is y, {("identity", "x"), ("identity", "y")}),
    "an element": (lambda x, y: x is y[0], {("identity", "x")}),
    "a call": (lambda x, y: x is y.get("k", x), {("identity", "x")}),
    "a call of a variable": (lambda x, y: x is y(3), {("identity", "x")}),
    "a text": (lambda x, y: x is f"{y}", {("identity", "x")}),
    "a constant": (lambda x, y: x is not True, {("constant", "x")}),
    "a global": (lambda x, y: torch.float32 is x, {("constant", "x")}),
    "of an attribute": (lambda x, y: x.dtype is torch.float32, {("identity", "x")}),
    "an attribute of its own": (lambda self, x: x is self.missing, {("constant", "x"), ("identity", "self")}),
    "None": (lambda x, y: x is None, {("None", "x")}),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_both_sides_of_an_identity_are_found(name: str) -> None:
    function, expected = IDENTITIES[name]
    assert {(q.kind, q.variable) for q in questions_of(function.__code__)} == expected


def test_stand_ins_may_be_part_of_messages() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 4, f"{x.shape[1]}")
        torch._assert(x.dim() == 4, f"of {x.shape} on {x.device!r}, " + str(x.dtype))
        y: Tensor = s.block(x)
        return y

    model = ready(Unary(forward, block=conv_bn(4, 4)))
    assert not opaque_reasons(check(model, image(1, 4, 5, 5)))


def test_bare_except_does_not_swallow_what_tracing_raises() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.c(x)
        try:
            return y * 2 if y.sum() > -1e9 else y
        except:  # noqa: E722 (the bare form is what is tested: other bytecode than that of a class)
            return y

    check(ready(Unary(forward, c=conv_bn(4, 4))), image(1, 4, 5, 5))


def test_unet_decoder_with_optional_skip_merges_in_both_forms() -> None:
    model, x, skip = ready(UNetDecoder(4, 3)), image(1, 4, 4, 4), image(1, 3, 8, 8)
    alone, both = elc_fx.compile(model, (x,)), elc_fx.compile(model, {"x": x, "skip": skip})
    assert_same(alone(x), model(x))
    assert_same(both(x, skip), model(x, skip))
    assert_same(both(x, skip=skip), model(x, skip))
    assert not batch_norms(alone) and not batch_norms(both)
    assert flops(both, x, skip) <= flops(model, x, skip)


def test_optional_argument_of_a_submodule_is_not_decided_by_tracing() -> None:
    """The decoder gets its skip on one path, None on another, and on a third what another module returned."""
    maybe = Unary(lambda s, x: None if s.off else F.avg_pool2d(x, 1), off=False)
    model = ready(
        Unary(
            lambda s, x: s.one(x) + s.two(x, F.interpolate(x, scale_factor=2.0)) + s.two(x, s.maybe(s.one(x))),
            one=UNetDecoder(4, 4),
            two=UNetDecoder(4, 4),
            maybe=maybe,
        )
    )
    compiled = check(model, image(1, 4, 4, 4))
    assert not batch_norms(compiled)


class TensorOrList(nn.Module):
    """Asks as torchvision's DenseNet layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Any) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        return self.block(torch.cat(features, 1))


def test_input_that_may_be_a_tensor_or_a_list() -> None:
    model, x = ready(TensorOrList()), image(1, 4, 5, 5)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
        assert_same(compiled(x), model(x))
        assert_same_or_refused(compiled, model, [x[:, :1], x[:, 1:]])
        assert not batch_norms(compiled)


class Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Tensor, scale: float = 2.0, *, flip: bool = False, other: Tensor | None = None) -> Tensor:
        x = self.block(x) * scale
        return x.flip(-1) if flip else x


def test_arguments_with_defaults_are_right_or_refused() -> None:
    model, x = ready(Defaults()), image(1, 4, 5, 5)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,)), elc_fx.compile(model, {"x": x})):
        assert_same(compiled(x), model(x))
        assert_same(compiled(x=x), model(x))
        assert not batch_norms(compiled)
        for kwargs in ({"scale": 3.0}, {"flip": True}, {"scale": 0.5, "flip": True}, {"scale": torch.tensor(2.5)}):
            assert_same_or_refused(compiled, model, x, **kwargs)


def test_keyword_arguments_given_as_examples_are_inputs() -> None:
    model, x = ready(Defaults()), image(1, 4, 5, 5)
    compiled = elc_fx.compile(model, {"x": x, "scale": 3.0, "flip": True})
    assert_same(compiled(x=x, scale=3.0, flip=True), model(x, 3.0, flip=True))
    assert_same_or_refused(compiled, model, x, scale=4.0, flip=True)
    assert_same_or_refused(compiled, model, x, scale=3.0, flip=False)
    assert_same_or_refused(compiled, model, x)


class Variadic(nn.Module):
    """Any number of feature maps; their number decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)

    def forward(self, *maps: Tensor, **named: Tensor) -> Tensor:
        y = self.block(sum(maps) / len(maps))
        if "bias" in named:
            y = y + named["bias"]
        return y


def test_variadic_arguments_are_right_or_refused() -> None:
    model, x, y = ready(Variadic()), image(1, 4, 5, 5), image(1, 4, 5, 5, seed=1)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x, y))):
        assert_same(compiled(x, y), model(x, y))
        assert_same_or_refused(compiled, model, x)
        assert_same_or_refused(compiled, model, x, y, y)
        assert_same_or_refused(compiled, model, x, y, bias=x)
        assert not batch_norms(compiled)


class TracerErrorCaught(nn.Module):
    """A fallback that only a tracer's stand-in can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            rows = len(list(range(x.shape[2])))
        except Exception:
            rows = 1
        return self.block(x) * rows


def test_forward_that_swallows_the_tracers_errors() -> None:
    assert not batch_norms(check(ready(TracerErrorCaught()), image(1, 4, 5, 6)))


def test_sizes_are_not_frozen() -> None:
    """The example's sizes decide costs, never what is computed."""

    def forward(s: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = s.a(x).reshape(n, c, h * w).softmax(-1).view(n, c, h, w)
        return s.b(y + torch.arange(w, dtype=x.dtype)) if w > 4 else s.b(y)

    model = ready(pair(forward))
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (image(1, 4, 5, 5),))):
        for x in (image(1, 4, 5, 5), image(2, 4, 3, 7), image(3, 4, 4, 4)):
            assert_same(compiled(x), model(x))


def test_names_of_the_users_that_look_like_the_tracers_own() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = F.conv2d(x, s.conv2d.weight, padding=1) + torch.ones(4, 1, 1)
        return s.conv2d(s.relu(y + s._tensor_constant0)) + s.add(y) * torch.full((4, 1, 1), 0.5) + s.x

    model = ready(
        Unary(
            forward,
            conv2d=nn.Conv2d(4, 4, 3, padding=1),
            add=conv_bn(4, 4),
            relu=nn.ReLU(),
            x=per_channel(4),
            _tensor_constant0=torch.full((4, 1, 1), 3.0),
        )
    )
    check(model, image(2, 4, 5, 5))


# --- what cannot be traced -------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Cannot be traced: its control flow depends on data."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.block = RepVGGBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.block(x)
        return -x


def test_untraceable_submodule_becomes_a_leaf_with_a_reason() -> None:
    model = ready(nn.Sequential(RepVGGBlock(4, 4), nn.ReLU(), Gate(), *conv_bn(4, 4)))
    x = image(2, 4, 6, 6)
    compiled = elc_fx.compile(model)
    assert isinstance(compiled, fx.GraphModule)
    for sample in (x, x - 9, x + 9):
        assert_same(compiled(sample), model(sample))
    assert "2" in [refusal.where for refusal in elc_fx.report_of(compiled).opaque]
    assert opaque_reasons(compiled)


def test_children_of_an_untraceable_submodule_are_compiled_too() -> None:
    model = ready(nn.Sequential(Gate(), nn.ReLU(), Gate()))
    compiled = elc_fx.compile(model)
    for sample in (image(2, 4, 6, 6) + 1, image(2, 4, 6, 6) - 1):
        assert_same(compiled(sample), model(sample))
    assert not batch_norms(compiled)


def test_untraceable_root_becomes_islands() -> None:
    model = ready(Gate())
    compiled = elc_fx.compile(model)
    for sample in (image(2, 4, 6, 6) + 1, image(2, 4, 6, 6) - 1):
        assert_same(compiled(sample), model(sample))
    assert len(convolutions(compiled)) == 1 and not batch_norms(compiled)
    assert isinstance(compiled, Gate) and compiled is not model
    assert len(elc_fx.report_of(compiled).merged) == 1


class BuiltByHelpers(nn.Module):
    """Its helpers get arguments that are not the module itself."""

    def __init__(self) -> None:
        def inner(width: int) -> nn.Module:
            return conv_bn(width.__index__(), 4)

        super().__init__()
        self.a, self.b = inner(4), self.outer(4)

    @staticmethod
    def outer(width: int) -> nn.Module:
        return conv_bn(width.__index__(), 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        y: Tensor = self.b(self.a(x).relu())
        return y


def test_helpers_say_nothing_of_the_children() -> None:
    assert len(elc_fx.report_of(check(ready(BuiltByHelpers()), image(2, 4, 5, 5))).merged) == 2


class ReadsLater(BuiltByHelpers):
    """What runs after `__init__` reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = lambda: self.a[0].weight.norm()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.norm()


def test_what_is_made_in_init_may_read_children_later() -> None:
    check(ready(ReadsLater()), image(2, 4, 5, 5))


def branching(formula: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """The formula in a module that cannot be traced."""

    def forward(s: Any, x: Tensor) -> Any:
        return formula(s, x) if x.abs().sum() > 0 else x

    return forward


READERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "weight of a child": lambda s, x: F.conv2d(x, s.seq[0].weight) + s.bn(x)[:, :, 1:-1, 1:-1],
    "attribute of a child": lambda s, x: s.block(x) * s.block.point[0].out_channels,
    "parameter of a grandchild": lambda s, x: s.block(x) + s.block.dense[1].running_mean.view(-1, 1, 1),
    "loop over a Sequential": lambda s, x: [x := layer(x) for layer in s.seq][-1],
    "item of a Sequential": lambda s, x: s.seq[0](x) + s.seq(x),
    "slice of a Sequential": lambda s, x: s.seq[:1](x),
    "length of a Sequential": lambda s, x: s.seq(x) * len(s.seq),
    "child of a child": lambda s, x: s.block.point(x) + s.block(x),
    "children()": lambda s, x: [m(x) for m in s.block.children()],
    "named_modules()": lambda s, x: s.block(x) * sum(isinstance(m, nn.Conv2d) for _, m in s.named_modules()),
    "isinstance of a child": lambda s, x: s.seq(x) if isinstance(s.seq, nn.Sequential) else x,
    "type of a child": lambda s, x: s.block(x) if type(s.block) is RepVGGBlock else x,
    "hasattr of a child": lambda s, x: s.block(x) if hasattr(s.block, "identity") else x,
    "method of a child": lambda s, x: s.block.forward(x),
    "child through getattr": lambda s, x: getattr(s, "blo" + "ck").point(x),
    "child through _modules": lambda s, x: s._modules["block"].point(x),
    "child in a plain list": lambda s, x: s.plain[0].point(x) + s.block(x),
    "state dict": lambda s, x: s.block(x) + sum(v.sum() for k, v in sorted(s.state_dict().items()) if "bias" in k),
    "parameters()": lambda s, x: s.block(x) * sum(p.numel() for p in s.block.parameters()),
    "child as an argument": lambda s, x: apply_twice(s.block, x),
    "training flag of a child": lambda s, x: s.block(x) if not s.block.training else x,
}


def apply_twice(block: nn.Module, x: Tensor) -> Tensor:
    return block.point(block(x))


@pytest.mark.parametrize("name", READERS)
def test_child_that_its_untraceable_parent_reads_stays_right(name: str) -> None:
    model = Unary(
        branching(READERS[name]),
        block=RepVGGBlock(4, 4),
        seq=nn.Sequential(*conv_bn(4, 4, padding=0)),
        bn=nn.BatchNorm2d(4),
    )
    model.plain = [model.block]
    check(ready(model), image(2, 4, 6, 6))


@pytest.mark.parametrize("name", READERS)
def test_child_that_a_traceable_parent_reads_stays_right(name: str) -> None:
    model = Unary(
        READERS[name], block=RepVGGBlock(4, 4), seq=nn.Sequential(*conv_bn(4, 4, padding=0)), bn=nn.BatchNorm2d(4)
    )
    model.plain = [model.block]
    check(ready(model), image(2, 4, 6, 6))


class Recurrent(nn.Module):
    """Calls a child a number of times that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item()) % 3 + 1):
            x = self.block(x)
        return x


def test_child_called_a_varying_number_of_times() -> None:
    model = ready(Recurrent())
    compiled = elc_fx.compile(model)
    for scale in (0.01, 1.0, 3.0):
        assert_same(compiled(image(1, 4, 5, 5) * scale), model(image(1, 4, 5, 5) * scale))
    assert len(convolutions(compiled)) == 1


class Frozen:
    """Not a tensor, not a container: an output that torch.fx has no word for."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.difference = first - second


class Named(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Record:
    first: Tensor
    second: Tensor


class Runs(nn.Module):
    """Layers that nothing is known about, and forms that tracing has trouble with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn(4, 4)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norms = nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        self.embedding = nn.Embedding(5, 6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.norms(self.conv(x))
        sequence = y.mean(2)
        hidden, (last, _) = self.lstm(sequence)
        attended, weights = self.attention(hidden, hidden, hidden)
        index = y.flatten(1).argmax(1) % 5
        return {"y": y, "last": last, "attended": attended, "weights": weights, "embedded": self.embedding(index)}


def test_odd_layers_run() -> None:
    model, x = ready(Runs()), image(2, 4, 5, 6)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
        assert_same(compiled(x), model(x))


FORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "checkpoint": lambda s, x: torch.utils.checkpoint.checkpoint(s.a, x, use_reentrant=False),
    "einsum": lambda s, x: torch.einsum("nchw,oc->nohw", s.a(x), s.b[0].weight[:, :, 0, 0]),
    "numpy": lambda s, x: s.a(x) + torch.from_numpy(x.detach().numpy() * 2),
    "unpacking": lambda s, x: [y * 2 for y in s.a(x).chunk(2, 1)],
    "string formatting": lambda s, x: s.a(x) if "Tensor" in str(type(x)) else x,
    "len": lambda s, x: s.a(x) * len(x),
    "device": lambda s, x: s.a(x) + torch.ones(4, 1, 1, device=x.device, dtype=x.dtype),
    "dtype": lambda s, x: s.a(x) if x.dtype == torch.float64 else x,
    "new_zeros": lambda s, x: s.a(x) + x.new_ones(4, 1, 1) + torch.zeros_like(x),
    "where": lambda s, x: torch.where(s.a(x) > 0, s.b(x), x),
    "assert": lambda s, x: asserting(s.a, x),
    "no_grad": lambda s, x: without_grad(s.a, x) + s.b(x),
    "autocast": lambda s, x: autocast(s.linear, x),
    "jit annotation": lambda s, x: torch.jit.annotate(Tensor, s.a(x)),
    "map": lambda s, x: list(map(s.a, (x, x + 1))),
    "global state": lambda s, x: s.a(x) if torch.is_grad_enabled() else s.b(x),
    "functional call": lambda s, x: torch.func.functional_call(s.a, {"0.weight": s.a[0].weight * 2}, (x,)),
    "vmap": lambda s, x: torch.vmap(lambda v: s.a(v[None])[0])(x),
}


def asserting(layer: nn.Module, x: Tensor) -> Tensor:
    assert x.dim() == 4, f"expected 4 axes, got {x.shape}"
    return layer(x)


def without_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x.mean((2, 3)).float())


@pytest.mark.parametrize("name", FORMS)
def test_what_runs_in_eager_mode_runs_compiled(name: str) -> None:
    model = ready(pair(FORMS[name], linear=nn.Linear(4, 4)))
    model.linear.float()
    x = image(2, 4, 5, 6)
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, (x,))):
        assert_same(compiled(x), model(x))
        with torch.no_grad():
            assert_same(compiled(x), model(x))


def test_model_that_cannot_be_deep_copied_compiles() -> None:
    model = ready(Unary(branching(lambda s, x: s.a(x)), a=conv_bn(4, 4)))
    model.lock = threading.Lock()
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    check(model, image(1, 4, 5, 5))


# --- one module, several readers -------------------------------------------------------------------------------------


SHARED: dict[str, Callable[[Any, Tensor], Any]] = {
    "convolution in a row": lambda s, x: s.c(s.c(x)),
    "convolution and batch norm in a row": lambda s, x: s.bn(s.c(s.bn(s.c(x)))),
    "convolution on two paths": lambda s, x: F.relu(s.bn(s.c(x))) + F.relu(s.c(-x)),
    "batch norm on one path only": lambda s, x: s.bn(s.c(x)) + F.relu(s.c(x)),
    "batch norm after two convolutions": lambda s, x: F.relu(s.bn(s.c(x))) + F.relu(s.bn(s.a(x))),
    "block twice": lambda s, x: s.block(F.relu(s.block(x))),
    "block as branch and as trunk": lambda s, x: s.block(x) + s.block(F.relu(x)),
    "tied weights": lambda s, x: s.bn(s.c(x)) + F.relu(s.tied(x)),
    "weight read by a function": lambda s, x: s.bn(s.c(x)) + F.relu(F.conv2d(x, s.c.weight, padding=1)),
    "weight in the output": lambda s, x: (s.bn(s.c(x)), s.c.weight),
    "statistics in the output": lambda s, x: (s.bn(s.c(x)), s.bn.running_mean * 2),
    "value read by two": lambda s, x: (lambda y: F.relu(y) + s.bn(y))(s.c(x)),
    "value read by two batch norms": lambda s, x: (lambda y: F.relu(s.bn(y)) + s.other(y))(s.c(x)),
    "value read and returned": lambda s, x: (lambda y: (y, s.bn(y)))(s.c(x)),
    "value read inside and outside a region": lambda s, x: (lambda y: (s.a(x) + y, F.relu(y)))(s.c(x)),
    "one name for two modules": lambda s, x: s.again(F.relu(s.c(x))) + s.c(x),
}


def sharing(formula: Callable[[Any, Tensor], Any]) -> nn.Module:
    convolution = nn.Conv2d(4, 4, 3, padding=1)
    tied = nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = convolution.weight
    return Unary(
        formula,
        c=convolution,
        again=convolution,
        tied=tied,
        a=conv_bn(4, 4, 1),
        bn=nn.BatchNorm2d(4),
        other=nn.BatchNorm2d(4),
        block=RepVGGBlock(4, 4),
    )


@pytest.mark.parametrize("name", SHARED)
def test_shared_module_or_value_is_not_changed_for_its_other_reader(name: str) -> None:
    check(ready(sharing(SHARED[name])), image(2, 4, 3, 3))


def test_module_called_twice_merges_on_each_path() -> None:
    model, x = ready(sharing(SHARED["batch norm on one path only"])), image(2, 4, 3, 3)
    compiled = elc_fx.compile(model)
    assert not batch_norms(compiled)
    assert operators(compiled, x)["convolution"] == 2
    twice = elc_fx.compile(ready(sharing(SHARED["block twice"])))
    assert operators(twice, x)["convolution"] == 2


def test_intermediate_value_read_twice_is_not_computed_twice() -> None:
    model, x = ready(sharing(SHARED["value read and returned"])), image(2, 4, 3, 3)
    assert flops(elc_fx.compile(model), x) == flops(model, x)


# --- in-place operations ---------------------------------------------------------------------------------------------


def overwriting(before: bool, overwrite: Callable[[Tensor], Any], alias: Callable[[Tensor], Tensor]) -> Any:
    """A value with a reader before or after one of its aliases is overwritten."""

    def forward(s: Any, x: Tensor) -> Any:
        y = s.c(x)
        seen = s.bn(y) if before else None
        overwrite(alias(y))
        return (seen if before else s.bn(y)) + s.a(y)

    return forward


def increase(y: Tensor) -> None:
    y += 1.5


def scale_part(y: Tensor) -> None:
    y[:, 1:] *= 2


@torch.library.custom_op("elc_fx_tests::scale_and_shift", mutates_args=["scaled", "shifted"])
def scale_and_shift(scaled: Tensor, shifted: Tensor) -> None:
    scaled.mul_(2.0)
    shifted.add_(1.5)


@torch.library.custom_op("elc_fx_tests::doubled_and_counted", mutates_args=["doubled"])
def doubled_and_counted(given: Tensor, doubled: Tensor) -> Tensor:
    doubled.mul_(2.0)
    return given + 1


def increase_data(y: Tensor) -> None:
    data = y.data
    data += 1.5


OVERWRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu_": lambda y: y.relu_(),
    "F.relu": lambda y: F.relu(y, inplace=True),
    "module": nn.ReLU(inplace=True),
    "+=": increase,
    "*= of a part": scale_part,
    "operator.iadd": lambda y: operator.iadd(y, 1.5),
    "__iadd__": lambda y: y.__iadd__(1.5),
    "assignment": lambda y: y.__setitem__((..., 0), 0.5),
    "fill of a part": lambda y: y[:, 1].fill_(2.0),
    "out=": lambda y: torch.clamp(y, min=0.1, out=y),
    "out= of two": lambda y: torch.sort(y.neg(), dim=1, out=(y, torch.empty_like(y, dtype=torch.long))),
    "list": lambda y: torch._foreach_add_([y], 1.5),
    "list, overload": lambda y: torch.ops.aten._foreach_add_.Scalar([y], 1.5),
    "last argument, overload": lambda y: torch.ops.aten.add.out(y.neg(), 1.5, out=y),
    "custom operator": lambda y: torch.ops.elc_fx_tests.scale_and_shift(y.neg(), y),
    "noise that is not returned": lambda y: torch.ops.aten.rrelu_with_noise.default(y.neg(), y, 0.1, 0.3, False),
    "operator that returns something else": lambda y: torch.ops.elc_fx_tests.doubled_and_counted.default(y.neg(), y),
    "+= of an attribute": increase_data,
    "set_": lambda y: y.set_(y.neg()),
}

ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "identity": nn.Identity(),
    "dropout": nn.Dropout(0.5).eval(),
    "F.dropout": lambda y: F.dropout(y, 0.5, training=False),
    "contiguous": lambda y: y.contiguous(),
    "to": lambda y: y.to(torch.float64),
    "slice": lambda y: y[:, :2],
    "view": lambda y: y.view(y.shape),
    "reshape": lambda y: y.reshape(-1, 4, 3, 3),
    "transpose": lambda y: y.transpose(2, 3),
    "chunk": lambda y: y.chunk(2, dim=1)[1],
    "detach": lambda y: y.detach(),
    "clone": lambda y: y.clone(),
}


@pytest.mark.parametrize("before", [True, False], ids=["read before", "read after"])
@pytest.mark.parametrize("overwrite", OVERWRITES)
def test_in_place_operation_whose_input_has_another_reader(before: bool, overwrite: str) -> None:
    for name in ("itself", "slice", "view"):
        model = ready(sharing(overwriting(before, OVERWRITES[overwrite], ALIASES[name])))
        with torch.no_grad():
            check(model, image(2, 4, 3, 3))


@pytest.mark.parametrize("before", [True, False], ids=["read before", "read after"])
@pytest.mark.parametrize("alias", ALIASES)
def test_in_place_operation_on_an_alias(before: bool, alias: str) -> None:
    model = ready(sharing(overwriting(before, OVERWRITES["relu_"], ALIASES[alias])))
    with torch.no_grad():
        check(model, image(2, 4, 3, 3))


PLACEHOLDERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "activated, then read twice": lambda s, x: (lambda y: s.bn(s.c(y)) + s.a(x))(F.relu(x, inplace=True)),
    "read, activated, read": lambda s, x: s.bn(s.c(x)) + s.a(F.relu_(x)),
    "read, activated, read again": lambda s, x: (s.a(x), x.mul_(2), s.a(x) + s.bn(s.c(x))),
    "residual into the input": lambda s, x: x.add_(s.c(x)) + s.a(x),
    "a view of the input": lambda s, x: s.c(x) + s.a(x[:, :, ::1].relu_()) + x,
    "activated and returned": lambda s, x: (s.bn(s.c(x.clone())), x.relu_(), x),
    "through an identity": lambda s, x: s.a(x) + s.bn(F.relu_(s.identity(x))) + x,
    "a part assigned": lambda s, x: s.a(x) + (x.__setitem__((slice(None), 0), 1.0), s.c(x))[1],
    "swapped halves": lambda s, x: (x[:, :2].add_(x[:, 2:]), s.block(x))[1],
}


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_input_overwritten_by_the_model_stays_right(name: str) -> None:
    model = ready(sharing(PLACEHOLDERS[name]))
    model.identity = nn.Identity()
    with torch.no_grad():
        check(model, image(2, 4, 3, 3))


def test_region_is_not_moved_past_an_overwrite_of_its_input() -> None:
    """The branches read x on either side of the overwrite; one convolution at either place would be wrong."""

    def forward(s: Any, x: Tensor) -> Tensor:
        first = s.a(x)
        x = x * 1.0
        second = s.c(x)
        x.relu_()
        return first + second + s.bn(x) + s.tied(x)

    with torch.no_grad():
        check(ready(sharing(forward)), image(2, 4, 3, 3))


def test_merged_value_may_be_overwritten_by_its_reader() -> None:
    """out += y overwrites the result of a region; another reader of out sees the sum, a reader of y does not."""

    def forward(s: Any, x: Tensor) -> Any:
        y = s.block(x)
        out = s.bn(s.c(x))
        out += y
        return out, y, F.relu(out)

    check(ready(sharing(forward)), image(2, 4, 3, 3))


def test_example_inputs_are_not_overwritten_by_compile() -> None:
    model, x = ready(nn.Sequential(nn.ReLU(inplace=True), *conv_bn(4, 4))), image(1, 4, 5, 5)
    kept = x.clone()
    elc_fx.compile(model, (x,))
    assert torch.equal(x, kept)


def scaled(y: Tensor, made: Tensor) -> Tensor:
    return y * made.exp().view(4, 1, 1)


def through_a_view(s: Any, y: Tensor, made: Tensor) -> Tensor:
    part = made[0]
    part.copy_(y.mean())
    return scaled(y, made)


def expanded(s: Any, y: Tensor, made: Tensor) -> Tensor:
    made.view_as(y.mean((0, 2, 3))).copy_(y.mean((0, 2, 3)))
    return scaled(y, made)


def written_or_doubled(s: Any, y: Tensor, made: Tensor) -> Tensor:
    try:
        made.copy_(y.mean())
    except:  # noqa: E722 (as above)
        made = made * 2
    return scaled(y, made)


WRITES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "read by itself": lambda s, y, made: (made.copy_(y.mean()), scaled(y, made))[1],
    "read with a value": lambda s, y, made: (made.add_(y.mean()), y * made.view(4, 1, 1))[1],
    "out=": lambda s, y, made: (torch.sum(y, (0, 2, 3), out=made), scaled(y, made))[1],
    "part": lambda s, y, made: (made.__setitem__(0, y.mean()), scaled(y, made))[1],
    "through a view": through_a_view,
    "through a view by its reader": expanded,
    "by a module": lambda s, y, made: (s.relu(made.sub_(y.mean())), scaled(y, made))[1],
    "under a bare except": written_or_doubled,
    "list": lambda s, y, made: (torch._foreach_add_([made], y.mean()), scaled(y, made))[1],
    "custom operator": lambda s, y, made: (
        torch.ops.elc_fx_tests.scale_and_shift(y.neg(), made),
        scaled(y, made),
    )[1],
    "statistics": lambda s, y, made: (
        F.batch_norm(y, made, torch.ones_like(made), training=True),
        scaled(y, made),
    )[1],
    "view of the second": lambda s, y, made: (
        torch.broadcast_tensors(y.mean((0, 2, 3)), made)[1].copy_(y.mean((0, 2, 3))),
        scaled(y, made),
    )[1],
    "changed by itself": lambda s, y, made: (y.add(made.view(4, 1, 1)), made.add_(1)) and y * made.view(4, 1, 1),
}


@pytest.mark.parametrize("kept", [False, True], ids=["made by forward", "buffer"])
@pytest.mark.parametrize("name", WRITES)
def test_values_written_into_a_tensor_that_is_none_of_the_graph(name: str, kept: bool) -> None:
    """It would be frozen as it is while tracing, and keep from call to call what is written."""

    def forward(s: Any, x: Tensor) -> Tensor:
        made = s.statistic if kept else torch.ones(4, dtype=torch.float64)
        written: Tensor = WRITES[name](s, s.c(x), made)
        return s.a(written)

    torch.manual_seed(0)
    layers = {"c": conv_bn(4, 4), "a": conv_bn(4, 4), "relu": nn.ReLU(inplace=True)}
    model = ready(Unary(forward, **layers, statistic=torch.ones(4, dtype=torch.float64)))
    compiled = [elc_fx.compile(model), elc_fx.compile(model, image(1, 4, 5, 5))]
    original = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(3):
            x = image(1, 4, 5, 5)
            expected = original(x)
            for result in compiled:
                assert_same(result(x), expected)


def exclusive_or(s: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(4, 1, 1, dtype=torch.bool)
    mask ^= s.c(x).mean((0, 2, 3)).view(4, 1, 1) > 0
    written: Tensor = s.a(x) * mask
    return written


def in_steps(s: Any, x: Tensor) -> Tensor:
    time = torch.zeros(4, 1, 1, dtype=torch.float64)
    for _ in range(3):
        x = x + s.c(x + time)
        time += 0.3
    return x


@pytest.mark.parametrize("forward", [exclusive_or, in_steps])
def test_tensor_that_forward_makes_and_changes(forward: Any) -> None:
    with torch.no_grad():
        model = ready(Unary(forward, c=conv_bn(4, 4), a=conv_bn(4, 4)))
        compiled = check(model, image(1, 4, 5, 5))
        for seed in range(3):
            x = image(1, 4, 5, 5, seed=seed)
            assert_same(compiled(x), model(x))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = conv_bn(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return in_steps(self, x)


def test_what_is_around_a_module_that_changes_its_own_tensor_is_traced() -> None:
    compiled = check(ready(nn.Sequential(conv_bn(4, 4), Steps(), conv_bn(4, 4))), image(1, 4, 5, 5))
    assert opaque_reasons(compiled).startswith("1: it changes a tensor") and opaque_reasons(compiled).count("\n") == 0


def test_matmul_has_no_form_in_place() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = z = s.c(x)
        y @= s.weight
        result: Tensor = s.a(y + z) + y
        return result

    weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    check(ready(Unary(forward, c=conv_bn(4, 4), a=conv_bn(4, 4), weight=weight)), image(1, 4, 5, 5))


def test_sparse_tensors_and_old_containers_among_the_attributes() -> None:
    """Buffers were kept in an OrderedDict by torch before 2.0, and models that it pickled have them so."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        s.steps.add_(1.0)
        product: Tensor = y * s.steps + torch.sparse.mm(s.sparse[0], y[0, 0])
        return product

    model = ready(Unary(forward, c=conv_bn(4, 4)))
    model.register_buffer("steps", torch.zeros((), dtype=torch.float64))
    model.sparse = [torch.eye(5, dtype=torch.float64).to_sparse()]
    model.__dict__["_buffers"] = OrderedDict(model._buffers)
    for examples in (None, image(1, 4, 5, 5)):
        compiled, original = elc_fx.compile(model, examples), copy.deepcopy(model)
        for _ in range(3):
            assert_same(compiled(image(1, 4, 5, 5)), original(image(1, 4, 5, 5)))


class MakesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = conv_bn(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.c(x)} if x.sum() < 1e9 else {}


class WritesDict(nn.Module):
    def forward(self, values: dict[str, Tensor]) -> Tensor:
        if values["a"].sum() < 1e9:
            values["b"] = values["a"] * 2
        return values["a"]


def test_dict_that_an_opaque_module_writes_into() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        values = s.makes(x)
        result: Tensor = s.a(s.writes(values)) + values["b"]
        return result

    model = ready(Unary(forward, a=conv_bn(4, 4), makes=MakesDict(), writes=WritesDict()))
    assert not batch_norms(check(model, image(1, 4, 5, 5)))
    assert elc_fx.report_of(elc_fx.compile(model, image(1, 4, 5, 5))).merged


class Constrained(nn.Conv2d):
    """Holds its filters to a length, in every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


CONSTRAINTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "own layer": lambda s, x: s.bn(s.constrained(x)),
    "data of a layer": lambda s, x: (s.c.weight.data.clamp_(-0.1, 0.1), s.bn(s.c(x)))[1],
    "data of a layer, assigned": lambda s, x: (setattr(s.c.weight, "data", F.normalize(s.c.weight)), s.bn(s.c(x)))[1],
    "layer": lambda s, x: (s.c.weight.clamp_(-0.1, 0.1), s.bn(s.c(x)))[1],
    "layer, as one of several": lambda s, x: (torch._foreach_clamp_max_([s.c.weight], 0.1), s.bn(s.c(x)))[1],
    "parameter": lambda s, x: (s.tied.weight.set_(s.tied.weight * 2), s.bn(F.conv2d(x, s.tied.weight)))[1],
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_layer_whose_weights_are_written_in_forward_is_not_folded(name: str) -> None:
    model = ready(sharing(CONSTRAINTS[name]))
    model.constrained = Constrained(4, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        compiled, x = elc_fx.compile(model), image(2, 4, 5, 5)
        assert_same(compiled(x), model(x))


def test_what_is_computed_from_a_buffer_may_be_overwritten() -> None:
    """A position bias of an MLP of coordinates, as in Swin: not the buffer is written, but what a layer made of it."""

    def forward(s: Any, x: Tensor) -> Tensor:
        bias = s.out(s.relu(s.hidden(s.coordinates))).permute(2, 0, 1)
        mask = torch.where(s.coordinates[..., 0] > 0, x, 0.0).relu_()
        return s.c(x) + bias + mask

    layers = {"hidden": nn.Linear(2, 8), "relu": nn.ReLU(inplace=True), "out": nn.Linear(8, 4), "c": conv_bn(4, 4)}
    model = Unary(forward, **layers, coordinates=torch.randn(5, 5, 2, dtype=torch.float64))
    assert not opaque_reasons(check(ready(model), image(1, 4, 5, 5)))


@pytest.mark.parametrize("form", [list, lambda ys: {"a": ys[0], "b": list(ys)}, lambda ys: (ys[0], [ys[1]])])
def test_lists_and_dicts_of_outputs_are_compared(form: Any) -> None:
    """torch.fx's own interpreter gives them in immutable forms."""
    model = ready(pair(lambda s, x: form([s.a(x), s.b(x)])))
    for compiled in (elc_fx.compile(model), elc_fx.compile(model, image(1, 4, 5, 5))):
        assert not batch_norms(compiled) and not elc_fx.report_of(compiled).opaque


def test_parameter_changed_by_forward_is_not_folded() -> None:
    """A buffer that every call changes: the third result differs from the first as the model's does."""

    def forward(s: Any, x: Tensor) -> Tensor:
        s.scale.add_(1.0)
        return s.c(x) * s.scale

    model = ready(Unary(forward, c=conv_bn(4, 4), scale=torch.ones(4, 1, 1, dtype=torch.float64)))
    for examples in (None, image(1, 4, 5, 5)):
        before = model.scale.clone()
        compiled = elc_fx.compile(model, examples)
        assert torch.equal(model.scale, before)
        original = copy.deepcopy(model)
        for _ in range(3):
            assert_same(compiled(image(1, 4, 5, 5)), original(image(1, 4, 5, 5)))


# --- hooks -----------------------------------------------------------------------------------------------------------


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


# --- parametrizations and subclasses ---------------------------------------------------------------------------------


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


# --- variants of the layers ------------------------------------------------------------------------------------------


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


# --- training mode ---------------------------------------------------------------------------------------------------


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


# --- inputs and outputs ----------------------------------------------------------------------------------------------


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


# --- types, devices, layouts -----------------------------------------------------------------------------------------


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


# --- determinism, and the caller's model -----------------------------------------------------------------------------


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


class Remembers(nn.Module):
    """Keeps what it has seen, which during tracing is a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.seen = RepVGGBlock(4, 4), []

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.append(x)
        return self.block(x) + torch.ones(4, 1, 1)


class WritesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.block(x) * self.steps


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that could have been changed: attributes of every module, flags, hooks, and the bits of every tensor."""
    attributes = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes[name] = {
            k: (id(v), copy.copy(v) if isinstance(v, dict | list | set) else None) for k, v in vars(module).items()
        }
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    state = {n: (id(t), t.requires_grad, t.grad, t.detach().clone() if not t.is_meta else None) for n, t in tensors}
    return {"attributes": attributes, "state": state}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    assert now["attributes"] == before["attributes"]
    assert list(now["state"]) == list(before["state"])
    for name, (identity, requires_grad, grad, value) in before["state"].items():
        other = now["state"][name]
        assert other[:3] == (identity, requires_grad, grad) and torch.equal(other[3], value), name


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


def storages(model: nn.Module) -> set[int]:
    """Addresses of the memory of every tensor that a module holds, registered or not."""
    held = [*model.parameters(), *model.buffers()]
    held += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return {t.untyped_storage().data_ptr() for t in held if t.numel()}


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


# --- the result ------------------------------------------------------------------------------------------------------


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


# --- verification ----------------------------------------------------------------------------------------------------


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


def test_wrong_result_is_an_error_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each region looked right by itself."""
    model, x = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU(), RepVGGBlock(4, 4))), image(2, 4, 5, 5)
    monkeypatch.setattr(AffineMap, "__add__", without_bias_of_the_second)
    monkeypatch.setattr(fusion, "verify_merge", lambda *_: None)
    with pytest.raises(elc_fx.VerificationError):
        elc_fx.compile(model, (x,))


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


class OfBlock(nn.Module):
    """Calls its block, and something else may read it."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) if block is None else block

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y if y.sum() > 0 else -y


class ReadsBlock(OfBlock):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y * self.block[0].weight.norm() if y.sum() > 0 else -y


class TwoOfBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = OfBlock()
        self.b = ReadsBlock(self.a.block)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y + self.b(x) if y.sum() > 0 else y - self.b(x)


def scaled_by_weight(self: OfBlock, x: Tensor) -> Tensor:
    y: Tensor = self.block(x)
    return y * self.block[0].weight.norm() if y.sum() > 0 else -y


class Patched(OfBlock):
    pass


Patched.forward = scaled_by_weight  # type: ignore[method-assign]


class WithFunction(OfBlock):
    """What it calls is an attribute that somebody set from outside."""

    after: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return self.after(y) if y.sum() > 0 else -y


def reads(model: OfBlock, y: Tensor) -> Tensor:
    return y * model.block[0].weight.norm()


STAYS = {
    "hook": "its children stay as they are: it has hooks",
    "shared": "a.block: several modules have it",
    "patched class": "its children stay as they are: code that may read them is not in the source of `Patched`",
    "method": "its children stay as they are: code that may read them is not in the source of `WithFunction`",
    "partial": "its children stay as they are: code that may read them is not in the source of `WithFunction`",
}


@pytest.mark.parametrize("how", STAYS)
def test_children_that_code_from_outside_may_read_stay(how: str) -> None:
    model: Any = {"shared": TwoOfBlock, "patched class": Patched}.get(how, WithFunction)()
    model = ready(model)
    if how == "hook":
        model.after = torch.relu
        model.register_forward_hook(lambda module, given, output: output * module.block[0].weight.norm())
    if how == "method":
        model.after = types.MethodType(reads, model)
    if how == "partial":
        model.after = functools.partial(reads, model)
    compiled = elc_fx.compile(model)
    for x in (image(2, 3, 6, 6), -image(2, 3, 6, 6)):
        assert_same(compiled(x), model(x))
    assert STAYS[how] in str(elc_fx.report_of(compiled))


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


HELD: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]] = {
    "list": (lambda block: [block], lambda held: held[0]),
    "dict": (lambda block: {"of": (block,)}, lambda held: held["of"][0]),
    "object": (Holder, lambda held: held.held),
    "partial": (lambda block: functools.partial(print, block), lambda held: held.args[0]),
    "method": (lambda block: block.forward, lambda held: held.__self__),
}


@pytest.mark.parametrize("how", HELD)
def test_children_that_attributes_hold_as_well_stay(how: str) -> None:
    hold, of = HELD[how]

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.block(x) * of(s.more)[0].weight.norm() if x.sum() < 1e9 else x

    model = ready(Unary(forward, block=conv_bn(4, 4)))
    model.more = hold(model.block)
    check(model, image(2, 4, 5, 5))


def test_attributes_are_looked_through_without_running_their_code() -> None:
    class Closed(dict[str, Any]):
        def __iter__(self) -> Any:
            raise ValueError("it is closed")

        values = items = __iter__

        def __deepcopy__(self, memo: object) -> Any:
            return self

        def __repr__(self) -> str:
            return "Closed"

    model = ready(OfBlock(conv_bn(3, 3)))
    model.more = [Closed(a=1), {"b": Closed()}]
    compiled, x = elc_fx.compile(model), image(2, 3, 6, 6)
    assert_same(compiled(x), model(x))
    assert not batch_norms(compiled)


def test_layers_that_an_opaque_module_calls_stay_as_they_are() -> None:
    model = ready(OfBlock(nn.Conv2d(3, 3, 3)))
    compiled = elc_fx.compile(model)
    assert isinstance(compiled, OfBlock) and type(compiled.block) is nn.Conv2d
    assert not elc_fx.report_of(compiled).refused


class BufferedConv(nn.Module):
    """No parameters: what it convolves with is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3, 3, 3, 3))
        self.norm = nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(F.conv2d(x, self.weight))
        return y


def test_children_without_parameters_are_compiled_too() -> None:
    report = elc_fx.report_of(check(ready(OfBlock(BufferedConv())), image(2, 3, 6, 6)))
    assert [region.name for region in report.merged] == ["block.conv2d"]


def test_the_report_says_why_children_stay() -> None:
    report = elc_fx.report_of(elc_fx.compile(ready(ReadsBlock())))
    assert [str(r) for r in report.refused] == [
        "block: the source of `ReadsBlock` does not show that it is only called"
    ]


class Recursive(WithFunction):
    """Functions that cannot reach its block: in a closure that holds itself, and of torch."""

    relu = staticmethod(F.relu)

    def __init__(self) -> None:
        def halved(y: Tensor, times: int = 2) -> Tensor:
            return halved(y / 2, times - 1) if times else self.relu(y)

        super().__init__()
        self.after = halved


def test_functions_that_do_not_reach_children_leave_them_to_be_compiled() -> None:
    model = ready(Recursive())
    compiled = elc_fx.compile(model)
    for x in (image(2, 3, 6, 6), -image(2, 3, 6, 6)):
        assert_same(compiled(x), model(x))
    assert not batch_norms(compiled)
