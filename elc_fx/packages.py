"""Packages that only some functions need."""

from __future__ import annotations

import importlib
import shlex
from typing import Any

from elc_fx.errors import MissingPackageError


def required(name: str, install: str) -> Any:
    """The module of this name. install: what pip installs it with. Raises `MissingPackageError`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{name} cannot be imported ({error}); pip install {shlex.quote(install)}") from error
