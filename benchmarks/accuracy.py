"""The error of norms against float64, also for squares that underflow or overflow.

The measured functions do not change gradients. A norm of 1e-26 is negligible compared with the 1e-6
in torch's formula of the clip coefficient, so clipping to such a norm would scale all gradients to
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastguard
from benchmarks.suite import EXTREMES, model_shapes
from benchmarks.targets import MODELS
from fastguard.commands.bench.runner import relative_error
from fastguard.commands.bench.workload import Case, Workload, float64_norm

MAGNITUDES = (1e-30, 1.0, 1e20)
NORMS: dict[str, Callable[[Workload], Tensor]] = {
    "torch foreach": lambda work: torch.nn.utils.get_total_norm(work.grads, foreach=True),
    "fastguard": lambda work: fastguard.get_total_norm(work.grads),
    "fastguard flat": lambda work: fastguard.FlatGradBuckets(work.twin()).measure().total_norm,
}
FIELD = tuple(NORMS)


def accuracy_cases() -> list[Case]:
    """Returns the cases of the targets, and every model that can be read within a second."""
    models = [name for name in MODELS if name != "llama-3.2-1b"]
    return [
        *(Case(name, model_shapes(name), FIELD) for name in models),
        Case("gpt2-124m", model_shapes("gpt2-124m"), FIELD, dtype="bf16"),
        Case("1000 x 10k", EXTREMES["1000 x 10k"], FIELD),
        Case("5000 x 100", EXTREMES["5000 x 100"], FIELD),
    ]


def measure_accuracy(
    case: Case, device: torch.device, magnitudes: Sequence[float] = MAGNITUDES
) -> list[dict[str, Any]]:
    """Measures the relative error of each contender at each magnitude, for normal values.

    At magnitude 1, also measures constant values, whose rounding errors all have the same sign.
    """
    found = []
    with torch.no_grad():
        for magnitude in magnitudes:
            work = Workload(case, device, magnitude=magnitude)
            for values in ("normal", "constant") if magnitude == 1.0 else ("normal",):
                if values == "constant":
                    torch._foreach_zero_(work.grads)
                    torch._foreach_add_(work.grads, 0.7 * magnitude)
                truth = float64_norm(work.grads)
                for name in case.contenders:
                    found.append(
                        {
                            "case": case.name,
                            "dtype": case.dtype,
                            "magnitude": magnitude,
                            "values": values,
                            "contender": name,
                            "norm_error": relative_error(NORMS[name](work), truth),
                        }
                    )
    return found
