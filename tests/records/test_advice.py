"""Faults of a training loop that are visible only in many records are reported once."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastguard import GuardedOptimizer, JsonLinesSink, StepRecord
from fastguard.records.advice import AT_LIMIT, CONSTANT, LONGEST_SEARCH, NEAR_LIMIT, Advice

INF = math.inf


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.WARNING, logger="fastguard")
    return caplog


def told(log):
    return [r.message for r in log.records if "gradient norm is the same" in r.message]


def train(steps, *, before=None, dtype=torch.float32, batches="new", sink=None, **options):
    """Runs a loop that may clip before the guard steps, with norms of about 0.7 to 7."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-4), **options)
    if sink is not None:
        opt.add_sink(sink)
    fixed = torch.randn(8, 16, dtype=dtype)
    for _ in range(steps):
        x = torch.randn(8, 16, dtype=dtype) if batches == "new" else fixed
        (20.0 * model(x).square().mean()).backward()
        if before is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), before)
        opt.step()
        opt.zero_grad()
    return opt


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_clipped_beforehand_to_our_limit_are_reported_once(
    dtype, clip, sink, log, tmp_path
):
    sink = JsonLinesSink(tmp_path / "records.jsonl") if sink else None
    opt = train(150, before=clip, max_norm=clip, dtype=dtype, sink=sink)
    opt.records()
    (message,) = told(log)
    assert f"{clip:g}, which is the guard's own max_norm" in message
    assert "remove that call" in message


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_segments_clipped_beforehand_to_our_limit_are_reported_once(scope, log):
    """The norm of the whole model is then neither a round number nor the limit of any segment."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(4, 4))
    groups = [{"params": layer.parameters()} for layer in model]
    opt = GuardedOptimizer(torch.optim.SGD(groups, lr=1e-4), max_norm=0.1, clip_scope=scope)
    for _ in range(2 * AT_LIMIT):
        (100 * model(torch.randn(8, 16)).square().mean()).backward()
        for part in model if scope == "group" else model.parameters():
            torch.nn.utils.clip_grad_norm_(
                part.parameters() if isinstance(part, nn.Module) else [part], 0.1
            )
        opt.step()
        opt.zero_grad()
    opt.records()
    (message,) = told(log)
    limit = 0.1 * math.sqrt(len(model) if scope == "group" else len([*model.parameters()]))
    assert f"{limit:g}, which is the guard's own max_norm" in message


@pytest.mark.parametrize("limit", [5.0, None])
@pytest.mark.parametrize("scope", ["global", "group"])
def test_gradients_clipped_beforehand_to_another_limit_are_reported_once(limit, scope, log):
    opt = train(2 * CONSTANT, before=0.5, max_norm=limit, clip_scope=scope)
    opt.records()
    (message,) = told(log)
    assert "0.5, as if clipped to a limit other" in message


def test_gradients_clipped_beforehand_to_a_limit_that_changes_are_reported_once(log):
    """The records are read only at the end."""
    model = nn.Linear(16, 4)
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-4))
    for step in range(2 * AT_LIMIT):
        opt.max_norm = 0.5 - 0.01 * step
        (20.0 * model(torch.randn(8, 16)).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), opt.max_norm)
        opt.step()
        opt.zero_grad()
    opt.records()
    (message,) = told(log)
    assert "which is the guard's own max_norm" in message


@pytest.mark.parametrize("limit", [0.1, None])
def test_parts_of_a_model_clipped_beforehand_are_reported_once(limit, log):
    parts = nn.Linear(16, 32), nn.Linear(32, 4)
    model = nn.Sequential(*parts)
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-4), max_norm=limit)
    for _ in range(2 * CONSTANT):
        (20.0 * model(torch.randn(8, 16)).square().mean()).backward()
        for part in parts:
            torch.nn.utils.clip_grad_norm_(part.parameters(), 0.1)
        opt.step()
        opt.zero_grad()
    opt.records()
    (message,) = told(log)
    assert "0.1414, as if clipped to a limit other" in message


@pytest.mark.parametrize("batches", ["new", "one"])
@pytest.mark.parametrize("limit", [1.0, 0.01, None])
def test_a_loop_that_leaves_clipping_to_the_guard_is_not_reported(limit, batches, log):
    train(3 * CONSTANT, max_norm=limit, batches=batches).records()
    assert told(log) == []


@pytest.mark.parametrize("limit", [None, 5.0])
def test_no_advice_for_an_optimizer_that_the_guard_cannot_clip(limit, log):
    """For LBFGS, a warning of the guard says to clip in the closure."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    inner = torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=1)
    opt = GuardedOptimizer(inner, max_norm=limit)

    def closure():
        opt.zero_grad()
        loss = (20.0 * model(x).square()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    for _ in range(CONSTANT + AT_LIMIT):
        x = torch.randn(8, 4)
        opt.step(closure)
    norms = [record.total_norm for record in opt.records()]
    assert max(norms) - min(norms) < 1e-5 and told(log) == []


def test_a_constant_gradient_is_not_reported(log):
    """In a toy model, all norms are bitwise equal."""
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.1), max_norm=1.0)
    for _ in range(3 * CONSTANT):
        p.grad = torch.tensor([3.0, 4.0])
        opt.step()
    assert len(opt.records()) == 3 * CONSTANT and told(log) == []


def seen(norms, limit=1.0):
    advice = Advice()
    for step, norm in enumerate(norms):
        advice.check(StepRecord(step, norm, 1.0, "applied"), limit)


def test_the_number_of_steps_before_the_advice(log):
    seen([1.0 - 1e-6] * (AT_LIMIT - 1))
    seen([0.995] * (NEAR_LIMIT - 1))
    assert told(log) == []
    seen([1.0 - 1e-6] * AT_LIMIT)
    seen([0.995] * NEAR_LIMIT)
    assert len(told(log)) == 2


def test_a_loop_that_clips_most_of_its_steps_is_found(log):
    random = np.random.default_rng(0)
    seen([1.0 if random.random() < 0.6 else random.random() for _ in range(200)])
    assert len(told(log)) == 1


@pytest.mark.parametrize(
    "norms",
    [
        lambda n: np.random.default_rng(0).normal(1.0, 0.05, n),
        lambda n: np.random.default_rng(1).normal(1.0, 0.01, n),  # steadier than a real run
        lambda n: np.linspace(2.0, 0.5, n),
        lambda n: 1.2345 + 1e-6 * np.arange(n),  # training on one batch with a tiny learning rate
        lambda n: np.full(n, INF),
        lambda n: np.zeros(n),
    ],
    ids=["noisy", "steady", "falling", "slow", "inf", "zero"],
)
def test_norms_of_sound_runs(norms, log):
    seen(norms(5000))
    seen(norms(5000), INF)
    assert told(log) == []


def test_incidents_do_not_count_as_clipping(log):
    advice = Advice()
    for step in range(5 * NEAR_LIMIT):
        advice.check(StepRecord(step, 1.0, 1.0, "skipped", "nonfinite_grad"), 1.0)
    assert told(log) == []


def test_a_scale_that_does_not_fall_is_reported(log):
    """This happens in a loop that passes its own scale to `scaler.update`."""
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3 * LONGEST_SEARCH):
        opt.zero_grad()
        scaler.scale((p * INF).sum()).backward()
        scaler.step(opt)
        scaler.update(1024.0)
    (message,) = [r.message for r in log.records]
    assert f"{LONGEST_SEARCH} steps in a row" in message and "scaler.update()" in message


@pytest.mark.parametrize("backoff", [0.5, 0.9, 0.97])
def test_a_scale_that_falls_slowly_is_not_reported(backoff, log):
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**50, backoff_factor=backoff)
    skips = 0
    while scaler.get_scale() > 2.0**20:
        opt.zero_grad()
        scaler.scale((p * INF).sum()).backward()
        scaler.step(opt)
        scaler.update()
        skips += 1
    assert opt.loss_scale_skips == skips == (30 if backoff == 0.5 else skips) and not log.records


def test_searches_with_applied_steps_between_them_are_not_reported(log):
    advice = Advice()
    for step in range(5 * LONGEST_SEARCH):
        reason = "loss_scale" if step % 50 else None
        advice.check(StepRecord(step, 1.0 + step, 1.0, "skipped", reason), INF)
    assert not log.records


def test_each_run_is_reported_separately(log):
    for _, _ in itertools.product(range(2), range(1)):
        train(2 * AT_LIMIT, before=1.0, max_norm=1.0).records()
    assert len(told(log)) == 2
