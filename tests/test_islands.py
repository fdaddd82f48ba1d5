"""Modules that cannot be traced: they stay as they are, and their children are compiled where nobody can tell."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, opaque_reasons
from networks import Gate, RepVGGBlock, Unary, assert_same, batch_norms, conv_bn, convolutions, image, pair, ready
from torch import Tensor, fx, nn

import elc_fx


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


class SetsUp(nn.Module):
    """Goes through all modules, but never while it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RepVGGBlock(4, 4), RepVGGBlock(4, 4)

    def init_weights(self) -> None:
        for module in self.modules():
            module.apply(lambda m: None)

    def head(self, x: Tensor) -> Tensor:
        return self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x if x.mean() > 0 else -x)


class LooksThrough(SetsUp):
    def head(self, x: Tensor) -> Tensor:
        self.init_weights()
        return super().head(x)


@pytest.mark.parametrize(("kind", "compiled"), [(SetsUp, 2), (LooksThrough, 0)])
def test_methods_that_a_call_does_not_run_may_go_through_the_children(kind: Any, compiled: int) -> None:
    model = ready(kind())
    result = elc_fx.compile(model)
    assert len(elc_fx.report_of(result).merged) == compiled
    assert_same(result(image(2, 4, 5, 5)), model(image(2, 4, 5, 5)))


class SumsUp(nn.Module):
    """Cannot be traced, and reads its block's parameters, by ways that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def init_weights(self) -> Tensor:
        return sum(p.sum() for m in self.modules() for p in m.parameters(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x if x.sum() < 1e9 else -x) + self.total()


class ByInheritance(SumsUp):
    def total(self) -> Tensor:
        return super().init_weights()


class ByReference(SumsUp):
    def __init__(self) -> None:
        super().__init__()
        self.total = self.init_weights


class ByName(SumsUp):
    total = SumsUp.init_weights


class ByLambda(SumsUp):
    def __init__(self) -> None:
        super().__init__()
        self.total = lambda: self.init_weights()


class ByProperty(SumsUp):
    def total(self) -> Tensor:
        return self.sum

    sum = property(SumsUp.init_weights)


@pytest.mark.parametrize("kind", [ByInheritance, ByReference, ByName, ByLambda, ByProperty])
def test_what_sets_weights_up_may_be_called_by_other_ways(kind: Any) -> None:
    model = ready(kind())
    result = elc_fx.compile(model)
    assert_same(result(image(2, 4, 5, 5)), model(image(2, 4, 5, 5)))
