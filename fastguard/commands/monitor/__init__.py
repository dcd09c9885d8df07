"""`fastguard monitor`: a run's records, live in the terminal or once for a script.

Nothing is read from the beginning: `tail` finds where the last lines start, `follow` reads on from
there through every rotation, `history` searches what lies before for incidents, a slice at a time.
`watch` keeps what is shown; `screen` and `summary` show it. Memory does not grow with the run.
"""
