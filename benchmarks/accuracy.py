"""Norms against float64, where squares are ordinary, underflow, and overflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.suite import EXTREMES, model_shapes
from fastguard.bench.contenders import CONTENDERS
from fastguard.bench.runner import relative_error
from fastguard.bench.workload import Case, Workload, float64_norm

MAGNITUDES = (1e-30, 1.0, 1e20)
FIELD = ("torch foreach", "fastguard", "fastguard flat")


def accuracy_cases() -> list[Case]:
    """The gradients of the table of targets."""
    gpt2 = model_shapes("gpt2-124m")
    return [
        Case("gpt2-124m", gpt2, FIELD),
        Case("gpt2-124m", gpt2, FIELD, dtype="bf16"),
        Case("1000 x 10k", EXTREMES["1000 x 10k"], FIELD),
        Case("5000 x 100", EXTREMES["5000 x 100"], FIELD),
    ]


def measure_accuracy(
    case: Case, device: torch.device, magnitudes: Sequence[float] = MAGNITUDES
) -> list[dict[str, Any]]:
    """The relative error of each contender at each magnitude, for normal and constant values."""
    found = []
    with torch.no_grad():
        for magnitude in magnitudes:
            work = Workload(case, device, magnitude=magnitude)
            for values in ("normal", "constant"):
                if values == "constant":
                    torch._foreach_zero_(work.grads)
                    torch._foreach_add_(work.grads, 0.7 * magnitude)
                truth = float64_norm(work.grads)
                for name in case.contenders:
                    norm = CONTENDERS[name](work).call()
                    assert norm is not None
                    found.append(
                        {
                            "case": case.name,
                            "dtype": case.dtype,
                            "magnitude": magnitude,
                            "values": values,
                            "contender": name,
                            "norm_error": relative_error(norm, truth),
                        }
                    )
    return found
