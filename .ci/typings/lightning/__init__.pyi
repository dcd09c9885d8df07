# For `.ci/known_types.py`, which explains it.
