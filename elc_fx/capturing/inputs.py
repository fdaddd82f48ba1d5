"""Example inputs: how a caller gives them, and how a module is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from elc_fx.errors import ElcError, InvalidInputError, TrainingModeError
from elc_fx.memory import is_out_of_memory

# What is wrong where a model's own code raises an error, see `running`.
NO_EXAMPLES = "does not run on the example_inputs"
NO_CALIBRATION = "a calibration batch does not fit the model"


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of `forward`, by position and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, given: Tensor | Sequence[Any] | Mapping[str, Any]) -> ExampleInputs:
        """A tensor is the only argument; a sequence gives arguments by position, a mapping by name.

        Raises `InvalidInputError` where `model.forward` does not take them.
        """
        if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
            raise InvalidInputError(
                f"{type(model).__name__} has lazy layers that have not run yet, and running them changes it; call it "
                "once before"
            )
        check_unwrapped(model)
        if isinstance(given, Tensor):
            examples = cls((given,), {})
        elif isinstance(given, Mapping):
            examples = cls((), dict(given))
        elif isinstance(given, list | tuple):
            examples = cls(tuple(given), {})
        else:
            raise InvalidInputError(
                f"example_inputs is a {type(given).__name__}, expected a tensor, a sequence of arguments or a mapping"
            )
        try:
            examples.bound(model)
        except TypeError as error:
            raise InvalidInputError(
                f"forward of {type(model).__name__} does not take the example_inputs: {error}"
            ) from None
        return examples

    def bound(self, model: nn.Module) -> dict[str, Any]:
        """The given arguments by parameter name of `model.forward`; by position where it has no Python signature.

        Raises `TypeError` where `forward` does not take them.
        """
        try:
            signature = inspect.signature(model.forward)
        except ValueError:  # TorchScript
            return {**{str(i): value for i, value in enumerate(self.args)}, **self.kwargs}
        return dict(signature.bind(*self.args, **self.kwargs).arguments)

    def by_position(self) -> tuple[Any, ...] | None:
        """The arguments, where all are given by position."""
        return None if self.kwargs else self.args


class InRuntime(nn.Module):
    """A network that runs outside of torch. runtime: where."""

    runtime: str


def check_visible(module: Any) -> None:
    """Raises `InvalidInputError` for a network whose layers torch does not run."""
    if isinstance(module, InRuntime):
        raise InvalidInputError(
            f"the model runs in {module.runtime}, where its layers cannot be seen; pass what compile returns without a "
            "backend"
        )


def check_unwrapped(model: Any) -> None:
    """Raises `InvalidInputError` for what shares a model among devices or processes, or hides it in a runtime."""
    check_visible(model)
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise InvalidInputError(f"the model is in a {type(model).__name__}; pass the one inside of it, `model.module`")


def check_model(model: Any) -> None:
    """Raises `InvalidInputError` or `TrainingModeError` for what cannot be compiled, planned or decoupled."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    check_unwrapped(model)
    if model.training:
        if "eval" in vars(model) and isinstance(model, fx.GraphModule):  # where it raises an error
            raise InvalidInputError("the model is a program of torch.export; pass the module that was exported")
        raise TrainingModeError(
            "the model is in training mode, in which batch norm and dropout cannot be merged; call model.eval() first "
            "(what decouple returns can be trained)"
        )


@contextmanager
def running(problem: str) -> Iterator[None]:
    """Whatever a network's own code raises is an `InvalidInputError`: what it is given and it do not go together.

    But for errors that say what is wrong already, and memory that has run out. problem: what the message begins with.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ElcError) or is_out_of_memory(error):
            raise
        raise InvalidInputError(f"{problem}: {type(error).__name__}: {error}") from error


def batches_of(calibration: Any) -> Iterable[Any]:
    """The batches; a tensor or a mapping is one. Raises `InvalidInputError` for what has none."""
    if not isinstance(calibration, Iterable):
        raise InvalidInputError(f"calibration is a {type(calibration).__name__}, expected batches")
    return [calibration] if isinstance(calibration, Tensor | Mapping) else calibration


def batch_values(graph_module: fx.GraphModule, batch: Any) -> list[Any]:
    """What the placeholders of a graph get of a batch, in their order, on the device of the graph's parameters.

    A tensor is the first input; a sequence begins with the inputs that have no default, as a loader gives them; a
    mapping has inputs by name. Raises `InvalidInputError` where an input without a default is missing, and for anything
    else.
    """
    nodes = graph_module.graph.find_nodes(op="placeholder")
    if isinstance(batch, Mapping):
        given = dict(batch)
    elif not isinstance(batch, Iterable):
        raise InvalidInputError(f"a calibration batch is a {type(batch).__name__}, expected tensors")
    else:
        required = [str(node.target) for node in nodes if not node.args]
        given = dict(zip(required, (batch,) if isinstance(batch, Tensor) else batch, strict=False))
    for node in nodes:
        if str(node.target) not in given and not node.args:
            raise InvalidInputError(f"a calibration batch has no input `{node.target}`")
    values = [given.get(str(node.target), *node.args) for node in nodes]
    weight = next(graph_module.parameters(), None)
    return values if weight is None else pytree.tree_map_only(Tensor, lambda t: t.to(weight.device), values)


def fresh(inputs: Any) -> Any:
    """The same inputs with tensors of their own, since a model may overwrite what it is given."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(memory_format=torch.preserve_format), inputs)


def of_dicts(values: Any) -> Any:
    """The same with dicts for all mappings, of which pytree knows some only."""
    return pytree.tree_map(lambda v: of_dicts(dict(v)) if isinstance(v, Mapping) else v, values)


def number_type(network: nn.Module) -> torch.dtype | None:
    """That of the first parameter, if it is one of floating point numbers."""
    weight = next(network.parameters(), None)
    return weight.dtype if weight is not None and weight.is_floating_point() else None


def of_type(values: Any, dtype: torch.dtype | None) -> Any:
    """The same with tensors of floating point numbers of a type, if there is one."""
    if dtype is None:
        return values
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)
