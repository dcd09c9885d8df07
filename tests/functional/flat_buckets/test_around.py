"""Flat buffers with param groups and scopes, copies of the model, DistributedDataParallel."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from fastguard import FlatGradBuckets, GuardedOptimizer
from guardtest.flat import attached, backward, model_of
from guardtest.gloo_groups import group_of_one
from guardtest.programs import run_program
from guardtest.training import new_parameters, snapshot

NAN = float("nan")


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("dtypes", ["same", "mixed"])
def test_groups_and_scopes_work_as_without_flat_buckets(scope, dtypes):
    def build(flat):
        parameters = new_parameters([(3, 4), (5,), (2, 3, 2), (), (7,), (1,)])
        if dtypes == "mixed":
            for p in parameters[1::2]:
                p.data = p.data.double()
        groups = [
            {"params": parameters[::2]},  # groups with interleaved parameters
            {"params": parameters[1::2], "lr": 0.5},
        ]
        inner = torch.optim.AdamW(groups, lr=0.1)
        return parameters, GuardedOptimizer(
            inner, max_norm=0.7, clip_scope=scope, flat_buckets=flat
        )

    runs = []
    for is_flat in (False, True):
        parameters, opt = build(is_flat)
        for step in range(4):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = sum(
                (p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum().double()
                for p in parameters
            )
            loss.backward()
            if step == 2:
                parameters[3].grad.fill_(NAN)
            opt.step(loss=loss)
        runs.append((snapshot(opt), opt.records(), opt.last))
    (plain, plain_records, plain_last), (flat, flat_records, flat_last) = runs
    for key in plain:
        torch.testing.assert_close(flat[key], plain[key], rtol=1e-6, atol=1e-7)
    for a, b in zip(flat_records, plain_records, strict=True):
        assert (a.action, a.culprits) == (b.action, b.culprits)
        assert a.total_norm == pytest.approx(b.total_norm, rel=1e-7)
    torch.testing.assert_close(flat_last.clip_coef, plain_last.clip_coef, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("trusted", [False, True], ids=["", "trusted"])
def test_a_copy_has_its_own_slots(copied, trusted):
    model = nn.Linear(3, 2)
    model.flat = FlatGradBuckets(model.named_parameters(), trusted=trusted)
    twin = copied(model)
    twin(torch.ones(1, 3)).sum().backward()
    assert twin.flat.measure().total_norm.item() == pytest.approx(8**0.5)
    assert model.flat.measure().total_norm == 0.0
    assert attached(twin.flat)


def test_old_slots_are_freed_when_a_param_group_is_added():
    a, b = new_parameters([(3,), (4,)])
    opt = GuardedOptimizer(torch.optim.SGD([a], lr=0.1), flat_buckets=True)
    a.grad.fill_(1.0)
    old = weakref.ref(opt._gradients.flat)
    opt.add_param_group({"params": [b]})
    b.grad = torch.ones(4)
    opt.step()
    gc.collect()
    assert old() is None
    assert attached(opt._gradients.flat)
    assert opt.records()[0].total_norm == pytest.approx(7**0.5)


def test_gradient_views_of_distributed_data_parallel_are_used_in_place():
    """DDP accumulates into its own buckets, so gradients must remain views of them."""
    with group_of_one():
        a, b = model_of(), model_of()
        ddp = nn.parallel.DistributedDataParallel(a, gradient_as_bucket_view=True)
        for step in range(2):  # DDP rebuilds its buckets after the first backward
            ddp.zero_grad()
            backward(ddp, step)
        buckets = [p.grad.data_ptr() for p in a.parameters()]
        opt = GuardedOptimizer(torch.optim.SGD(a.parameters(), lr=0.1), flat_buckets=True)
        plain = GuardedOptimizer(torch.optim.SGD(b.parameters(), lr=0.1))
        for step in range(3):
            opt.zero_grad()
            assert [p.grad.data_ptr() for p in a.parameters()] == buckets
            plain.zero_grad()
            backward(ddp, step)
            backward(b, step)
            opt.step()
            plain.step()
            assert [p.grad.data_ptr() for p in a.parameters()] == buckets
        assert all(map(torch.equal, a.parameters(), b.parameters()))


MOVED = """
import torch, fastguard
parameters = [torch.nn.Parameter(torch.zeros({n})) for _ in range(30)]
segments = [i % {n_segments} for i in range(30)]
flat = fastguard.FlatGradBuckets(
    parameters, trusted={trusted}, segments=segments, n_segments={n_segments}
)
for value in (1.0, 3.0):
    for p in parameters:
        p.grad.fill_(value)
    norm = flat.measure().total_norm
    assert abs(norm / (value * (30 * {n}) ** 0.5) - 1.0) < 1e-6, norm
    before = parameters[0].grad.data_ptr()
    parameters[0].grad.share_memory_()
    assert parameters[0].grad.data_ptr() != before or value == 3.0
"""


@pytest.mark.parametrize(
    "n, n_segments, trusted", [(60_000, 1, True), (100_000, 2, True), (100_000, 2, False)]
)
def test_sharing_memory_with_other_processes_moves_the_slots(n, n_segments, trusted):
    """The old address is unmapped, so reading it would crash the process."""
    code = MOVED.format(n=n, n_segments=n_segments, trusted=trusted)
    done = run_program(code)
    assert done.returncode == 0, (done.returncode, done.stderr)
