"""Compiles every model of torchvision and checks each against the original, by instruments independent of elc_fx.

For each model, with random batch-norm statistics and parameters (the freshly initialised ones hide mistakes):

- outputs equal to 1e-5 relative in float32;
- FLOPs (counted while it runs) never up;
- no batch norm left behind a convolution that could take it (watched while it runs, so opaque parts count too).

Where a network amplifies rounding so much that its own float32 outputs are that far from float64, the model is compiled
and compared in float64 as well (1e-9), and the row says so. Prints a table, stores JSON, exits 1 if any model fails.

    python tools/zoo_sweep.py                              everything, into docs/results/zoo_sweep.json
    python tools/zoo_sweep.py --only 'resnet*'             some models; stored only where --json says
    python tools/zoo_sweep.py --family detection
    python tools/zoo_sweep.py --timm 'repvgg_*'            timm's models in place of torchvision's
"""

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import elc_fx
import provenance
import terminal
from zoo import TIMM, TORCHVISION, Arguments, Family, accepted_size, build, call, freeze_as_published, unsettle

FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-9
ROUNDING_FACTOR = (
    10  # a float32 error above the tolerance is rounding if it is within this factor of the original's own
)
ERRORS = ("error_float32", "error_float64", "own_rounding")
CONVOLUTION_CALLS = {f"{kind}{axes}d" for kind in ("conv", "conv_transpose") for axes in (1, 2, 3)}


class CallWatch(TorchFunctionMode):
    """Counts calls that compute tensors, and batch norms that alone read a convolution's or linear layer's output.

    A multiplication by a tensor of shape [1, C, 1, …] is a frozen batch norm: with two samples in the batch, a gate
    that is computed from the input has shape [2, C, 1, …].
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._outputs: dict[int, Tensor] = {}  # holds the tensors, so that no id is used twice
        self._readers: dict[int, list[str]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            self._note(func.__name__, tree_leaves((args, kwargs)), output)
        return output

    def _note(self, name: str, read: list[Any], output: Any) -> None:
        name = "batch_norm" if name == "mul" and _is_channel_scale(read, output) else name
        self.calls[name] += 1
        for value in read:
            if id(value) in self._readers:
                self._readers[id(value)].append(name)
        if name in CONVOLUTION_CALLS or name == "linear":
            self._outputs[id(output)] = output
            self._readers[id(output)] = []

    @property
    def convolutions(self) -> int:
        return sum(self.calls[name] for name in CONVOLUTION_CALLS)

    @property
    def left_behind(self) -> int:
        return sum(readers == ["batch_norm"] for readers in self._readers.values())


def _is_channel_scale(operands: list[Any], output: Tensor) -> bool:
    if output.dim() < 3:
        return False
    shape = (1, output.shape[1], *[1] * (output.dim() - 2))
    return output.shape != shape and any(isinstance(value, Tensor) and value.shape == shape for value in operands)


@dataclass(frozen=True)
class Measured:
    """What one run of one model did. `calls` are calls of torch functions that compute a tensor."""

    calls: int
    convolutions: int
    batch_norms: int
    left_behind: int
    flops: int
    parameters: int


def measure(model: nn.Module, arguments: Arguments) -> Measured:
    """Runs the model once under the watch and the FLOP counter."""
    with FlopCounterMode(display=False) as counter, CallWatch() as watch:
        call(model, arguments)
    return Measured(
        calls=watch.calls.total(),
        convolutions=watch.convolutions,
        batch_norms=watch.calls["batch_norm"],
        left_behind=watch.left_behind,
        flops=counter.get_total_flops(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def relative_error(expected: Any, actual: Any) -> float:
    """The largest |expected − actual| over the largest |expected| of a tensor, for the worst tensor of all.

    Infinite where structures, shapes, dtypes or integers differ, or where a value is not finite. Detections are
    compared as sets: which of two boxes with equal scores comes first is a matter of rounding.
    """
    expected, actual = _in_order(expected), _in_order(actual)
    (tensors, structure), (others, other_structure) = tree_flatten(expected), tree_flatten(actual)
    if structure != other_structure:
        return math.inf
    return max((_tensor_error(*pair) for pair in zip(tensors, others, strict=True)), default=0.0)


def _in_order(output: Any) -> Any:
    """Detections from left to right, in place of the order of their scores."""
    if isinstance(output, list):
        return [_in_order(element) for element in output]
    if isinstance(output, dict) and "boxes" in output:
        order = output["boxes"][:, 0].argsort()
        return {name: values[order] for name, values in output.items()}
    return output


def _tensor_error(expected: Any, actual: Any) -> float:
    if not isinstance(expected, Tensor):
        return 0.0 if expected == actual else math.inf
    if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else math.inf
    if not expected.numel():
        return 0.0
    difference, scale = (expected - actual).abs().max().item(), expected.abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


@dataclass(frozen=True)
class Row:
    """One model of the sweep. Errors are relative and None where not measured or not finite.

    error_float64 and own_rounding (how far the original in float32 is from itself in float64) are there only where
    error_float32 missed the tolerance.
    """

    model: str
    family: str
    reasons: tuple[str, ...] = ()
    input_size: tuple[int, ...] = ()
    compile_seconds: float | None = None
    before: Measured | None = None
    after: Measured | None = None
    graph_nodes: int = 0
    merged: int = 0
    refused: int = 0
    opaque: tuple[str, ...] = ()
    error_float32: float | None = None
    error_float64: float | None = None
    own_rounding: float | None = None
    note: str = ""

    @property
    def status(self) -> str:
        return "FAIL" if self.reasons else "ok"

    def stored(self) -> dict[str, Any]:
        """The row as it stands in the result file."""
        return {**asdict(self), "status": self.status}


def sweep(family: Family, name: str, seed: int = 0) -> Row:
    """Builds, compiles and checks one model. Whatever goes wrong becomes the row's reason: no model ends a sweep."""
    try:
        return _check(family, name, seed)
    except Exception as error:
        message = " ".join(str(error).split())
        return Row(name, family.name, reasons=(f"{type(error).__name__}: {message[:300]}",))
    finally:
        gc.collect()


def _check(family: Family, name: str, seed: int) -> Row:
    torch.manual_seed(seed)
    model = build(family, name)
    size = accepted_size(model, family)
    unsettle(model, family.arguments(family.batch, size))
    freeze_as_published(name, model)
    arguments = family.arguments(2, size)
    start = time.perf_counter()
    compiled = elc_fx.compile(model)
    elapsed = time.perf_counter() - start
    expected, actual = call(model, arguments), call(compiled, arguments)
    report = elc_fx.report_of(compiled)
    row: dict[str, Any] = {
        "model": name,
        "family": family.name,
        "input_size": size,
        "compile_seconds": elapsed,
        "before": measure(model, arguments),
        "after": measure(compiled, arguments),
        "graph_nodes": _graph_nodes(compiled),
        "merged": len(report.merged),
        "refused": len(report.refused),
        "opaque": tuple(str(reason) for reason in report.opaque),
        "error_float32": relative_error(expected, actual),
    }
    del compiled, actual
    if row["error_float32"] > FLOAT32_TOLERANCE:
        row |= _in_float64(model, arguments, expected)
    return _judge(row, expected)


def _in_float64(model: nn.Module, arguments: Arguments, expected: Any) -> dict[str, Any]:
    """The same comparison in float64, from compilation on, and how far the original's float32 outputs were off.

    FLOPs and calls are counted again: where a rounding error reorders a detector's boxes, float32 runs differ in count.
    """
    model.double()
    arguments = _as_double(arguments)
    exact = call(model, arguments)
    compiled = elc_fx.compile(model)
    return {
        "error_float64": relative_error(exact, call(compiled, arguments)),
        "own_rounding": relative_error(exact, _as_double(expected)),
        "before": measure(model, arguments),
        "after": measure(compiled, arguments),
    }


def _as_double(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)


def _judge(row: dict[str, Any], expected: Any) -> Row:
    """Turns the measurements into a verdict."""
    reasons, note = [], ""
    before, after, error = row["before"], row["after"], row["error_float32"]
    if not _is_substantial(expected):
        reasons.append("the original's own outputs vanish or are not finite: the comparison says nothing")
    if error > FLOAT32_TOLERANCE:
        note = _rounding_note(row["own_rounding"])
        if row["error_float64"] > FLOAT64_TOLERANCE or error > ROUNDING_FACTOR * row["own_rounding"]:
            reasons.append(f"outputs differ by {error:.1e} in float32, {row['error_float64']:.1e} in float64")
    if after.flops > before.flops:
        reasons.append(f"FLOPs rise from {before.flops:,} to {after.flops:,}")
    if after.left_behind:
        reasons.append(f"{after.left_behind} batch norms left behind a layer that could take them")
    errors = {key: row[key] if math.isfinite(row[key]) else None for key in ERRORS if key in row}
    return Row(**row | errors, reasons=tuple(reasons), note=note)


def _rounding_note(own_rounding: float) -> str:
    if math.isfinite(own_rounding):
        return f"rounding: the original in float32 is {own_rounding:.0e} from itself in float64"
    return "rounding: the original in float32 finds other boxes than in float64"


def _is_substantial(outputs: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(tensor.numel() for tensor in tensors) and all(
        torch.isfinite(tensor).all() and 1e-6 < tensor.abs().max() < 1e6 for tensor in tensors if tensor.numel()
    )


def _graph_nodes(compiled: nn.Module) -> int:
    return sum(len(module.graph.nodes) for module in compiled.modules() if isinstance(module, fx.GraphModule))


def table(rows: Sequence[dict[str, Any]], style: str = "simple") -> str:
    """The table of stored rows."""
    headers = (
        "model", "input", "calls", "convolutions", "batch norms", "FLOPs", "regions merged", "opaque",
        "error (float32)", "compile [s]", "status",
    )  # fmt: skip
    return terminal.table([_cells(row) for row in rows], headers, style)


def _cells(row: dict[str, Any]) -> list[str]:
    before, after, error = row["before"], row["after"], row["error_float32"]
    verdict = "; ".join(row["reasons"]) or row["note"]
    status = f"{row['status']}: {verdict}" if verdict else row["status"]
    if before is None:
        return [row["model"], *[""] * 9, status]
    return [
        row["model"],
        "×".join(map(str, row["input_size"])),
        *(f"{before[key]:,} → {after[key]:,}" for key in ("calls", "convolutions", "batch_norms")),
        f"{before['flops'] / 1e9:.3f} G → {after['flops'] / before['flops']:.1%}",
        str(row["merged"]),
        str(len(row["opaque"])),
        "differs" if error is None else f"{error:.0e}",
        f"{row['compile_seconds']:.2f}",
        status,
    ]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One sentence over all rows."""
    failed = [row["model"] for row in rows if row["status"] != "ok"]
    rounding = [row["model"] for row in rows if row["note"] and row["status"] == "ok"]
    errors = [row["error_float32"] for row in rows if row["error_float32"] is not None and row["model"] not in rounding]
    parts = [
        f"{len(rows) - len(failed)} of {len(rows)} models ok",
        f"largest relative error in float32 {max(errors, default=0):.1e}",
        f"{sum(row['merged'] for row in rows):,} regions merged",
    ]
    if rounding:
        parts.append(f"checked in float64 because they amplify rounding: {', '.join(rounding)}")
    return "; ".join(parts + ([f"FAILED: {', '.join(failed)}"] if failed else []))


def _selection(families: list[str], only: str, timm: str | None) -> list[tuple[Family, str]]:
    if timm is not None:
        return [(TIMM, name) for name in TIMM.models(timm)]
    chosen = [family for family in TORCHVISION if not families or family.name in families]
    return [(family, name) for family in chosen for name in family.models(only)]


def main(
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be given several times.")] = None,
    only: Annotated[str, typer.Option(help="Only models whose name matches this glob.")] = "*",
    timm: Annotated[
        str | None, typer.Option(help="timm's models matching this glob, in place of torchvision's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random parameters, statistics and inputs.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Result file. The whole torchvision sweep has a default.")] = None,
) -> None:
    known = [known.name for known in TORCHVISION]
    if unknown := set(family or []) - set(known):
        raise typer.BadParameter(f"no family {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    selected = _selection(family or [], only, timm)
    if not selected:
        raise typer.BadParameter(f"no model matches {timm or only!r}")
    origin = provenance.collect()
    rows = [sweep(*case, seed).stored() for case in terminal.tracked(selected, label=lambda case: case[1])]
    print(table(rows), summary(rows), sep="\n\n")
    whole = timm is None and not family and only == "*"
    if json or whole:
        provenance.store(json or provenance.RESULTS / "zoo_sweep.json", origin, {"seed": seed, "rows": rows})
    if any(row["reasons"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    terminal.run(main, __doc__)
