"""Measures the cost of guarding a step, relative to the alternatives and to the bandwidth limit.

One runner serves `fastguard bench` (about a minute), `python -m benchmarks` (the whole suite, in
the source tree) and pytest-benchmark. Results are always ratios to a peer that is measured in the
same process and the same rounds.
"""

from fastguard.commands.bench.runner import Row as Row
from fastguard.commands.bench.runner import run_case as run_case
from fastguard.commands.bench.workload import Case as Case
from fastguard.commands.bench.workload import Workload as Workload
