"""What tracing must not decide, and what it must read as the model does."""

from __future__ import annotations

import builtins
import contextlib
import cProfile
import gc
import math
import operator
import pickle
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_or_refused, check, opaque_reasons
from networks import (
    Defaults,
    RepVGGBlock,
    Unary,
    UNetDecoder,
    assert_same,
    batch_norms,
    conv_bn,
    flops,
    image,
    pair,
    per_channel,
    quiet,
    ready,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import elc_fx
from elc_fx.capturing.questions import questions_of


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


class Asked(nn.Module):
    """Asks something of what its layer gives, and computes something else where the answer is no."""

    def __init__(self, question: Callable[[Any, Any], bool]) -> None:
        super().__init__()
        self.first, self.second = conv_bn(4, 4), conv_bn(4, 4)
        self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 2.0))
        self.lstm, self.kept = nn.LSTM(5, 5), nn.Identity()
        self.parallel = nn.DataParallel(nn.LSTM(5, 5))
        self.question = question

    def forward(self, x: Any) -> Tensor:
        y = self.first(x)
        z: Tensor = self.second(y) if self.question(self, y) else y * 3
        return z


class OfFour(type):
    """Whose instances are what has four axes."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return bool(instance.ndim == 4)


class FourAxes(metaclass=OfFour):
    pass


@pytest.mark.parametrize(
    "question",
    [
        lambda s, y: isinstance(y, Tensor),
        lambda s, y: not isinstance(y, list),
        lambda s, y: not isinstance(y, list | tuple),
        lambda s, y: isinstance(y, (list, (int, Tensor))),
        lambda s, y: isinstance(y, Iterable) and isinstance(y.double(), Tensor),
        lambda s, y: torch.is_tensor(y),
        lambda s, y: isinstance(y.data, Tensor) and isinstance(y.shape, tuple) and isinstance(y.ndim, int),
        lambda s, y: isinstance(y.dtype, torch.dtype) and isinstance(y.device, torch.device),
        lambda s, y: isinstance(y.shape[0], int) and not isinstance(y.size(-1), (Tensor, float)),
        lambda s, y: isinstance(y.size(), tuple) and isinstance(y.shape[1:], torch.Size) and isinstance(y.numel(), int),
        lambda s, y: not isinstance(math.ceil(y.shape[2] / 2) + 1, Tensor),
        lambda s, y: isinstance(y.chunk(2)[0], Tensor) and not isinstance(y.split([1, 3], 1)[1], list),
        lambda s, y: isinstance(s.scale, nn.Parameter) and isinstance(s.scale.data, Tensor),
        lambda s, y: isinstance(F.interpolate(torch.cat([y, y + 1], 1)[:, :3].relu().flatten(1)[None], 2), Tensor),
    ],
)
def test_types_of_what_is_a_tensor_for_sure_are_known(question: Callable[[Any, Any], bool]) -> None:
    compiled = check(ready(Asked(question)), image(2, 4, 5, 5))
    assert not opaque_reasons(compiled) and not batch_norms(compiled)
    assert "isinstance" not in globals() and not hasattr(torch, "isinstance")


def test_types_are_known_to_files_that_have_pythons_own_function_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `from builtins import *`, by which code ran under Python 2."""
    monkeypatch.setitem(globals(), "isinstance", isinstance)
    compiled = check(ready(Asked(lambda s, y: isinstance(y, Tensor))), image(2, 4, 5, 5))
    assert not opaque_reasons(compiled) and not batch_norms(compiled)
    assert globals()["isinstance"] is builtins.isinstance


@pytest.mark.parametrize(
    "question",
    [
        lambda s, y: isinstance(y, torch.DoubleTensor),
        lambda s, y: isinstance(s.kept(s.scale), nn.Parameter),
        lambda s, y: isinstance(y.nonzero(as_tuple=True), tuple),
        lambda s, y: isinstance(y, FourAxes),
        lambda s, y: isinstance(s.lstm(y[0, 0])[1], tuple),
        lambda s, y: isinstance(s.parallel(y[0, 0]), tuple),
        lambda s, y: isinstance(y.max(1), tuple),
        lambda s, y: isinstance(y.chunk(2), tuple),
        lambda s, y: isinstance(y.shape[0] / 2, float),
        lambda s, y: isinstance(y.sum().item(), float),
        lambda s, y: isinstance(operator.add(y.shape[2:3], (4,)), tuple),
        lambda s, y: isinstance(y.shape[2:] * 2, tuple),
        lambda s, y: isinstance(max(y.shape[2:], (7, 9)), tuple),
        lambda s, y: isinstance("a" * y.shape[1], str),
        lambda s, y: isinstance((1,) * y.shape[1], tuple),
        lambda s, y: isinstance(y.grad_fn, type(None)),
        lambda s, y: isinstance(F.max_pool2d(y, 2, return_indices=True), tuple),
        lambda s, y: isinstance(F.max_pool2d(y, 2, None, 0, 1, False, True), tuple),
    ],
)
def test_types_that_are_not_known_are_not_guessed(question: Callable[[Any, Any], bool]) -> None:
    assert opaque_reasons(check(ready(Asked(question)), image(2, 4, 5, 5)))


def test_examples_tell_the_types_of_inputs() -> None:
    """And that of inputs alone: what else is given then is refused, whatever the code would do with it."""
    model = ready(Unary(lambda s, x: s.block(x if isinstance(x, Tensor) else torch.stack(x)), block=conv_bn(4, 4)))
    x = image(2, 4, 5, 5)
    assert "give example_inputs" in opaque_reasons(elc_fx.compile(model))
    compiled = elc_fx.compile(model, x)
    assert not opaque_reasons(compiled)
    assert_same(compiled(x), model(x))
    with pytest.raises(AssertionError, match="`x` was a tensor in the example_inputs"):
        compiled(list(x))


class Kind(Tensor):
    pass


def test_a_kind_of_tensor_is_not_told_from_others_by_an_example() -> None:
    model = ready(Unary(lambda s, x: s.block(x * 2 if isinstance(x, Kind) else x), block=conv_bn(4, 4)))
    x = image(2, 4, 5, 5)
    compiled = elc_fx.compile(model, x)
    for given in (x, x.as_subclass(Kind)):
        assert_same(compiled(given), model(given))


def test_of_inputs_that_nobody_asks_for_nothing_is_required() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = conv_bn(4, 4)

        def forward(self, x: Tensor, scale: Any) -> Tensor:
            y: Tensor = self.block(x) * scale
            return y.relu() if isinstance(self.block(x), Tensor) else y

    model, x = ready(Scaled()), image(2, 4, 5, 5)
    compiled = elc_fx.compile(model, (x, torch.tensor(2.0)))
    assert not opaque_reasons(compiled)
    assert_same(compiled(x, 3.0), model(x, 3.0))


def pads_same(s: Any, x: Tensor) -> Tensor:
    """As TensorFlow does: the last window begins inside of the image."""
    y = s.block(x)
    sides = [max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in y.shape[-2:]]
    height, width = sides
    y = F.pad(y, [width // 2, width - width // 2, height // 2, height - height // 2])
    return F.conv2d(y, s.w, stride=2)


def limits(s: Any, x: Tensor) -> Tensor:
    y = s.block(x)
    smaller = min(y.shape[2], y.size(3), 4)
    return s.other(F.adaptive_avg_pool2d(y, (smaller, max([y.shape[2] // 2, 1])))) * max(y.shape)


@pytest.mark.parametrize("forward", [pads_same, limits])
def test_the_larger_of_two_sizes_is_computed_by_the_graph(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = ready(Unary(forward, block=conv_bn(4, 4), other=conv_bn(4, 4), w=nn.Parameter(torch.rand(4, 4, 3, 3))))
    compiled = check(model, image(2, 4, 6, 5))
    assert not opaque_reasons(compiled) and not batch_norms(compiled)
    assert not opaque_reasons(elc_fx.compile(pickle.loads(pickle.dumps(compiled))))
    for other in (image(1, 4, 3, 9), image(1, 4, 8, 8)):
        assert_same(compiled(other), model(other))
    assert "max" not in globals() and "min" not in globals()


def test_the_larger_of_two_values_is_no_question_of_sizes() -> None:
    model = ready(Unary(lambda s, x: s.block(x) * max(x.sum(), 0), block=conv_bn(4, 4)))
    x = image(2, 4, 5, 5)
    for given in (x, -x):
        assert_same(check(model, given)(x), model(x))


def types_of_parameter(s: Any, x: Tensor) -> Tensor:
    w = s.scale
    return x * w if type(w) is nn.Parameter else x * 0


def types_of_attribute(s: Any, x: Tensor) -> Tensor:
    data = x.data
    return x * 2 if type(data) is Tensor else x * 0


def attributes_of_parameter(s: Any, x: Tensor) -> Tensor:
    w = s.scale
    return x * 0 if hasattr(w, "no_such_thing") else x * w


def raises_for_attribute(s: Any, x: Tensor) -> Tensor:
    data = x.data
    try:
        return x * data[1000]
    except IndexError:
        return x * 2


@pytest.mark.parametrize(
    "forward", [types_of_parameter, types_of_attribute, attributes_of_parameter, raises_for_attribute]
)
def test_parameters_and_attributes_are_asked_as_values_are(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = ready(Unary(lambda s, x: forward(s, s.block(x)), block=conv_bn(4, 4), scale=nn.Parameter(torch.ones(1))))
    assert opaque_reasons(check(model, image(2, 4, 5, 5)))


def test_code_in_a_folder_called_torch_is_not_torchs(tmp_path: Path) -> None:
    file = tmp_path / "torch" / "net.py"
    file.parent.mkdir()
    code = "def forward(s, x, skip):\n    if skip is None:\n        return s.block(x)\n    return s.block(x) + skip\n"
    file.write_text(code)
    names: dict[str, Any] = {}
    exec(compile(code, str(file), "exec"), names)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = conv_bn(4, 4)

        forward = names["forward"]

    model, x = ready(Net()), image(2, 4, 5, 5)
    compiled = elc_fx.compile(model)
    assert_same(compiled(x, None), model(x, None))
    assert_same(compiled(x, x), model(x, x))


COUNTS: dict[str, Callable[[Any, Any], Any]] = {
    "nelement": lambda s, x: x.nelement(),
    "itemsize": lambda s, x: x.itemsize,
    "offset": lambda s, x: x.storage_offset() + 1,
    "max": lambda s, x: max(s.block(x).shape),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", COUNTS)
def test_a_number_that_grows_is_another_one(name: str, given: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        n = COUNTS[name](s, x)
        m = n
        n += 1
        y: Tensor = s.block(x) * m
        return y + n

    model, x = ready(Unary(forward, block=conv_bn(4, 4))), image(2, 4, 5, 5)
    compiled = elc_fx.compile(model, x if given else None)
    assert not opaque_reasons(compiled)
    assert_same(compiled(x), model(x))


SPLIT: dict[str, Callable[[Any, Any], list[Any]]] = {
    "list": lambda s, y: list(y.chunk(2, 1)),
    "sizes": lambda s, y: list(torch.split(y, [1, 3], dim=1)),
    "sizes, of a method": lambda s, y: list(y.split(split_size=[1, 3], dim=1)),
    "starred": lambda s, y: [*y.tensor_split((1, 3), 1)],
    "sections": lambda s, y: [*y.tensor_split(sections=2, dim=1)],
    "loop": lambda s, y: [part.relu() for part in torch.chunk(y, chunks=2, dim=1)],
    "rest": lambda s, y: (lambda first, *rest: [first, *rest])(*y.split_with_sizes([2, 2], 1)),
    "zip": lambda s, y: [part * k for k, part in zip((1, 2), y.tensor_split(2, dim=1), strict=True)],
    "length": lambda s, y: [y.chunk(2, 1)[len(y.chunk(2, 1)) - 1]],
}


@pytest.mark.parametrize("name", SPLIT)
def test_parts_whose_number_is_known_may_be_iterated(name: str, tmp_path: Path) -> None:
    """As the C2f blocks of YOLO do."""

    def forward(s: Any, x: Tensor) -> Tensor:
        parts = SPLIT[name](s, s.block(x))
        parts.append(s.inner(parts[-1][:, :1]))
        y: Tensor = torch.cat(parts, 1)
        return y.reshape(*y.shape[:2], -1) * y.flatten(2).reshape(*x.shape[:1], -1, x.size(2) * x.size(3))

    model, x = ready(Unary(forward, block=conv_bn(4, 4), inner=conv_bn(1, 1))), image(2, 4, 5, 5)
    compiled = check(model, x)
    assert not opaque_reasons(compiled) and not batch_norms(compiled)
    assert_same(pickle.loads(pickle.dumps(compiled))(x), model(x))
    assert_same(quiet(torch.jit.script, compiled)(x), model(x))
    assert not opaque_reasons(elc_fx.compile(compiled))
    elc_fx.save(compiled, tmp_path / "parts.elc")
    assert_same(elc_fx.load(tmp_path / "parts.elc")(x), model(x))


def test_another_number_of_parts_is_an_error() -> None:
    model = ready(Unary(lambda s, x: sum(s.block(part) for part in x.chunk(3, 2)), block=conv_bn(4, 4)))
    compiled = elc_fx.compile(model)
    x = image(2, 4, 4, 5)
    assert not opaque_reasons(compiled)
    assert_same(compiled(x[:, :, :3]), model(x[:, :, :3]))
    with pytest.raises(AssertionError, match="another number of parts than the 3"):
        compiled(x)  # two of two


def test_inputs_that_are_lists_are_as_long_as_in_the_examples() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(conv_bn(4, 4) for _ in range(2))

        def forward(self, features: list[Tensor]) -> list[Tensor]:
            return [block(feature) for block, feature in zip(self.blocks, features, strict=True)]

    model, features = ready(Head()), [image(1, 4, 5, 5), image(1, 4, 3, 3)]
    assert "number of its parts is not known" in opaque_reasons(elc_fx.compile(model))
    compiled = elc_fx.compile(model, (features,))
    assert not opaque_reasons(compiled) and not batch_norms(compiled)
    assert_same(compiled(features), model(features))
    with pytest.raises(AssertionError, match="another number of parts"):
        compiled(features[:1])


def asserts(s: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 4, f"channels: {x.shape}"
    assert x.dim() == 4
    return s.block(x)  # type: ignore[no-any-return]


def raises(s: Any, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if height % 4 != 0 or width % 4:
        wanted = (height // 4 + 1) * 4
        raise ValueError(f"{height}×{width}, not {wanted}")
    ok = x.shape[1] == 4
    if not ok:
        if s.named:
            raise TypeError(s.named)
        raise ValueError
    return s.block(x)  # type: ignore[no-any-return]


def raises_at_the_end(s: Any, x: Tensor) -> Tensor:
    if x.shape[2] % 4 == 0 and x.shape[1] == 4:
        return s.block(x)  # type: ignore[no-any-return]
    for i in range(3):
        if i == len(s.named):
            raise TypeError(i)
    raise ValueError


def looks_at_numbers(s: Any, x: Tensor) -> Tensor:
    if torch.isnan(x).any():
        raise ValueError
    assert x.max() < 99
    return s.block(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [asserts, raises, raises_at_the_end, looks_at_numbers])
def test_what_only_raises_errors_otherwise_is_checked(forward: Any) -> None:
    model, x = ready(Unary(forward, block=RepVGGBlock(4, 4), named="")), image(2, 4, 8, 8)
    compiled = check(model, x)
    assert not opaque_reasons(compiled) and not batch_norms(compiled)
    assert_same(compiled(x[:1]), model(x[:1]))
    if forward is raises:
        assert_same(compiled(x[..., :4]), model(x[..., :4]))
    wrong = x * float("nan") if forward is looks_at_numbers else image(2, 3, 7, 7)
    with pytest.raises((ValueError, TypeError, AssertionError)):
        model(wrong)
    with pytest.raises(
        AssertionError, match=rf"`{forward.__name__}` raises an error for such inputs \(test_tracing.py"
    ):
        compiled(wrong)


def either(s: Any, x: Tensor) -> Tensor:
    if x.shape[1] != 4:
        return x
    return s.block(x)  # type: ignore[no-any-return]


def raises_sometimes(s: Any, x: Tensor) -> Tensor:
    if x.shape[1] != 4:
        if x.shape[2] > 4:
            raise ValueError
        x = x[:, :4]
    return s.block(x)  # type: ignore[no-any-return]


def catches(s: Any, x: Tensor) -> Tensor:
    try:
        assert x.shape[2] > 7
    except AssertionError:
        x = x * 2
    return s.block(x)  # type: ignore[no-any-return]


def suppresses(s: Any, x: Tensor) -> Tensor:
    y: Tensor = x * 2
    with contextlib.suppress(ValueError):
        if x.shape[2] < 8:
            raise ValueError
        y = x * 3
    return s.block(y)  # type: ignore[no-any-return]


def raises_to_its_caller(s: Any, x: Tensor) -> Tensor:
    try:
        return raises(s, x)
    except ValueError:
        return s.block(x) * 2  # type: ignore[no-any-return]


def counts(s: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        if x.shape[2] > 8:
            break
    else:
        return s.block(x)  # type: ignore[no-any-return]
    raise ValueError


@pytest.mark.parametrize(
    "forward", [either, raises_sometimes, catches, suppresses, raises_to_its_caller], ids=lambda f: f.__name__
)
def test_what_may_also_do_something_else_is_not_decided(forward: Any) -> None:
    model = ready(Unary(forward, block=RepVGGBlock(4, 4), named=""))
    compiled = check(model, image(2, 4, 8, 8))
    assert opaque_reasons(compiled)
    for other in (image(2, 4, 5, 5), image(2, 5, 4, 4), image(2, 4, 9, 8)):
        with contextlib.suppress(ValueError, RuntimeError):
            assert_same_or_refused(compiled, model, other)


def test_loops_are_looked_through() -> None:
    model, x = ready(Unary(counts, block=RepVGGBlock(4, 4))), image(2, 4, 8, 8)
    compiled = check(model, x)
    assert not opaque_reasons(compiled)
    assert_same_or_refused(compiled, model, x[..., :5, :])
    with pytest.raises(AssertionError):
        compiled(image(2, 4, 9, 8))


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
