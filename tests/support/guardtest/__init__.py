"""Shared code of the tests; pytest puts tests/support on the path."""

import importlib
import os
from types import ModuleType

import pytest


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true")


def long_tests() -> bool:
    """Whether tests run over all of their cases, as in the workflow: some fifteen minutes more."""
    return os.environ.get("FASTGUARD_LONG_TESTS") == "1"


def require(module: str) -> ModuleType:
    """Imports an optional module, for one test or (at the top of a file) for all tests in it.

    Missing on a user's machine, the tests are skipped and say why; missing in CI, they fail, so
    that no part of the suite disappears unseen. A module that is there but breaks while it is
    imported is an error everywhere.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # `module` is installed, but one of its imports is not
        if in_ci():
            pytest.fail(f"{module} is not installed, and CI must test with it", pytrace=False)
        pytest.skip(f"{module} is not installed", allow_module_level=True)
