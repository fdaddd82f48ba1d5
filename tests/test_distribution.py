"""A batch norm behind a join of layers of different values goes into the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BATCH_NORM, CONV, Unary, assert_same, batch_norms, conv_bn, convolutions, image, operators, ready
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
