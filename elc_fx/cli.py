"""The command line: `elc-fx compile` and `elc-fx demo`. The result goes to stdout, all else to stderr."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from typer.core import TyperGroup

import elc_fx
from elc_fx import demo, exporting
from elc_fx.errors import ElcError, InvalidInputError
from elc_fx.loading import Spec, load_weights

FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit codes
_UsageError: Any = typer.BadParameter.__bases__[0]  # click's; newer releases of typer bring a click of their own

COMPILE_HELP = """Merge every layer of a model that merges exactly, and show what that saves.

SPEC says where the model comes from: torchvision:NAME, timm:NAME or package.module:factory, a function without
arguments (or a class, or a model) that can be imported, also from this directory. Nothing is downloaded: give trained
weights by --weights.

\b
Examples:
  elc-fx compile torchvision:resnet50 --input 1x3x224x224
  elc-fx compile timm:repvgg_a0 --input 8x3x224x224 --json > repvgg.json
  elc-fx compile mynets:make_net --input 1x3x32x32 --weights net.safetensors --save net.pt2
  elc-fx compile mynets:two_views --input 1x3x64x64 --input 1x1x64x64

Exit codes: 0 fine, 1 failed, 2 wrong usage.
"""
DEMO_HELP = """Train a small multi-branch network on real handwritten digits, compile it, and compare the two.

Takes about 15 seconds. Exit codes: 0 when both networks predict the same on every test image, 1 otherwise.

\b
Examples:
  elc-fx demo
  elc-fx demo --epochs 2 --json
"""


class Dtype(str, Enum):
    """The number formats that --dtype takes."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class _OneLineErrors(TyperGroup):
    """Says what is wrong with the arguments in one line, as every other error."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except _UsageError as error:
            _complain(f"{error.format_message()} (see {error.ctx.command_path if error.ctx else 'elc-fx'} --help)")
            sys.exit(MISUSED)
        except typer.Abort:
            _complain("interrupted")
            sys.exit(INTERRUPTED)
        sys.exit(code or 0)


app = typer.Typer(name="elc-fx", cls=_OneLineErrors, add_completion=False, rich_markup_mode=None)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Debug = Annotated[
    bool, typer.Option("--debug", envvar="ELC_FX_DEBUG", help="Show the traceback of an error.", show_envvar=True)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elc-fx {importlib.metadata.version('elc_fx')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def elc_fx_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Shorten convolutional networks: merge layers without changing what the network computes."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(MISUSED)


@app.command("compile", help=COMPILE_HELP, short_help="Merge what merges exactly, and show what that saves.")
def compile_command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="The model.", show_default=False)],
    shapes: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="SHAPE", help="Shape of an input, as 1x3x224x224; once for each input."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="State dict: .safetensors, or a file of torch.save.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="OUT.pt2", help="Export the compiled model to this file; needs --input.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the model to this format.", show_default=False)] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check that each merge is exact.")] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    with _one_line_errors(debug):
        source = _parsed_spec(spec)
        sizes = [_parsed_shape(text) for text in shapes or ()]
        _require_saveable(save, sizes)
        with _working(f"compiling {spec}"):
            model = _model(source, weights, dtype)
            inputs = _random_inputs(sizes, model)
            compiled = elc_fx.compile(model, inputs or None, verify=verify)
            comparison = elc_fx.compare(model, compiled, inputs) if inputs else None
            if save:
                _save(compiled, inputs, save)
        report = elc_fx.report_of(compiled)
        if as_json:
            compared = comparison.to_dict() if comparison else None
            typer.echo(json.dumps({"report": report.to_dict(), "comparison": compared}, indent=2))
        else:
            typer.echo("\n\n".join(str(part) for part in (report, comparison) if part is not None))


@app.command("demo", help=DEMO_HELP, short_help="Train a small network on real digits and compile it.")
def demo_command(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = demo.EPOCHS,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the images.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    with _one_line_errors(debug):
        result = demo.run(epochs, seed)
        typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
        if result.differing_predictions:
            raise ElcError(f"the compiled network predicts {result.differing_predictions} images differently")


def main() -> None:
    """The console script. What the working directory holds can be imported, as with `python -m`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    app(prog_name="elc-fx")


@contextlib.contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Ends the command with exit code 1 and one line on stderr. Wrong usage, which has its own code, passes."""
    try:
        yield
    except (_UsageError, typer.Exit, typer.Abort):
        raise
    except Exception as error:  # the last stop before the shell, which needs no traceback
        if debug:
            traceback.print_exc()
        unexpected = "" if isinstance(error, ElcError) else f"{type(error).__name__}: "
        hint = "" if debug or not unexpected else " (--debug shows where)"
        _complain(f"{unexpected}{error}{hint}")
        raise typer.Exit(FAILED) from error


@contextlib.contextmanager
def _working(on: str) -> Iterator[None]:
    """A spinner where stderr is a terminal; what the model's code prints goes to stderr as well."""
    with contextlib.redirect_stdout(sys.stderr), Console(stderr=True).status(on):
        yield


def _complain(message: str) -> None:
    typer.echo(f"elc-fx: error: {' '.join(message.split())}", err=True)


def _parsed_spec(text: str) -> Spec:
    try:
        return Spec.parse(text)
    except InvalidInputError as error:
        raise typer.BadParameter(str(error), param_hint="SPEC") from error


def _parsed_shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"{text!r} is no shape; expected sizes as in 1x3x224x224", param_hint="--input")
    return tuple(map(int, sizes))


def _require_saveable(file: Path | None, sizes: list[tuple[int, ...]]) -> None:
    """Before the work is done, not after."""
    if file is None:
        return
    if not sizes:
        raise typer.BadParameter("the export needs --input as well", param_hint="--save")
    if not file.parent.is_dir():
        raise exporting.ExportError(f"cannot write {file}: there is no directory {file.parent}")
    if file.is_dir():
        raise exporting.ExportError(f"cannot write {file}: it is a directory")


def _model(spec: Spec, weights: Path | None, dtype: Dtype | None) -> nn.Module:
    torch.manual_seed(0)  # without --weights, the same numbers each time
    model = spec.load()
    if weights:
        load_weights(model, weights)
    return model.to(getattr(torch, dtype.value)) if dtype else model


def _random_inputs(sizes: list[tuple[int, ...]], model: nn.Module) -> tuple[Tensor, ...]:
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point]
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator).to(dtypes[0] if dtypes else torch.float32) for size in sizes)


def _save(compiled: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
    exported = exporting.export(compiled, inputs)
    exporting.save(exported, file)
    if exported.fixed_batch:
        typer.echo(f"elc-fx: note: {file} takes this batch size only ({exported.fixed_batch})", err=True)
