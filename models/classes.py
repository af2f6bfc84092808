"""Finds the adapter that a model's file names, `module:Class`: one of ours, or a file beside the model's own.

The folder of further models comes last on the path, so that nothing in it hides a package of ours, Python's or another
that is installed; what is hidden itself is told.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

from core.errors import ModelFailed
from models.base import Adapter


def add_folder(folder: str) -> None:
    """Let models be found there that are not found elsewhere. An empty name: no such folder."""
    if folder and (whole := str(Path(folder).resolve())) not in sys.path:
        sys.path.append(whole)


def check_module(adapter: str, folder: str = "") -> None:
    """Raise `ModelFailed` with what to do when the module is not there, or another one is found in its place. Imports
    packages around it, not the module itself."""
    module = adapter.partition(":")[0]
    if module in sys.modules and getattr(sys.modules[module], "__spec__", None) is None:
        return  # made, not found
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package around it
        found = None
    if found is None:
        raise ModelFailed(f"there is no module '{module}'; put {_file(module)} beside the model's TOML file")
    meant = Path(folder).resolve() / _file(module)
    if folder and meant.is_file() and found.origin is not None and Path(found.origin) != meant:
        raise ModelFailed(f"{_file(module)} beside its TOML file is hidden by another module '{module}'; rename it")


def adapter_class(adapter: str, folder: str = "") -> type[Adapter]:
    """The class. Raises `ModelFailed` with what to do when it is not there or is no adapter, and what its module
    raises."""
    check_module(adapter, folder)
    module, _, name = adapter.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except SyntaxError as fault:
        raise ModelFailed(f"{Path(fault.filename or _file(module)).name}, line {fault.lineno}: {fault.msg}") from fault
    if found is None:
        raise ModelFailed(f"module '{module}' has no class '{name}'; the key 'adapter' of the model's file names it")
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        raise ModelFailed(f"'{adapter}' is no subclass of models.base.Adapter")
    return found


def _file(module: str) -> str:
    return module.replace(".", "/") + ".py"


def tell_faults(folder: str, *adapters: str) -> None:
    """For the doctor: print, as JSON by adapter, what keeps those of these adapters from being used that cannot be."""
    add_folder(folder)
    faults = {}
    for adapter in adapters:
        try:
            adapter_class(adapter, folder)
        except ModelFailed as fault:
            faults[adapter] = fault.message
        except Exception as fault:
            faults[adapter] = f"{type(fault).__name__}: {fault}"[:200]
    print(json.dumps(faults))

