"""A model by name, and its weights from a file: what the command line is given, as an `nn.Module` in eval mode."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import pickle
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from elc_fx.errors import InvalidInputError, LoadingError, listed
from elc_fx.packages import required

# What reading a damaged file raises.
_DAMAGED = (AssertionError, EOFError, OSError, RuntimeError, SafetensorError, LookupError, TypeError, ValueError)
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Spec:
    """Where a model comes from: `torchvision:NAME`, `timm:NAME` or `package.module:factory`."""

    source: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises InvalidInputError where the text is none of the three forms."""
        source, _, name = text.partition(":")
        if source.endswith(".py"):
            file, factory = Path(source).with_suffix(""), name or "FACTORY"
            way = f"{file.name}:{factory}, with PYTHONPATH={shlex.quote(str(file.parent))}"
            if not file.name.isidentifier():
                way = f"{re.sub('[^0-9A-Za-z_]', '_', file.name)}:{factory}, once the file has that name"
            elif all(part.isidentifier() for part in file.parts):  # in this directory
                way = f"{'.'.join(file.parts)}:{factory}"
            raise InvalidInputError(f"{text!r} is no model: a module is named without .py, such as {way}")
        if not name or not all(part.isidentifier() for part in source.split(".")):
            raise InvalidInputError(
                f"{text!r} is no model; expected torchvision:NAME, timm:NAME or package.module:factory"
            )
        return cls(source, name)

    def load(self) -> nn.Module:
        """The model with freshly initialised weights, in eval mode; nothing is downloaded.

        Raises LoadingError, MissingPackageError.
        """
        build = {"torchvision": _from_torchvision, "timm": _from_timm}.get(self.source)
        model = build(self.name) if build else _from_factory(self.source, self.name)
        return model.eval()


def load_weights(model: nn.Module, file: Path) -> None:
    """Puts the state dict of a file into the model: every key has to be there, and of the right shape.

    The file is .safetensors, or anything that torch.save wrote and `weights_only=True` reads: a state dict, or a dict
    that holds one as "state_dict", "model_state_dict" or "model". Raises LoadingError that lists what does not fit.
    """
    state, own = _state_dict(file), model.state_dict()
    strange = {key for key, value in state.items() if _is_tensor(own, key) and not isinstance(value, Tensor)}
    if odd := [key for key in state if key in strange or not isinstance(key, str)]:
        what = (f"{key!r} is a {type(state[key]).__name__}" for key in odd)
        raise LoadingError(f"{file} holds more, or other, than tensors by name: {listed(what)}")
    shapes = {key: (list(value.shape), list(own[key].shape)) for key, value in state.items() if _is_tensor(own, key)}
    differing = {key: f"{key} {found}, expected {wanted}" for key, (found, wanted) in shapes.items() if found != wanted}
    fitting = {key: value for key, value in state.items() if key not in differing}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in differing]
    problems = {"wrong shapes": list(differing.values()), "missing": missing, "unexpected": unexpected}
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys)
        raise LoadingError(f"the weights in {file} do not fit the model: {told}")


def _from_torchvision(name: str) -> nn.Module:
    models = required("torchvision.models", "torchvision")
    known = models.list_models()
    if name not in known:
        raise LoadingError(f"torchvision has no model {name!r}{_did_you_mean(name, known)}")
    takes_backbone = "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # some announce another initialisation
        model: nn.Module = models.get_model(
            name, weights=None, **({"weights_backbone": None} if takes_backbone else {})
        )
    return model


def _from_timm(name: str) -> nn.Module:
    timm = required("timm", "timm")
    if not timm.is_model(name):
        raise LoadingError(f"timm has no model {name!r}{_did_you_mean(name, timm.list_models())}")
    model: nn.Module = _built(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))
    return model


def _from_factory(module_name: str, path: str) -> nn.Module:
    module = _import(module_name)
    try:
        found: Any = operator.attrgetter(path)(module)
    except AttributeError:
        raise LoadingError(f"{module_name} has no {path!r}{_did_you_mean(path, vars(module))}") from None
    model = found if isinstance(found, nn.Module) or not callable(found) else _built(f"{module_name}:{path}()", found)
    if not isinstance(model, nn.Module):
        raise LoadingError(f"{module_name}:{path} gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _built(spec: str, factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise LoadingError(f"{spec} failed: {type(error).__name__}: {error}") from error


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise LoadingError(f"importing {name} failed: {error}") from error
        raise LoadingError(f"there is no module {error.name!r}, neither installed nor in this directory") from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise LoadingError(f"importing {name} failed: {type(error).__name__}: {error}") from error


def _state_dict(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise LoadingError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoadingError(
            f"{file} holds more than weights, or is no file of torch.save; only weights are read: store the state dict "
            "alone, torch.save(model.state_dict(), file)"
        ) from error
    except _DAMAGED as error:
        raise LoadingError(
            f"{file} cannot be read; it is damaged, or of neither torch.save nor safetensors: "
            f"{type(error).__name__}: {error}"
        ) from error
    while isinstance(stored, Mapping) and (wrapper := next((key for key in _WRAPPERS if key in stored), None)):
        if not isinstance(stored[wrapper], Mapping):
            break
        stored = stored[wrapper]
    if not isinstance(stored, Mapping):
        raise LoadingError(f"{file} holds a {type(stored).__name__}, expected a state dict")
    return stored


def _is_tensor(own: Mapping[str, Any], key: str) -> bool:
    return isinstance(own.get(key), Tensor)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
