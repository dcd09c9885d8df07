"""The fast path for tensors of every size, and what must not happen on it."""

import pytest

from fastguard.stages.cpu import l2_sums, power_sums
from guardtest.cpu_norms import scaled_down


@pytest.fixture(autouse=True)
def fast_path_for_small_tensors(monkeypatch):
    """What is summed in float64 outright is exact: from here on it is not."""
    monkeypatch.setattr(l2_sums, "EXACT_BELOW", 2 * l2_sums.LARGE)
    monkeypatch.setattr(l2_sums, "FEW", 2 * l2_sums.LARGE)


@pytest.fixture
def no_second_look(monkeypatch):
    """Fails where gradients that are clean are read a second time."""

    def second_look(*args):
        raise AssertionError("clean gradients were read twice")

    monkeypatch.setattr(power_sums, "_exact", second_look)


@pytest.fixture
def small_stages(monkeypatch):
    """Every branch of the fast path within a few thousand elements."""
    with scaled_down(monkeypatch):
        yield
