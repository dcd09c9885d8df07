"""Update clipping (StableAdamW), spike-aware clipping and momentum reset (SPAM) of `AdamW`."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastguard
import fastguard.optim as guarded
from guardtest import long_tests
from guardtest.updates import same_bits

F64 = torch.float64
SHAPES = [(7,), (6, 5), (3, 2, 2), (1,)]
STABLE = dict(update_clipping=True)
SPAM = dict(spike_threshold=5000, momentum_reset=60, reset_warmup=15)
# Thresholds and intervals that have an effect in a short test.
TIGHT = dict(spike_threshold=4.0, momentum_reset=30, reset_warmup=9)
KINDS = {"stable": STABLE, "spam": TIGHT, "both": STABLE | TIGHT}


class StableAdamW:
    """Algorithm 2 of Wortsman et al. 2023, arXiv 2304.13013, for one tensor in float64."""

    def __init__(self, weight: Tensor, lr: float, betas=(0.9, 0.999), eps=1e-8, decay=1e-2) -> None:
        self.weight, self.lr, self.betas, self.eps, self.decay = weight, lr, betas, eps, decay
        self.m, self.u, self.t = torch.zeros_like(weight), torch.zeros_like(weight), 0

    def step(self, g: Tensor) -> float:
        self.t += 1
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        self.m = b1 * self.m + (1 - b1) * g
        self.u = b2 * self.u + (1 - b2) * g * g
        rms = float((g * g / self.u.clamp(min=self.eps**2)).mean().sqrt())
        lr = self.lr / max(1.0, rms)
        self.weight = (
            self.weight - lr * self.decay * self.weight - lr * self.m / (self.u.sqrt() + self.eps)
        )
        return rms


class Spam:
    """Algorithm 1 of Huang et al. 2025, arXiv 2501.06842, dense, for one tensor in float64.

    Details that the paper does not specify follow the code of its authors: there is no clipping in
    the first 20 steps and in the 20 steps after a reset, the warm-up starts at 0.01, and bias
    corrections do not restart. An element whose second moment is 0 is not clipped; the authors'
    code would keep it at 0.
    """

    betas, eps = (0.9, 0.999), 1e-8

    def __init__(
        self, weight: Tensor, lr: float, decay: float, theta: float, interval: int
    ) -> None:
        self.weight, self.lr, self.decay = weight, lr, decay
        self.theta, self.interval, self.warmup = theta, interval, interval // 4
        self.m, self.v = torch.zeros_like(weight), torch.zeros_like(weight)
        self.t = self.clipped = 0

    def step(self, g: Tensor) -> None:
        self.t += 1
        since = self.t % self.interval
        if since == 0:
            self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
        scale = 1.0
        if self.t >= self.interval and since < self.warmup:
            scale = 1 - 0.99 * (1 + math.cos(math.pi * since / (self.warmup + 1))) / 2
        if since >= 20:
            spikes = (g * g > self.theta * self.v) & (self.v > 0)
            self.clipped += int(spikes.sum())
            g = torch.where(spikes, g.sign() * (self.theta * self.v).sqrt(), g)
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        decayed = self.weight * (1 - self.lr * self.decay)
        self.weight = decayed - self.lr * scale * m / (v.sqrt() + self.eps)


def parameters_of(dtype: torch.dtype = F64) -> list[Any]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=F64).to(dtype)) for s in SHAPES]


def gradient(step: int, i: int, shape: Any) -> Tensor:
    """Noise with a spike in one element at every seventh step."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(7919 * step + i), dtype=F64)
    if step % 7 == 0:
        grad.view(-1)[step % grad.numel()] *= 1000.0
    return grad


def train(optimizer: torch.optim.Optimizer, parameters: list[Any], steps: Any) -> None:
    for step in steps:
        for i, p in enumerate(parameters):
            p.grad = gradient(step, i, p.shape).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("shared_group", [True, False])
def test_update_clipping_equals_the_algorithm_of_the_paper(shared_group):
    ours = parameters_of()
    groups: Any = ours if shared_group else [{"params": [p]} for p in ours]
    optimizer = guarded.AdamW(groups, lr=1e-2, **STABLE)
    exact = [StableAdamW(p.detach().clone(), 1e-2) for p in ours]
    clipped = 0
    n_steps = 10_000 if long_tests() else 150
    for step in range(n_steps):
        train(optimizer, ours, [step])
        clipped += sum(o.step(gradient(step, i, o.weight.shape)) > 1 for i, o in enumerate(exact))
        if step >= 150 and step % 50:
            continue  # the comparison takes longer than the step
        for p, oracle in zip(ours, exact, strict=True):
            torch.testing.assert_close(p.detach(), oracle.weight, rtol=1e-7, atol=1e-9)
    assert n_steps / 3 < clipped < 3.5 * n_steps  # some steps are clipped and some are not


def test_spam_equals_the_algorithm_of_the_paper_over_thousands_of_steps():
    """Steps with NaN in the first, a middle or the last element are skipped and not counted."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(9, dtype=F64))
    optimizer = guarded.AdamW([p], lr=1e-2, weight_decay=0.1, **SPAM)
    oracle = Spam(p.detach().clone(), 1e-2, 0.1, 5000, 60)
    n_steps = 10_000 if long_tests() else 2_500
    noise = torch.randn(n_steps, 9, dtype=F64)
    noise[::7] *= 1.0 + 1000.0 * (torch.rand(-(-n_steps // 7), 9) < 0.1)
    for step, grad in enumerate(noise):
        p.grad = grad.clone()
        optimizer.found_inf = torch.tensor(float(step % 11 == 5))
        if optimizer.found_inf:
            p.grad[(0, 4, -1)[step % 3]] = (math.nan, math.inf, -math.inf)[step // 11 % 3]
        else:
            oracle.step(grad)
        optimizer.step()
    assert oracle.clipped > 0.03 * n_steps
    torch.testing.assert_close(p.detach(), oracle.weight, rtol=1e-8, atol=1e-9)
    assert optimizer.state[p]["step"] == oracle.t


def test_a_reset_clears_moments_and_lowers_the_learning_rate():
    (p,) = parameters = [torch.nn.Parameter(torch.zeros(3))]
    optimizer = guarded.AdamW(
        parameters, lr=1.0, weight_decay=0.0, momentum_reset=4, reset_warmup=2
    )
    moves = []
    for step in range(8):
        p.grad = torch.ones(3)
        if step == 2:
            p.grad[0] = math.nan  # makes a moment NaN, which the reset removes
        before = p.detach().clone()
        optimizer.step()
        moves.append((before - p.detach())[1].item())
        state = optimizer.state[p]
        if step == 3:
            torch.testing.assert_close(state["exp_avg"], torch.full((3,), 0.1))
            torch.testing.assert_close(state["exp_avg_sq"], torch.full((3,), 0.001))
    # After a reset, the step is lr * warm-up * (m / bc1) / sqrt(v / bc2), with the old corrections.
    at_reset = 0.01 * (0.1 / (1 - 0.9**4)) / math.sqrt(0.001 / (1 - 0.999**4))
    assert moves[:3] == pytest.approx([1.0] * 3, rel=1e-4)
    assert moves[3] == pytest.approx(at_reset, rel=1e-4)
    assert moves[3] < moves[4] < moves[5]


def test_an_element_that_never_had_a_gradient_can_begin_to_learn():
    """Otherwise a row of an embedding with a second moment of 0 would always be clipped to 0."""
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = guarded.AdamW([weight], lr=1e-2, weight_decay=0.0, spike_threshold=5000)
    for step in range(40):
        weight.grad = torch.ones(2, 3)
        weight.grad[1] = 1.0 if step >= 30 else 0.0
        optimizer.step()
    assert (weight[1] < -1e-3).all()


def test_one_nonfinite_element_does_not_reach_the_others():
    """Update clipping leaves the element out of the mean, so the others change as without it."""
    moved = []
    for value in (0.0, math.nan, math.inf):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = guarded.AdamW([p], lr=0.1, update_clipping=True)
        for step in range(30):
            p.grad = torch.ones(5) * (100.0 if step == 25 else 1.0)
            p.grad[2] = value if step >= 25 else 0.0
            optimizer.step()
        assert value == 0.0 or not p[2].isfinite()
        moved.append(p.detach()[[0, 1, 3, 4]])
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_bfloat16_with_a_master_trains_like_float32_to_the_last_bit(kind, master):
    ours = parameters_of(torch.bfloat16)
    exact = [torch.nn.Parameter(p.detach().float()) for p in ours]
    a = guarded.AdamW(ours, lr=1e-2, master=master, reproducible=True, **KINDS[kind])
    b = guarded.AdamW(exact, lr=1e-2, reproducible=True, **KINDS[kind])
    for step in range(70):
        train(a, ours, [step])
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()
        b.step()
    for p, q in zip(ours, exact, strict=True):
        state = a.state[p]
        whole = (
            state["master"]
            if master == "float32"
            else guarded.bits.from_remainder(p.detach(), state["remainder"])
        )
        assert same_bits(whole, q.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reproducible", [False, True])
def test_a_clip_coefficient_is_applied_first(kind, reproducible):
    """Clipping in the update gives the same result as clipping the gradient before the update."""
    folded, written = parameters_of(torch.float32), parameters_of(torch.float32)
    options = KINDS[kind] | dict(reproducible=reproducible)
    guard = fastguard.GuardedOptimizer(guarded.AdamW(folded, lr=1e-2, **options), max_norm=1.0)
    plain = guarded.AdamW(written, lr=1e-2, **options)
    for step in range(70):
        for i, (p, q) in enumerate(zip(folded, written, strict=True)):
            p.grad, q.grad = (gradient(step, i, p.shape).float() for _ in range(2))
        guard.step()
        torch.nn.utils.clip_grad_norm_(written, 1.0)
        plain.step()
    for p, q in zip(folded, written, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_bit_for_bit(kind):
    whole, parts = parameters_of(torch.float32), parameters_of(torch.float32)
    optimizer = guarded.AdamW(whole, lr=1e-2, **KINDS[kind])
    train(optimizer, whole, range(80))
    first = guarded.AdamW(parts, lr=1e-2, **KINDS[kind])
    train(first, parts, range(50))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = guarded.AdamW(parts)  # the settings come from the file
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, parts, range(50, 80))
    assert all(map(same_bits, [p.detach() for p in whole], [p.detach() for p in parts]))


def test_state_dicts_are_exchangeable_with_torch():
    """The state has torch's format; the settings are kept, and torch ignores them."""
    parameters, theirs = parameters_of(torch.float32), parameters_of(torch.float32)
    ours = guarded.AdamW(parameters, lr=1e-2, **(STABLE | TIGHT))
    train(ours, parameters, range(20))
    torchs = torch.optim.AdamW(theirs, lr=1.0)
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torchs.param_groups[0]["lr"] == 1e-2
    train(torchs, theirs, range(3))
    ours.load_state_dict(torchs.state_dict())
    assert ours.param_groups[0]["update_clipping"] is True
    # The settings are not defaults of the optimizer.
    fresh = guarded.AdamW([{"params": theirs, **TIGHT}])
    plain = torch.optim.AdamW(parameters_of(torch.float32))
    fresh.load_state_dict(plain.state_dict())
    assert {key: fresh.param_groups[0][key] for key in TIGHT} == TIGHT


def test_param_groups_have_their_own_settings():
    ours, theirs = parameters_of(), parameters_of()
    groups = [{"params": ours[:2], **STABLE}, {"params": ours[2:], **TIGHT}]
    mixed = guarded.AdamW(groups, lr=1e-2)
    alone = [
        guarded.AdamW(theirs[:2], lr=1e-2, **STABLE),
        guarded.AdamW(theirs[2:], lr=1e-2, **TIGHT),
    ]
    for step in range(70):
        train(mixed, ours, [step])
        for i, p in enumerate(theirs):
            p.grad = gradient(step, i, p.shape)
        for optimizer in alone:
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))


def test_an_empty_tensor_and_a_zero_gradient_change_nothing():
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in ((0,), (3,))]
    optimizer = guarded.AdamW(parameters, lr=1.0, weight_decay=0.0, eps=0.0, **(STABLE | TIGHT))
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[parameters[1]]["exp_avg_sq"].eq(0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(update_clipping=1), "update_clipping=1 must be True or False"),
        (dict(spike_threshold=0.0), "spike_threshold=0.0 must be None or a finite number > 0"),
        (dict(spike_threshold=math.inf), "spike_threshold=inf must be None or"),
        (dict(spike_threshold=math.nan), "spike_threshold=nan must be None or"),
        (dict(spike_threshold="5000"), "spike_threshold='5000' is not a number"),
        (dict(momentum_reset=0), "momentum_reset=0 must be None or an integer >= 1"),
        (dict(momentum_reset=2.5), "momentum_reset=2.5 must be None or an integer"),
        (dict(momentum_reset=500, reset_warmup=-1), "reset_warmup=-1 must be an integer >= 0"),
        (dict(momentum_reset=100), "reset_warmup=150 must be shorter than momentum_reset=100"),
        (
            dict(momentum_reset=20, reset_warmup=5, spike_threshold=5000),
            "momentum_reset=20 leaves no step for spike_threshold=5000",
        ),
    ],
)
def test_an_invalid_setting_is_refused(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        guarded.AdamW(parameters_of(), **settings)


@pytest.mark.parametrize("kind", [guarded.Adam, guarded.SGD, guarded.Lion])
def test_the_other_optimizers_refuse_the_settings(kind):
    with pytest.raises(TypeError, match="takes no argument 'update_clipping'"):
        kind(parameters_of(), update_clipping=True)
    with pytest.raises(TypeError, match="takes no argument 'spike_threshold'"):
        kind([{"params": parameters_of(), "spike_threshold": 5000}])
