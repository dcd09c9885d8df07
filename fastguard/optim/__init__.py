"""Fused guarded optimizers: the touch that updates a weight also obeys the verdict."""

from fastguard.optim.adamw import Adam, AdamW
from fastguard.optim.lion import Lion
from fastguard.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion"]
