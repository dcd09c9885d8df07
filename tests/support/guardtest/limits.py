"""Adaptive limits: the papers' formulas in plain floats, and scripted steps for both forms."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from fastguard import AdaGC, AutoClip, ZClip
from fastguard.guard.clip_scope import policy_of
from fastguard.stages import adaptive_limits, reference
from fastguard.stages.contract import GuardState, Signals, Verdict
from fastguard.stages.cpu import decide as cpu_decide
from guardtest.stories import CPU, float64, stats_of

NAN, INF = math.nan, math.inf
RULES = {
    "zclip": ZClip(max_norm=3.0),
    "zclip without a cap": ZClip(z=1.0, alpha=0.9, warmup=10, max_norm=None),
    "autoclip": AutoClip(window=150),
    "autoclip of the largest": AutoClip(percentile=90, window=64),
    "adagc": AdaGC(),
    "adagc with a short warm-up": AdaGC(ratio=1.5, beta=0.5, warmup=3, max_norm=2.0),
}


@dataclass
class ZClipOracle:
    """The formula of arXiv 2504.02507, section 3, with population variance in the warm-up."""

    rule: ZClip
    norms: list[float] = field(default_factory=list)
    mean: float = 0.0
    var: float = 0.0

    def limit(self, norm: float, total: float) -> float:
        cap = INF if self.rule.max_norm is None else self.rule.max_norm
        return min(self.own_limit(norm), cap)

    def own_limit(self, norm: float) -> float:
        if len(self.norms) < self.rule.warmup:
            return INF
        sigma = math.sqrt(self.var)
        z = (norm - self.mean) / sigma
        return self.mean + self.rule.z**2 / z * sigma if z > self.rule.z else INF

    def learn(self, norm: float, total: float) -> None:
        entry = min(norm, self.own_limit(norm))
        self.norms.append(norm)
        if len(self.norms) <= self.rule.warmup:
            self.mean, self.var = np.mean(self.norms), np.var(self.norms)
            return
        a = self.rule.alpha
        self.mean = a * self.mean + (1 - a) * entry
        self.var = a * self.var + (1 - a) * (entry - self.mean) ** 2


@dataclass
class AutoClipOracle:
    """Section 3 of arXiv 2007.14469: the percentile of the history, including this step's norm."""

    rule: AutoClip
    norms: list[float] = field(default_factory=list)

    def limit(self, norm: float, total: float) -> float:
        return np.percentile([*self.norms, norm][-self.rule.window :], self.rule.percentile)

    def learn(self, norm: float, total: float) -> None:
        self.norms.append(norm)


@dataclass
class AdaGCOracle:
    """Algorithm 1 of arXiv 2502.11034: the coefficients h of a tensor and its average gamma."""

    rule: AdaGC
    gamma: float = INF
    steps: int = 0

    def limit(self, norm: float, total: float) -> float:
        if self.steps < self.rule.warmup:
            return norm * self.rule.max_norm / total
        return self.rule.ratio * self.gamma

    def learn(self, norm: float, total: float) -> None:
        h = min(self.limit(norm, total) / norm, 1.0) * norm
        b = self.rule.beta
        if self.steps < self.rule.warmup:
            self.gamma = min(self.gamma, h)
        else:
            self.gamma = b * self.gamma + (1 - b) * h
        self.steps += 1


ORACLES = {ZClip: ZClipOracle, AutoClip: AutoClipOracle, AdaGC: AdaGCOracle}


class Limited:
    """Takes steps of one or more segments with a rule, in one of its two forms."""

    def __init__(self, rule, n_segments: int = 1, nonfinite="skip", *, tensors: bool) -> None:
        scope = "tensor" if n_segments > 1 else "global"
        self.policy = policy_of((rule,), scope, 2.0, n_segments, CPU, nonfinite, {})
        self.state = GuardState.fresh(self.policy, CPU)
        self.tensors = tensors

    def step(self, norms, loss: float | None = None, **counts) -> tuple[float, Verdict]:
        """Takes a step; returns the limit of the whole model and the verdict."""
        stats = stats_of(norms, **counts)
        names = () if loss is None else ("loss",)
        signals = Signals(float64([] if loss is None else [loss]), names)
        arguments = stats, signals, self.state, self.policy
        if self.tensors:
            adaptive_limits.set_limits(stats, self.state, self.policy)
            verdict = reference.decide(*arguments)
            adaptive_limits.learn(stats, verdict, self.state, self.policy)
        else:
            assert self.policy.on_host
            verdict = cpu_decide.decide(*arguments)
            return verdict.known.limit, verdict
        return float(self.policy.joint_limit), verdict


BAD = (
    {"nan": 1},
    {"posinf": 3},
    {"neginf": 1},
    {"nan": 2, "posinf": 1, "neginf": 1},
    {"loss": NAN},
    {"loss": INF},
)
"""The faults because of which a step is skipped."""


def norms_with_faults(n: int, n_segments: int = 1) -> Iterator[tuple[list[float], dict]]:
    """Norms of a run with spikes and zeros, and the faults of its bad steps.

    The first steps, some steps of each warm-up, and all steps after a spike are bad.
    """
    chance = random.Random(n_segments)
    yield from (([7.0] * n_segments, bad) for bad in BAD)
    level, spiked = 1.0, False
    for i in range(n - len(BAD)):
        level *= math.exp(chance.gauss(0, 0.01))
        bad = chance.choice(BAD) if spiked or chance.random() < 0.05 else {}
        spiked = i % 97 == 50
        scale = level * (100.0 if spiked else 0.0 if i % 89 == 7 else 1.0)
        yield [scale * math.exp(chance.gauss(0, 0.3)) for _ in range(n_segments)], bad


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b), (a - b).abs().max()
