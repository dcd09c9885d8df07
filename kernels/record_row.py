"""The columns of a record's row: what `record` writes and `fastguard.records.device_row` reads.

A head of `HEAD` numbers; how many culprits there are; `CULPRIT` numbers for each of the first
`CULPRITS`; then what differs from step to step. Plain numbers: this file needs no triton.
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

N_CULPRITS = HEAD  # how many there are
CULPRITS_BEGIN = HEAD + 1
CULPRITS = 8  # that are named
CULPRIT = 4  # index, NaN, +Inf, -Inf
CULPRITS_END = CULPRITS_BEGIN + CULPRITS * CULPRIT
