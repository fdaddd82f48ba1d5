"""Writes the figures of docs/, and what the examples in docs/examples/ print, from real output.

Each figure is drawn from what elc_fx computes on a small network with random weights. The examples run as they stand.

    python tools/render_docs.py                figures and examples, into docs/figures/ and docs/examples/ (a minute)
    python tools/render_docs.py --figures      the figures only
"""

import contextlib
import io
import runpy
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import torch.nn.functional as F
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import elc_fx
import provenance
import terminal
from elc_fx.decoupling.nodes import DecoupledActivation
from elc_fx.report.charts import BLUE, ORANGE, STYLE, picture

DOCS = provenance.ROOT / "docs"


class Branches(nn.Module):
    """relu(3×3 + 1×1 + identity), each with a batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.dense(x) + self.point(x) + self.identity(x))


class Residual(nn.Module):
    """relu(3×3 – relu – 3×3 + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


def branches(file: Path) -> None:
    """The diff of parallel branches and what `compile` makes of them."""
    model, x = Branches(8).eval(), torch.randn(1, 8, 16, 16)
    elc_fx.draw(elc_fx.diff(model, elc_fx.compile(model, x), x, names=("the model", "compiled")), file)


def decoupled(file: Path) -> None:
    """The diff of a residual block and what `decouple` makes of it."""
    model, x = Residual(8).eval(), torch.randn(1, 8, 16, 16)
    network = elc_fx.decouple(model, _plan(model, x))
    elc_fx.draw(elc_fx.diff(model, network.eval(), x, names=("the model", "decoupled")), file)


def merged(file: Path) -> None:
    """The diff of a residual block and its merge."""
    model, x = Residual(8).eval(), torch.randn(1, 8, 16, 16)
    network = elc_fx.decouple(model, _plan(model, x))
    elc_fx.set_gate(network, 0)
    elc_fx.draw(elc_fx.diff(model, elc_fx.merge(network.eval()), x, names=("the model", "merged")), file)


def activation(file: Path) -> None:
    """A decoupled ReLU at five gates, with the line that it starts from."""
    node = DecoupledActivation(nn.ReLU(), torch.tensor([0.5]), torch.tensor([(2 * torch.pi) ** -0.5]), dims=2)
    x = torch.linspace(-2, 2, 201)
    with _figure(file, 1, (4.6, 3)) as (axes,):
        for gate in (1, 0.75, 0.5, 0.25, 0):
            node.set_gate(gate)
            y = node(x.view(1, 1, -1, 1)).detach().flatten()
            axes.plot(x, y, color=ORANGE if gate in (0, 1) else BLUE)
            axes.annotate(f"gate {gate:g} ", (-2, float(y[0])), ha="right", va="center", fontsize=8)
        axes.set_xlim(-2.9, 2)
        axes.set(xlabel="x", ylabel="output")


def schedules(file: Path) -> None:
    """The gates of four blocks over the steps of a schedule, in three orders."""
    model, x = nn.Sequential(*(Residual(4) for _ in range(4))).eval(), torch.randn(1, 4, 8, 8)
    network = elc_fx.decouple(model, elc_fx.Plan.of(model, x, collapse=["0", "1", "2", "3"]))
    with _figure(file, 3, (8, 2.4)) as all_axes:
        variants: list[dict[str, Any]] = [{}, {"shape": "cosine"}, {"order": "depth"}]
        for axes, options in zip(all_axes, variants, strict=True):
            schedule, history = elc_fx.GateSchedule(network, total_steps=100, **options), []
            for _ in range(100):
                history.append(list(elc_fx.gates(network).values()))
                schedule.step()
            axes.plot(torch.tensor(history).unique(dim=1), color=BLUE)  # most gates close together
            axes.set(title=", ".join(f'{k}="{v}"' for k, v in options.items()) or "default", xlabel="step")
            axes.title.set_fontsize(9)
            elc_fx.set_gate(network, 1)
        all_axes[0].set_ylabel("gate")


def kernels(file: Path) -> None:
    """The kernels that `compile` composes: which taps there are, and how large their weights."""
    pairs = {
        "3×3, then 3×3": (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 3)),
        "3×3, then 1×1": (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 1)),
        "1×1 of stride 2, then 3×3": (nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 1, 3)),
    }
    with _figure(file, 3, (8, 2.6)) as all_axes:
        for axes, (title, (first, second)) in zip(all_axes, pairs.items(), strict=True):
            model = nn.Sequential(first, second).eval()
            (region,) = elc_fx.report_of(elc_fx.compile(model, torch.randn(1, 8, 12, 12))).merged
            axes.imshow(_impulse_response(model).numpy(), cmap="Blues", vmin=0)
            axes.set_title(f"{title}:\n{region.result}", fontsize=9)
            axes.set(xticks=[], yticks=[])


def border(file: Path) -> None:
    """Two padded 3×3 and the 5×5 of the same taps, padded by 2: where their outputs differ."""
    first, second = (nn.Conv2d(1, 1, 3, padding=1, bias=False).double() for _ in range(2))
    taps = F.conv_transpose2d(second.weight, first.weight)
    x = torch.randn(64, 1, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        difference = (second(first(x)) - F.conv2d(x, taps, padding=2)).abs().amax((0, 1))
    with _figure(file, 1, (3, 2.6)) as (axes,):
        axes.figure.colorbar(axes.imshow(difference.numpy(), cmap="Oranges", vmin=0), ax=axes)
        axes.set(xticks=[], yticks=[])


FIGURES: dict[str, Callable[[Path], None]] = {
    "branches": branches,
    "decoupled": decoupled,
    "merged": merged,
    "activation": activation,
    "schedules": schedules,
    "kernels": kernels,
    "border": border,
}


def draw_figures(folder: Path) -> None:
    """All figures, as SVG files named after them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        torch.manual_seed(0)
        draw(folder / f"{name}.svg")


def run_example(script: Path) -> str:
    """What a script prints, headed by the versions that printed it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script), run_name="__main__")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision"))
    return f"({versions})\n\n{printed.getvalue().rstrip()}\n"


def main(figures: Annotated[bool, typer.Option("--figures", help="Only the figures.")] = False) -> None:
    draw_figures(DOCS / "figures")
    if figures:
        return
    for script in sorted((DOCS / "examples").glob("*.py")):
        print(script.name, file=sys.stderr)
        script.with_suffix(".txt").write_text(run_example(script), encoding="utf-8")


def _plan(model: nn.Module, x: Tensor) -> elc_fx.Plan:
    """The whole block, into one 3×3."""
    return elc_fx.Plan.of(model, x, collapse=["conv1..conv2:3x3"])


def _impulse_response(model: nn.Module) -> Tensor:
    """The magnitude of the composed kernel at each position of the input that one output reads: its gradient there."""
    size = next(size for size in range(1, 20) if _runs(model, size))
    x = torch.zeros(1, 8, size, size, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    magnitude: Tensor = x.grad[0].norm(dim=0)
    return magnitude


def _runs(model: nn.Module, size: int) -> bool:
    try:
        return model(torch.zeros(1, 8, size, size)).shape[2:] == (1, 1)
    except RuntimeError:
        return False


@contextlib.contextmanager
def _figure(file: Path, columns: int, size: tuple[float, float]) -> Iterator[list[Axes]]:
    """The axes of a figure, which is written afterwards: the same bytes for the same figure."""
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(size, layout="constrained")
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        file.write_text(picture(figure, file.stem), encoding="utf-8")


if __name__ == "__main__":
    terminal.run(main, __doc__)
