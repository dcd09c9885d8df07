"""Differences between the supported versions of triton, 3.4 to 3.9; no other module checks them.

| what                  | in older versions      | in newer versions  | can be removed when   |
|-----------------------|------------------------|--------------------|-----------------------|
| hooks around a launch | 3.4: a function or None| 3.5: a chain       | 3.5 is the oldest     |
| `CompiledKernel.run`  | equal in 3.4 to 3.9    | unknown            | Triton documents it   |
"""

from __future__ import annotations

import triton

RUN_IS_KNOWN = (3, 4) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 9)
"""Whether `CompiledKernel.run` takes the arguments that `fastguard.kernels.launch` passes.

Triton's own JIT calls this method, which is not documented. Its source was read in 3.4, 3.5, 3.6
and 3.9; newer versions of triton are launched with `compiled[grid](...)`, which takes 3 µs more.
"""


def launches_are_watched() -> bool:
    """Returns whether Triton calls a hook around each launch, such as one set by a profiler."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
