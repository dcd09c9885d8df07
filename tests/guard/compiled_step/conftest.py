"""Fixtures for tests of the compiled step."""

import pytest


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    """Runs graphs with the eager backend, since inductor takes seconds per graph."""
    monkeypatch.setattr("fastguard.guard.compiled_step.BACKEND", "eager")
