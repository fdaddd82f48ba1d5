"""The command line: `elc-fx compile` and its like. The result goes to stdout, all else to stderr."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
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
from rich.text import Text
from torch import Tensor, nn
from typer.core import TyperGroup

import elc_fx
from elc_fx import demo, job
from elc_fx.api import DRAWINGS
from elc_fx.deploying import exporting
from elc_fx.errors import ElcError, ExportError, InvalidInputError
from elc_fx.loading import Spec, load_weights
from elc_fx.planning.budget import Budget
from elc_fx.planning.sensitivity import SAMPLES
from elc_fx.training import data as pictures
from elc_fx.training.finetuning import FinetuneConfig

LINE_STYLES = {
    "kept": "dim",
    "merged": "blue",
    "split": "magenta",
    "changed": "yellow",
    "inserted": "green",
    "removed": "red",
}
FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit codes
STORED = ".elc"  # the suffix of what elc_fx.save writes
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
  elc-fx compile mynets:make_net --weights net.safetensors --save net.elc
  elc-fx compile mynets:two_views --input 1x3x64x64 --input 1x1x64x64

--save writes net.pt2 for torch.export.load, torch's compilers and runtimes; net.elc for elc_fx.load, with its report,
which runs nothing that is in the file. For ONNX Runtime or OpenVINO, see docs/deploy.md.

Exit codes: 0 fine, 1 failed, 2 wrong usage.
"""
DEMO_HELP = """Train three small networks on real handwritten digits, and make them shallower.

A multi-branch network is merged exactly; a plain and a residual network are compressed to half of their FLOPs and
fine-tuned. Takes about a minute. Reports go to a folder. Exit codes: 0 when the exact merge predicts the same on every
test image, 1 otherwise.

\b
Examples:
  elc-fx demo
  elc-fx demo --epochs 2 --out /tmp/demo --json
"""
EXPLAIN_HELP = """Show what of a model would merge exactly, what could after decoupling, what not, and why.

Nothing is compiled or written: look here first. Without --input nothing is said of FLOPs, and of decoupling.

\b
Examples:
  elc-fx explain torchvision:resnet18 --input 1x3x224x224
  elc-fx explain mynets:net --weights net.safetensors --input 1x3x32x32 --json
"""
DIFF_HELP = """Show what became of the layers of one network in another.

A and B are each a model (SPEC, as for compile) or a .pt2 or .elc file. Without B, it is A after its exact merges; with
--plan, A after a plan has been carried out. Layers that elc_fx made know what they stand for; others are told by their
names, their weights, and what surrounds them.

\b
What the text shows:
    kept      the same layer (other weights are told)
  »  merged    several layers became one, after the arrow
  «  split     one became several
  ~  changed   another operation in the same place
  +  inserted
  -  removed

\b
Examples:
  elc-fx diff torchvision:resnet18 --input 1x3x224x224
  elc-fx diff torchvision:resnet18 small/model.pt2 --draw diff.html
  elc-fx diff mynets:net --plan plan.json --input 1x3x32x32 --draw diff.svg --draw diff.html
  elc-fx diff before.pt2 after.pt2 --all

The page (.html) needs nothing but itself: zoom, search, filter, click a layer; press ? for its keys. --draw also takes
.svg, and .dot for graphviz. Exit codes: 0 shown, 1 failed, 2 wrong usage.
"""
PLAN_HELP = """Choose which regions of a model become one convolution each, and which kernels shrink, under a budget.

Losses are measured on images of the training set, normalised as for ImageNet unless --mean and --std say otherwise. The
model itself is not changed; --save keeps the plan, for elc_fx.Plan.from_json.

\b
Examples:
  elc-fx plan --model mynets:net --weights net.safetensors --data images/ --budget flops=0.5
  elc-fx plan --model mynets:net --weights net.safetensors --data cifar.tar --budget "latency=12 ms,params=0.8"
"""
COMPRESS_HELP = """Compress a trained classifier to a budget: plan, merge, fine-tune, verify, write.

DATA holds images as train/CLASS/IMAGE (and test/CLASS/IMAGE), as CLASS/IMAGE, or CIFAR-10's own files; in a folder, or
a tar or zip archive. A share of the training images is held out to choose the best epoch; test images only give the
last figure. OUT gets the network (model.pt2, model.elc, with --onnx model.onnx), its weights (model.safetensors),
plan.json, report.html, report.json and metrics.csv. report.html is what to look at: accuracy and costs before and
after, the plan, every layer before and after, training, and what stayed apart and why. A run that was killed goes on
with the same command.

Images are normalised as for ImageNet, unless --mean and --std say otherwise. Look at the first lines that are printed:
one is the accuracy of your model on the images that are held out.

\b
Examples:
  elc-fx compress --model mynets:net --weights net.safetensors --data images/ --budget flops=0.5 --out small/
  elc-fx compress --model torchvision:resnet18 --weights r18.pt --data photos.tar --size 3x224x224 \\
      --budget "latency=0.6" --epochs 20 --batch 64 --out small/
  elc-fx compress --model mynets:net --weights net.safetensors --data images/ --plan plan.json --out small/
  elc-fx compress --model mynets:net --weights net.safetensors --data images/ --budget flops=0.3 --out third/ \\
      --beside half/ --beside small/
"""


IMAGENETS_MEAN, IMAGENETS_STD = (",".join(map(str, values)) for values in (pictures.MEAN, pictures.DEVIATION))


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
        if code == INTERRUPTED:  # what newer releases of typer give instead
            _complain("interrupted")
        sys.exit(code or 0)


app = typer.Typer(name="elc-fx", cls=_OneLineErrors, add_completion=False, rich_markup_mode=None)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Debug = Annotated[
    bool, typer.Option("--debug", envvar="ELC_FX_DEBUG", help="Show the traceback of an error.", show_envvar=True)
]

Shapes = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="Shape of an input, as 1x3x224x224; once for each input."),
]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="State dict: .safetensors, or of torch.save.")]


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
    shapes: Shapes = None,
    weights: Weights = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write the compiled model: .elc for elc_fx.load; else .pt2, needs --input."),
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


@app.command("explain", help=EXPLAIN_HELP, short_help="Show what would merge, what could, what not, and why.")
def explain_command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="The model, as for compile.", show_default=False)],
    shapes: Shapes = None,
    weights: Weights = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    with _one_line_errors(debug):
        source = _parsed_spec(spec)
        sizes = [_parsed_shape(text) for text in shapes or ()]
        with _working(f"looking at {spec}"):
            model = _model(source, weights, None)
            explanation = elc_fx.explain(model, _random_inputs(sizes, model) or None)
        typer.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else str(explanation))


@app.command("diff", help=DIFF_HELP, short_help="Show what became of each layer: text, picture, page.")
def diff_command(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, or a .pt2 or .elc file.", show_default=False)],
    b: Annotated[str | None, typer.Argument(metavar="B", help="Another; by default A after its merges.")] = None,
    shapes: Shapes = None,
    weights: Weights = None,
    weights_b: Annotated[Path | None, typer.Option(metavar="FILE", help="State dict of B.")] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="In the place of B: A after this plan.")
    ] = None,
    draw: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Write .html, .svg or .dot; may be given several times.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show the kept layers too.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    with _one_line_errors(debug):
        if b is not None and plan is not None:
            raise typer.BadParameter("it stands in the place of B; give one of the two", param_hint="--plan")
        if b is None and weights_b is not None:
            raise typer.BadParameter("there is no B", param_hint="--weights-b")
        for file in draw or ():
            if file.suffix not in DRAWINGS:
                raise typer.BadParameter(f"{file} does not end in {', '.join(DRAWINGS)}", param_hint="--draw")
            _require_writable(file)
        sizes = [_parsed_shape(text) for text in shapes or ()]
        with _working(f"comparing {a} and {b or 'what becomes of it'}"):
            before = _network(a, weights)
            inputs = None if not sizes else _random_inputs(sizes, before if isinstance(before, nn.Module) else None)
            if b is not None:
                after, name = _network(b, weights_b), b
            else:
                after, name = _merged(before, plan, inputs), f"{a}, merged"
            found = elc_fx.diff(before, after, inputs, names=(a, name))
            for file in draw or ():
                elc_fx.draw(found, file)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=2))
        else:
            _show(found, everything=everything)


def _network(text: str, weights: Path | None) -> nn.Module | exporting.Exported:
    if text.endswith((".pt2", STORED)):
        if weights is not None:
            raise InvalidInputError(f"{text} has its weights already; {weights} is for a model by name")
        return elc_fx.load(text) if text.endswith(STORED) else exporting.load(Path(text))
    return _model(_parsed_spec(text), weights, None)


def _merged(model: nn.Module | exporting.Exported, plan: Path | None, inputs: tuple[Tensor, ...] | None) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InvalidInputError("a .pt2 file is not merged any more; give B, or the model that it was made from")
    if plan is None:
        return elc_fx.compile(model, inputs, verify=False)
    decoupled = elc_fx.decouple(model, _plan(plan))
    elc_fx.set_gate(decoupled, 0)
    return elc_fx.merge(decoupled, verify=False)


def _plan(file: Path) -> elc_fx.Plan:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{file} cannot be read: {error}") from error
    return elc_fx.Plan.from_json(text)


def _show(found: elc_fx.Diff, *, everything: bool) -> None:
    """In colour on a terminal, where long lines end in …; whole lines elsewhere."""
    console = Console(highlight=False)
    console.print(Text(found.summary()), style="bold", soft_wrap=not console.is_terminal)
    for line in found.lines(everything=everything):
        text = Text(line.text, style=LINE_STYLES[line.kind], no_wrap=True, overflow="ellipsis")
        console.print(text, soft_wrap=not console.is_terminal)


Model = Annotated[str, typer.Option("--model", metavar="SPEC", help="The model, as for compile.", show_default=False)]
Data = Annotated[Path, typer.Option(metavar="DIR", help="Images: a folder or an archive.", show_default=False)]
BUDGET = typer.Option(
    "--budget",
    help="Limits, as flops=0.5 or params=0.6,depth=20: up to 1, a share of what it is now; above, or with a unit, "
    'as in "depth=1 layer,latency=12 ms", absolute.',
    show_default=False,
)
BudgetText = Annotated[str, BUDGET]
TimedBy = Annotated[str, typer.Option(help="For latencies: eager, compile, onnxruntime or openvino.")]
Size = Annotated[
    str | None,
    typer.Option(metavar="CxHxW", help="What images are brought to; by default the size of the first, in colour."),
]
Mean = Annotated[
    str,
    typer.Option(
        help="By which images (values from 0 to 1) were normalised when the model was trained: R,G,B, or one for all."
    ),
]
Std = Annotated[str, typer.Option(help="Their standard deviation, likewise. --mean 0 --std 1: as ToTensor gives them.")]


@app.command("plan", help=PLAN_HELP, short_help="Choose what becomes one convolution, under a budget.")
def plan_command(
    spec: Model,
    data: Data,
    budget: BudgetText,
    weights: Weights = None,
    size: Size = None,
    mean: Mean = IMAGENETS_MEAN,
    std: Std = IMAGENETS_STD,
    backend: TimedBy = "eager",
    save: Annotated[Path | None, typer.Option(metavar="PLAN.json", help="Write the plan to this file.")] = None,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep losses and latencies here.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    with _one_line_errors(debug):
        source, limits, shape = _parsed_spec(spec), _parsed_budget(budget), _parsed_size(size)
        normalisation = _parsed_numbers(mean, "--mean"), _parsed_numbers(std, "--std")
        _require_writable(save)
        with _printing_to_stderr():
            model = _model(source, weights, None)
            images = pictures.load(data, "train", shape, *normalisation)
            assert images is not None  # or a DataError
            drawn = images.taken(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:SAMPLES])
            batches = list(drawn.inputs().split(job.CALIBRATION_BATCH))
            job.check_classes(model, batches[0][:1], images)
            options: dict[str, Any] = {"backend": backend, "cache": cache}
            plan = elc_fx.plan(model, batches[0][:1], limits, batches, **options)
        if save:
            exporting.write(save, plan.to_json().encode())
        typer.echo(plan.to_json() if as_json else str(plan))


@app.command("compress", help=COMPRESS_HELP, short_help="Compress a classifier to a budget, fine-tuned on your images.")
def compress_command(
    spec: Model,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the result goes.", show_default=False)],
    budget: Annotated[str | None, BUDGET] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="In the place of a budget: what elc-fx plan --save wrote.")
    ] = None,
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    size: Size = None,
    mean: Mean = IMAGENETS_MEAN,
    std: Std = IMAGENETS_STD,
    batch: Annotated[int, typer.Option(min=1, help="Images in a training step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = FinetuneConfig.learning_rate,
    held_out: Annotated[float, typer.Option(help="Share of the training images that is held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the order of the images and their augmentation.")] = 0,
    backend: TimedBy = "eager",
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too.")] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="An earlier --out: report.html shows both on one curve; several times."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    with _one_line_errors(debug):
        source, shape = _parsed_spec(spec), _parsed_size(size)
        if (budget is None) == (plan is None):
            raise typer.BadParameter("give one of the two", param_hint="--budget or --plan")
        limits = None if budget is None else _parsed_budget(budget)
        made = None if plan is None else _plan(plan)
        options: dict[str, Any] = {"backend": backend, "epochs": epochs, "learning_rate": learning_rate, "seed": seed}
        if weights is not None and weights.resolve().parent == out.resolve() and weights.name in job.RESULTS:
            raise InvalidInputError(f"{weights} would be overwritten by the result; give another --out")
        with _printing_to_stderr():
            result = job.run(
                _model(source, weights, None),
                data,
                limits,
                out,
                plan=made,
                shape=shape,
                mean=_parsed_numbers(mean, "--mean"),
                deviation=_parsed_numbers(std, "--std"),
                held_out=held_out,
                batch=batch,
                onnx=onnx,
                beside=beside or (),
                say=lambda message: typer.echo(f"elc-fx: {message}", err=True),
                **options,
            )
        typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


@app.command("demo", help=DEMO_HELP, short_help="Train small networks on real digits and make them shallower.")
def demo_command(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = demo.EPOCHS,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the images.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the reports go.")] = Path("elc_fx_demo"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    with _one_line_errors(debug):
        result = demo.run(epochs, seed, out)
        typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
        if differing := result.exact.differing_predictions:
            raise ElcError(f"the compiled network predicts {differing} images differently")


def main() -> None:
    """The console script. What the working directory holds can be imported, as with `python -m`."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # some encodings lack arrows and signs
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
    with _printing_to_stderr(), Console(stderr=True).status(on):
        yield


@contextlib.contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """What compiled libraries print as well: HiGHS prints a line now and then, which would spoil --json."""
    with contextlib.ExitStack() as stack:
        if os.name == "posix":
            stdout = os.dup(1)
            stack.callback(os.close, stdout)
            stack.callback(os.dup2, stdout, 1)
            stack.callback(ctypes.CDLL(None).fflush, None)  # C's own buffers, before stdout is itself again
            os.dup2(2, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
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


def _parsed_budget(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except InvalidInputError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from error


def _parsed_numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number, nor several with commas between", param_hint=option) from None


def _parsed_size(text: str | None) -> tuple[int, int, int] | None:
    sizes = None if text is None else _parsed_shape(text)
    if sizes is not None and (len(sizes) != 3 or sizes[0] not in (1, 3)):
        raise typer.BadParameter(f"{text!r} is no size; expected 3x224x224, or 1x28x28 for grey", param_hint="--size")
    return sizes  # type: ignore[return-value]


def _require_saveable(file: Path | None, sizes: list[tuple[int, ...]]) -> None:
    """Before the work is done, not after."""
    if file is None:
        return
    if not sizes and file.suffix != STORED:
        raise typer.BadParameter("the export needs --input as well", param_hint="--save")
    _require_writable(file)
    if file.suffix not in (".pt2", STORED):
        raise typer.BadParameter(f"{file} ends in neither .pt2 nor {STORED}", param_hint="--save")


def _require_writable(file: Path | None) -> None:
    if file is None:
        return
    if not file.parent.is_dir():
        raise ExportError(f"cannot write {file}: there is no directory {file.parent}")
    if file.is_dir():
        raise ExportError(f"cannot write {file}: it is a directory")


def _model(spec: Spec, weights: Path | None, dtype: Dtype | None) -> nn.Module:
    torch.manual_seed(0)  # without --weights, the same numbers each time
    model = spec.load()
    if weights:
        load_weights(model, weights)
    return model.to(getattr(torch, dtype.value)) if dtype else model


def _random_inputs(sizes: list[tuple[int, ...]], model: nn.Module | None) -> tuple[Tensor, ...]:
    parameters = () if model is None else model.parameters()
    dtypes = [parameter.dtype for parameter in parameters if parameter.dtype.is_floating_point]
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator).to(dtypes[0] if dtypes else torch.float32) for size in sizes)


def _save(compiled: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
    if file.suffix == STORED:
        elc_fx.save(compiled, file)
        return
    exported = exporting.export(compiled, inputs)
    exporting.save(exported, file)
    if exported.fixed_batch:
        typer.echo(f"elc-fx: note: {file} takes this batch size only ({exported.fixed_batch})", err=True)
