"""`compile`, which strings the stages together, and `draw`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from elc_fx.capturing.inputs import ExampleInputs, check_model
from elc_fx.compiled import REPORT, report_of
from elc_fx.compression import compress
from elc_fx.deploying.exporting import write
from elc_fx.deploying.runtimes import Runtime, check_runtime, deployed
from elc_fx.errors import InvalidInputError
from elc_fx.memory import within_memory
from elc_fx.merging.lossless import LosslessCompilation
from elc_fx.planning.budget import Budget
from elc_fx.planning.latency import Backend
from elc_fx.planning.plan import Plan
from elc_fx.report.diff import Diff
from elc_fx.report.drawing import to_dot, to_svg
from elc_fx.report.page import diff_page
from elc_fx.training.finetuning import FinetuneConfig

TIMED_BY: dict[Runtime | None, Backend] = {
    None: "eager",
    "inductor": "compile",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
DRAWINGS: dict[str, Callable[[Diff], str]] = {".html": diff_page, ".svg": to_svg, ".dot": to_dot}


def compile(  # as torch.compile
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    mode: Literal["lossless", "decouple"] = "lossless",
    verify: bool = True,
    budget: Budget | None = None,
    plan: Plan | None = None,
    calibration: Iterable[Any] | None = None,
    finetune: FinetuneConfig | None = None,
    backend: Runtime | None = None,
) -> nn.Module:
    """A copy of `model` in which everything that merges exactly is merged; the model itself is not changed.

    With mode "decouple", also what does not: the regions that a planner chooses under a budget become one convolution
    each, fitted to what they computed, and the network is fine-tuned with the original as its teacher.

    Args:
        model: any module, in eval mode.
        example_inputs: a tensor, a sequence of positional arguments or a mapping of keyword arguments of `forward`.
            With them, costs are those of the real shapes, and the outputs are compared end to end. The result takes
            any batch size and spatial size all the same.
        mode: "lossless" merges what is exact up to the rounding of the weights; "decouple" needs `example_inputs` and
            `budget` or `plan`, and `calibration` or `finetune`.
        verify: compare each merged region with its layers, on random inputs in float64; and a backend with torch, on
            the example inputs.
        budget: what the result may cost.
        plan: one that is there already, in the place of the one that is made for a budget.
        calibration: batches of the training set that losses are measured and convolutions fitted on; by default those
            of `finetune`.
        finetune: how to train; without it, the fitted convolutions stay as they are. With a folder in it, a run that
            was killed goes on from there.
        backend: what runs the result: None (torch itself), "inductor" (`torch.compile`), or "onnxruntime" or
            "openvino", which need `example_inputs`, and take their sizes with any batch size. A budget's latency is
            measured by it.

    Returns:
        A `torch.fx.GraphModule`; where the root cannot be traced, a copy of it whose children are compiled. With a
        backend, a module that runs it there.

    Raises:
        TrainingModeError: the model is in training mode.
        InvalidInputError: an argument is of the wrong type, or the model does not run on `example_inputs`.
        VerificationError: a merge does not compute what its layers compute.
        PlanError, CaptureError, TrainingError: as `plan` and `finetune`; mode "decouple" only.
        OutOfMemoryError: the result, which takes about as much memory as the model, does not fit beside it.
        MissingPackageError, ExportError, RuntimeFailedError: the backend is not installed, or does not take the result.
    """
    check_model(model)
    if mode not in ("lossless", "decouple"):
        raise InvalidInputError(f"mode is {mode!r}, expected 'lossless' or 'decouple'")
    inputs = None if example_inputs is None else ExampleInputs.of(model, example_inputs)
    by_position = None if inputs is None else inputs.by_position()
    check_runtime(backend, by_position)
    for name, value in {"budget": budget, "plan": plan, "calibration": calibration, "finetune": finetune}.items():
        if value is not None and mode == "lossless":
            raise InvalidInputError(f"{name} is for mode 'decouple'; the mode is 'lossless'")
    with within_memory(model):
        if mode == "decouple":
            network = compress(
                model,
                example_inputs,
                budget=budget,
                plan=plan,
                calibration=calibration,
                finetune=finetune,
                verify=verify,
                backend=TIMED_BY[backend],
            )
        else:
            network = LosslessCompilation(inputs, verify=verify).run(model)
        result = deployed(network, by_position, backend, verify=verify)
    setattr(result, REPORT, report_of(network))
    return result


def draw(diff: Diff, file: str | Path) -> None:
    """Writes a diff as a page that works offline (.html), as a picture (.svg) or for graphviz (.dot).

    Raises `InvalidInputError` for another suffix, and `ExportError` where the file cannot be written.
    """
    file = Path(file)
    if not isinstance(diff, Diff):
        raise InvalidInputError(f"diff is a {type(diff).__name__}, expected what elc_fx.diff returns")
    if file.suffix not in DRAWINGS:
        raise InvalidInputError(f"{file} ends in {file.suffix or 'nothing'}, expected {', '.join(DRAWINGS)}")
    write(file, DRAWINGS[file.suffix](diff).encode())
