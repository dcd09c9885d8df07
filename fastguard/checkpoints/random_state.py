"""The state of all random number generators that training draws from, as tensors and plain values.

A checkpoint holds it, and so does a snapshot in memory: `torch.load(weights_only=True)` reads it.
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
    """The state of every global random generator: Python, numpy, torch, each CUDA device."""
    with lasting():
        return _random_state()


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
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
    """Continues every random stream where `random_state` left it.

    What was loaded under `FakeTensorMode` says nothing, so the streams go on as they are.

    Raises:
        CheckpointError: The state is of another number of ranks or of CUDA devices.
    """
    if "ranks" in state:
        raise CheckpointError(
            f"the random state is of {state['ranks']} ranks, one each; load with rng=False to "
            "start new random streams"
        )
    cuda = state.get("cuda")
    if cuda is not None and len(cuda) != torch.cuda.device_count():
        raise CheckpointError(
            f"the random state is of {len(cuda)} CUDA devices, this process sees "
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
