"""fastguard: keep training finite, at the speed of memory.

Reads every gradient once, and from that read knows the global norm, what is NaN or Inf in which
parameter, and whether the step is a spike; decides on the device to clip, clean, skip or apply.
"""

from fastguard.checkpoints import CheckpointStore
from fastguard.checkpoints.random_state import random_state
from fastguard.config import GuardConfig
from fastguard.diagnosis import Diagnosis, Finding, diagnose
from fastguard.diagnosis.activations import ActivationGuard
from fastguard.diagnosis.batch_check import BatchCheck, check_batch
from fastguard.diagnosis.provenance import NonFiniteReport, explain_nonfinite
from fastguard.errors import NonFiniteGradError, TrainingDivergedError
from fastguard.functional import ops as ops
from fastguard.functional.clip import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
    measure_grads,
    sanitize_grads_,
)
from fastguard.functional.flat_buckets import FlatGradBuckets
from fastguard.functional.patch import patch_torch, unpatch_torch
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import ModelBuffers, protect_buffers
from fastguard.guard.rank_watch import RankWatch
from fastguard.ranks.groups import Replicated
from fastguard.records.json_lines_sink import JsonLinesSink
from fastguard.records.loggers import LogSink, TensorBoardSink
from fastguard.records.loss_meter import LossMeter
from fastguard.records.read_json_lines import read_records
from fastguard.records.step_record import StepRecord
from fastguard.recovery.guarded_lr import GuardedLR
from fastguard.recovery.rollback import Rewind, Rollback
from fastguard.recovery.warmup import Warmup
from fastguard.stages.backend import backend_for
from fastguard.stages.contract import GradStats
from fastguard.stages.spike_rules import SpikeRule, Threshold

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
    "random_state",
    "NonFiniteReport",
    "diagnose",
    "Diagnosis",
    "Finding",
]

__version__ = "0.1.0"
