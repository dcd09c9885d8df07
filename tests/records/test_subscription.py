"""Delivery of records: to sinks at once, to inboxes at the next delivery."""

import copy
import logging
from contextlib import suppress
from types import SimpleNamespace

import pytest

from fastguard import StepRecord
from fastguard.records.recorder import Recorder
from guardtest.interrupts import interrupted
from guardtest.recorded import SlowArrival, guard


def test_a_sink_that_raises_loses_its_records_not_the_run(caplog):
    def full(record):
        raise OSError("disk full")

    (p,), opt = guard()
    seen = []
    for sink in (full, seen.append, full):
        opt.add_sink(sink)
    for _ in range(3):
        opt.step()
    assert p[0] == -1.5
    assert [r.step for r in seen] == [1, 2, 3]
    assert [r.step for r in opt.records()] == [1, 2, 3]
    assert caplog.text.count("records are being lost") == 1
    assert "disk full" in caplog.text


def test_a_sink_may_be_interrupted():
    def interrupted(record):
        raise KeyboardInterrupt

    _, opt = guard()
    opt.add_sink(interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step()


def test_a_sink_may_ask_for_the_records():
    _, opt = guard()
    told, seen = [], []

    def asks(record):
        told.append(record.step)
        seen.extend(r.step for r in opt.records())

    for sink in (asks, lambda r: told.append(-r.step)):
        opt.add_sink(sink)
    for _ in range(3):
        opt.step()
    assert sorted(told) == [-3, -2, -1, 1, 2, 3]
    assert [*seen, *(r.step for r in opt.records())] == [1, 2, 3]


def test_each_sink_gets_each_record_once_if_one_asks_while_several_have_arrived():
    recorder = Recorder()
    told = []

    def asks(record):
        told.append(record.step)
        recorder.wait()

    for sink in (asks, lambda r: told.append(-r.step)):
        recorder.add_sink(sink)
    for step in (1, 2, 3):
        a_record_on_its_way(recorder, step)
    recorder.wait()
    assert told == [1, -1, 2, -2, 3, -3]
    assert [r.step for r in recorder.drain()] == [1, 2, 3]


def test_an_interrupted_sink_is_called_once_more():
    _, opt = guard()
    told = []

    def interrupted_once(record):
        told.append(record.step)
        if told == [1]:
            raise KeyboardInterrupt

    opt.add_sink(interrupted_once)
    after = []
    opt.add_sink(after.append)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    opt.step()
    assert told == [1, 1, 2]
    assert [r.step for r in after] == [r.step for r in opt.records()] == [1, 2]


def test_a_deleted_subscriber_is_freed_and_not_called():
    _, opt = guard()
    inbox = opt.subscribe()
    opt.step()
    assert [r.step for r in inbox] == [1]
    assert opt._recorder.has_subscribers
    del inbox
    assert not opt._recorder.has_subscribers
    opt.step()
    assert opt._recorder.undelivered == []


def test_an_inbox_that_is_never_emptied_is_bounded(caplog, monkeypatch):
    monkeypatch.setattr("fastguard.records.recorder.INBOX", 3)
    _, opt = guard()
    slow, quick = opt.subscribe(), opt.subscribe()
    for _ in range(5):
        opt.step()
        quick.popleft()
    assert [r.step for r in slow] == [3, 4, 5]
    assert caplog.text.count("inbox of a subscriber is full") == 1


def a_record_on_its_way(recorder, step, action="applied", reason=None):
    record = StepRecord(step, 1.0, 1.0, action, reason)
    recorder._pending.append(
        SimpleNamespace(key=object(), arrival=SlowArrival(), record=lambda: record)
    )


def test_records_in_transfer_during_a_load_reach_no_inbox():
    recorder = Recorder()
    inbox = recorder.subscribe()
    a_record_on_its_way(recorder, 7)
    recorder.forget_last()
    recorder.deliver()
    assert list(inbox) == []


def test_one_subscriber_can_fetch_records_early_and_gets_them_once():
    recorder = Recorder()
    hasty, other = recorder.subscribe(), recorder.subscribe()
    a_record_on_its_way(recorder, 1)
    assert [r.step for r in hasty.coming()] == [1]
    assert list(hasty) == []
    hasty.settle()
    assert [r.step for r in hasty] == [1] and list(other) == []
    assert hasty.coming() == []
    a_record_on_its_way(recorder, 2)
    recorder.deliver()
    assert [r.step for r in hasty] == [r.step for r in other] == [1, 2]


def test_expected_records_arrive_with_the_next_delivery():
    recorder = Recorder()
    inbox = recorder.subscribe()
    inbox.expect([StepRecord(3, 1.0, 1.0, "applied")])
    assert [r.step for r in inbox.coming()] == [3] and list(inbox) == []
    recorder.forget_last()  # the optimizer may be loaded after its subscribers
    a_record_on_its_way(recorder, 4)
    assert [r.step for r in inbox.coming()] == [3, 4]
    recorder.deliver()
    assert [r.step for r in inbox] == [3, 4]
    assert inbox.coming() == []


def test_an_inbox_can_be_copied():
    _, opt = guard()
    inbox = opt.subscribe()
    opt.step()
    assert list(copy.deepcopy(inbox)) == list(inbox)


def test_a_delivery_that_is_interrupted_at_any_line_gives_each_inbox_each_record_once():
    for at in range(200):
        recorder = Recorder()
        inboxes = [recorder.subscribe() for _ in range(3)]
        inboxes[0].expect([StepRecord(0, 1.0, 1.0, "applied")])
        for step in (1, 2):
            recorder._finish(StepRecord(step, 1.0, 1.0, "applied"))
        inboxes[1].settle()
        with suppress(KeyboardInterrupt), interrupted(at) as lines:
            recorder.deliver()
        recorder.deliver()
        recorder._finish(StepRecord(3, 1.0, 1.0, "applied"))
        recorder.deliver()
        first, *others = ([r.step for r in inbox] for inbox in inboxes)
        assert first == [0, 1, 2, 3] and others == [[1, 2, 3]] * 2, lines
        if not lines:
            break
    assert at > 20 and not lines


def test_a_logging_handler_that_asks_for_the_records_sees_each_incident_once():
    recorder = Recorder()
    lines, told = [], []

    class Asks(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())
            recorder.wait()

    handler, logger = Asks(), logging.getLogger("fastguard")
    logger.addHandler(handler)
    try:
        recorder.add_sink(lambda r: told.append(r.step))
        for step in (1, 2, 3):
            a_record_on_its_way(recorder, step, "skipped", "grad_spike")
        recorder.wait()
    finally:
        logger.removeHandler(handler)
    assert [line.partition(" skipped")[0] for line in lines] == [
        f"fastguard: step {step}" for step in (1, 2, 3)
    ]
    assert told == [1, 2, 3]
    assert [r.step for r in recorder.drain()] == [1, 2, 3]
