"""Fixtures shared by the tests of all incidents."""

from guardtest.incidents import as_it_was, folder, guarded, played  # noqa: F401  (fixtures)
