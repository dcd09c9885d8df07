"""The trainers under test stay offline, and find a torchvision that can be imported."""

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

from guardtest.incidents import as_it_was, folder, guarded, played  # noqa: F401  (fixtures)
from guardtest.torchvision_ops import define_missing_operators

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is first imported
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before mlflow is
os.environ["YOLO_OFFLINE"] = "true"  # before ultralytics is
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()  # where it keeps settings that it may change
define_missing_operators()
torch.set_num_threads(1)  # models this small only wait for further threads


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """Accelerate keeps precision and accumulation of the first accelerator of a process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
