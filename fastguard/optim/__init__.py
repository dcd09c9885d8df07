"""Fused guarded optimizers: the touch that updates a weight also obeys the verdict."""
