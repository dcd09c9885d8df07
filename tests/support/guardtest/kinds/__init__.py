"""For every kind of finding, a setup with the defect and the same setup without it.

`faulty=True` creates the setup with the defect, `faulty=False` the one without. There is one file
per family of checks; importing it registers its cases.
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
