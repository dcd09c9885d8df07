"""What differs between the supported versions of triton, 3.4 to 3.9: no other kernel file asks.

| what                  | in older versions      | in newer versions  | can go when           |
|-----------------------|------------------------|--------------------|-----------------------|
| hooks around a launch | 3.4: a function or None| 3.5: a chain       | 3.5 is the oldest     |
| `CompiledKernel.run`  | the same in 3.4 to 3.9 | not known          | Triton documents it   |
"""

from __future__ import annotations

import triton

RUN_IS_KNOWN = (3, 4) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 9)
"""Whether `CompiledKernel.run` takes what `fastguard.kernels.launch` hands over. Triton's own JIT
calls it, but it is not documented: it was read in 3.4, 3.5, 3.6 and 3.9, and a triton newer than
these is launched with `compiled[grid](...)`, at 3 µs more."""


def launches_are_watched() -> bool:
    """Whether a profiler has set a hook that Triton calls before or after each launch."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
