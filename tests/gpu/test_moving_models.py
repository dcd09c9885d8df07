"""A guard that is created before `model.to("cuda")` decides on the new device of the model."""

import copy

import pytest
import torch

from fastguard import GuardedOptimizer, SpikeRule


@pytest.mark.parametrize("flat", [False, True])
def test_counters_and_baselines_move_with_the_model(flat):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    stays = copy.deepcopy(model)
    guards = []
    for m in (model, stays):
        inner = torch.optim.SGD(m.parameters(), lr=0.1)
        rule = SpikeRule(window=4, warmup=2)
        guards.append(GuardedOptimizer(inner, max_norm=1.0, spike=rule, flat_buckets=flat))
    opt, expected = guards
    batches = torch.randn(8, 4, 8)
    batches[2] = torch.nan
    for k, batch in enumerate(batches):
        if k == 4:
            model.to("cuda")
        for guard, m in ((opt, model), (expected, stays)):
            device = next(m.parameters()).device
            m(batch.to(device)).square().mean().backward()
            guard.step()
            guard.zero_grad()
    assert opt.last.total_norm.is_cuda
    assert (opt.applied_steps, opt.skipped_steps) == (7, 1)
    assert [r.action for r in opt.flush()] == [r.action for r in expected.flush()]
    for got, want in zip(model.parameters(), stays.parameters(), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-6)
