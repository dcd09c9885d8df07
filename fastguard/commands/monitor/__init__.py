"""`fastguard monitor`: a run's records, live in the terminal or once for a script.

`follow` reads a run from its oldest file on, through every rotation; `watch` parses its last lines
and incidents, and keeps what is shown; `screen` and `summary` show it. Memory depends on `--last`.
"""
