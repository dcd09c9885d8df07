"""The columns of a record's row, which `record` writes and `fastguard.records.device_row` reads.

The row consists of `HEAD` numbers, the number of culprits, `CULPRIT` numbers for each of the first
`CULPRITS`, and then losses and rules, whose number varies. This module does not need triton.
"""

from __future__ import annotations

TOTAL_NORM = 0
CLIP_COEF = 1
SKIPPED = 2
CLEANED = 3
REASON = 4
STEP = 5
CONSECUTIVE_SKIPS = 6
NAN_COUNT = 7
POSINF_COUNT = 8
NEGINF_COUNT = 9
LR = 10
HEAD = 11

N_CULPRITS = HEAD  # total number of culprits
CULPRITS_BEGIN = HEAD + 1
CULPRITS = 8  # maximum number of culprits listed
CULPRIT = 4  # index, NaN, +Inf, -Inf
CULPRITS_END = CULPRITS_BEGIN + CULPRITS * CULPRIT
