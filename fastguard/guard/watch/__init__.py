"""What `GuardedOptimizer(watch=...)` reads besides the norm: one file per quantity."""
