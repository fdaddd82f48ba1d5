"""Quantisation after merging: test accuracy in float32 and in int8, of a network, its exact merge and compressed ones.

    python tools/quantise.py --data ../shared/data/cifar10-jpeg.tar.xz \\
        --weights ../shared/data/resnet20-cifar10jpeg.safetensors \\
        --compressed runs/resnet20-cifar10jpeg-elc-0.5-5-0

Each network goes through torch.export and torchao's PT2E for x86: weights in int8 with a scale for each output channel,
activations in uint8 with one scale each, calibrated on training images. Which images these are moves the result, so
there are several draws of them. With "a scale per layer", all channels of a weight share one. Accuracy is that of the
graph with quantisation in it, as torch computes it; time is that of both forms under Inductor, which computes in int8.
Prints tables and stores JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._inductor.config
import typer
from torch import Tensor, nn

import cifar_models
import elc_fx
import provenance
import terminal
from elc_fx.deploying import exporting
from elc_fx.planning.latency import rounds
from elc_fx.training import data as pictures
from timing import Timing, milliseconds

BATCH = 64  # of calibration
SCALES = {"channel": True, "layer": False}
TIMED = (1, 64)  # images at a time
BLOCKS = 15  # of each network and form, in turns


def quantised(network: nn.Module, calibration: pictures.Images, per_channel: bool = True) -> nn.Module:
    """The network with quantised convolutions, linear layers and what they read; it takes any batch size."""
    from torchao.quantization.pt2e import MinMaxObserver  # here, because render_results needs the tables alone
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    if not per_channel:
        observer = MinMaxObserver.with_args(eps=2**-12)  # as the default has it
        scheme = {"qscheme": torch.per_tensor_symmetric, "ch_axis": None, "observer_or_fake_quant_ctr": observer}
        config = replace(config, weight=replace(config.weight, **scheme))
    sample = calibration.taken(slice(2)).inputs()
    program = torch.export.export(network, (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    prepared = prepare_pt2e(program.module(check_guards=False), x86.X86InductorQuantizer().set_global(config))
    with torch.no_grad():
        for pixels, _ in calibration.batches(BATCH):
            prepared(pixels)
    converted: nn.Module = convert_pt2e(prepared)
    return converted


@torch.no_grad()
def predictions(network: nn.Module, images: pictures.Images) -> Tensor:
    return torch.cat([network(pixels).argmax(1) for pixels, _ in images.batches(pictures.SCORED_BATCH)])


def draws(images: pictures.Images, size: int, count: int) -> list[pictures.Images]:
    """Samples of the training images that have none in common."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [images.taken(order[size * i : size * (i + 1)]) for i in range(count)]


def examine(network: nn.Module, calibrations: Sequence[pictures.Images], test: pictures.Images) -> dict[str, Any]:
    """Right predictions in float32; for int8, by kind of scale and calibration, and how many differ from float32's."""
    expected = predictions(network, test)
    int8: dict[str, list[dict[str, int]]] = {scale: [] for scale in SCALES}
    for scale, per_channel in SCALES.items():
        for calibration in calibrations:
            actual = predictions(quantised(network, calibration, per_channel), test)
            int8[scale].append({"right": _right(actual, test), "changed": int((actual != expected).sum())})
    return {"images": len(test), "float32": {"right": _right(expected, test)}, "int8": int8}


def _right(predicted: Tensor, images: pictures.Images) -> int:
    return int((predicted == images.labels).sum())


@torch.no_grad()
def measure(networks: Mapping[str, nn.Module], calibration: pictures.Images) -> dict[str, dict[str, Any]]:
    """Seconds of every network in both forms under Inductor, all of them in turn, by network and batch size."""
    forms = {(name, "float32"): network for name, network in networks.items()}
    forms |= {(name, "int8"): quantised(network, calibration) for name, network in networks.items()}
    seconds: dict[str, dict[str, Any]] = {name: {} for name in networks}
    for size in TIMED:
        torch._dynamo.reset()
        pixels = calibration.taken(slice(size)).inputs()
        calls = [partial(torch.compile(network), pixels) for network in forms.values()]
        with torch._inductor.config.patch(freezing=True):  # without it, int8 stays a simulation
            timings = rounds(calls, BLOCKS)
        for (name, form), taken in zip(forms, timings, strict=True):
            seconds[name].setdefault(str(size), {})[form] = asdict(Timing.of(taken))
    return seconds


def load(path: Path) -> nn.Module:
    """A network that was compressed: a .pt2 or .elc file, or the folder of a run, which holds model.pt2."""
    file = path / "model.pt2" if path.is_dir() else path
    if file.suffix == ".elc":
        return elc_fx.load(file)
    return exporting.load(file).program.module(check_guards=False)


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Accuracies, and predictions that int8 changes: the mean over the calibrations, with the least and the most."""
    headers = ["network", "float32"]
    for scale in SCALES:
        headers += [f"int8, a scale per {scale}", "points", "changed predictions"]
    lines = []
    for row in rows:
        images, before = row["images"], row["float32"]["right"]
        line = [row["network"], f"{before / images:.2%}"]
        for scale in SCALES:
            right, changed = ([run[key] / images for run in row["int8"][scale]] for key in ("right", "changed"))
            mean = sum(right) / len(right)
            line += [_spread(right), f"{100 * (mean - before / images):+.2f}", _spread(changed)]
        lines.append(line)
    return terminal.table(lines, headers, style)


def _spread(shares: Sequence[float]) -> str:
    return f"{sum(shares) / len(shares):.2%} ({100 * min(shares):.2f}–{100 * max(shares):.2f})"


def speed_table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Milliseconds under Inductor, by batch size."""
    lines = []
    for row in rows:
        line = [row["network"]]
        for pair in row["seconds"].values():
            ratio = pair["float32"]["median"] / pair["int8"]["median"]
            line += [*(milliseconds(pair[form]) for form in ("float32", "int8")), f"{ratio:.2f}×"]
        lines.append(line)
    headers = ["network"]
    for size in rows[0]["seconds"]:
        headers += [f"float32, batch {size} [ms]", "int8", "as fast"]
    return terminal.table(lines, headers, style)


def main(
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an archive.")],
    weights: Annotated[
        list[Path] | None, typer.Option(help="A weight file of a CIFAR network; several times for several.")
    ] = None,
    compressed: Annotated[
        list[Path] | None, typer.Option(help="A .pt2 or .elc file, or a run's folder; several times for several.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Training images of each calibration.", min=2)] = 512,
    calibrations: Annotated[int, typer.Option(help="Draws of these images.", min=1)] = 3,
    times: Annotated[bool, typer.Option(help="Time both forms, too; compiling takes minutes.")] = True,
    limit: Annotated[int | None, typer.Option(help="Only about so many test images, for a quick look.", min=2)] = None,
    json: Annotated[Path | None, typer.Option(help="Result file. A run over all images has a default.")] = None,
) -> None:
    origin = provenance.collect()
    train, test = pictures.load(data), pictures.load(data, "test")
    assert train is not None and test is not None
    test = test.sample(limit) if limit else test
    samples = draws(train, calibration, calibrations)
    networks: dict[str, nn.Module] = {}
    for file in weights or []:
        model = cifar_models.load(file)
        networks[file.stem] = model
        networks[f"{file.stem}, merged"] = elc_fx.compile(model, samples[0].taken(slice(2)).inputs())
    for path in compressed or []:
        networks[path.stem if path.suffix in (".pt2", ".elc") else path.name] = load(path)
    scores = {name: examine(networks[name], samples, test) for name in terminal.tracked(list(networks))}
    seconds = measure(networks, samples[0]) if times else {}
    rows = [{"network": name, **scores[name], "seconds": seconds.get(name, {})} for name in networks]
    print(table(rows))
    if times:
        print(f"\n{speed_table(rows)}")
    if json or not limit:
        provenance.store(json or provenance.RESULTS / "quantised.json", origin, {"rows": rows})


if __name__ == "__main__":
    terminal.run(main, __doc__)
