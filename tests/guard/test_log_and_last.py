"""The log has one line per incident, and `last` stays on the device."""

import logging
import math

import pytest
import torch

from fastguard import Threshold
from guardtest.guarded import one

NAN = math.nan


def test_the_log_has_one_line_about_the_guard_and_one_per_incident(caplog):
    with caplog.at_level(logging.INFO, logger="fastguard"):
        p, opt = one(1.0, max_norm=2.5, spike=Threshold(max=7.0))
        (start,) = caplog.records
        assert start.levelno == logging.INFO
        for word in ("SGD", "1 tensors", "max_norm=2.5", "skip", "Threshold(max=7.0", "cpu"):
            assert word in start.getMessage()
        caplog.clear()
        for value in (1.0, 3.0, NAN, 9.0):
            p.grad = torch.tensor([value])
            opt.step(tag="batch")
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2  # clipping is not an incident
    assert all(r.levelno == logging.WARNING and "\n" not in r.getMessage() for r in caplog.records)
    assert "step 3 skipped (tag batch) because of nonfinite_grad" in messages[0]
    assert "grad_norm=9 > 7" in messages[1]


def test_last_is_a_snapshot_on_the_device():
    _, opt = one(3.0, 4.0, max_norm=1.0)
    assert opt.last is None
    opt.step()
    assert opt.last.total_norm.item() == 5.0
    assert opt.last.clip_coef.item() == pytest.approx(0.2, rel=1e-5)
    assert opt.last.found_inf.dtype == torch.float32
    assert opt.last.found_inf.item() == 0.0


def test_repr_contains_the_settings_of_the_guard():
    _, opt = one(1.0, max_norm=2.5, nonfinite="zero", spike=Threshold(max=7.0))
    first, *rest = repr(opt).splitlines()
    for word in ("GuardedOptimizer", "SGD", "max_norm=2.5", "zero", "grad_norm: Threshold(max=7.0"):
        assert word in first
    assert rest == repr(opt.optimizer).splitlines()[1:]  # the param groups, as torch prints them
