"""Fused optimizers that clip, clean or skip in the same pass that updates the weights."""

from fastguard.optim.adamw import Adam, AdamW
from fastguard.optim.lion import Lion
from fastguard.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion"]
