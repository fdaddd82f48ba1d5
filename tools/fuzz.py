"""Random networks, compiled, saved, decoupled and merged, and compared with what they were; what fails is made small.

A network is plain data: a list of layers, each a tuple of its kind and its numbers, with lists of layers in those that
have branches. So whatever fails can be cut down while it still fails, and printed as a test.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import elc_fx

Layers = list[Any]
DESCRIPTION = """Tries random networks: deep and wide ones, several inputs, shared modules, parts that cannot be traced.

Each is compiled with and without examples, saved and loaded, decoupled (which must change nothing), closed and merged,
and compared with the original in float64. The first of each kind of failure is made as small as it still fails, and
printed as a test for tests/test_regressions.py. Exit codes: 0 nothing found, 1 something, 2 wrong usage.

examples:
  python tools/fuzz.py --minutes 5
  python tools/fuzz.py --minutes 0.1 --seed 17   # begins with the network of seed 17
"""
TOLERANCE = 1e-9


class Block(nn.Module):
    """Layers in a row. widths: `out` is known when it is built. shared: modules that later layers may call again."""

    def __init__(self, layers: Layers, channels: int, shared: list[nn.Module]) -> None:
        super().__init__()
        self.parts, self.out = nn.ModuleList(), channels
        for layer in layers:
            part = build(layer, self.out, shared)
            self.out = getattr(part, "out", self.out)
            self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Sum(nn.Module):
    """Branches of one value, brought to its channels and added."""

    def __init__(self, branches: list[Layers], channels: int, shared: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Block(branch, channels, shared) for branch in branches)
        self.fit = nn.ModuleList(
            nn.Identity() if b.out == channels else nn.Conv2d(b.out, channels, 1) for b in self.branches
        )

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        for branch, fit in zip(self.branches, self.fit, strict=True):
            total = fit(branch(x)) + total
        return total


class Cat(nn.Module):
    def __init__(self, branches: list[Layers], channels: int, shared: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Block(branch, channels, shared) for branch in branches)
        self.out = sum(branch.out for branch in self.branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Opaque(Block):
    """Branches on a value, which tracing cannot see."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(x.detach().sum()) > -1e30 else -y


class Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Network(nn.Module):
    """One stem for each input, whose values are added; then a body."""

    def __init__(self, stems: list[Layers], body: Layers) -> None:
        super().__init__()
        shared: list[nn.Module] = []
        self.stems = nn.ModuleList(Block([*stem, ("conv", 4, 1, 1, True)], 3, shared) for stem in stems)
        self.body = Block(body, 4, shared)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        x = self.stems[0](a)
        if len(self.stems) > 1:
            x = x + self.stems[1](b)
        return self.body(x)


def build(layer: Any, channels: int, shared: list[nn.Module]) -> nn.Module:
    """The module of one layer, and its `out` where it changes the number of channels."""
    kind, *rest = layer
    if kind == "conv":
        out, kernel, groups, bias = rest
        groups = groups if channels % groups == 0 and out % groups == 0 else 1
        convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        convolution.out = out
        if out == channels:
            shared.append(convolution)
        return convolution
    if kind == "again":  # the same module once more, where one fits
        fitting = [m for m in shared if isinstance(m, nn.Conv2d) and m.in_channels == channels]
        return fitting[rest[0] % len(fitting)] if fitting else nn.Identity()
    if kind in ("sum", "cat"):
        return (Sum if kind == "sum" else Cat)(rest[0], channels, shared)
    if kind == "opaque":
        return Opaque(rest[0], channels, shared)
    simple: dict[str, Any] = {
        "norm": lambda: nn.BatchNorm2d(channels),
        "scale": lambda: Scale(channels),
        "relu": nn.ReLU,
        "hardswish": nn.Hardswish,
        "in place": lambda: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
        "pool": lambda: nn.AvgPool2d(3, 1, 1),
        "dropout": lambda: nn.Dropout(0.5),
    }
    return simple[kind]()


def drawn(source: random.Random) -> tuple[list[Layers], Layers]:
    """Stems and body: few layers or many."""
    deep = source.choice((3, 6, 6, 20))
    stems = [_layers(source, 2, 1) for _ in range(source.choice((1, 1, 2)))]
    return stems, _layers(source, deep, 3)


def _layers(source: random.Random, most: int, nesting: int) -> Layers:
    kinds = ["conv", "conv", "conv", "norm", "relu", "scale", "in place", "pool", "again", "dropout", "hardswish"]
    if nesting:
        kinds += ["sum", "sum", "cat", "opaque"]
    found: Layers = []
    for _ in range(source.randint(0 if nesting < 3 else 1, most)):
        kind = source.choice(kinds)
        if kind == "conv":
            out, groups = source.choice((2, 4, 4, 8)), source.choice((1, 1, 1, 2, 4))
            found.append(("conv", out, source.choice((1, 3, 3, 5)), groups, source.random() < 0.5))
        elif kind in ("sum", "cat"):
            wide = source.choice((2, 2, 3, 6)) if nesting > 1 else 2
            found.append((kind, [_layers(source, 3, nesting - 1) for _ in range(wide)]))
        elif kind == "opaque":
            found.append((kind, _layers(source, 3, nesting - 1)))
        elif kind == "again":
            found.append((kind, source.randint(0, 3)))
        else:
            found.append((kind,))
    return found


def check(stems: list[Layers], body: Layers, seed: int) -> None:
    """Raises where anything that elc_fx makes of the network does not compute what the network computes."""
    model, inputs = _ready(Network(stems, body), len(stems), seed)
    with torch.no_grad():
        expected = model(*inputs)
        compiled = elc_fx.compile(model, inputs)
        _compare("compiled", compiled(*inputs), expected)
        if len(stems) == 1:
            _compare("compiled without examples", elc_fx.compile(model)(*inputs), expected)
        flops = elc_fx.report_of(compiled).totals.flops
        assert flops is None or flops[1] <= flops[0], f"FLOPs {flops}"
        _check_saved(compiled, inputs)
        _check_decoupled(model, inputs, expected)


def _ready(model: nn.Module, count: int, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 4) if parameter.dim() else 4
            parameter.normal_(std=fan_in**-0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith("running_mean"):
                buffer.normal_(std=0.5, generator=generator)
    return model, tuple(torch.randn(2, 3, 8, 9, generator=generator, dtype=torch.float64) for _ in range(count))


def _check_saved(compiled: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.elc"
        try:
            elc_fx.save(compiled, file)
        except elc_fx.StorageError:
            assert not file.exists() and any(type(m).__name__ in ("Opaque", "Network") for m in compiled.modules())
            return
        assert torch.equal(elc_fx.load(file)(*inputs), compiled(*inputs)), "loaded differs"


def _check_decoupled(model: nn.Module, inputs: tuple[Tensor, ...], expected: Tensor) -> None:
    try:
        plan = elc_fx.Plan.of(model, inputs)
        if not plan.candidates:
            return
        decoupled = elc_fx.decouple(model, plan)
    except (elc_fx.CaptureError, elc_fx.PlanError):
        return
    _compare("decoupled", decoupled.eval()(*inputs), expected)
    elc_fx.set_gate(decoupled, 0)
    closed = decoupled(*inputs)
    merged = elc_fx.merge(decoupled)
    _compare("merged", merged(*inputs), closed)
    _compare("compiled after the merge", elc_fx.compile(merged, inputs)(*inputs), closed)


def _compare(what: str, actual: Tensor, expected: Tensor) -> None:
    difference = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"


def failure(stems: list[Layers], body: Layers, seed: int) -> str | None:
    """The kind of what fails: the error, and the line that raised it."""
    try:
        check(stems, body, seed)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.name}"
    return None


def smaller(layers: Layers) -> Iterator[Layers]:
    """All ways to make layers a little smaller."""
    for i, layer in enumerate(layers):
        before, after = layers[:i], layers[i + 1 :]
        yield [*before, *after]
        if layer[0] in ("sum", "cat"):
            for j, branch in enumerate(layer[1]):
                yield [*before, *branch, *after]
                if len(layer[1]) > 1:
                    yield [*before, (layer[0], [*layer[1][:j], *layer[1][j + 1 :]]), *after]
                for less in smaller(branch):
                    yield [*before, (layer[0], [*layer[1][:j], less, *layer[1][j + 1 :]]), *after]
        elif layer[0] == "opaque":
            yield [*before, *layer[1], *after]
            yield from ([*before, ("opaque", less), *after] for less in smaller(layer[1]))
        elif layer[0] == "conv" and layer[2] > 1:
            yield [*before, ("conv", layer[1], layer[2] - 2, *layer[3:]), *after]


def minimised(stems: list[Layers], body: Layers, seed: int, kind: str) -> tuple[list[Layers], Layers]:
    """The smallest network on the way down that fails in the same way."""
    while True:
        candidates = [(stems, less) for less in smaller(body)]
        candidates += [
            ([*stems[:i], less, *stems[i + 1 :]], body) for i, stem in enumerate(stems) for less in smaller(stem)
        ]
        candidates += [(stems[:1], body)] if len(stems) > 1 else []
        found = next((c for c in candidates if failure(*c, seed) == kind), None)
        if found is None:
            return stems, body
        stems, body = found


def as_test(stems: list[Layers], body: Layers, seed: int, kind: str) -> str:
    return (
        f"from fuzz import check\n\n\ndef test_found_by_fuzz_{seed}() -> None:\n"
        f'    """{kind}"""\n    check({stems!r}, {body!r}, seed={seed})\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to try (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the next has the next (default: 0)")
    given = parser.parse_args()
    end, seed, kinds = time.monotonic() + 60 * given.minutes, given.seed, Counter[str]()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of merges that cost more, and of drop-outs that training would have
    while time.monotonic() < end:
        stems, body = drawn(random.Random(seed))
        if kind := failure(stems, body, seed):
            kinds[kind] += 1
            if kinds[kind] == 1:
                print(as_test(*minimised(stems, body, seed, kind), seed, kind), flush=True)
        seed += 1
    tried = seed - given.seed
    print(f"{tried:,} networks, seeds {given.seed} to {seed - 1}; {sum(kinds.values())} failed", file=sys.stderr)
    for kind, count in kinds.most_common():
        print(f"  {count} × {kind}", file=sys.stderr)
    return int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
