"""Guards that take scripted steps. Both implementations of stage 3 make each decision."""

import math
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from fastguard import SpikeRule, Threshold
from fastguard.stages import reference
from fastguard.stages.contract import GuardState, Policy, Signals, Verdict
from fastguard.stages.cpu import decide as cpu_decide
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reason import Reason
from fastguard.stages.spike_rules import Rule

INF = math.inf
CPU = torch.device("cpu")
TWINS = {"tensors": reference, "floats": cpu_decide}

RULE = SpikeRule(window=4, sigma=2.0, warmup=4)
THRESHOLD_1234 = 2.5 + 2.0 * math.sqrt(1.25)  # population std of 1, 2, 3, 4: 4.736...


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stats_of(
    norms: float | Sequence[float], nan=0, posinf=0, neginf=0, norm_type=2.0, bad_segment=0
) -> GradStats:
    """Statistics of one tensor per segment; the non-finite elements are in one of them."""
    norms = [norms] if isinstance(norms, float | int) else norms
    summary = torch.zeros(4, len(norms), dtype=torch.float64)
    summary[0] = float64(norms) if norm_type == INF else float64(norms).pow(norm_type)
    summary[1:, bad_segment] = float64([nan, posinf, neginf])
    return GradStats(summary, summary[1:].long(), norm_type)


def assert_taken_back(decide, stats, signals, state, policy) -> None:
    """Checks that undoing a decision restores the state bit for bit."""
    names = ("counters", "windows", "rings")
    before = [getattr(state, name).clone() for name in names]
    state.undo = undo = []
    decide(stats, signals, state, policy)
    assert not torch.equal(state.counters, before[0])
    for put_back in reversed(undo):
        put_back()
    state.undo = None
    for name, was in zip(names, before, strict=True):
        assert torch.equal(getattr(state, name), was), name


class Story:
    """A guard that takes one step after another."""

    def __init__(
        self,
        twin: ModuleType,
        rules: Rule | Mapping[str, Rule] | None = None,
        max_norm: float | Sequence[float] = INF,
        nonfinite="skip",
    ) -> None:
        if isinstance(rules, SpikeRule | Threshold):
            rules = {"grad_norm": rules}
        limits = [max_norm] if isinstance(max_norm, float | int) else max_norm
        rules = rules or {}
        self.policy = Policy(float64(limits), nonfinite, tuple(rules.values()), tuple(rules))
        self.state = GuardState.fresh(self.policy, CPU)
        self.twin = twin

    def step(
        self,
        norms=1.0,
        *,
        losses=None,
        found_inf=None,
        inv_scale=None,
        scale_falls=None,
        **counts,
    ) -> Verdict:
        losses = losses or {}
        signals = Signals(
            float64(list(losses.values())),
            tuple(losses),
            None if inv_scale is None else float64(inv_scale),
            None if found_inf is None else torch.tensor(found_inf),
            scale_falls=None if scale_falls is None else torch.tensor(scale_falls),
        )
        arguments = stats_of(norms, **counts), signals, self.state, self.policy
        assert_taken_back(self.twin.decide, *arguments)
        return self.twin.decide(*arguments)

    def steps(self, *norms: float) -> list[str]:
        return [outcome(self.step(norm)) for norm in norms]

    def losses(self, *values: float) -> list[str]:
        return [outcome(self.step(losses={"loss": value})) for value in values]

    @property
    def baseline(self) -> list[float]:
        """The accepted values of the first rule."""
        n = int(self.state.rings[0, 0])
        return sorted(self.state.windows[0, :n].tolist())

    @property
    def counters(self) -> list[int]:
        return self.state.counters.tolist()


def outcome(verdict: Verdict) -> str:
    return "skip" if verdict.found_inf else "apply"


def reason(verdict: Verdict) -> str | None:
    return Reason(int(verdict.reason)).label
