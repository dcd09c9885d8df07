"""Column indices of the tables that kernels and launchers share, defined only here.

    chunks  int64 (C, 6): stretch, first byte, elements, segment, first piece, pieces
    pieces  int64 (M, 3): first byte, elements, tensor id
    units   int64 (T + 1, 5): gradient, weight, elements per row, first unit, aligned
    rules   float64 (K, 8), rings int64 (K, 3), counters int64 (5,), undo float64 (5 + 4 * K,)

The columns of a record's row are in `record_row`, which is also used without triton.
"""

from __future__ import annotations

import triton.language as tl

# A chunk; see `chunks`.
STRETCH = tl.constexpr(0)
FIRST_BYTE = tl.constexpr(1)
ELEMENTS = tl.constexpr(2)
SEGMENT = tl.constexpr(3)
FIRST_PIECE = tl.constexpr(4)
PIECES = tl.constexpr(5)
CHUNK_COLUMNS = tl.constexpr(6)

# A piece; see `chunks`.
PIECE_FIRST_BYTE = tl.constexpr(0)
PIECE_ELEMENTS = tl.constexpr(1)
PIECE_TENSOR = tl.constexpr(2)
PIECE_COLUMNS = tl.constexpr(3)

# A spike rule; see `rules`.
SIGMA = tl.constexpr(0)
WARMUP = tl.constexpr(1)
WINDOW_SIZE = tl.constexpr(2)  # 0 means a fixed threshold
FIXED = tl.constexpr(3)  # inf means a sigma rule
SKIPS = tl.constexpr(4)
CLIPS = tl.constexpr(5)
SIGNAL = tl.constexpr(6)  # index of the loss; -1: the gradient norm; -2: no such loss in this step
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

# Previous values that `decide` overwrites, to undo a failed step: the counters, then these columns
# per rule.
UNDO_VALUE = tl.constexpr(3)  # after the three columns of the ring
UNDO_COLUMNS = tl.constexpr(4)

# The rows of the summary, with one column per segment; see `summary`.
SUMMARY_ROWS = tl.constexpr(4)  # power sum, NaN, +Inf, -Inf

# A chunk of an update; see `update`.
UPDATE_TENSOR = tl.constexpr(0)
UPDATE_FIRST = tl.constexpr(1)
UPDATE_ELEMENTS = tl.constexpr(2)
UPDATE_ALIGNED = tl.constexpr(3)
UPDATE_SEGMENT = tl.constexpr(4)
UPDATE_ROW = tl.constexpr(5)  # elements per limited unit; 0: not limited
UPDATE_COLUMNS = tl.constexpr(6)

# A tensor of an update: values that do not depend on addresses.
GROUP_COLUMN = tl.constexpr(0)
COUNTER_COLUMN = tl.constexpr(1)
SIZE_COLUMN = tl.constexpr(2)  # elements
FIRST_CHUNK_COLUMN = tl.constexpr(3)
CHUNKS_COLUMN = tl.constexpr(4)  # number of chunks, which are consecutive
TENSOR_COLUMNS = tl.constexpr(5)

# A tensor of an update: addresses.
WEIGHT = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
STATE = tl.constexpr(2)  # the first of three columns
MASTER = tl.constexpr(5)
STEP_ADDRESS = tl.constexpr(6)
ADDRESS_COLUMNS = tl.constexpr(8)  # 64 bytes: two memory sectors

# A tensor in the table of units; see `unit_table`.
GRAD_ADDRESS = tl.constexpr(0)
WEIGHT_ADDRESS = tl.constexpr(1)
ROW_SIZE = tl.constexpr(2)
FIRST_UNIT = tl.constexpr(3)
ALIGNED = tl.constexpr(4)  # bit 0: aligned rows in the gradient; bit 1: in the weight
UNIT_COLUMNS = tl.constexpr(5)

# `HYPER`, `N_COEFFICIENTS`, `SIGN`, `KEY`, ... of `fastguard.optim.contract`.
HYPER_COLUMNS = tl.constexpr(12)
COEFFICIENT_COLUMNS = tl.constexpr(13)
SIGN_COLUMN = tl.constexpr(8)
KEY_COLUMN = tl.constexpr(9)
SPIKE_COLUMN = tl.constexpr(10)
RESET_COLUMN = tl.constexpr(11)
SUM_SCALE_COLUMN = tl.constexpr(12)
