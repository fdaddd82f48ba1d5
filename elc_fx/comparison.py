"""What a model costs, and how far apart two models compute: both read off one run, for any `nn.Module`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker
from torch.utils.weak import WeakIdRef

from elc_fx.affine import wide
from elc_fx.capturing.copying import UNCOPYABLE, clone
from elc_fx.capturing.graph import written_arguments
from elc_fx.capturing.inputs import ExampleInputs, check_visible, fresh, of_type
from elc_fx.capturing.randomness import reproducibly
from elc_fx.errors import InvalidInputError, TrainingModeError

aten = torch.ops.aten

_Given: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]

# Autograd is off while measuring, so the convolutions of every module and function arrive as the first of these; the
# others come from TorchScript and from frozen cuDNN graphs.
_CONVOLUTIONS = frozenset({aten.convolution, aten._convolution, aten.cudnn_convolution})
# Matrix products, and the position of the first of their two factors.
_FIRST_FACTOR: dict[Any, int] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv), 0),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv), 1),
}
UNREACHED = -(10**9)  # the depth of what is not on the way from where it is counted
_QUANTITIES = {"flops": "FLOPs", "parameters": "parameters", "convolutions": "convolutions", "depth": "depth"}


@dataclass(frozen=True)
class Measurement:
    """What one run of a model costs."""

    flops: int  # two per multiply-add; convolutions, matrix products and attention, as torch.utils.flop_counter counts
    parameters: int  # numbers, shared parameters once
    convolutions: int  # executed, so a module called twice counts twice
    depth: int  # convolutions and linear layers on the longest way of the data through the model

    def to_dict(self) -> dict[str, int]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """What two models cost, and how far their outputs differ on the same inputs; `str()` is a table.

    The errors are over all numbers of the outputs, nan where nothing was computed (meta tensors), inf where one model
    gives nan or inf and the other does not. The relative error of a tensor is its largest difference over the largest
    finite magnitude that `a` puts out there; of several tensors the worst counts.
    """

    max_abs_error: float
    max_rel_error: float
    dtype: str  # in which both ran: "float64" where they can
    before: Measurement
    after: Measurement

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON: "nan" and "inf", which JSON has no numbers for, become strings."""
        errors = {name: getattr(self, name) for name in ("max_abs_error", "max_rel_error")}
        return {
            **{name: value if math.isfinite(value) else str(value) for name, value in errors.items()},
            "dtype": self.dtype,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def changes(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, change) for each cost, as texts."""
        return [(what, f"{a:,}", f"{b:,}", f"{b / a - 1:+.1%}" if a else "") for what, a, b in self._counts()]

    def _counts(self) -> list[tuple[str, int, int]]:
        return [(what, getattr(self.before, name), getattr(self.after, name)) for name, what in _QUANTITIES.items()]

    def __str__(self) -> str:
        rows = [(what, f"{a:,}", f"{b:,}", f"{b / a:.1%}" if a else "-") for what, a, b in self._counts()]
        headers = ("", "before", "after", "after / before")
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right"))
        errors = f"{self.max_abs_error:.1e} absolute, {self.max_rel_error:.1e} relative"
        return f"{table}\nlargest error: {errors}, in {self.dtype}"


def compare(a: nn.Module, b: nn.Module, example_inputs: _Given) -> Comparison:
    """Runs both models once on the same inputs and measures what differs. Neither model is changed.

    example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Both models run
    from the same state of the random generators; in float64 (copies of them) where their parameters are real numbers
    and their code allows it, else as they are. Raises TrainingModeError where batch norm or dropout would train, and
    InvalidInputError where a model does not take the inputs, runs in a runtime outside of torch, or the outputs are not
    of one structure and shape.
    """
    for model in (a, b):
        _require_eval(model)
        examples = ExampleInputs.of(model, example_inputs)
    before, after = _runs_in_float64((a, b), examples) or _runs_as_they_are((a, b), examples)
    reference, other = _tensors(before.output), _tensors(after.output)
    _require_equal_structure(reference, other)
    errors = [_errors(reference[path], other[path]) for path in reference]
    max_abs_error, max_rel_error = (_largest(column) for column in zip(*errors, strict=True))
    return Comparison(max_abs_error, max_rel_error, _dtype_of(reference.values()), before.cost, after.cost)


def measure(model: nn.Module, example_inputs: _Given) -> Measurement:
    """Runs the model once, in its own dtype and without autograd, and counts. The model is not changed.

    example_inputs: as for `compare`. Works on the meta device too. Attention is counted as the matrix products it
    consists of, whichever kernel the device would choose; the products inside recurrent layers are not counted.
    Raises TrainingModeError where batch norm or dropout would train, and InvalidInputError as `compare` does.
    """
    _require_eval(model)
    return run(_with_own_buffers(model), ExampleInputs.of(model, example_inputs)).cost


def _require_eval(model: nn.Module) -> None:
    """Refuses what would train. The flag of a graph module says nothing: what an exported program does is fixed."""
    root = [] if isinstance(model, fx.GraphModule) else [("", model)]
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _NormBase | _DropoutNd)]
    for name, module in root + layers:
        if module.training:
            where = f"`{name}` of the model" if name else "the model"
            raise TrainingModeError(
                f"{where} ({type(module).__name__}) is in training mode, expected eval; call .eval() first"
            )


# Running


def _runs_in_float64(models: Sequence[nn.Module], examples: ExampleInputs) -> list[Run] | None:
    """None where a parameter is not a real number, or where a model cannot be copied or does not run in float64."""
    if not all(parameter.is_floating_point() for model in models for parameter in model.parameters()):
        return None
    doubled = ExampleInputs(*of_type((examples.args, examples.kwargs), torch.float64))
    try:
        return [run(clone(model, {}).double(), doubled) for model in models]
    except Exception:  # whatever is wrong besides the dtype is raised when they run as they are
        return None


def _runs_as_they_are(models: Sequence[nn.Module], examples: ExampleInputs) -> list[Run]:
    return [run(_with_own_buffers(model), examples) for model in models]


def _with_own_buffers(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, so that a forward that keeps state keeps it elsewhere; else the model."""
    try:
        return clone(model, {id(parameter): parameter for parameter in model.parameters()})  # type: ignore[no-any-return]
    except UNCOPYABLE:
        return model


class _NoModules(ModuleTracker):
    """Only the total is asked for; and modules that take views of parameters make the tracker fail under no_grad."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """Torch's own counter of FLOPs, for the total."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter


class Run(NamedTuple):
    """What a model gave, and what was seen meanwhile."""

    output: Any
    cost: Measurement
    dtypes: frozenset[torch.dtype]  # of what it made of the inputs: under its own autocast, not those of its weights


def run(model: nn.Module, examples: ExampleInputs) -> Run:
    """On copies of the inputs."""
    for module in model.modules():
        check_visible(module)
    args, kwargs = fresh((examples.args, examples.kwargs))
    layers = _Layers(tree_leaves((args, kwargs)))
    flops = flop_counter()
    with reproducibly(), _attention_as_products(), flops, layers:
        output = model(*args, **kwargs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cost = Measurement(int(flops.get_total_flops()), parameters, layers.convolutions, layers.depth)
    return Run(output, cost, frozenset(layers.dtypes))


def layers_between(source: Any, others: Any, call: Callable[[], Any]) -> int | None:
    """The depth that `measure` sees on the longest way from a value to what a call makes of it; None without a way.

    others: the values besides it that derive from the inputs of the model.
    """
    layers = _Layers(())
    layers._mark(tree_leaves(others), UNREACHED)
    layers._mark(tree_leaves(source), 0)
    with reproducibly(), _attention_as_products(), layers:
        output = call()
    found = [layers._depth_of(value) for value in tree_leaves(output)]
    return max((depth for depth in found if depth is not None and depth >= 0), default=None)


@contextlib.contextmanager
def _attention_as_products() -> Iterator[None]:
    """Attention runs as matrix products, which are counted; its fused kernels, of which there are many, are not all."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Layers(TorchDispatchMode):
    """Counts the convolutions that run, and the depth: convolutions and linear layers one after the other.

    What derives from the inputs carries the depth of the longest way to it; a layer adds one. A linear layer is a
    matrix product with one factor that derives from the inputs. Depths belong to storages, so a write through a view
    reaches every view (and the parts of one storage count as one value).
    """

    supports_higher_order_operators = True

    def __init__(self, inputs: Iterable[Any]) -> None:
        super().__init__()
        self.convolutions = 0
        self.depth = 0
        self.dtypes: set[torch.dtype] = set()  # of all that derives from the inputs
        self._depths: dict[StorageWeakRef | WeakIdRef, int] = {}
        self._mark(inputs, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = isinstance(func, torch._ops.OpOverload)
        if operation and func._can_decompose():  # under inference_mode, conv2d and linear come as they are
            with self:
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        packet = func.overloadpacket if operation else func
        self.convolutions += packet in _CONVOLUTIONS
        values = tree_leaves((args, kwargs))
        known = [depth for value in values if (depth := self._depth_of(value)) is not None]
        if known:
            depth = max(known) + (packet in _CONVOLUTIONS or self._is_linear(packet, args))
            self.dtypes.update(value.dtype for value in tree_leaves(output) if isinstance(value, Tensor))
            self._mark([*tree_leaves(output), *(written_arguments(func, args, kwargs) if operation else ())], depth)
        return output

    def _is_linear(self, packet: Any, args: tuple[Any, ...]) -> bool:
        if (first := _FIRST_FACTOR.get(packet)) is None:
            return False
        return sum(self._depth_of(factor) is not None for factor in args[first : first + 2]) == 1

    def _depth_of(self, value: Any) -> int | None:
        return self._depths.get(_storage(value)) if isinstance(value, Tensor) else None

    def _mark(self, values: Iterable[Any], depth: int) -> None:
        self.depth = max(self.depth, depth)
        for value in values:
            if isinstance(value, Tensor):
                self._depths[_storage(value)] = depth


def _storage(tensor: Tensor) -> StorageWeakRef | WeakIdRef:
    """What the views of one tensor have in common. Sparse and other storageless tensors stand for themselves."""
    return StorageWeakRef(tensor.untyped_storage()) if torch._C._has_storage(tensor) else WeakIdRef(tensor)


# Outputs


def _tensors(output: Any) -> dict[str, Tensor]:
    """The numbers of a nested output by their path, as `['boxes'][0]`: tensors, and Python numbers as tensors."""
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(output)[0]]
    found = {path: torch.as_tensor(leaf) for path, leaf in leaves if isinstance(leaf, Tensor | int | float | complex)}
    if not found:
        kinds = ", ".join(sorted({type(leaf).__name__ for _, leaf in leaves})) or "nothing"
        raise InvalidInputError(f"the output holds no tensors to compare, but {kinds}")
    return found


def _require_equal_structure(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    for path in [*a, *(path for path in b if path not in a)]:
        found = [f"{list(side[path].shape)}" if path in side else "nothing" for side in (a, b)]
        if found[0] != found[1]:
            raise InvalidInputError(f"the outputs differ in shape: output{path} is {found[0]} before, {found[1]} after")


def _errors(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two tensors of one shape, and the same relative to a's largest finite value."""
    if a.is_meta or b.is_meta:
        return math.nan, math.nan
    a, b = (wide(tensor.detach().cpu()) for tensor in (a, b))
    difference = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    largest = _maximum(difference.nan_to_num(nan=math.inf, posinf=math.inf))
    scale = _maximum(a.abs().masked_fill(~a.isfinite(), 0.0))
    return largest, largest / scale if scale else (math.inf if largest else 0.0)


def _maximum(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0


def _largest(errors: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _dtype_of(tensors: Iterable[Tensor]) -> str:
    """The narrowest dtype of real or complex numbers among the outputs: the one whose rounding the errors show."""
    dtypes = [tensor.dtype for tensor in tensors]
    inexact = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    narrowest = min(inexact, key=lambda dtype: torch.finfo(dtype).bits) if inexact else dtypes[0]
    return str(narrowest).removeprefix("torch.")
