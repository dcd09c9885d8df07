"""fastguard: keep training finite, at the speed of memory.

One pass over the gradients yields the global norm, names every parameter that contains NaN or Inf,
and flags spikes. The decision to apply, clip, clean or skip the step is made on the device.

`import fastguard` imports neither torch nor its own modules: each public name is imported when it
is first used, which keeps imports and `fastguard --help` fast.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastguard.checkpoints import CheckpointStore
    from fastguard.checkpoints.random_state import random_state
    from fastguard.config import GuardConfig
    from fastguard.diagnosis import Diagnosis, Finding, diagnose
    from fastguard.diagnosis.activations import ActivationGuard
    from fastguard.diagnosis.batch_check import BatchCheck, check_batch
    from fastguard.diagnosis.provenance import NonFiniteReport, explain_nonfinite
    from fastguard.errors import NonFiniteGradError, TrainingDivergedError
    from fastguard.functional.adaptive import clip_grad_adaptive_
    from fastguard.functional.clip import (
        clip_grad_norm_,
        clip_grad_value_,
        clip_grads_with_norm_,
        get_total_norm,
    )
    from fastguard.functional.flat_buckets import FlatGradBuckets
    from fastguard.functional.measure_and_sanitize import measure_grads, sanitize_grads_
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
    from fastguard.stages.agc import AGC
    from fastguard.stages.auto_clip import AutoClip
    from fastguard.stages.backend import backend_for
    from fastguard.stages.contract import Verdict
    from fastguard.stages.grad_stats import GradStats
    from fastguard.stages.limit_rules import AdaGC, AdaptiveLimit, ZClip
    from fastguard.stages.spike_rules import SpikeRule, Threshold

__all__ = [
    # the functions of torch.nn.utils, and gradients in one buffer
    "clip_grad_norm_",
    "get_total_norm",
    "clip_grads_with_norm_",
    "clip_grad_value_",
    "patch_torch",
    "unpatch_torch",
    "FlatGradBuckets",
    # functions that torch lacks
    "clip_grad_adaptive_",
    "sanitize_grads_",
    "measure_grads",
    "GradStats",
    "backend_for",
    # the guarded optimizer, its rules and errors
    "GuardedOptimizer",
    "Verdict",
    "SpikeRule",
    "Threshold",
    "ZClip",
    "AutoClip",
    "AdaGC",
    "AGC",
    "AdaptiveLimit",
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
    # recovery: learning rate, checkpoints, rollback
    "protect_buffers",
    "ModelBuffers",
    "GuardedLR",
    "Warmup",
    "CheckpointStore",
    "Rollback",
    "Rewind",
    # diagnosis
    "explain_nonfinite",
    "random_state",
    "NonFiniteReport",
    "diagnose",
    "Diagnosis",
    "Finding",
]

__version__ = "0.1.0"

_NAMES_BY_MODULE = {
    "checkpoints": "CheckpointStore",
    "checkpoints.random_state": "random_state",
    "config": "GuardConfig",
    "diagnosis": "Diagnosis Finding diagnose",
    "diagnosis.activations": "ActivationGuard",
    "diagnosis.batch_check": "BatchCheck check_batch",
    "diagnosis.provenance": "NonFiniteReport explain_nonfinite",
    "errors": "NonFiniteGradError TrainingDivergedError",
    "functional.adaptive": "clip_grad_adaptive_",
    "functional.clip": "clip_grad_norm_ clip_grad_value_ clip_grads_with_norm_ get_total_norm",
    "functional.flat_buckets": "FlatGradBuckets",
    "functional.measure_and_sanitize": "measure_grads sanitize_grads_",
    "functional.patch": "patch_torch unpatch_torch",
    "guard.guarded": "GuardedOptimizer",
    "guard.model_buffers": "ModelBuffers protect_buffers",
    "guard.rank_watch": "RankWatch",
    "ranks.groups": "Replicated",
    "records.json_lines_sink": "JsonLinesSink",
    "records.loggers": "LogSink TensorBoardSink",
    "records.loss_meter": "LossMeter",
    "records.read_json_lines": "read_records",
    "records.step_record": "StepRecord",
    "recovery.guarded_lr": "GuardedLR",
    "recovery.rollback": "Rewind Rollback",
    "recovery.warmup": "Warmup",
    "stages.agc": "AGC",
    "stages.auto_clip": "AutoClip",
    "stages.backend": "backend_for",
    "stages.contract": "Verdict",
    "stages.grad_stats": "GradStats",
    "stages.limit_rules": "AdaGC AdaptiveLimit ZClip",
    "stages.spike_rules": "SpikeRule Threshold",
}
"""The public names by module, as in the imports above."""


if not TYPE_CHECKING:  # so that type checkers use the imports above

    def __getattr__(name: str):
        for module, names in _NAMES_BY_MODULE.items():
            if name in names.split():
                globals()[name] = value = getattr(import_module(f"fastguard.{module}"), name)
                return value
        if name.startswith("_") or find_spec(f"fastguard.{name}") is None:
            raise AttributeError(f"module 'fastguard' has no attribute {name!r}")
        return import_module(f"fastguard.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
