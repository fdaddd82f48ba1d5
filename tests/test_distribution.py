"""A batch norm behind a join of layers of different values goes into the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_or_refused, check
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    BATCH_NORM,
    CONV,
    Unary,
    assert_same,
    batch_norms,
    conv_bn,
    convolutions,
    image,
    operators,
    ready,
)
from torch import Tensor, nn

import elc_fx

JOINS: dict[str, Any] = {
    "sum": lambda a, b, c: a + b,
    "difference": lambda a, b, c: a - b,
    "weighted": lambda a, b, c: torch.sub(a, b, alpha=0.5) + c,
    "turned round": lambda a, b, c: torch.rsub(a, b, alpha=2),
    "cat": lambda a, b, c: torch.cat([a, c, b], 1),
    "cat of sums": lambda a, b, c: torch.cat([a + b, c], 1),
    "sum of cats": lambda a, b, c: torch.cat([a, b[:, :2]], 1) + torch.cat([b[:, :2], c], 1),
}


def joined(join: Any, channels: int, dims: int = 2) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        u, v, w = F.relu(x), x.sigmoid(), x.tanh()
        return s.norm(join(s.a(u), s.b(v), s.c(w))).relu()

    layers = {name: CONV[dims](4, 4, 1, bias=name != "b") for name in "abc"}
    return Unary(forward, **layers, norm=BATCH_NORM[dims](channels))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "channels"),
    [("sum", 4), ("difference", 4), ("weighted", 4), ("turned round", 4), ("cat", 12), ("cat of sums", 8)],
)
def test_it_goes_into_each_layer(name: str, channels: int, dims: int) -> None:
    model, x = ready(joined(JOINS[name], channels, dims)), image(2, 4, *[3] * dims)
    result = check(model, x)
    assert not batch_norms(result) and len(convolutions(result)) == 3


def test_a_function_goes_with_what_it_reads() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.a(x.relu()) + s.b(x.tanh())
        return F.batch_norm(y, s.norm.running_mean, s.norm.running_var, s.norm.weight.abs(), s.norm.bias) * 2

    layers = {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)}
    result = check(ready(Unary(forward, **layers, norm=nn.BatchNorm2d(4))), image(2, 4, 3, 3))
    assert not batch_norms(result) and not result.graph.find_nodes(op="get_attr")
    assert operators(result, image(2, 4, 3, 3)).keys() == {"relu", "tanh", "convolution", "add"}


def test_layers_may_have_batch_norms_of_their_own() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.norm(s.a(x.relu()) + s.b(x.tanh())) * 0.5

    model = ready(Unary(forward, a=conv_bn(4, 4), b=conv_bn(4, 4, 1), norm=nn.BatchNorm2d(4)))
    result = check(model, image(2, 4, 3, 3))
    assert operators(result, image(2, 4, 3, 3)).keys() == {"relu", "tanh", "convolution", "add"}


def test_networks_without_numbers_compile() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.norm(s.a(x.relu()) + s.b(x.tanh())) * 2

    model = Unary(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)).eval().to("meta")
    assert elc_fx.compile(model)(torch.empty(2, 4, 3, 3, device="meta")).shape == (2, 4, 3, 3)


def test_a_pooling_of_the_input_is_no_layer() -> None:
    layers = {"pool": nn.AvgPool1d(3, 1, 1), "a": nn.BatchNorm1d(2), "norm": nn.BatchNorm1d(4)}
    model = ready(Unary(lambda s, x: s.norm(torch.cat([s.pool(x), s.a(x)], 1)), **layers))
    check(model, image(2, 2, 5))


def test_layers_of_two_types_are_left_alone() -> None:
    """The whole shift would be rounded to the narrower one."""
    model = ready(
        Unary(
            lambda s, x: s.norm(s.a(x.half()) + s.b(x)),
            a=nn.Conv2d(4, 4, 1),
            b=nn.Conv2d(4, 4, 1),
            norm=nn.BatchNorm2d(4),
        )
    )
    model.float().a.half()
    with torch.no_grad():
        model.b.bias.add_(1000.0)
        model.norm.running_mean.fill_(1000.0)
    x = image(2, 4, 6, 6).float()
    assert_same(elc_fx.compile(model)(x), model(x), 1e-4)


def test_what_others_read_is_left_alone() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = s.a(x.relu())
        return s.norm(y + s.b(x.tanh())), y

    model = ready(Unary(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)))
    assert len(batch_norms(check(model, image(2, 4, 3, 3)))) == 1


@pytest.mark.parametrize(
    "join",
    [lambda a, b: a + b.relu(), lambda a, b: a + a, lambda a, b: a.add_(b), lambda a, b: a + b.mean(1, keepdim=True)],
    ids=["an activation", "twice the same", "in place", "of one channel"],
)
def test_where_it_does_not_fit_it_stays(join: Any) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.norm(join(s.a(x.relu()), s.b(x.tanh())))

    check(ready(Unary(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))), image(2, 4, 3, 3))


def test_one_channel_that_is_broadcast_is_not_scaled_as_many() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.norm(s.a(x.relu()) + s.b(x.tanh()))

    model = ready(Unary(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 1, 1), norm=nn.BatchNorm2d(4)))
    check(model, image(2, 4, 3, 3))


def test_numbers_that_do_not_merge_stay_in_the_type_of_their_layer() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.norm(s.a(x.relu()) + s.b(x.tanh()))

    model = Unary(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model.a.weight[0, 0] = float("nan")
    x = image(2, 4, 3, 3, dtype=torch.float32)
    result = elc_fx.compile(model)
    assert torch.equal(result(x).isnan(), model(x).isnan())
    assert_same(result(x)[:, 1:], model(x)[:, 1:], 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.booleans(), st.integers(0, 5))
def test_random_concatenations_and_sums(widths: list[int], sums: bool, seed: int) -> None:
    """Concatenations of layers of different values; with sums, each summed with another."""
    layers = {f"l{i}": nn.Conv2d(4, width, 3, padding=1) for i, width in enumerate(widths)}
    others = {f"o{i}": nn.Conv2d(4, width, 1) for i, width in enumerate(widths)} if sums else {}

    def forward(s: Any, x: Tensor) -> Tensor:
        values = [getattr(s, f"l{i}")(x.sin() * (i + 1)) for i in range(len(widths))]
        if sums:
            values = [value - getattr(s, f"o{i}")(x.cos()) for i, value in enumerate(values)]
        return s.norm(torch.cat(values, 1))

    model = ready(Unary(forward, **layers, **others, norm=nn.BatchNorm2d(sum(widths))), seed)
    result = check(model, image(2, 4, 4, 4, seed=seed))
    assert not batch_norms(result)
    assert "native_batch_norm" not in operators(result, image(2, 4, 4, 4))


def test_the_origin_of_each_layer_is_told() -> None:
    model, x = ready(joined(JOINS["cat"], 12)), image(2, 4, 3, 3)
    diff = elc_fx.diff(model, elc_fx.compile(model, x), x)
    (change,) = [change for change in diff.changes if change.kind != "kept"]
    assert len(change.before) == 4 and len(change.after) == 3


def test_joins_inside_of_each_other_with_batch_norms_between() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.inner(torch.cat([s.a(x.relu()), s.b(x.tanh())], 1))
        z = s.outer(y + s.d(x.sin()))
        return s.last(torch.cat([z, s.c(x.cos())], 1))

    layers = {name: nn.Conv2d(4, 4, 1) for name in "abc"}
    norms = {"inner": nn.BatchNorm2d(8), "outer": nn.BatchNorm2d(8), "last": nn.BatchNorm2d(12)}
    model = ready(Unary(forward, **layers, **norms, d=nn.Conv2d(4, 8, 1)))
    assert not batch_norms(check(model, image(2, 4, 3, 3)))


def test_branches_of_other_axes_are_left_alone() -> None:
    """What a 1-d convolution or a linear layer gives has as many channels, on another axis."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.l, self.norm = nn.Conv2d(3, 6, 1), nn.Conv1d(3, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(self.a(x) + self.l(y))

    model = ready(Both())
    x, y = image(2, 3, 6, 5), image(6, 3, 5)
    for result in (elc_fx.compile(model), elc_fx.compile(model, (x, y))):
        assert_same(result(x, y), model(x, y))
    mixed = {"a": nn.Conv1d(6, 6, 1), "l": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6)}
    check(ready(Unary(lambda s, x: s.norm(s.a(x) + s.l(x)), **mixed)), image(2, 6, 6))


def test_a_scale_of_four_axes_makes_four() -> None:
    model = ready(Unary(lambda s, x: (s.a(x.relu()) + s.b(x.tanh())) * s.w, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)))
    model.register_buffer("w", torch.full((1, 4, 1, 1), 2.0, dtype=torch.float64))
    assert_same_or_refused(elc_fx.compile(model), model, image(3, 8, 8))


@pytest.mark.parametrize("kind", ["half", "infinite"])
def test_scales_that_the_layers_cannot_hold_stay(kind: str) -> None:
    model = Unary(lambda s, x: s.norm(s.a(x.relu()) + s.b(x.tanh())), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    model.add_module("norm", nn.BatchNorm2d(4, eps=1e-9 if kind == "half" else 0.0))
    with torch.no_grad():
        model.a.bias.zero_(), model.b.bias.fill_(100.0), model.norm.running_mean.fill_(100.0)
        model.norm.running_var.fill_(1e-6 if kind == "half" else 0.0)
    if kind == "half":
        model.a.half(), model.b.half()
    x = image(2, 4, 3, 3, dtype=torch.float16 if kind == "half" else torch.float32)
    result = elc_fx.compile(model.eval())
    assert torch.equal(result(x).nan_to_num(), model(x).nan_to_num()) and len(batch_norms(result)) == 1


def test_a_layer_that_is_read_twice_is_not_doubled() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.c(s.norm(s.a(x.relu()) + s.a(x.tanh())))

    model = ready(Unary(forward, a=nn.Conv2d(4, 64, 3), norm=nn.BatchNorm2d(64), c=nn.Conv2d(64, 4, 1)))
    result = check(model, image(2, 4, 5, 5))
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_long_sum_is_no_recursion() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.norm(sum(s.a(x * float(i)) for i in range(400)))

    check(ready(Unary(forward, a=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2))), image(1, 2, 2, 2))
