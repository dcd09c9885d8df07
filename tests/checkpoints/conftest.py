"""Fixtures of the tests of checkpoints."""

import pytest
from torch.distributed.device_mesh import init_device_mesh

from guardtest.gloo_groups import group_of_one


@pytest.fixture(scope="module")
def mesh():
    """A device mesh of one process."""
    with group_of_one():
        yield init_device_mesh("cpu", (1,))
