"""The demo, on real handwritten digits: one network merged exactly, and two compressed to half of their FLOPs."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elc_fx.api import compile
from elc_fx.comparison import Comparison, compare
from elc_fx.compiled import report_of
from elc_fx.errors import InvalidInputError
from elc_fx.files import make_folder, write_whole
from elc_fx.planning.budget import Budget
from elc_fx.report import Report
from elc_fx.report.diff import Diff, diff
from elc_fx.report.page import page
from elc_fx.training.finetuning import FinetuneConfig

EPOCHS = 10
FINETUNE_EPOCHS = 10
BUDGET = Budget(flops=0.5, depth=0.9)
BATCH = 64
LEARNING_RATE = 4e-3
TIMED_ROUNDS = 100


class MultiBranch(nn.Module):
    """The sum of five branches, each with batch norm, then ReLU: 3×3, 3×1, 1×3, 1×1 and, where it fits, the identity.

    Input [N, in_channels, H, W], output [N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, (h, w), stride, padding=(h // 2, w // 2), bias=False),
                nn.BatchNorm2d(out_channels),
            )
            for h, w in ((3, 3), (3, 1), (1, 3), (1, 1))
        )
        if in_channels == out_channels and stride == 1:
            self.branches.append(nn.BatchNorm2d(in_channels))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return torch.relu(total)


class Residual(nn.Module):
    """Two 3×3 convolutions and a shortcut. Input [N, in_channels, H, W], output as `MultiBranch`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _normalised(in_channels, out_channels, 3, stride)
        self.second = _normalised(out_channels, out_channels, 3)
        keeps = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if keeps else _normalised(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def _normalised(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def plain_network() -> nn.Module:
    """As VGG: convolutions in a row, with pooling between the stages."""
    layers: list[nn.Module] = []
    channels = 1
    for stage in ((16, 16, 16), (32, 32, 32), (64, 64)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for width in stage:
            layers += [_normalised(channels, width, 3), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, *_head(channels))


def residual_network() -> nn.Module:
    """As ResNet: three stages of two blocks."""
    blocks = [Residual(16, 16), Residual(16, 16), Residual(16, 32, 2), Residual(32, 32), Residual(32, 64, 2)]
    return nn.Sequential(_normalised(1, 16, 3), nn.ReLU(), *blocks, Residual(64, 64), *_head(64))


def network() -> nn.Module:
    """Grey images [N, 1, 8, 8] to the scores of ten digits, [N, 10]."""
    return nn.Sequential(
        MultiBranch(1, 16),
        MultiBranch(16, 16),
        MultiBranch(16, 32, stride=2),
        MultiBranch(32, 32),
        MultiBranch(32, 64, stride=2),
        MultiBranch(64, 64),
        *_head(64),
    )


COMPRESSED = {"A plain network": plain_network, "A residual network": residual_network}


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, a quarter of them for the test. images: [N, 1, 8, 8] in [0, 1]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> Digits:
        """The split is the same each time, with equal shares of every digit."""
        from sklearn.datasets import load_digits  # takes a second, which the other commands need not wait
        from sklearn.model_selection import train_test_split

        stored = load_digits()
        parts = train_test_split(stored.images, stored.target, test_size=0.25, random_state=0, stratify=stored.target)
        images = [torch.tensor(part, dtype=torch.float32).unsqueeze(1) / 16 for part in parts[:2]]
        labels = [torch.tensor(part, dtype=torch.int64) for part in parts[2:]]
        return cls(images[0], labels[0], images[1], labels[1])


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one batch on one thread: the median, and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower_quartile:.2f} to {self.upper_quartile:.2f})"


@dataclass(frozen=True)
class Side:
    """One of the two networks."""

    accuracy: float
    milliseconds: Timing


@dataclass(frozen=True)
class Exact:
    """The multi-branch network, before and after its exact merges."""

    test_images: int
    differing_predictions: int
    before: Side
    after: Side
    report: Report
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {
            "test_images": self.test_images,
            "differing_predictions": self.differing_predictions,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "report": self.report.to_dict(),
            "comparison": self.comparison.to_dict(),
        }

    def __str__(self) -> str:
        sides = (self.before, self.after)
        rows = [
            (f"accuracy on {self.test_images} test images", *(f"{side.accuracy:.2%}" for side in sides)),
            (f"milliseconds for a batch of {BATCH}, one thread", *(str(side.milliseconds) for side in sides)),
        ]
        table = tabulate(rows, ("", "before", "after"), disable_numparse=True)
        ratio = self.before.milliseconds.median / self.after.milliseconds.median
        summary = f"{self.differing_predictions} predictions differ; {ratio:.2f} times as fast"
        return f"{self.report}\n\n{self.comparison}\n\n{table}\n{summary}"


@dataclass(frozen=True)
class Compressed:
    """A network at half of its FLOPs, and shallower. before: with its batch norms folded, so that no gain is theirs."""

    name: str
    before: Side
    after: Side
    report: Report
    comparison: Comparison
    diff: Diff

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {
            "name": self.name,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "report": self.report.to_dict(),
            "comparison": self.comparison.to_dict(),
        }

    def summary(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, change)."""
        a, b = self.before, self.after
        slower = b.milliseconds.median / a.milliseconds.median
        points = 100 * (b.accuracy - a.accuracy)
        return [
            ("accuracy on test images", f"{a.accuracy:.2%}", f"{b.accuracy:.2%}", f"{points:+.2f} points"),
            *self.comparison.changes(),
            (
                f"ms for {BATCH} images",
                f"{a.milliseconds.median:.2f}",
                f"{b.milliseconds.median:.2f}",
                f"{slower - 1:+.1%}",
            ),
        ]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `str()` is what it shows. pages: the reports that were written."""

    exact: Exact
    compressed: tuple[Compressed, ...]
    pages: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        pages = [str(page) for page in self.pages]
        return {"exact": self.exact.to_dict(), "compressed": [c.to_dict() for c in self.compressed], "pages": pages}

    def __str__(self) -> str:
        parts = [f"A multi-branch network, merged exactly\n\n{self.exact}"]
        for one in self.compressed:
            table = tabulate(one.summary(), ("", "before", "after", "change"), disable_numparse=True)
            parts.append(
                f"{one.name}, at half of its FLOPs and 90 % of its depth, fine-tuned\n\n{one.report.plan}\n\n{table}"
            )
        return "\n\n\n".join([*parts, "\n".join(f"report: {page}" for page in self.pages)])


def run(epochs: int = EPOCHS, seed: int = 0, folder: Path | None = None) -> DemoResult:
    """All three networks; progress bars on stderr. The same seed gives the same networks.

    folder: where the reports are written, as HTML; None for nowhere. Raises `InvalidInputError` where that cannot be.
    """
    if folder is not None:
        try:
            make_folder(folder)
        except OSError as error:
            raise InvalidInputError(f"reports cannot be written to {folder}: {error}") from error
    digits = Digits.load()
    with _one_thread():
        exact = merged_exactly(digits, epochs, seed)
        compressed = tuple(
            at_half_the_flops(name, trained_network(digits, epochs, seed, make), digits, seed)
            for name, make in COMPRESSED.items()
        )
    pages = []
    for one in compressed if folder is not None else ():
        assert folder is not None
        pages.append(folder / f"{one.name.split()[1]}.html")
        title = f"{one.name} at half of its FLOPs"
        write_whole({pages[-1]: page(one.summary(), one.report, one.diff, title=title).encode()})
    return DemoResult(exact, compressed, tuple(pages))


def merged_exactly(digits: Digits, epochs: int, seed: int) -> Exact:
    """The multi-branch network, trained, compiled and compared."""
    original = trained_network(digits, epochs, seed, network)
    compiled = compile(original, (digits.test_images[:BATCH],))
    predictions = [_predictions(model, digits.test_images) for model in (original, compiled)]
    before, after = _sides([original, compiled], digits)
    return Exact(
        test_images=len(digits.test_labels),
        differing_predictions=int((predictions[0] != predictions[1]).sum()),
        before=before,
        after=after,
        report=report_of(compiled),
        comparison=compare(original, compiled, (digits.test_images[:1],)),
    )


def at_half_the_flops(name: str, original: nn.Module, digits: Digits, seed: int) -> Compressed:
    """A trained network, compressed and compared."""
    images, x = TensorDataset(digits.train_images, digits.train_labels), digits.test_images[:1]
    tuning = FinetuneConfig(DataLoader(images, BATCH, shuffle=True), epochs=FINETUNE_EPOCHS, seed=seed)
    with Console(stderr=True).status(f"{name}: measuring losses, planning, fine-tuning"):
        small = compile(original, x, mode="decouple", budget=BUDGET, calibration=_calibration(digits), finetune=tuning)
    before, after = _sides([compile(original, x), small], digits)
    difference = diff(original, small, x, names=(name, "at half of its FLOPs"))
    return Compressed(name, before, after, report_of(small), compare(original, small, x), difference)


def _calibration(digits: Digits) -> list[Tensor]:
    return list(digits.train_images[: 8 * BATCH].split(BATCH))


def _sides(models: list[nn.Module], digits: Digits) -> list[Side]:
    times = interleaved_times(models, digits.test_images[:BATCH], TIMED_ROUNDS)
    return [
        Side(float((_predictions(model, digits.test_images) == digits.test_labels).float().mean()), timing)
        for model, timing in zip(models, times, strict=True)
    ]


def trained_network(digits: Digits, epochs: int, seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A network in eval mode, whose weights and order of images come from the seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = make()
        _train(model, digits, epochs)
    return model.eval()


def _train(model: nn.Module, digits: Digits, epochs: int) -> None:
    """Adam with a one-cycle learning rate."""
    batches = -(-len(digits.train_labels) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    model.train()
    for chosen in _tracked_batches(len(digits.train_labels), epochs):
        loss = nn.functional.cross_entropy(model(digits.train_images[chosen]), digits.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def interleaved_times(models: list[nn.Module], images: Tensor, rounds: int) -> list[Timing]:
    """The models run in turn, so that a slow moment of the machine meets all of them alike."""
    taken: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_number in range(-3, rounds):  # three to warm up
            for model, times in zip(models, taken, strict=True):
                elapsed = _milliseconds(lambda: model(images))  # noqa: B023 (called at once)
                if round_number >= 0:
                    times.append(elapsed)
    return [_timing(times) for times in taken]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second core, and wait ten times as long for it where others use it too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _timing(times: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4)
    return Timing(median, lower, upper)


def _milliseconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return 1000 * (time.perf_counter() - start)


def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images).argmax(1)


def _tracked_batches(images: int, epochs: int) -> Iterator[Tensor]:
    """The indices of each batch of each epoch, in random order; the bar counts epochs."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for _ in progress.track(range(epochs)):
            yield from torch.randperm(images).split(BATCH)
