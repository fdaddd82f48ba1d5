"""Runtimes that a network is deployed to: `compile` returns networks that run in them, planning measures with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from elc_fx.capturing.attributes import Attributes
from elc_fx.capturing.equivalence import rounding_of, verify_outputs
from elc_fx.capturing.inputs import InRuntime, fresh
from elc_fx.capturing.randomness import generators, seeded
from elc_fx.deploying.exporting import onnx_bytes
from elc_fx.errors import ElcError, InvalidInputError, RuntimeFailedError, VerificationError
from elc_fx.packages import required

Runtime = Literal["inductor", "onnxruntime", "openvino"]
PACKAGES = {"onnxruntime": "elc_fx[onnx]", "openvino": "elc_fx[openvino]"}
Run: TypeAlias = Callable[[Sequence[Any]], Sequence[Any]]  # numpy arrays, in the order of the network's inputs


def onnxruntime_run(stored: bytes) -> Run:
    """ONNX Runtime on the CPU, with as many threads as torch. Raises `MissingPackageError`."""
    onnxruntime = required("onnxruntime", PACKAGES["onnxruntime"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, too
    session = onnxruntime.InferenceSession(stored, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))  # type: ignore[no-any-return]


def openvino_run(stored: bytes) -> Run:
    """OpenVINO on the CPU, with as many threads as torch, in float32. Raises `MissingPackageError`."""
    openvino = required("openvino", PACKAGES["openvino"])
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(stored), "CPU", options)
    read = {name for port in compiled.inputs for name in port.names}
    onnx = required("onnx", PACKAGES["openvino"])
    names = [given.name for given in onnx.load_model_from_string(stored).graph.input]  # OpenVINO drops the unused
    of_thread = threading.local()  # a request is for one call at a time

    def run(arrays: Sequence[Any]) -> Sequence[Any]:
        if not hasattr(of_thread, "request"):
            of_thread.request = compiled.create_infer_request()
        given = {name: array for name, array in zip(names, arrays, strict=True) if name in read}
        return list(of_thread.request.infer(given).values())

    return run


RUNS: dict[str, Callable[[bytes], Run]] = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}


class _Loaded:
    """A network that a runtime has loaded, which several threads may call, and copies share, since it never changes."""

    def __init__(self, runtime: str, run: Run) -> None:
        self.runtime, self.run = runtime, run

    def __call__(self, arrays: Sequence[Any]) -> Sequence[Any]:
        return self.run(arrays)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loaded:
        return self

    def __reduce__(self) -> str:
        raise RuntimeFailedError(
            f"a network in {self.runtime} cannot be pickled; save what compile returns without a backend"
        )


class Deployed(InRuntime):
    """A network in a runtime outside of torch: takes and returns tensors on the CPU, and no gradients.

    It takes any batch size, and the other sizes that it was made for.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor], runtime: str, *, verify: bool = True) -> None:
        super().__init__()
        self.runtime = runtime
        self.expected = [(tuple(x.shape[1:]), x.dtype) for x in inputs]
        expected, random = _computed(network, inputs, runtime)
        outputs, self.structure = pytree.tree_flatten(expected)
        if not all(isinstance(value, Tensor) for value in outputs):
            raise InvalidInputError(f"the network returns more than tensors, which {runtime} does not")
        self.dtypes = [value.dtype for value in outputs]
        try:
            self.run = _Loaded(runtime, RUNS[runtime](onnx_bytes(network, inputs)))
        except ElcError:
            raise
        except Exception as error:  # whatever the runtime runs into
            raise RuntimeFailedError(f"{runtime} does not take this network: {error}{self._way_out()}") from error
        self.eval()
        if verify and not random:
            rounding = rounding_of(*network.parameters(), inputs, torch.float32)
            try:
                verify_outputs(expected, self(*inputs), rounding, runtime)
            except VerificationError as error:
                raise RuntimeFailedError(
                    f"on the example_inputs, {runtime} computes something else than the network: {error}; if they are "
                    "no images that it is made for, such as zeros, give others, or pass verify=False"
                ) from error

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        if named:
            names = ", ".join(named)
            raise InvalidInputError(f"a network in {self.runtime} takes its inputs by position, not by name: {names}")
        if not all(isinstance(x, Tensor) for x in inputs):
            raise InvalidInputError(f"this network takes tensors, and is given {[type(x).__name__ for x in inputs]}")
        given = [(tuple(x.shape[1:]), x.dtype) for x in inputs]
        if given != self.expected:  # some runtimes would compute something
            raise InvalidInputError(
                f"this network was made for inputs {_listed(self.expected)} of any batch size N, and is given "
                f"{_listed(given)}; compile it with such example_inputs"
            )
        try:
            outputs = self.run([x.detach().cpu().numpy() for x in inputs])
        except Exception as error:
            message = f"{self.runtime} does not run {_listed(given)}: {error}{self._way_out()}"
            raise RuntimeFailedError(message) from error
        tensors = [torch.from_numpy(a.copy()).to(d) for a, d in zip(outputs, self.dtypes, strict=True)]
        return pytree.tree_unflatten(tensors, self.structure)

    def _way_out(self) -> str:
        """For networks in another precision than all runtimes have."""
        others = [str(d) for _, d in self.expected if d.is_floating_point and d != torch.float32]
        return f" (the network takes {others[0]}; runtimes know float32 best: `model.float()`)" if others else ""


def _computed(network: nn.Module, inputs: Sequence[Tensor], runtime: str) -> tuple[Any, bool]:
    """What the network gives, and whether it draws random numbers for that.

    Raises `InvalidInputError` where it gives something else the second time, which a runtime does not.
    """
    before, outputs, random = Attributes(network), [], False
    for _ in range(2):
        with seeded():
            drawn = generators()
            outputs.append(network(*fresh(tuple(inputs))))
            random = generators() != drawn
    if changed := before.restore():
        try:
            verify_outputs(*outputs)
        except VerificationError as error:
            where = f"`{changed[0][0]}`" if changed[0][0] else "the network"
            raise InvalidInputError(f"{where} keeps state from call to call, which {runtime} does not") from error
    return outputs[0], random


def _listed(inputs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"[{', '.join(map(str, ('N', *shape)))}] {dtype}" for shape, dtype in inputs) or "none"


def check_runtime(runtime: Any, inputs: Sequence[Any] | None) -> None:
    """Before long work. inputs: the positional arguments. Raises `InvalidInputError`, `MissingPackageError`."""
    if runtime is None or runtime == "inductor":
        return
    if runtime not in get_args(Runtime):
        raise InvalidInputError(f"backend is {runtime!r}, expected None, {', '.join(map(repr, get_args(Runtime)))}")
    if inputs is None or not all(isinstance(value, Tensor) for value in inputs):
        raise InvalidInputError(f"backend {runtime!r} needs example_inputs that are tensors, by position")
    required(runtime, PACKAGES[runtime])


def deployed(
    network: nn.Module, inputs: Sequence[Any] | None, runtime: Runtime | None, *, verify: bool = True
) -> nn.Module:
    """The network in a runtime; itself for None. verify: compare both on the inputs.

    Raises as `check_runtime`, `ExportError`, `RuntimeFailedError`.
    """
    if runtime is None:
        return network
    if runtime == "inductor":
        compiled: nn.Module = torch.compile(network)  # type: ignore[assignment]
        return compiled
    return Deployed(network, inputs or (), runtime, verify=verify)
