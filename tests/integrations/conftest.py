"""Keeps the trainers under test offline, and makes torchvision importable."""

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

from guardtest.incidents import as_it_was, folder, guarded, played  # noqa: F401  (fixtures)
from guardtest.torchvision_ops import define_missing_operators

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is first imported
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before mlflow is first imported
os.environ["YOLO_OFFLINE"] = "true"  # before ultralytics is first imported
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()  # so that it does not change the user's settings
define_missing_operators()
torch.set_num_threads(1)  # more threads only slow down models this small


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """Resets Accelerate, which keeps the settings of the first accelerator of a process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
