"""`decide` in the interpreter gives the verdict and state of `reference.decide` in each step."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

from fastguard.stages import reference
from fastguard.stages import triton as triton_stages
from fastguard.stages.contract import GuardState, Policy, Signals
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reason import Reason
from fastguard.stages.spike_rules import SpikeRule, Threshold
from guardtest.stories import assert_taken_back

CPU = torch.device("cpu")
RTOL = 1e-12  # sums over rings and segments in another order differ by n * eps of float64


def stats_of(norms, counts=(0, 0, 0), norm_type=2.0, rooted=False):
    """Returns stats of segments with these norms, with all bad elements in the first segment."""
    norms = torch.as_tensor(norms, dtype=torch.float64).reshape(-1)
    summary = torch.zeros(4, len(norms), dtype=torch.float64)
    summary[0] = norms if rooted or norm_type == math.inf else norms**norm_type
    summary[1:, 0] = torch.tensor(counts, dtype=torch.float64)
    counts = torch.zeros(3, 1, dtype=torch.int64)
    return GradStats(summary, counts, norm_type, rooted=rooted)


def signals_of(losses=None, inv_scale=None, found_inf=None, scale_falls=None):
    losses = losses or {}
    return Signals(
        torch.tensor(list(losses.values()), dtype=torch.float64),
        tuple(losses),
        None if inv_scale is None else torch.tensor(inv_scale, dtype=torch.float64),
        None if found_inf is None else torch.tensor(found_inf),
        scale_falls=None if scale_falls is None else torch.tensor(scale_falls),
    )


def assert_same(ours, theirs):
    for field in (f for f in dataclasses.fields(theirs) if f.compare):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
        rtol = RTOL if a.is_floating_point() else 0
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=0, equal_nan=True, msg=lambda m, f=field: f"{f.name}: {m}"
        )


class Story:
    """A guard that decides each step twice, by the kernel and by the reference."""

    def __init__(self, policy):
        self.policy = policy
        self.ours, self.theirs = (GuardState.fresh(policy, CPU) for _ in range(2))
        self.n_steps = 0

    def step(self, stats, signals=None):
        signals = signals or Signals.none(CPU)
        self.n_steps += 1
        if self.n_steps % 3 == 0:
            assert_taken_back(triton_stages.decide, stats, signals, self.ours, self.policy)
        verdict = triton_stages.decide(stats, signals, self.ours, self.policy)
        assert_same(verdict, reference.decide(stats, signals, self.theirs, self.policy))
        assert verdict.changes is not None and verdict.changes.shape == ()
        changes = bool((verdict.multiplier != 1.0).any()) or bool(verdict.clean)
        assert verdict.changes.item() == changes
        assert_same(self.ours, self.theirs)
        return verdict


def policy_of(nonfinite="skip", max_norm=1.0, **rules):
    limits = torch.as_tensor(max_norm, dtype=torch.float64).reshape(-1)
    return Policy(limits, nonfinite, tuple(rules.values()), tuple(rules))


MODES = ["skip", "zero", "raise", "propagate"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0], ids=str)
def test_one_call_without_a_state(mode, norm_type):
    limits = itertools.cycle((1.0, math.inf, 0.0, 1.0))
    for norms in ([0.0], [7.0], [3.0, 0.0, 0.2]):
        for counts in ((0, 0, 0), (2, 0, 0), (1, 1, 0), (0, 0, 3)):
            stats = stats_of(norms, counts, norm_type)
            arguments = (stats, Signals.none(CPU), None, policy_of(mode, next(limits)))
            assert_same(triton_stages.decide(*arguments), reference.decide(*arguments))


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_scaler(mode):
    story = Story(policy_of(mode, [1.0, math.inf]))
    # The cycles of 5, 3 and 4 values have no common factor, so 20 steps cover nearly every pair.
    losses = itertools.cycle((1.0, math.nan, math.inf, -math.inf, 2.0))
    scales = itertools.cycle((None, 0.25, math.inf))
    found = itertools.cycle((0.0, None, 1.0, math.nan))
    for step in range(20):
        signals = signals_of({"loss": 1.0, "aux": next(losses)}, next(scales), next(found))
        story.step(stats_of([3.0, 2.0], (0, 1, 0) if step % 3 else (0, 0, 0)), signals)


def test_thousands_of_segments_with_their_own_limits():
    n = 2000
    norms = torch.rand(n, dtype=torch.float64) * 4
    limits = torch.where(torch.rand(n) < 0.1, math.inf, 1.0).double()
    Story(policy_of("propagate", limits)).step(stats_of(norms, (1, 0, 0)))


def test_counters():
    story = Story(policy_of())
    for bad in (0, 1, 1, 0, 1):
        story.step(stats_of([1.0], (bad, 0, 0)))
    assert story.ours.counters.tolist() == [5, 2, 3, 1, 0]


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_that_only_lowers_a_loss_scale(mode):
    story = Story(policy_of(mode, grad_norm=SpikeRule(window=4, warmup=2, sigma=2.0)))
    # All combinations of (found, falls, loss, counted) in one run, each followed by a good step.
    cases = itertools.product((1.0, 2.0, 0.0), (True, False, None), (1.0, math.nan), (0, 1))
    n_searches = 0
    for found, falls, loss, posinf in cases:
        signals = signals_of({"loss": loss}, 0.5, found, falls)
        before = story.ours.counters.tolist()
        verdict = story.step(stats_of([3.0], (0, posinf, 0)), signals)
        searches = found > 0 and falls is True and loss == 1.0
        n_searches += searches
        assert (verdict.reason == Reason.LOSS_SCALE) == searches
        if searches:
            assert (verdict.found_inf, verdict.clean, verdict.multiplier) == (1.0, 0.0, 1.0)
            assert story.ours.counters[3] == before[3]
        if loss == 1.0:
            story.step(stats_of([2.0]), signals_of({"loss": loss}, 0.5, 0.0, falls))
    assert story.ours.counters[4] == n_searches == 4


def test_a_spike_is_skipped_and_enters_the_ring_clipped():
    story = Story(policy_of(grad_norm=SpikeRule(window=4, warmup=2, sigma=3.0)))
    for norm in (1.0, 1.1, 0.9):
        assert story.step(stats_of([norm])).found_inf == 0.0
    verdict = story.step(stats_of([50.0]))
    assert verdict.found_inf == 1.0 and verdict.reason == Reason.GRAD_SPIKE
    assert story.ours.windows[0, 3] == verdict.thresholds[0]
    assert story.step(stats_of([1.0])).found_inf == 0.0


def test_a_lasting_shift_is_accepted_after_a_window_of_skips():
    story = Story(policy_of(grad_norm=SpikeRule(window=6, warmup=3, sigma=2.0)))
    for norm in (1.0, 1.05, 0.95, 1.0, 1.02, 0.98):
        story.step(stats_of([norm]))
    decisions = [story.step(stats_of([1e6])).found_inf.item() for _ in range(14)]
    assert decisions[:6] == [1.0] * 6 and decisions[6:] == [0.0] * 8


@pytest.mark.parametrize("action", ["skip", "clip", "record"])
def test_actions_and_losses(action):
    rules = {
        "grad_norm": SpikeRule(window=5, warmup=2, sigma=3.0, action=action),
        "loss": Threshold(3.0),
        "aux": SpikeRule(window=130, warmup=3, action="record"),  # longer than a block
    }
    story = Story(policy_of(max_norm=2.0, **rules))
    for i in range(9):
        loss = 5.0 if i == 6 else 1.0
        losses = {"aux": 1.0 + i, "loss": loss} if i % 3 else {"loss": loss}
        story.step(stats_of([100.0 if i in (4, 5) else 1.0]), signals_of(losses))


@pytest.mark.parametrize("mode", MODES)
def test_random_runs(mode):
    rng = random.Random(7)
    rules = {
        "grad_norm": SpikeRule(window=4, warmup=2, sigma=2.0, action="clip"),
        "loss": SpikeRule(window=3, warmup=2, sigma=2.0),
    }
    story = Story(policy_of(mode, [1.0, 2.0, math.inf], **rules))
    for _ in range(40):
        scale = rng.choice([0.0, 1.0, 1.0, 1.0, 30.0, 1e4])
        counts = rng.choice([(0, 0, 0)] * 5 + [(1, 0, 0), (0, 2, 1)])
        norms = [scale * rng.random() for _ in range(3)]
        loss = rng.choice([1.0, 1.1, 0.9, 20.0, math.nan])
        signals = signals_of({"loss": loss} if rng.random() < 0.8 else {})
        story.step(stats_of(norms, counts), signals)


@pytest.mark.parametrize("signal", ["ce", "aux"])
def test_a_loss_given_by_no_rank_is_ignored(signal):
    """With several ranks, losses keep their positions, even if they are not given in a step."""
    story = Story(policy_of(**{signal: SpikeRule(window=4, warmup=2, sigma=2.0)}))
    values = torch.tensor([2.0, math.nan, math.inf], dtype=torch.float64)
    for given in [(1, 0, 0), (1, 0, 0), (0, 0, 0), (1, 1, 0), (1, 0, 0)]:
        signals = Signals(values, ("ce", "aux", ""), given=torch.tensor(given) > 0)
        verdict = story.step(stats_of([3.0]), signals)
        assert bool(verdict.found_inf) == (given[1] == 1)
    assert story.ours.rings[0, 0] == (
        3 if signal == "ce" else 0
    )  # nothing enters a ring in a bad step


@pytest.mark.parametrize("mode", ["skip", "zero", "propagate", "raise"])
@pytest.mark.parametrize("norm_type", [2.0, 3.0, 0.5])
def test_norms_whose_powers_overflow_float64(mode, norm_type):
    for norms in ([2e200], [3e200, 4e200, 0.0], [1e-200, 1e-300], [1e308] * 200, [math.inf, 1.0]):
        for counts in ((0, 0, 0), (0, 2, 0)):
            limits = torch.full((len(norms),), 1e100, dtype=torch.float64)
            story = Story(Policy(limits, mode, (SpikeRule(window=4, warmup=2),), ("grad_norm",)))
            for _ in range(3):
                story.step(stats_of(norms, counts, norm_type, rooted=True))
