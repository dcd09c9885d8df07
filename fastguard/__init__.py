"""fastguard: keep training finite, at the speed of memory.

Reads every gradient once, and from that read knows the global norm, what is NaN or Inf in which
parameter, and whether the step is a spike; decides on the device to clip, clean, skip or apply.
"""

from fastguard import ops as ops  # registers the ops that torch.compile needs
from fastguard.backend import backend_for
from fastguard.checkpoints import CheckpointStore
from fastguard.clip import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
    measure_grads,
    sanitize_grads_,
)
from fastguard.config import GuardConfig
from fastguard.diagnosis import Diagnosis, Finding, diagnose
from fastguard.diagnosis.activations import ActivationGuard
from fastguard.diagnosis.batch_check import BatchCheck, check_batch
from fastguard.diagnosis.provenance import NonFiniteReport, explain_nonfinite
from fastguard.errors import NonFiniteGradError, TrainingDivergedError
from fastguard.flat_buckets import FlatGradBuckets
from fastguard.loss_meter import LossMeter
from fastguard.measure import GradStats
from fastguard.model_buffers import ModelBuffers, protect_buffers
from fastguard.optimizer import GuardedOptimizer
from fastguard.patch import patch_torch, unpatch_torch
from fastguard.ranks.groups import Replicated
from fastguard.ranks.watch import RankWatch
from fastguard.rollback import Rewind, Rollback
from fastguard.rules import SpikeRule, Threshold
from fastguard.schedule import GuardedLR
from fastguard.sinks import JsonLinesSink, LogSink, TensorBoardSink, read_records
from fastguard.step_record import StepRecord
from fastguard.warmup import Warmup

__all__ = [
    # the functions of torch.nn.utils, and gradients that live in one buffer
    "clip_grad_norm_",
    "get_total_norm",
    "clip_grads_with_norm_",
    "clip_grad_value_",
    "patch_torch",
    "unpatch_torch",
    "FlatGradBuckets",
    # what torch has not
    "sanitize_grads_",
    "measure_grads",
    "GradStats",
    "backend_for",
    # the guarded optimizer, its rules and errors
    "GuardedOptimizer",
    "SpikeRule",
    "Threshold",
    "NonFiniteGradError",
    "TrainingDivergedError",
    "GuardConfig",
    # several ranks
    "Replicated",
    "RankWatch",
    # records
    "StepRecord",
    "JsonLinesSink",
    "LogSink",
    "TensorBoardSink",
    "read_records",
    # losses, batches and activations
    "LossMeter",
    "BatchCheck",
    "check_batch",
    "ActivationGuard",
    # when it has gone wrong: learning rate, checkpoints, the way back
    "protect_buffers",
    "ModelBuffers",
    "GuardedLR",
    "Warmup",
    "CheckpointStore",
    "Rollback",
    "Rewind",
    # why it has gone wrong
    "explain_nonfinite",
    "NonFiniteReport",
    "diagnose",
    "Diagnosis",
    "Finding",
]

__version__ = "0.1.0"
