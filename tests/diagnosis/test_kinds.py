"""Every kind of finding is reported for a setup with the defect, and not for one without it."""

from __future__ import annotations

import pytest

from fastguard import diagnose
from fastguard.diagnosis import KINDS
from guardtest.kinds import CASES
from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import regression


@case("empty-batch", "error", "data", where="inputs", says="no samples: [0, 4]")
def empty_batch(faulty: bool) -> Setup:
    setup = regression()
    inputs, targets = setup["batch"]
    return setup | {"batch": (inputs[:0], targets[:0]) if faulty else (inputs, targets)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ok"])
def test_a_kind_is_reported_for_the_faulty_setup(kind: str) -> None:
    case = CASES[kind]
    found = diagnose(**case.make(True)).of(kind)
    assert found, f"{kind} is not reported"
    assert (found[0].severity, found[0].check) == (case.severity, case.check)
    assert case.where in found[0].where
    assert case.says in found[0].seen
    assert found[0].remedy or found[0].severity == "note"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ok"])
def test_a_kind_is_not_reported_for_the_sound_setup(kind: str) -> None:
    assert diagnose(**CASES[kind].make(False)).of(kind) == []
