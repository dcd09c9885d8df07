"""What guarding a step costs: against what one would otherwise use, and against the limit.

One runner serves `fastguard bench` (a minute on the user's machine), `python -m benchmarks` (the
whole suite, in the source tree) and pytest-benchmark. The result is always a ratio to a peer that
was measured in the same process, in the same rounds.
"""

from fastguard.commands.bench.runner import Row as Row
from fastguard.commands.bench.runner import run_case as run_case
from fastguard.commands.bench.workload import Case as Case
from fastguard.commands.bench.workload import Workload as Workload
