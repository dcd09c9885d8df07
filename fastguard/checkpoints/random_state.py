"""Saves and restores all random number generators used in training, as tensors and plain values.

Checkpoints and in-memory snapshots contain this state; `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastguard.checkpoints.errors import CheckpointError
from fastguard.gradients.tensor_kinds import has_numbers, lasting


def random_state() -> dict[str, Any]:
    """Returns the state of every global generator: Python, numpy, torch and each CUDA device."""
    with lasting():
        return _random_state()


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, device="cpu"), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores the state returned by `random_state`.

    A state loaded under `FakeTensorMode` has no data and is ignored.

    Raises:
        CheckpointError: The state is from another number of ranks or of CUDA devices.
    """
    if "ranks" in state:
        raise CheckpointError(
            f"the random state is from {state['ranks']} ranks, but this run has another number of "
            "ranks; load with rng=False to start new random streams"
        )
    cuda = state.get("cuda")
    if cuda is not None and len(cuda) != torch.cuda.device_count():
        raise CheckpointError(
            f"the random state is from {len(cuda)} CUDA devices, but this process sees "
            f"{torch.cuda.device_count()}; load with rng=False to start new random streams"
        )
    if not has_numbers(state["torch"]):
        return
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
