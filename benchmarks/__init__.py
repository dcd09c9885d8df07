"""The benchmark suite: `make bench`, or `python -m benchmarks --help`.

The suite measures the cost of guarding a step, compared with the usual alternatives and with the
limit of memory bandwidth. The runner is `fastguard.commands.bench`; this package contains the
cases, growth curves, charts, and the comparison of two results. `pytest benchmarks
--benchmark-only` runs the same cases under pytest-benchmark.
"""
