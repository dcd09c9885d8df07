"""The `fastguard` command line; only this package writes to a terminal."""
