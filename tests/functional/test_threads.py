"""Threads never see shared state, such as caches, in the middle of a change."""

import random
import sys
import threading
import types

import pytest
import torch

import fastguard
from fastguard.gradients import layout_guards
from fastguard.gradients.buckets import bucketize

N = 40
THREADS = 4


@pytest.fixture(autouse=True)
def switching_often():
    before, torch_threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(torch_threads)


def together(work, n=THREADS):
    """Runs `work(number)` in threads that start together; raises the first error."""
    start, errors = threading.Barrier(n), []

    def run(number):
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def parameters():
    return [torch.nn.Parameter(torch.zeros(1 + i % 5)) for i in range(N)]


def some(draw):
    """Returns the gradients of a step, all ones, of which other ones are None each time."""
    return [None if draw.random() < 0.2 else torch.ones(1 + i % 5) for i in range(N)]


def distinct(n):
    return [torch.ones(1) for _ in range(n)]


def test_another_thread_adds_a_layout_during_the_search():
    class Meanwhile(list):
        """A list that lets another thread run in the middle of a comparison."""

        def __len__(self):
            other = threading.Thread(target=lambda: bucketize(distinct(N + 1 + len(added))))
            added.append(other)
            other.start()
            other.join()
            return super().__len__()

    added = []
    bucketize(distinct(N))
    layout_guards.known_form(Meanwhile(distinct(N - 1)))
    assert added


def test_no_layout_is_lost_when_threads_add_them_at_once(monkeypatch):
    for _ in range(50):
        monkeypatch.setattr(layout_guards, "_forms", ())
        together(lambda number: bucketize(distinct(N + number)))
        assert {form._n for form in layout_guards._forms} == {N + i for i in range(THREADS)}


def test_lists_with_changing_layouts_are_sorted_in_threads(monkeypatch):
    # Makes the search longer, so that threads collide.
    monkeypatch.setattr(layout_guards, "FORMS", 100)

    def work(number):
        draw = random.Random(number)
        for _ in range(200):
            grads = some(draw)
            present = [g for g in grads if g is not None]
            (bucket,) = bucketize(grads).buckets
            assert all(a is b for a, b in zip(bucket.grads, present, strict=True))

    together(work)
    assert len(layout_guards._forms) == 100


def test_the_functions_return_the_norm_of_their_own_thread():
    def work(number):
        draw = random.Random(number)
        params = parameters()
        for step in range(100):
            for p, g in zip(params, some(draw), strict=True):
                p.grad = g
            n = sum(p.numel() for p in params if p.grad is not None)
            limit = 1.0 + step % 50  # more limits than are cached
            norm = fastguard.clip_grad_norm_(params, limit)
            assert norm.item() == pytest.approx(n**0.5)
            left = fastguard.get_total_norm([p.grad for p in params if p.grad is not None])
            assert left.item() == pytest.approx(min(limit, n**0.5), rel=1e-5)

    together(work)


def test_optimizers_in_threads_decide_independently():
    def work(number):
        draw = random.Random(number)
        params = parameters()
        opt = fastguard.GuardedOptimizer(
            torch.optim.SGD(params, lr=0.1),
            max_norm=1.0,
            spike=fastguard.Threshold(max=100.0 + number),
        )
        bad = 0
        for step in range(100):
            for p, g in zip(params, some(draw), strict=True):
                p.grad = g
            if step % (number + 2) == 0:
                params[number].grad = torch.full_like(params[number], float("nan"))
                bad += 1
            opt.step(loss=1.0)
        records = opt.records()
        assert (opt.skipped_steps, opt.applied_steps) == (bad, 100 - bad)
        assert [r.step for r in records] == list(range(1, 101))
        culprits = {c[0] for r in records for c in r.culprits}
        assert culprits == {f"parameter {number}"}

    together(work)


class Redefined(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "module",
    [
        "torch.distributed.tensor",
        "torch.distributed._functional_collectives",
        "torch._subclasses.fake_tensor",
        "torch._subclasses.functional_tensor",
    ],
)
def test_another_thread_is_importing_a_module_of_torch(module, monkeypatch):
    # An empty module, as while its first line runs.
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([3.0, 4.0])
    fastguard.clip_grad_adaptive_([p], 1.0)
    fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.0)).step()
    assert fastguard.get_total_norm([torch.ones(4).as_subclass(Redefined)]) == 2.0
