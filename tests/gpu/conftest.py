"""Fixtures of the tests on a GPU."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def waiting_is_an_error():
    """Makes every operation raise that torch knows to wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_sync():
    """A context in which waiting for the device is an error."""
    return waiting_is_an_error


@pytest.fixture
def stages():
    from fastguard.stages import triton as triton_stages

    return triton_stages
