"""The benchmark suite: `make bench`, or `python -m benchmarks --help`.

What guarding a step costs, against what one would otherwise write and against the memory's limit.
The runner is `fastguard.commands.bench`; here are the cases, the growth curves, the charts, and the
comparison of two results. `pytest benchmarks --benchmark-only` runs the same cases under
pytest-benchmark.
"""
