"""Lossless compilation on real images: the same predictions from fewer layers, and the time before and after.

Each weight file's network is compiled, and the original and the compiled one run side by side over all test images in
float32. Prints a table, stores JSON, and exits 1 if a single prediction differs.

    python tools/cifar_lossless.py --data ../shared/data/cifar10-jpeg.tar.xz \\
        --weights ../shared/data/resnet20-cifar10jpeg.safetensors \\
        --weights ../shared/data/resnet56-cifar10jpeg.safetensors

The data set is a directory or a tar archive, with test/CLASS/IMAGE files or CIFAR-10's own python batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import cifar_models
import elc_fx
import provenance
import terminal
from elc_fx.training import data as pictures
from timing import Timing, milliseconds, side_by_side

TIMED_BATCHES = {1: 100, 128: 10}  # batch size: repeats


@dataclass(frozen=True)
class Agreement:
    """Both networks over all images. Accuracies are fractions; the differences are of logits, absolute and relative."""

    images: int
    accuracy_before: float
    accuracy_after: float
    differing_predictions: int
    largest_difference: float
    relative_difference: float


def compare_predictions(before: nn.Module, after: nn.Module, images: pictures.Images, batch_size: int) -> Agreement:
    """Runs both networks over the images, batch by batch."""
    outputs = [
        (before(pixels), after(pixels), labels)
        for pixels, labels in terminal.tracked(
            list(images.batches(batch_size)), label=lambda _: "comparing predictions"
        )
    ]
    expected, actual, labels = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
    difference = (expected - actual).abs().max().item()
    return Agreement(
        images=len(images),
        accuracy_before=_accuracy(expected, labels),
        accuracy_after=_accuracy(actual, labels),
        differing_predictions=int((expected.argmax(1) != actual.argmax(1)).sum()),
        largest_difference=difference,
        relative_difference=difference / expected.abs().max().item(),
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def measure_time(before: nn.Module, after: nn.Module, images: pictures.Images) -> dict[str, dict[str, Timing]]:
    """Forward passes of both networks on the first images, by batch size."""
    timings = {}
    for size, repeats in terminal.tracked(list(TIMED_BATCHES.items()), label=lambda timed: f"timing batch {timed[0]}"):
        pixels = images.taken(slice(size)).inputs()
        jobs = {"before": partial(before, pixels), "after": partial(after, pixels)}
        timings[str(len(pixels))] = side_by_side(jobs, repeats)
    return timings


def examine(weights: Path, images: pictures.Images, batch_size: int) -> dict[str, Any]:
    """One network before and after: agreement, time, size."""
    original = cifar_models.load(weights)
    sample = images.taken(slice(2)).inputs()
    compiled = elc_fx.compile(original, (sample,))
    with torch.inference_mode():
        agreement = compare_predictions(original, compiled, images, batch_size)
        timings = measure_time(original, compiled, images)
    return {
        "weights": weights.name,
        "agreement": asdict(agreement),
        "seconds": {size: {side: asdict(timing) for side, timing in pair.items()} for size, pair in timings.items()},
        "size": {side: asdict(size) for side, size in sizes(original, compiled, sample)},
    }


@dataclass(frozen=True)
class Size:
    """What a network consists of; FLOPs are of one image."""

    batch_norms: int
    convolutions: int
    depth: int
    flops: int
    parameters: int


def sizes(original: nn.Module, compiled: nn.Module, sample: Tensor) -> Iterator[tuple[str, Size]]:
    """Yields ("before", …) and ("after", …). sample: [N, C, H, W], of which one image is used."""
    comparison = elc_fx.compare(original, compiled, (sample[:1],))
    for side, model, counted in (("before", original, comparison.before), ("after", compiled, comparison.after)):
        batch_norms = _count(model, nn.BatchNorm2d)
        yield side, Size(batch_norms, counted.convolutions, counted.depth, counted.flops, counted.parameters)


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """The table of stored networks, one property a line, before and after in columns."""
    lines = [line for row in rows for line in _lines(row)]
    return terminal.table(lines, ("weights", "", "before", "after", ""), style)


def _lines(row: Mapping[str, Any]) -> list[list[str]]:
    agreement, before, after = row["agreement"], row["size"]["before"], row["size"]["after"]
    accuracies = [f"{agreement[key]:.2%}" for key in ("accuracy_before", "accuracy_after")]
    differing = f"{agreement['differing_predictions']} of {agreement['images']:,} predictions differ"
    lines = [[row["weights"].removesuffix(".safetensors"), "accuracy", *accuracies, differing]]
    for label, key in (
        ("convolutions", "convolutions"),
        ("batch norms", "batch_norms"),
        ("FLOPs", "flops"),
        ("parameters", "parameters"),
    ):
        ratio = f"{after[key] / before[key]:.1%}" if before[key] else ""
        lines.append(["", label, f"{before[key]:,}", f"{after[key]:,}", ratio])
    for size, pair in row["seconds"].items():
        speedup = pair["before"]["median"] / pair["after"]["median"]
        lines.append(
            [
                "",
                f"batch {size} [ms]",
                milliseconds(pair["before"]),
                milliseconds(pair["after"]),
                f"{speedup:.2f}× as fast",
            ]
        )
    return lines


def main(
    data: Annotated[
        Path, typer.Option(help="CIFAR-10: a directory or a tar archive, images in folders or python batches.")
    ],
    weights: Annotated[list[Path], typer.Option(help="Weight file (.safetensors); may be given several times.")],
    batch_size: Annotated[int, typer.Option(help="Images per forward pass of the comparison.", min=1)] = 256,
    limit: Annotated[int | None, typer.Option(help="Only about so many test images, for a quick look.", min=2)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)] = None,
    json: Annotated[Path | None, typer.Option(help="Result file. A run over all images has a default.")] = None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    origin = provenance.collect()
    images = pictures.load(data, "test")
    assert images is not None
    images = images.sample(limit) if limit else images
    rows = [examine(file, images, batch_size) for file in weights]
    print(table(rows))
    if json or not limit:
        provenance.store(json or provenance.RESULTS / "cifar_lossless.json", origin, {"rows": rows})
    if any(row["agreement"]["differing_predictions"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    terminal.run(main, __doc__)
