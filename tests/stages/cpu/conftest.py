"""Fixtures that use the fast path for tensors of any size, and that check it."""

import pytest

from fastguard.stages.cpu import l2_sums
from fastguard.stages.cpu import measure as cpu_measure
from guardtest.cpu_norms import scaled_down


@pytest.fixture(autouse=True)
def fast_path_for_small_tensors(monkeypatch):
    """Makes small tensors use the fast path, instead of exact sums in float64."""
    monkeypatch.setattr(l2_sums, "EXACT_BELOW", 2 * l2_sums.LARGE)
    monkeypatch.setattr(l2_sums, "FEW", 2 * l2_sums.LARGE)


@pytest.fixture
def no_second_read(monkeypatch):
    """Fails if clean gradients are read a second time."""

    def second_read(*args):
        raise AssertionError("clean gradients were read twice")

    monkeypatch.setattr(cpu_measure, "_exact", second_read)


@pytest.fixture
def small_stages(monkeypatch):
    """Scales the limits down, so that a few thousand elements reach every branch."""
    with scaled_down(monkeypatch):
        yield
