"""What elc_fx.compile costs: time beside torch's batch-norm fusion, time per layer of long chains, peak memory.

    python tools/bench_compile.py zoo                     torchvision's models, beside torch.fx's own fuse
    python tools/bench_compile.py chains                  synthetic chains of 100, 1,000 and 10,000 layers
    python tools/bench_compile.py memory                  peak memory, each measurement in a fresh process
    python tools/bench_compile.py end-to-end              verification with example inputs, on its own

Each prints a table and stores docs/results/compile_SECTION.json, with where and when it ran. `zoo` exits 1 if elc_fx
takes more than twice fuse's time in total, `chains` if the time per layer more than doubles from 1,000 layers to
10,000.
"""

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

import elc_fx
import provenance
import terminal
from timing import Timing, milliseconds, side_by_side
from zoo import CLASSIFICATION, CONVOLUTIONS, SEGMENTATION, VIDEO, build, family_of

TIME_LIMIT = 2.0  # total time over fuse's
MMAP_THRESHOLD = 64 * 1024  # bytes; larger tensors go back to the system as soon as they are freed
GROWTH_LIMIT = 2.0  # time per layer of the longest chain over that of the one before it
CHANNELS = 4
MEMORY_MODELS = ("vgg16_bn", "resnet152", "convnext_base", "densenet201", "mobilenet_v3_large")
END_TO_END_MODELS = (
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "densenet121",
    "convnext_tiny",
)


# zoo: beside torch's fuse


def _compile(model: nn.Module) -> nn.Module:
    return elc_fx.compile(model)


def _compile_unverified(model: nn.Module) -> nn.Module:
    return elc_fx.compile(model, verify=False)


COMPILERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "elc_fx": _compile,
    "unverified": _compile_unverified,
    "fuse": fuse,
}


def time_model(name: str, threads: int, repeats: int) -> dict[str, Any]:
    """Compile times of one model, side by side. A model that fuse cannot trace is timed without it."""
    torch.set_num_threads(threads)
    model = build(family_of(name), name)
    compilers = dict(COMPILERS)
    try:
        fuse(model)
        reason = ""
    except Exception as error:  # whatever stops torch's fuse: it promises no particular exception
        reason = f"fuse: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        del compilers["fuse"]
    jobs = {label: _job(compiler, model) for label, compiler in compilers.items()}
    timings = side_by_side(jobs, repeats)
    return {"model": name, "threads": threads, "reason": reason, "seconds": _stored(timings)}


def _job(compiler: Callable[[nn.Module], nn.Module], model: nn.Module) -> Callable[[], nn.Module]:
    return lambda: compiler(model)


def _stored(timings: Mapping[str, Timing]) -> dict[str, Any]:
    return {label: asdict(timing) for label, timing in timings.items()}


def zoo_totals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sums of the medians, per number of threads, over the models that fuse takes."""
    totals = []
    for threads in sorted({row["threads"] for row in rows}):
        chosen = [row["seconds"] for row in rows if row["threads"] == threads and "fuse" in row["seconds"]]
        if chosen:
            sums = {label: sum(times[label]["median"] for times in chosen) for label in COMPILERS}
            totals.append(
                {"threads": threads, "models": len(chosen), "seconds": sums, "ratio": sums["elc_fx"] / sums["fuse"]}
            )
    return totals


def zoo_table(result: Mapping[str, Any], style: str = "simple") -> str:
    """The totals, then every model."""
    headers = ("models", "threads", "elc_fx [ms]", "without verification [ms]", "fuse [ms]", "elc_fx / fuse")
    totals = [
        [
            f"all {total['models']}",
            total["threads"],
            *(f"{1000 * total['seconds'][label]:,.0f}" for label in COMPILERS),
            f"{total['ratio']:.2f}",
        ]
        for total in result["totals"]
    ]
    models = [_zoo_cells(row) for row in result["rows"]]
    return terminal.table(totals + models, headers, style)


def _zoo_cells(row: Mapping[str, Any]) -> list[Any]:
    times = row["seconds"]
    cells = [milliseconds(times[label]) if label in times else "" for label in COMPILERS]
    ratio = f"{times['elc_fx']['median'] / times['fuse']['median']:.2f}" if "fuse" in times else row["reason"][:60]
    return [row["model"], row["threads"], *cells, ratio]


# chains: does the time per layer stay flat?


def conv_bn_relu(layers: int) -> nn.Module:
    """3×3 convolution, batch norm, ReLU: every layer a region of its own."""
    return _chain(layers, lambda: (_conv(3, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()))


def pointwise(layers: int) -> nn.Module:
    """1×1 convolutions and nothing between them: one region."""
    return _chain(layers, lambda: (_conv(1, 0),))


def valid(layers: int) -> nn.Module:
    """3×3 convolutions without padding: mergeable, but the kernel grows, so the partition must decide."""
    return _chain(layers, lambda: (_conv(3, 0),))


def multi_branch(layers: int) -> nn.Module:
    """Residual blocks of two convolutions in parallel, batch norms on every branch, and a ReLU."""
    return nn.Sequential(*(Branches() for _ in range(layers // 2)))


class Branches(nn.Module):
    """x → relu(bn(conv3×3(x)) + bn(conv1×1(x)) + bn(x) + x), all of CHANNELS channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(_conv(3, 1), nn.BatchNorm2d(CHANNELS))
        self.narrow = nn.Sequential(_conv(1, 0), nn.BatchNorm2d(CHANNELS))
        self.identity = nn.BatchNorm2d(CHANNELS)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.wide(x) + self.narrow(x) + self.identity(x) + x)
        return y


def _conv(size: int, padding: int) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, size, padding=padding)


def _chain(layers: int, layer: Callable[[], tuple[nn.Module, ...]]) -> nn.Module:
    return nn.Sequential(*(module for _ in range(layers) for module in layer()))


CHAINS: dict[str, Callable[[int], nn.Module]] = {
    "conv, batch norm, ReLU": conv_bn_relu,
    "1×1 convolutions": pointwise,
    "3×3 convolutions, unpadded": valid,
    "multi-branch blocks": multi_branch,
}


def time_chain(kind: str, layers: int, repeats: int) -> dict[str, Any]:
    """Compile time of one chain, and of torch.fx.symbolic_trace alone beside it. `layers` counts convolutions."""
    model = CHAINS[kind](layers).eval()
    jobs = {
        "trace": lambda: fx.symbolic_trace(model),
        **{label: _job(COMPILERS[label], model) for label in ("elc_fx", "unverified")},
    }
    timings = side_by_side(jobs, repeats, warmup=int(layers < 1000))
    left = sum(isinstance(module, CONVOLUTIONS) for module in _compile_unverified(model).modules())
    return {"chain": kind, "layers": layers, "convolutions_after": left, "seconds": _stored(timings)}


def growths(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For each kind of chain: time per layer of the longest over that of the next shorter one."""
    growth = {}
    for kind in dict.fromkeys(row["chain"] for row in rows):
        lengths = sorted((row["layers"], row["seconds"]["elc_fx"]["median"]) for row in rows if row["chain"] == kind)
        if len(lengths) > 1:
            (shorter, time_before), (longest, time_after) = lengths[-2:]
            growth[kind] = (time_after / longest) / (time_before / shorter)
    return growth


def chains_table(result: Mapping[str, Any], style: str = "simple") -> str:
    headers = (
        "chain",
        "layers",
        "convolutions left",
        "total [s]",
        "per layer [ms]",
        "without verification [ms]",
        "symbolic_trace alone [ms]",
    )
    return terminal.table([_chain_cells(row) for row in result["rows"]], headers, style)


def _chain_cells(row: Mapping[str, Any]) -> list[str]:
    per_layer = [
        f"{1000 * row['seconds'][label]['median'] / row['layers']:.3f}" for label in ("elc_fx", "unverified", "trace")
    ]
    total = f"{row['seconds']['elc_fx']['median']:.2f}"
    return [row["chain"], f"{row['layers']:,}", f"{row['convolutions_after']:,}", total, *per_layer]


# memory: the peak above the loaded model


def measure_memory(name: str, compiler: str) -> dict[str, Any]:
    """The peak resident memory of one compilation above that of the loaded model. Run it in a fresh process.

    A small model is compiled first, so that what is imported and allocated once is not counted.
    """
    model = build(family_of(name), name)
    COMPILERS[compiler](CHAINS["conv, batch norm, ReLU"](2).eval())
    gc.collect()
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    compiled = COMPILERS[compiler](model)
    gc.collect()
    peak = _resident_bytes("VmHWM") - before
    kept = _resident_bytes("VmRSS") - before
    del compiled
    return {
        "model": name,
        "compiler": compiler,
        "model_bytes": _bytes(model),
        "largest_layer_float64_bytes": 8 * max(parameter.numel() for parameter in model.parameters()),
        "largest_convolution_float64_bytes": 8
        * max(m.weight.numel() for m in model.modules() if isinstance(m, CONVOLUTIONS)),
        "peak_bytes": peak,
        "kept_bytes": kept,
    }


def _resident_bytes(key: str) -> int:
    """VmRSS, what is resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def memory_table(result: Mapping[str, Any], style: str = "simple") -> str:
    headers = (
        "model",
        "compiler",
        "model [MB]",
        "largest convolution in float64 [MB]",
        "peak above the model [MB]",
        "peak / model",
        "kept / model",
    )
    return terminal.table([_memory_cells(row) for row in result["rows"]], headers, style)


def _memory_cells(row: Mapping[str, Any]) -> list[str]:
    sizes = [f"{row[key] / 1e6:,.0f}" for key in ("model_bytes", "largest_convolution_float64_bytes", "peak_bytes")]
    ratios = [f"{row[key] / row['model_bytes']:.2f}" for key in ("peak_bytes", "kept_bytes")]
    return [row["model"], row["compiler"], *sizes, *ratios]


# end-to-end: verification on example inputs


def time_end_to_end(name: str, side: int, repeats: int) -> dict[str, Any]:
    """Compile time with one example image, verified and not, and one forward pass of the original beside it."""
    model = build(family_of(name), name)
    image = torch.randn(1, 3, side, side)
    jobs: dict[str, Callable[[], object]] = {
        "verified": lambda: elc_fx.compile(model, (image,)),
        "unverified": lambda: elc_fx.compile(model, (image,), verify=False),
        "forward": lambda: _forward(model, image),
    }
    return {"model": name, "image": side, "seconds": _stored(side_by_side(jobs, repeats))}


def _forward(model: nn.Module, image: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(image)
        return output


def end_to_end_table(result: Mapping[str, Any], style: str = "simple") -> str:
    headers = (
        "model",
        "image",
        "verified end to end [ms]",
        "not verified [ms]",
        "verification [ms]",
        "one forward pass [ms]",
    )
    return terminal.table([_end_to_end_cells(row) for row in result["rows"]], headers, style)


def _end_to_end_cells(row: Mapping[str, Any]) -> list[str]:
    times = row["seconds"]
    verification = times["verified"]["median"] - times["unverified"]["median"]
    shown = [milliseconds(times[label]) for label in ("verified", "unverified")]
    return [
        row["model"],
        f"{row['image']}×{row['image']}",
        *shown,
        f"{1000 * verification:,.0f}",
        milliseconds(times["forward"]),
    ]


# the command line

app = typer.Typer(add_completion=False, rich_markup_mode=None, help=terminal.verbatim(__doc__), no_args_is_help=True)
Repeats = Annotated[int, typer.Option(help="Measurements of each; the median counts.", min=1)]
Json = Annotated[
    Path | None, typer.Option(help="Result file; docs/results/compile_SECTION.json where nothing is left out.")
]


def _store(section: str, origin: provenance.Provenance, result: dict[str, Any], json: Path | None, whole: bool) -> None:
    if json or whole:
        provenance.store(json or provenance.RESULTS / f"compile_{section}.json", origin, result)


@app.command()
def zoo(
    only: Annotated[str, typer.Option(help="Only models whose name matches this glob.")] = "*",
    threads: Annotated[
        list[int] | None, typer.Option(help="CPU threads; may be given several times. Default: 1, and all.")
    ] = None,
    repeats: Repeats = 3,
    json: Json = None,
) -> None:
    """Compile time beside torch.fx.experimental.optimization.fuse: classification, segmentation and video models."""
    origin = provenance.collect()
    chosen_threads = threads or sorted({1, torch.get_num_threads()})
    names = [name for family in (CLASSIFICATION, SEGMENTATION, VIDEO) for name in family.models(only)]
    if not names:
        raise typer.BadParameter(f"no model matches {only!r}")
    cases = [(name, count) for name in names for count in chosen_threads]
    rows = [
        time_model(name, count, repeats)
        for name, count in terminal.tracked(cases, label=lambda case: f"{case[0]}, {case[1]} threads")
    ]
    result = {"rows": rows, "totals": zoo_totals(rows)}
    print(zoo_table(result))
    _store("zoo", origin, result, json, whole=only == "*")
    if any(total["ratio"] > TIME_LIMIT for total in result["totals"]):
        sys.exit(f"elc_fx takes more than {TIME_LIMIT:g} times the time of fuse")


@app.command()
def chains(
    length: Annotated[
        list[int] | None, typer.Option(help="Layers; may be given several times. Default: 100, 1000, 10000.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help=f"Which chain; may be given several times: {'; '.join(CHAINS)}.")
    ] = None,
    repeats: Repeats = 3,
    json: Json = None,
) -> None:
    """Compile time per layer of synthetic chains, beside torch.fx.symbolic_trace alone."""
    origin = provenance.collect()
    cases = [(name, layers) for name in kind or CHAINS for layers in length or (100, 1_000, 10_000)]
    rows = [
        time_chain(*case, repeats) for case in terminal.tracked(cases, label=lambda case: f"{case[0]}, {case[1]:,}")
    ]
    growth = growths(rows)
    result = {"rows": rows, "growth": growth}
    print(chains_table(result))
    _store("chains", origin, result, json, whole=not length and not kind)
    if steep := [f"{name}: {factor:.1f}" for name, factor in growth.items() if factor > GROWTH_LIMIT]:
        sys.exit(f"the time per layer grows with the length: {', '.join(steep)}")


@app.command()
def memory(
    model: Annotated[
        list[str] | None, typer.Option(help=f"Model; may be given several times. Default: {', '.join(MEMORY_MODELS)}.")
    ] = None,
    json: Json = None,
) -> None:
    """Peak memory of one compilation above the loaded model (Linux: it reads /proc)."""
    origin = provenance.collect()
    cases = [(name, compiler) for name in model or MEMORY_MODELS for compiler in COMPILERS]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD)  # read by the C library of the processes to come
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh_process:
        shown = terminal.tracked(cases, label=lambda case: f"{case[0]}, {case[1]}")
        rows = [fresh_process.submit(measure_memory, *case).result() for case in shown]
    result = {"rows": rows}
    print(memory_table(result))
    _store("memory", origin, result, json, whole=not model)


@app.command("end-to-end")
def end_to_end(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"Model; may be given several times. Default: {', '.join(END_TO_END_MODELS)}."),
    ] = None,
    side: Annotated[int, typer.Option(help="Height and width of the example image.", min=32)] = 224,
    repeats: Repeats = 3,
    json: Json = None,
) -> None:
    """Time of compiling with example inputs, with and without verification."""
    origin = provenance.collect()
    rows = [time_end_to_end(name, side, repeats) for name in terminal.tracked(model or END_TO_END_MODELS)]
    result = {"rows": rows}
    print(end_to_end_table(result))
    _store("end_to_end", origin, result, json, whole=not model)


if __name__ == "__main__":
    app()
