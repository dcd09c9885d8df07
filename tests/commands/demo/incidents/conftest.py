"""What the tests of all incidents share."""

from guardtest.incidents import as_it_was, folder, guarded, played  # noqa: F401  (fixtures)
