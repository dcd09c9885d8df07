"""The quantities of `GuardedOptimizer(watch=...)`, one module each."""
