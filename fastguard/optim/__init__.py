"""Fused optimizers that clip, clean or skip in the same pass that updates the weights."""

from fastguard.optim.adamw import Adam, AdamW
from fastguard.optim.lion import Lion
from fastguard.optim.sgd import SGD
from fastguard.optim.statistics import UpdateStatistics

__all__ = ["SGD", "Adam", "AdamW", "Lion", "UpdateStatistics"]
