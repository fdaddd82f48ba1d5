"""The whole job on files: a model, its weights and images in, a folder with the compressed network out."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tabulate import tabulate
from torch import nn

from elc_fx.api import compile
from elc_fx.capturing.identity import fingerprint
from elc_fx.comparison import Comparison, compare
from elc_fx.compiled import report_of
from elc_fx.compression import compress
from elc_fx.deploying import exporting, storing
from elc_fx.errors import DataError, ExportError, InvalidInputError, StorageError, TrainingError, warn
from elc_fx.files import alone_in, write_whole
from elc_fx.memory import within_memory
from elc_fx.planning import latency
from elc_fx.planning.budget import Budget
from elc_fx.planning.latency import Backend
from elc_fx.planning.plan import Plan
from elc_fx.report import Report
from elc_fx.report.charts import Point
from elc_fx.report.diff import Diff, diff
from elc_fx.report.page import page
from elc_fx.training import data as pictures
from elc_fx.training.finetuning import FinetuneConfig
from elc_fx.training.history import METRICS, metrics

CALIBRATION_BATCH = 128
WORK = "work"  # inside the output folder: losses, checkpoints
JOB = "job.json"  # inside that: what the folder is of
RESULTS = (
    *("model.pt2", "model.elc", "model.safetensors", "model.onnx"),
    *("plan.json", "report.json", "report.html", METRICS),
)


@dataclass(frozen=True)
class Accuracy:
    """Shares of right classes, before and after. held_out: of the training set; test: where the data has a test set."""

    held_out: tuple[float, float]
    test: tuple[float, float] | None

    @property
    def best_known(self) -> tuple[float, float]:
        """On test images where there are some."""
        return self.held_out if self.test is None else self.test


@dataclass(frozen=True)
class JobResult:
    """What came of it; `str()` is a summary.

    latency: seconds for one image, of the original with its batch norms folded, and of the result, by the backend.
    diff: of the two networks, layer by layer.
    """

    folder: Path
    accuracy: Accuracy
    report: Report
    comparison: Comparison
    latency: tuple[float, float]
    diff: Diff
    backend: Backend = "eager"

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {
            "accuracy": asdict(self.accuracy),
            "report": self.report.to_dict(),
            "comparison": self.comparison.to_dict(),
            "latency": self.latency,
            "backend": self.backend,
        }

    def summary(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, change) of all that a decision needs."""
        rows = [("accuracy on held-out training images", self.accuracy.held_out)]
        rows += [] if self.accuracy.test is None else [("accuracy on test images", self.accuracy.test)]
        lines = [(name, f"{a:.2%}", f"{b:.2%}", f"{100 * (b - a):+.2f} points") for name, (a, b) in rows]
        lines += self.comparison.changes()
        a, b = (1000 * seconds for seconds in self.latency)
        runs = "" if self.backend == "eager" else f" by {self.backend}"
        lines.append((f"ms for one image{runs}, batch norms folded", f"{a:.3g}", f"{b:.3g}", f"{b / a - 1:+.1%}"))
        return lines

    def points(self, beside: Sequence[Point]) -> list[Point]:
        """The accuracy–cost curve: the original, this result, and those of other runs."""
        (before, after), flops = self.accuracy.best_known, self.comparison
        own = [Point("original", flops.before.flops, before), Point(self.folder.name, flops.after.flops, after)]
        return [*own, *beside]

    def __str__(self) -> str:
        table = tabulate(
            self.summary(),
            ("", "before", "after", "change"),
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        )
        return f"{self.report.plan}\n\n{table}\n\nwritten to {self.folder}"


def run(
    model: nn.Module,
    data: Path,
    budget: Budget | None,
    folder: Path,
    *,
    plan: Plan | None = None,
    shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] = pictures.MEAN,
    deviation: Sequence[float] = pictures.DEVIATION,
    held_out: float = 0.1,
    batch: int = 128,
    onnx: bool = False,
    beside: Sequence[Path] = (),
    backend: Backend = "eager",
    say: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> JobResult:
    """Compresses a model to a budget, and writes the result; a run that was killed goes on when it is called again.

    Args:
        model: trained, in eval mode, [N, channels, H, W] → [N, classes]. It is not changed.
        data: a data set, see `elc_fx.training.data`. It is only read.
        budget, plan, options: as for `compile`; `FinetuneConfig`.
        folder: gets the network (model.pt2, model.elc, model.onnx), its weights (model.safetensors), plan.json,
            report.html, report.json and metrics.csv; and a folder `work`, which may be deleted afterwards.
        shape: (channels, height, width) that images are brought to; by default that of the first one, in colour.
        mean, deviation: what images are normalised by, as the model was trained; by default those of ImageNet.
        held_out: the share of the training images that nothing is trained on or fitted to. The best epoch on them is
            what remains.
        batch: images in a training step.
        onnx: write an ONNX file too.
        backend: by which latencies are measured, those of the budget and those of the result.
        beside: folders of other runs with the same model and data, that the report shows on one curve with this one.
        say: is told what is being done.

    Raises:
        DataError: the data set is missing, damaged, or has other classes than the model.
        PlanError: the budget cannot be met.
        TrainingError: training cannot go on, or `folder` holds a run with another model, data set or other options, or
            one that is at work.
        ExportError: the result cannot be written.
        MissingPackageError: what `onnx` or `backend` needs is not installed.
        LatencyError: the backend does not run one of the layers.
    """
    if not 0 < held_out < 1:
        raise InvalidInputError(f"held_out is {held_out!r}, expected a share between 0 and 1")
    _check_apart(folder, data)
    others = [_point(other) for other in beside if other.resolve() != folder.resolve()]
    if onnx:
        exporting.require_onnx()
    say(f"reading {data}")
    images = pictures.load(data, "train", shape, mean, deviation)
    assert images is not None  # or a DataError
    train, kept = images.split(held_out)
    if not len(train) or not len(kept):
        raise DataError(
            f"{data} has {len(images)} training images; held_out={held_out} leaves {len(train)} to train on and "
            f"{len(kept)} to choose by"
        )
    x = train.taken(slice(1)).inputs()
    check_classes(model, x, images)
    latency.runner(model, (x,), backend)  # or an error, before anything is trained
    test = pictures.load(data, "test", tuple(images.pixels.shape[1:]), mean, deviation)  # type: ignore[arg-type]
    if test is not None and test.classes != images.classes:
        only = sorted(set(images.classes) ^ set(test.classes))
        raise DataError(f"{data}: training and test images differ in their classes: {', '.join(only[:5])}")
    what = {
        "budget": str(budget),
        "plan": None if plan is None else plan.to_json(),
        "batch": batch,
        "held_out": held_out,
        "backend": backend,
    }
    what |= {"options": repr(sorted(options.items())), "mean": repr(tuple(mean)), "deviation": repr(tuple(deviation))}
    config = FinetuneConfig(
        train.loader(batch), validation=list(kept.batches(pictures.SCORED_BATCH)), folder=folder / WORK, **options
    )
    with _alone_in(folder):
        _claim(folder, what | {"model": fingerprint(model), "data": _fingerprint(train, kept)})
        known = pictures.accuracy(model, kept)
        say(f"the model is right on {known:.1%} of the images that are held out")
        chance = 1 / len(images.classes)
        if known < chance + min(chance / 2, (1 - chance) / 10):
            warn(
                f"the model is right on {known:.1%} of the images, hardly more than chance: is that how they were "
                "normalised when it was trained (--mean, --std), and are these its weights and its classes?"
            )
        say("measuring losses, planning, training")
        drawn = train.taken(torch.randperm(len(train), generator=torch.Generator().manual_seed(0)))
        calibration = drawn.batches(CALIBRATION_BATCH)
        with within_memory(model):
            small = compress(
                model,
                x,
                budget=budget,
                plan=plan,
                calibration=calibration,
                finetune=config,
                verify=True,
                backend=backend,
            )
        say("scoring, writing")
        accuracy = Accuracy(
            (known, pictures.accuracy(small, kept)),
            None if test is None else (pictures.accuracy(model, test), pictures.accuracy(small, test)),
        )
        folded = compile(model, x, verify=False)
        before, after = latency.seconds([latency.runner(network, (x,), backend) for network in (folded, small)])
        difference = diff(model, small, x, names=(type(model).__name__, folder.name))
        comparison = compare(model, small, x)
        result = JobResult(folder, accuracy, report_of(small), comparison, (before, after), difference, backend)
        _write(result, others, small, x, onnx=onnx, say=say)
        return result


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(folder / WORK))
        except OSError as error:
            raise ExportError(f"cannot write to {folder}: {error}") from error
        yield


def check_classes(model: nn.Module, x: torch.Tensor, images: pictures.Images) -> None:
    """Raises DataError where the model does not classify these images."""
    with torch.no_grad():
        try:
            output = model(x)
        except Exception as error:  # whatever the model runs into
            shape = "×".join(map(str, x.shape[1:]))
            raise DataError(
                f"the model does not take images of {shape}: {error}; --size brings them to what it takes: 3x224x224, "
                "or 1x28x28 for grey"
            ) from error
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        raise DataError("the model gives no scores [N, classes]; call elc_fx.compile from Python")
    if output.shape[1] != len(images.classes):
        raise DataError(
            f"the model gives {output.shape[1]} scores, and the data has {len(images.classes)} classes: "
            f"{', '.join(images.classes[:10])}"
        )


def _check_apart(folder: Path, data: Path) -> None:
    """The folder may hold nothing but an earlier result, so that nothing of the user's is overwritten."""
    out, given = folder.resolve(), data.resolve()
    if out == given or out in given.parents or given in out.parents:
        raise InvalidInputError(f"the result would go to {folder} and the data is {data}; give a folder apart from it")
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"cannot write to {folder}: it is a file")
    there = [name for name in RESULTS if (folder / name).exists()]
    if there and not (folder / WORK / JOB).exists() and "report.json" not in there:
        raise InvalidInputError(f"{folder} holds a {there[0]} that is not of a run like this; give another folder")


def _claim(folder: Path, what: dict[str, Any]) -> None:
    """Notes what the folder is of. Raises TrainingError where something else was trained for it."""
    file = folder / WORK / JOB
    trained = any(file.parent.glob("checkpoint-*")) or any((folder / name).exists() for name in RESULTS)
    try:
        if file.exists():
            noted = json.loads(file.read_text(encoding="utf-8"))
            other = [name for name in what if noted.get(name) != what[name]]
            if other and trained:
                raise TrainingError(
                    f"{folder} holds a run with other {', '.join(other)}; give another folder, or delete {file.parent}"
                )
        write_whole({file: json.dumps(what, indent=1).encode()})
    except OSError as error:
        raise ExportError(f"cannot write to {folder}: {error}") from error
    except (ValueError, AttributeError) as error:  # no JSON, or none of an object
        raise TrainingError(f"{file} cannot be read: {error}; delete {file.parent} to begin anew") from error


def _fingerprint(*parts: pictures.Images) -> str:
    digest = hashlib.sha256()
    for images in parts:
        digest.update(images.pixels.numpy().tobytes())
        digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()


def _point(folder: Path) -> Point:
    """What an earlier run came to."""
    file = folder / "report.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        accuracy, flops = found["accuracy"], found["comparison"]["after"]["flops"]
        return Point(folder.name, int(flops), float((accuracy["test"] or accuracy["held_out"])[1]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InvalidInputError(
            f"{folder} holds no report of an earlier run: {type(error).__name__}: {error}"
        ) from None


def _write(
    result: JobResult,
    beside: Sequence[Point],
    small: nn.Module,
    x: torch.Tensor,
    *,
    onnx: bool,
    say: Callable[[str], None],
) -> None:
    """All files or none; others of an earlier run do not stay beside them."""
    exported = exporting.export(small, (x,))
    if exported.fixed_batch:
        say(f"model.pt2 takes batches of {len(x)} only ({exported.fixed_batch})")
    # Clones, because safetensors takes no tensors that share memory.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in small.state_dict().items()}
    assert result.report.plan is not None
    contents = {
        "model.pt2": exporting.to_bytes(exported),
        "model.safetensors": safetensors.torch.save(state),
        "plan.json": result.report.plan.to_json().encode(),
        "report.json": json.dumps(result.to_dict(), indent=1).encode(),
        "report.html": page(result.summary(), result.report, result.diff, result.points(beside)).encode(),
        METRICS: metrics(result.report.epochs),
    }
    if onnx:
        contents["model.onnx"] = exporting.onnx_bytes(small, (x,))
    try:
        contents["model.elc"] = storing.to_bytes(small)
    except StorageError as error:  # of layers that are not torch's
        say(f"there is no model.elc: {error}")
    try:
        write_whole({result.folder / name: content for name, content in contents.items()})
        for name in {"model.onnx", "model.elc"} - contents.keys():
            (result.folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write to {result.folder}: {error}") from error
