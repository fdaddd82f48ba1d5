"""A model as a file that runs without its source: torch.export, written whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from elc_fx.capturing.origins import all_origins
from elc_fx.errors import ExportError, MissingPackageError, first_line
from elc_fx.files import write_whole
from elc_fx.packages import required

ORIGINS = "elc_fx_origins.json"  # beside the program, in the same file


@dataclass(frozen=True)
class Exported:
    """A program, and why its batch size is fixed (None: it takes any). origins: of its layers, see `origins.py`."""

    program: ExportedProgram
    fixed_batch: str | None
    origins: Mapping[str, Sequence[str]] = field(default_factory=dict)


def export(model: nn.Module, inputs: Sequence[Tensor]) -> Exported:
    """The model as a program that takes any batch size where the model allows, else the batch size of the inputs.

    inputs: the positional arguments, each [N, ...] with one N. Raises ExportError.
    """
    inputs, origins = tuple(inputs), all_origins(model)
    try:
        return Exported(_with_any_batch(model, inputs), None, origins)
    except Exception as error:  # torch.export raises whatever the model's code runs into
        reason = first_line(error)
    try:
        return Exported(torch.export.export(model, tuple(x.clone() for x in inputs)), reason, origins)
    except Exception as error:
        raise ExportError(f"torch.export refuses the model: {first_line(error)}") from error


def save(exported: Exported, file: Path) -> None:
    """Writes the program, whole or not at all. Raises ExportError."""
    write(file, to_bytes(exported))


def to_bytes(exported: Exported) -> bytes:
    """What a .pt2 file holds. (On a full disk, torch's writer would abort the process.)"""
    stream = io.BytesIO()
    torch.export.save(exported.program, stream, extra_files={ORIGINS: json.dumps(exported.origins)})
    return stream.getvalue()


def load(file: Path) -> Exported:
    """The inverse of `save`, and any other .pt2 file. Raises ExportError."""
    if not file.is_file():
        raise ExportError(f"there is no file {file}")
    if not zipfile.is_zipfile(file):
        raise ExportError(f"{file} is no program of torch.export, or it is damaged")
    extra, log = {ORIGINS: ""}, logging.getLogger("torch.export")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)  # it tells of files that it cannot read with a traceback
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files without the extra one
            program = torch.export.load(file, extra_files=extra)
        origins = json.loads(extra[ORIGINS] or "{}")
    except Exception as error:  # whatever torch's reader runs into in a file that is damaged, or is something else
        raise ExportError(f"{file} is no program of torch.export, or it is damaged") from error
    finally:
        log.setLevel(level)
    return Exported(program, None, origins)


def require_onnx() -> None:
    """Raises MissingPackageError where ONNX cannot be written; call it before long work."""
    for package in ("onnx", "onnxscript"):  # which torch's exporter needs
        required(package, "elc_fx[onnx]")


def onnx_model(model: nn.Module, inputs: Sequence[Any], dynamic_shapes: Any = None) -> Any:
    """The model as an `onnx.ModelProto`, for these inputs. Raises MissingPackageError, and what the exporter raises."""
    require_onnx()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch's exporter uses itself
        program = torch.onnx.export(model, tuple(inputs), dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    assert program is not None
    return program.model_proto


def onnx_bytes(model: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """The model as ONNX, for any batch size. Raises ExportError, MissingPackageError."""
    try:
        return bytes(onnx_model(model, *_of_any_batch(inputs)).SerializeToString())
    except MissingPackageError:
        raise
    except Exception as error:  # whatever torch's exporter runs into
        raise ExportError(f"torch.onnx.export refuses the model: {first_line(error)}") from error


def write(file: Path, content: bytes) -> None:
    """Writes a file, whole or not at all. Raises ExportError."""
    try:
        write_whole({file: content})
    except OSError as error:
        raise ExportError(f"cannot write {file}: {error}") from error


def _with_any_batch(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Tried on the given inputs."""
    several, dynamic_shapes = _of_any_batch(inputs)
    program = torch.export.export(model, several, dynamic_shapes=dynamic_shapes)
    with torch.no_grad():
        program.module()(*inputs)
    program.example_inputs = inputs, {}  # by which costs are counted, as everywhere
    return program


def _of_any_batch(inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs of two samples at least, because torch.export takes a batch of one for a constant, and its shapes.

    They are copies, since it takes one tensor that is given twice for one input.
    """
    batch = Dim("batch")
    return tuple(torch.cat([x, x]) if len(x) == 1 else x.clone() for x in inputs), tuple({0: batch} for _ in inputs)
