"""With the kernels, adaptive limits are computed on tensors and never sync."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguard import AdaGC, AdaptiveLimit, AutoClip, ZClip
from fastguard.gradients.tensor_kinds import Kind
from fastguard.stages import adaptive_limits, backend
from fastguard.stages import triton as triton_stages
from fastguard.stages.contract import Signals
from fastguard.stages.decide import decide
from guardtest.guarded import adamw, train
from guardtest.limits import Limited, norms_with_faults
from guardtest.stories import float64, stats_of


class TwiceTheMean(AdaptiveLimit):
    """Clips to twice the mean of the norms so far."""

    initial = (0.0,)

    def limit(self, norm, state, step):
        return torch.where(step.seen < 3, math.inf, 2 * state[0])

    def learn(self, norm, state, step):
        return [state[0] + (norm - state[0]) / (step.seen + 1)]


RULES = {
    "zclip": ZClip(warmup=5, max_norm=3.0),
    "autoclip": AutoClip(window=16),
    "adagc": AdaGC(warmup=5),
    "own": TwiceTheMean(),
}


@pytest.fixture
def use_the_kernels(monkeypatch):
    """Uses the interpreted kernels for CPU tensors."""
    monkeypatch.setattr(backend, "stages", lambda device, kind=Kind.PLAIN: triton_stages)


@pytest.mark.parametrize("n_segments", [1, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_decisions_match_the_reference(use_the_kernels, rule, n_segments):
    wanted, own = (Limited(rule, n_segments, tensors=True) for _ in range(2))
    policy = replace(own.policy, on_host=False)
    n_clipped = 0
    for norms, bad in norms_with_faults(120, n_segments):
        limit, verdict = wanted.step(norms, **bad)
        loss = bad.pop("loss", None)
        names = () if loss is None else ("loss",)
        signals = Signals(float64([] if loss is None else [loss]), names)
        ours = decide(stats_of(norms, **bad), signals, own.state, policy)
        assert float(policy.joint_limit) == limit
        for name in ("found_inf", "reason", "clean"):
            assert getattr(ours, name) == getattr(verdict, name)
        torch.testing.assert_close(ours.clip_coef, verdict.clip_coef, rtol=1e-12, atol=0)
        assert torch.equal(own.state.limits, wanted.state.limits)
        n_clipped += bool((ours.clip_coef < 1).any())
    assert n_clipped > 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_guarded_run_with_the_kernels_equals_one_without(monkeypatch, rule):
    """All rules run with one segment per tensor, and a custom rule also for the whole model."""
    scope = "global" if isinstance(rule, TwiceTheMean) else "tensor"
    plain = adamw(max_norm=rule, clip_scope=scope)
    train(plain, range(12), bad=(0, 4))
    monkeypatch.setattr(backend, "stages", lambda device, kind=Kind.PLAIN: triton_stages)
    opt = adamw(max_norm=rule, clip_scope=scope)
    train(opt, range(12), bad=(0, 4))
    assert [(r.action, r.reason) for r in opt.flush()] == [
        (r.action, r.reason) for r in plain.records()
    ]
    torch.testing.assert_close(opt._state.limits, plain._state.limits, rtol=1e-6, atol=0)
    assert opt._state.limits[0].tolist() == [10.0] * opt._state.limits.shape[1]


class Reads(TorchDispatchMode):
    """Records the operations that would sync with a GPU."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.names = []
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        name = func.overloadpacket.__name__
        if name in self.WAITS or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_segments", [1, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_do_not_sync(rule, n_segments):
    guard = Limited(rule, n_segments, tensors=True)
    _, verdict = guard.step([1.0] * n_segments)
    stats = stats_of([2.0] * n_segments)
    with Reads() as reads:
        adaptive_limits.set_limits(stats, guard.state, guard.policy)
        adaptive_limits.learn(stats, verdict, guard.state, guard.policy)
    assert reads.names == [] and reads.seen > 5


def test_a_rule_that_syncs_is_detected():
    class Reading(TwiceTheMean):
        def limit(self, norm, state, step):
            return norm * float(norm[0])

    guard = Limited(Reading(), tensors=True)
    with Reads() as reads:
        adaptive_limits.set_limits(stats_of([2.0]), guard.state, guard.policy)
    assert reads.names == ["_local_scalar_dense"]
