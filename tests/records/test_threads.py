"""Threads, such as those of a dashboard, may read records while another thread trains."""

import logging
import os
import signal
import sys
import threading

import pytest
import torch

import fastguard

STEPS = 300
BAD_EVERY = 7


@pytest.fixture(autouse=True)
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def train_while_read(read, sink=None):
    """Takes `STEPS` steps, every seventh of them bad, while two threads call `read(optimizer)`."""
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1), max_norm=1.0)
    if sink is not None:
        opt.add_sink(sink)
    is_over, errors = threading.Event(), []

    def keep_reading():
        try:
            while not is_over.is_set():
                read(opt)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=keep_reading) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for step in range(STEPS):
            p.grad = torch.full_like(p, float("nan") if step % BAD_EVERY == 0 else 1.0)
            opt.step()
    finally:
        is_over.set()
        for reader in readers:
            reader.join()
    if errors:
        raise errors[0]
    return opt


def test_a_history_read_meanwhile_has_each_step_once_in_order():
    def read(opt):
        steps = [record.step for record in opt.history]
        assert steps == list(range(1, len(steps) + 1))

    assert len(train_while_read(read).history) == STEPS


@pytest.mark.parametrize("fetch", ["records", "flush"])
def test_records_fetched_meanwhile_come_once_each(fetch):
    seen = []
    opt = train_while_read(lambda opt: seen.extend(getattr(opt, fetch)()))
    seen += opt.records()
    assert sorted(record.step for record in seen) == list(range(1, STEPS + 1))


def test_sinks_and_the_log_get_each_record_once(caplog):
    told = []
    with caplog.at_level(logging.WARNING, "fastguard"):
        train_while_read(lambda opt: opt.history, sink=told.append)
    assert [record.step for record in told] == list(range(1, STEPS + 1))
    named = [m for m in caplog.messages if "step 1 skipped" in m]
    assert len(named) == 1


def test_a_sink_may_wait_for_a_thread_that_reads_the_history():
    lengths = []

    def sink(record):
        other = threading.Thread(target=lambda: lengths.append(len(opt.history)))
        other.start()
        other.join(timeout=10)
        assert not other.is_alive()

    p = torch.nn.Parameter(torch.zeros(3))
    opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1))
    opt.add_sink(sink)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    assert lengths == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_while_a_thread_reads_has_the_records():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1))
    opt.step()
    reads, may_end = threading.Event(), threading.Event()

    def read():
        with opt._recorder._finishing:
            reads.set()
            may_end.wait()

    reader = threading.Thread(target=read)
    reader.start()
    reads.wait()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        os._exit(0 if len(opt.history) == 1 and opt._recorder.wait() is not None else 1)
    status = os.waitpid(child, 0)[1]
    may_end.set()
    reader.join()
    assert status == 0
