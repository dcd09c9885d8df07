"""What the tests of the compiled step share."""

import pytest


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    """The graph as torch runs it, operation by operation: inductor takes seconds for each."""
    monkeypatch.setattr("fastguard.guard.compiled_step.BACKEND", "eager")
