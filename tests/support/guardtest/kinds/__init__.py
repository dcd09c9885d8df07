"""For every kind of finding, a setup with the defect and the same setup without the defect.

`faulty=True` creates the setup with the defect, and `faulty=False` the setup without it. There is
one file per family of checks; importing a file registers its cases.
"""

from guardtest.kinds import (  # noqa: F401  (they register)
    backward,
    data,
    forward,
    initialization,
    loss,
    optimizer,
    precision,
    real_steps,
)
from guardtest.kinds.case import CASES as CASES
