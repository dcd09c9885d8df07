"""The checks, one module per family; the function `check(evidence)` of each yields findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastguard.diagnosis.checks import (
    backward,
    data,
    forward,
    initialization,
    loss,
    optimizer,
    precision,
    real_steps,
)
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Finding

Check = Callable[[Evidence], Iterable[Finding]]

FAMILIES: dict[str, Check] = {
    module.CHECK: module.check
    for module in (
        initialization,
        data,
        forward,
        loss,
        backward,
        precision,
        optimizer,
        real_steps,
    )
}
"""The checks by name, ordered by what breaks first."""
