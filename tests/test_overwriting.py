"""Modules and values with several readers, and values that are overwritten."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, opaque_reasons
from networks import (
    SHARED,
    Unary,
    assert_same,
    batch_norms,
    conv_bn,
    convolutions,
    flops,
    image,
    operators,
    pair,
    ready,
    sharing,
)
from torch import Tensor, nn

import elc_fx
from elc_fx.capturing.attributes import unchanged

# --- one module, several readers --------------------------------------------------------------------------------------


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


def test_a_module_that_is_called_often_becomes_one_layer() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(3):
            x = s.block(x).relu()
        y, z = x[:1], x[1:]
        return s.a(y) + s.b(y), s.a(z) + s.b(z), s.a(x) + 2 * s.b(x)

    model, x = ready(pair(forward, block=conv_bn(4, 4))), image(2, 4, 5, 5)
    compiled = elc_fx.compile(model)
    assert_same(compiled(x), model(x))
    assert [layer.kernel_size for layer in {*convolutions(compiled)}] == [(3, 3)] * 3
    assert operators(compiled, x)["convolution"] == 6


def test_intermediate_value_read_twice_is_not_computed_twice() -> None:
    model, x = ready(sharing(SHARED["value read and returned"])), image(2, 4, 3, 3)
    assert flops(elc_fx.compile(model), x) == flops(model, x)


# --- sizes ------------------------------------------------------------------------------------------------------------


def reads_sizes(s: Any, x: Tensor) -> Any:
    y = s.c(x)
    assert y.size(1) == 4
    n, _, height, width = y.shape
    z = s.bn(y) + x.new_ones(n, 1, height, width)
    return z.view(n, -1, height * width) * y.dim()


def reads_sizes_of_what_is_written(s: Any, x: Tensor) -> Any:
    y = s.c(x)
    seen = y[:, :1]
    height = y.shape[2]
    seen += 1.5
    return s.bn(y) * height


def reads_sizes_of_what_is_turned(s: Any, x: Tensor) -> Any:
    y = s.c(x)
    z = s.bn(y)
    z.transpose_(2, 3)
    return z * y.shape[2]


def reads_sizes_of_a_view(s: Any, x: Tensor) -> Any:
    y = s.c(x)
    seen = y.view(y.size(0), 4, -1, y.size(3))
    height = seen.shape[2]
    y += 1.5
    return s.bn(seen) * height + y


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "forward", [reads_sizes, reads_sizes_of_what_is_written, reads_sizes_of_what_is_turned, reads_sizes_of_a_view]
)
def test_a_size_that_is_read_in_between_keeps_nothing_apart(forward: Callable[[Any, Tensor], Any], given: bool) -> None:
    model = ready(Unary(forward, c=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4)))
    x, other = image(2, 4, 5, 5), image(1, 4, 7, 3)
    compiled = elc_fx.compile(model, x if given else None)
    assert_same(compiled(x), model(x))
    assert_same(compiled(other), model(other))
    assert len(batch_norms(compiled)) == (forward not in (reads_sizes, reads_sizes_of_what_is_turned))


# --- in-place operations ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("writes", [True, False])
def test_a_crop_that_shows_what_is_written_before_it_is_read(writes: bool) -> None:
    """As in blocks of unpadded convolutions whose activation works in place."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.block(x)
        crop = y[:, :, 1:-1, 1:-1]
        z = s.inner(F.relu(y, inplace=writes))
        out: Tensor = z + s.a(crop)
        return out

    model, x = (
        ready(Unary(forward, block=conv_bn(4, 4), inner=nn.Conv2d(4, 4, 3), a=nn.Conv2d(4, 4, 1))),
        image(2, 4, 7, 7),
    )
    compiled = check(model, x)
    reasons = [refusal.reason for refusal in elc_fx.report_of(compiled).refused]
    assert any("may overwrite what it shows" in reason for reason in reasons) == writes


def test_parts_that_are_written_into_are_so_in_what_is_unpickled() -> None:
    """Torch's own tracer, which reads the code again, would take `half *= 2` for `half = half * 2`."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.block(x)
        half, _ = y.chunk(2, 1)
        half *= 2
        data = y.data
        data += 1
        z: Tensor = s.a(y)
        return z

    model, x = ready(Unary(forward, block=conv_bn(4, 4), a=nn.Conv2d(4, 4, 3))), image(2, 4, 7, 7)
    planner = elc_fx.Planner(model, x, [x], loss="uniform")
    plan = elc_fx.Plan.of(model, x, collapse=["a:1x1"])
    for made in (elc_fx.compile(model, x), elc_fx.decouple(model, plan), planner.collapse(plan)):
        with torch.no_grad():
            once = pickle.loads(pickle.dumps(made))
            assert_same(once(x), made(x), 0.0)
            assert_same(pickle.loads(pickle.dumps(once))(x), made(x), 0.0)
            assert_same(elc_fx.compile(once)(x), made(x))


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


@pytest.mark.parametrize(
    "joined", [lambda a, b, c: a + b + c, lambda a, b, c: torch.cat([a, b, c], 1)], ids=["+", "cat"]
)
def test_an_activation_in_place_inside_of_a_branch_leaves_the_others_to_be_merged(joined: Any) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return joined(s.a(x), s.b(x), s.c(s.act(s.bn(s.d(x)))))

    def parts(inplace: bool) -> dict[str, nn.Module]:
        layers = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "abcd"}
        return {**layers, "bn": nn.BatchNorm2d(4), "act": nn.ReLU(inplace)}

    twins = [check(ready(Unary(forward, **parts(inplace))), image(2, 4, 5, 5)) for inplace in (False, True)]
    assert len(convolutions(twins[1])) == len(convolutions(twins[0])) == 3


def test_a_branch_that_is_overwritten_before_the_sum_is_read_in_time() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.d(x)
        a, b = s.a(y) + y, s.b(y)
        y.relu_()
        return a + b + s.c(y)

    layers = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "abcd"}
    check(ready(Unary(forward, **layers)), image(2, 4, 5, 5))


def test_a_buffer_that_is_written_under_another_name_is_no_constant() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 3)
            self.register_buffer("scale", torch.ones(4, 1, 1))
            self.register_buffer("read", self.scale.view(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(x.abs().mean() + 1)
            return self.layer(x) * self.read

    model, twin, x = Model().double().eval(), Model().double().eval(), image(2, 4, 5, 5)
    twin.load_state_dict(model.state_dict())
    result = elc_fx.compile(model)
    for _ in range(3):
        assert_same(result(x), twin(x))


def test_statistics_that_become_nan_are_put_back() -> None:
    norm = nn.BatchNorm2d(3).train()
    with unchanged(norm):
        norm(torch.full((1, 3, 2, 2), torch.nan))
    assert torch.equal(norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]
