"""How often an update is compiled when settings change and gradients are sometimes None."""

import math

import pytest
import torch

from fastguard import GuardedOptimizer
from fastguard.guard import compiled_step
from guardtest.compiled import compiled, give, parameters
from guardtest.tolerances import COMPILED_RTOL


def pair(make, **options):
    """Returns a compiled and a plain guard of equal optimizers."""
    params, others = parameters(), parameters()
    plain = GuardedOptimizer(make(others), **{"max_norm": 1.0} | options)
    return (params, compiled(make(params), **options)), (others, plain)


def assert_close(params, others):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)


def test_a_thousand_steps_of_a_schedule_compile_once():
    torch._dynamo.utils.counters.clear()
    params = parameters()
    opt = compiled(torch.optim.SGD(params, lr=0.1))
    lr = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1000)
    give(params, 0)
    for _ in range(1000):
        opt.step()
        lr.step()
    assert opt._stepper._n_compiled == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert opt.applied_steps == 1000


def test_a_thousand_steps_with_a_schedule_for_each_param_group_compile_once():
    torch._dynamo.utils.counters.clear()

    def make(params):
        groups = [
            {"params": params[:1], "lr": 0.01, "weight_decay": 0.1},
            {"params": params[1:], "lr": 0.02, "weight_decay": 0.0, "betas": (0.8, 0.99)},
        ]
        return torch.optim.AdamW(groups)

    (params, opt), (others, plain) = pair(make)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            o, [lambda n: 1 / (1 + 0.01 * n), lambda n: 0.5 + 0.5 * math.cos(n / 100)]
        )
        for o in (opt, plain)
    ]
    for seed in range(1000):
        for some, o in ((params, opt), (others, plain)):
            give(some, seed, math.nan if seed % 250 == 3 else None)
            o.step()
        for scheduler in schedulers:
            scheduler.step()
    assert opt._stepper._n_compiled == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert opt.skipped_steps == plain.skipped_steps == 4
    assert_close(params, others)


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
@pytest.mark.parametrize("first", [None, math.nan], ids=["good first", "bad first"])
def test_good_and_bad_steps_use_one_graph(nonfinite, first):
    torch._dynamo.utils.counters.clear()
    params = parameters()
    opt = compiled(torch.optim.AdamW(params), nonfinite=nonfinite)
    for seed, value in enumerate((first, None, math.nan, None, math.inf)):
        give(params, seed, value)
        opt.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_cycled_momentum_becomes_an_input():
    (params, opt), (others, plain) = pair(lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9))
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40) for o in (opt, plain)
    ]
    for seed in range(30):
        for some, o in ((params, opt), (others, plain)):
            give(some, seed)
            o.step()
        for scheduler in schedulers:
            scheduler.step()
    assert opt._stepper._n_compiled == 2
    assert_close(params, others)


def test_cycled_betas_become_inputs():
    (params, opt), (others, plain) = pair(lambda ps: torch.optim.AdamW(ps, lr=0.01))
    for seed in range(12):
        for some, o in ((params, opt), (others, plain)):
            o.param_groups[0]["betas"] = (0.9 - 0.01 * seed, 0.999)
            o.param_groups[0]["weight_decay"] = 0.01 * (1 + seed)
            give(some, seed)
            o.step()
    assert opt._stepper._n_compiled == 2  # all numbers that differ in the second step became inputs
    assert_close(params, others)


def test_a_branch_on_a_setting_that_changes():
    (params, opt), (others, plain) = pair(lambda ps: torch.optim.SGD(ps, lr=0.1, weight_decay=0.1))
    for seed, decay in enumerate([0.1, 0.2, 0.3, 0.0, 0.2, 0.0]):
        for some, o in ((params, opt), (others, plain)):
            o.param_groups[0]["weight_decay"] = decay
            give(some, seed)
            o.step()
    assert opt._stepper._n_compiled == 3  # a constant, a non-zero input, a zero input
    assert_close(params, others)


def test_a_learning_rate_that_is_a_tensor():
    params, others = parameters(), parameters()
    rate = torch.tensor(0.1)
    opt = compiled(torch.optim.SGD(params, lr=rate))
    plain = GuardedOptimizer(torch.optim.SGD(others, lr=0.1), max_norm=1.0)
    for seed in range(4):
        rate.fill_(0.1 / (1 + seed))
        plain.param_groups[0]["lr"] = 0.1 / (1 + seed)
        for some, o in ((params, opt), (others, plain)):
            give(some, seed)
            o.step()
    assert opt.param_groups[0]["lr"] is rate
    assert opt._stepper._n_compiled == 1
    assert_close(params, others)


def test_a_gradient_that_is_none_does_not_change_parameter_and_state():
    (params, opt), (others, plain) = pair(lambda ps: torch.optim.AdamW(ps, weight_decay=0.5))
    for seed, absent in enumerate([None, 0, None, 1, 0, 0, None]):
        for some, o in ((params, opt), (others, plain)):
            give(some, seed)
            if absent is not None:
                some[absent].grad = None
            o.step()
    assert opt._stepper._n_compiled == 3  # both gradients, only the first, only the second
    assert_close(params, others)
    steps = [
        [o.state[p]["step"].item() for p in some] for some, o in ((params, opt), (others, plain))
    ]
    assert steps[0] == steps[1]


def test_no_gradient_at_all():
    params = parameters()
    opt = compiled(torch.optim.AdamW(params))
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(p.equal(q) for p, q in zip(params, before, strict=True))


def test_graphs_are_limited(monkeypatch, caplog):
    monkeypatch.setattr(compiled_step, "MAX_GRAPHS", 2)
    (params, opt), (others, plain) = pair(lambda ps: torch.optim.SGD(ps, lr=0.1))
    assert not opt._stepper.reads_first
    for seed, options in enumerate([True, False, True, False, True]):
        for some, o in ((params, opt), (others, plain)):
            give(some, seed, math.nan if seed == 3 else None)
            o.param_groups[0]["nesterov"] = False
            o.param_groups[0]["maximize"] = options if seed < 2 else seed
            o.step()
    assert opt._stepper._n_compiled == 2
    assert opt._stepper.reads_first and "after reading the verdict" in opt.describe()
    assert sum("2 updates of SGD have been compiled" in r.getMessage() for r in caplog.records) == 1
    assert opt.skipped_steps == 1
    assert_close(params, others)


def test_guards_do_not_share_the_limit_of_dynamo():
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (3, 4):
            p = torch.nn.Parameter(torch.ones(size))
            opt = compiled(torch.optim.SGD([p], lr=0.1))
            give([p], 0)
            opt.step()
