"""Every kind of finding: a setup in which it is seen, and the same one repaired, in which it isn't.

A case makes both: `sick=True` has the defect, `sick=False` differs from it in the defect alone.
One file for each check of the package; importing it registers its cases.
"""

from guardtest.kinds import (  # noqa: F401  (they register)
    backward,
    data,
    forward,
    initialisation,
    loss,
    optimizer,
    precision,
    real_steps,
)
from guardtest.kinds.case import CASES as CASES
