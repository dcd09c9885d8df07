"""The columns of the tables that kernels and launchers share: each is named here alone.

    chunks  int64 (C, 6): stretch, first byte, elements, segment, first piece, pieces
    pieces  int64 (M, 3): first byte, elements, tensor id
    rules   float64 (K, 8), rings int64 (K, 3), counters int64 (5,), undo float64 (5 + 4 * K,)

The columns of a record's row are in `record_row`, which machines without triton read too.
"""

from __future__ import annotations

import triton.language as tl

# One chunk; see `chunks`.
STRETCH = tl.constexpr(0)
FIRST_BYTE = tl.constexpr(1)
ELEMENTS = tl.constexpr(2)
SEGMENT = tl.constexpr(3)
FIRST_PIECE = tl.constexpr(4)
PIECES = tl.constexpr(5)
CHUNK_COLUMNS = tl.constexpr(6)

# One piece; see `chunks`.
PIECE_FIRST_BYTE = tl.constexpr(0)
PIECE_ELEMENTS = tl.constexpr(1)
PIECE_TENSOR = tl.constexpr(2)
PIECE_COLUMNS = tl.constexpr(3)

# One spike rule; see `rules`.
SIGMA = tl.constexpr(0)
WARMUP = tl.constexpr(1)
WINDOW_SIZE = tl.constexpr(2)  # 0 for a fixed threshold
FIXED = tl.constexpr(3)  # inf for a sigma rule
SKIPS = tl.constexpr(4)
CLIPS = tl.constexpr(5)
SIGNAL = tl.constexpr(6)  # index of the loss; -1: the gradient norm; -2: this step has no such loss
RULE_COLUMNS = tl.constexpr(8)

# The ring of accepted values of one rule; see `fastguard.stages.contract.GuardState`.
FILLED = tl.constexpr(0)
NEXT_SLOT = tl.constexpr(1)
CONSECUTIVE_SPIKES = tl.constexpr(2)
RING_COLUMNS = tl.constexpr(3)

# The counters of a guard; see `fastguard.stages.contract.GuardState`.
DECIDED = tl.constexpr(0)
APPLIED = tl.constexpr(1)
SKIPPED = tl.constexpr(2)
CONSECUTIVE_SKIPS = tl.constexpr(3)
FOR_SCALE = tl.constexpr(4)
COUNTERS = tl.constexpr(5)

# What decide has overwritten, for a step that fails: the counters, then these of each rule.
UNDO_VALUE = tl.constexpr(3)  # after the three columns of its ring
UNDO_COLUMNS = tl.constexpr(4)

# The summary: one row of each per segment; see `summary`.
SUMMARY_ROWS = tl.constexpr(4)  # power sum, NaN, +Inf, -Inf

# One chunk of an update; see `update`.
UPDATE_TENSOR = tl.constexpr(0)
UPDATE_FIRST = tl.constexpr(1)
UPDATE_ELEMENTS = tl.constexpr(2)
UPDATE_ALIGNED = tl.constexpr(3)
UPDATE_COLUMNS = tl.constexpr(4)

# What does not move of one tensor of an update.
SEGMENT_COLUMN = tl.constexpr(0)
GROUP_COLUMN = tl.constexpr(1)
COUNTER_COLUMN = tl.constexpr(2)
TENSOR_COLUMNS = tl.constexpr(3)

# The addresses of one tensor of an update.
WEIGHT = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
STATE = tl.constexpr(2)  # and the two behind it
MASTER = tl.constexpr(5)
STEP_ADDRESS = tl.constexpr(6)
ADDRESS_COLUMNS = tl.constexpr(8)  # 64 bytes: two sectors

# `fastguard.optim.contract`: `HYPER`, `N_COEFFICIENTS`, `SIGN`, `KEY`.
HYPER_COLUMNS = tl.constexpr(9)
COEFFICIENT_COLUMNS = tl.constexpr(10)
SIGN_COLUMN = tl.constexpr(8)
KEY_COLUMN = tl.constexpr(9)
