"""A case of one kind of finding, and the registry of all cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastguard.diagnosis import Severity

Setup = dict[str, Any]


@dataclass(frozen=True)
class Case:
    make: Callable[[bool], Setup]
    severity: Severity
    check: str
    where: str
    says: str


CASES: dict[str, Case] = {}


def case(kind: str, severity: Severity, check: str, where: str = "", says: str = "") -> Any:
    """Registers a case with the required contents of its finding."""

    def register(make: Callable[[bool], Setup]) -> Callable[[bool], Setup]:
        CASES[kind] = Case(make, severity, check, where, says)
        return make

    return register
