"""`fastguard monitor`: shows a run's records, live in the terminal or once for scripts.

`follow` reads a run from its oldest file on, across rotations; `run_state` parses its latest lines
and its incidents; `screen` and `summary` display them. Memory use depends only on `--last`.
"""
