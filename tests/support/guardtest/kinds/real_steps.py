"""The findings of a few real steps."""

from __future__ import annotations

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import regression, with_sgd


@case("diverges", "error", "real steps", says="the loss was finite at first")
def diverges(faulty: bool) -> Setup:
    return with_sgd(regression(), lr=1e12 if faulty else 0.01)


@case("does-not-fall", "warning", "real steps")
def does_not_fall(faulty: bool) -> Setup:
    return with_sgd(regression(), lr=0.01, maximize=faulty)
