"""Shared code of the tests; pytest puts tests/support on the path."""

import importlib
import os
from types import ModuleType

import pytest


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true")


def long_tests() -> bool:
    """Whether tests run all of their cases, as in the workflow, which takes 15 minutes longer."""
    return os.environ.get("FASTGUARD_LONG_TESTS") == "1"


def require(module: str) -> ModuleType:
    """Imports an optional module, for one test or (at the top of a file) for all tests in it.

    If the module is missing, the tests are skipped with the reason on a user's machine, and fail in
    CI, so that no part of the suite disappears unnoticed. If an installed module raises an error on
    import, the tests fail everywhere.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # `module` is installed, but one of its imports is not
        if in_ci():
            pytest.fail(f"{module} is not installed, and CI must test with it", pytrace=False)
        pytest.skip(f"{module} is not installed", allow_module_level=True)
