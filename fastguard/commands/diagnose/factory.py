"""Resolves `module:factory`: imports the user's module and calls its factory."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastguard.commands.usage import UsageError

REQUIRED = ("model", "batch")
OPTIONAL = ("loss_fn", "optimizer", "data", "step")


def setup_of(spec: str) -> dict[str, Any]:
    """Returns the dict of `factory()`; modules in the current folder take precedence.

    Raises:
        UsageError: The module or the factory does not exist, the factory raises an error, or it
            does not return a dict with the expected keys.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise UsageError(
            f"{spec!r} is not of the form module:factory; write train:make for make() in train.py"
        )
    if "/" in module_name or os.sep in module_name or module_name[0] == ".":
        name = Path(module_name).name.strip(".").removesuffix(".py")
        raise UsageError(
            f"{module_name!r} is a file, not a module; run the command in the folder of this "
            f"file, with {name}:{path}"
        )
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found: Any = _import(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            known = ", ".join(n for n, v in vars(found).items() if callable(v) and n[0] != "_")
            raise UsageError(f"{module_name} has no {path!r}; it has {known or 'no functions'}")
        found = getattr(found, name)
    if not callable(found):
        raise UsageError(f"{spec} is a {type(found).__name__}, not a function")
    try:
        setup = found()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec}() raises {_one_line(error)}") from None
    return _check_setup(setup, spec)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is no module {name!r} here or in the environment; run the command in the "
                "folder of your script, and omit the suffix .py"
            ) from None
        raise UsageError(f"importing {name} raises {_one_line(error)}") from None
    except (Exception, SystemExit) as error:
        hint = ""
        if isinstance(error, SystemExit):
            hint = '; put code that should run only as a script under if __name__ == "__main__":'
        raise UsageError(f"importing {name} raises {_one_line(error)}{hint}") from None


def _check_setup(setup: Any, spec: str) -> dict[str, Any]:
    keys = ", ".join((*REQUIRED, *OPTIONAL))
    if not isinstance(setup, Mapping):
        raise UsageError(f"{spec}() returns a {type(setup).__name__}; return a dict with {keys}")
    missing = [key for key in REQUIRED if setup.get(key) is None]
    unknown = [str(key) for key in setup if key not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        wrong = [f"lacks {key}" for key in missing] + [f"has an unknown {key}" for key in unknown]
        raise UsageError(f"the dict of {spec}() {' and '.join(wrong)}; its keys are {keys}")
    if not isinstance(setup["model"], nn.Module):
        kind = type(setup["model"]).__name__
        raise UsageError(f"the model of {spec}() is a {kind}, not a torch.nn.Module")
    return dict(setup)


def _one_line(error: BaseException) -> str:
    """The error in one line, with the line of the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<") and f.filename != __file__]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError) and error.filename is not None:
        where = f" ({error.filename}:{error.lineno})"
        return f"{type(error).__name__}: {error.msg}{where}"
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}{where}"
