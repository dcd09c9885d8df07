"""fastguard: keep training finite, at the speed of memory.

Reads every gradient once, and from that read knows the global norm, what is NaN or Inf in which
parameter, and whether the step is a spike; decides on the device to clip, clean, skip or apply.
"""

from fastguard import ops as ops  # registers the ops that torch.compile needs
from fastguard.activations import ActivationGuard as ActivationGuard
from fastguard.backend import backend_for as backend_for
from fastguard.batch_check import BatchCheck as BatchCheck
from fastguard.batch_check import check_batch as check_batch
from fastguard.checkpoints import CheckpointStore as CheckpointStore
from fastguard.clip import clip_grad_norm_ as clip_grad_norm_
from fastguard.clip import clip_grad_value_ as clip_grad_value_
from fastguard.clip import clip_grads_with_norm_ as clip_grads_with_norm_
from fastguard.clip import get_total_norm as get_total_norm
from fastguard.clip import measure_grads as measure_grads
from fastguard.clip import sanitize_grads_ as sanitize_grads_
from fastguard.config import GuardConfig as GuardConfig
from fastguard.diagnosis import Diagnosis as Diagnosis
from fastguard.diagnosis import Finding as Finding
from fastguard.diagnosis import diagnose as diagnose
from fastguard.errors import NonFiniteGradError as NonFiniteGradError
from fastguard.errors import TrainingDivergedError as TrainingDivergedError
from fastguard.flat_buckets import FlatGradBuckets as FlatGradBuckets
from fastguard.loss_meter import LossMeter as LossMeter
from fastguard.measure import GradStats as GradStats
from fastguard.optimizer import GuardedOptimizer as GuardedOptimizer
from fastguard.patch import patch_torch as patch_torch
from fastguard.patch import unpatch_torch as unpatch_torch
from fastguard.provenance import NonFiniteReport as NonFiniteReport
from fastguard.provenance import explain_nonfinite as explain_nonfinite
from fastguard.ranks.groups import Replicated as Replicated
from fastguard.ranks.watch import RankWatch as RankWatch
from fastguard.records import StepRecord as StepRecord
from fastguard.rollback import Rewind as Rewind
from fastguard.rollback import Rollback as Rollback
from fastguard.rules import SpikeRule as SpikeRule
from fastguard.rules import Threshold as Threshold
from fastguard.schedule import GuardedLR as GuardedLR
from fastguard.schedule import Warmup as Warmup
from fastguard.sinks import JsonLinesSink as JsonLinesSink
from fastguard.sinks import LogSink as LogSink
from fastguard.sinks import TensorBoardSink as TensorBoardSink
from fastguard.sinks import read_records as read_records

__version__ = "0.1.0"
