"""Everything behind the command `fastguard`: the only wing that knows a terminal."""
