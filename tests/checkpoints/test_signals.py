"""SIGTERM ends a run with a verified checkpoint of a consistent state."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastguard import CheckpointStore
from guardtest.longrun import LongRun
from guardtest.training import assert_same_bits

RUN = """
import os, sys
from fastguard import CheckpointStore
from guardtest.longrun import LongRun

store = CheckpointStore(sys.argv[1])
run = LongRun()
with store.save_on_signal():
    print("ready", flush=True)
    for step in range(1, 10**9):
        run.advance(step)
        store.maybe_save(run.objects(), step=step, position={"batch": step})
"""


def test_sigterm_from_outside_ends_the_run_with_a_clean_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # launchers send the signal repeatedly
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "signal 15: stopping at step" in errors
    with CheckpointStore(tmp_path) as store:
        (entry,) = store.list()
        assert entry.clean
        assert all(check.ok for check in store.verify())
        resumed = LongRun.resumed(store, "last").advance(entry.step + 6).everything()
    assert_same_bits(resumed, LongRun().advance(entry.step + 6).everything())


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path) as opened:
        yield opened


def test_the_flag_waits_for_maybe_save_and_the_old_handler_is_restored(store):
    before = signal.getsignal(signal.SIGUSR1)
    store.save_on_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert store.stop_requested
    assert store.list() == ()
    with pytest.raises(SystemExit) as stop:
        store.maybe_save(x=1, step=5)
    assert stop.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
    with CheckpointStore(store.directory) as later:  # the store was closed when the run ended
        assert later.last_clean().step == 5


def test_a_failing_disk_does_not_prevent_a_run_from_ending(store, monkeypatch, caplog):
    def fail(*_):
        raise OSError(28, "No space left on device")

    store.save_on_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(SystemExit):
            store.maybe_save(x=1, step=5)
    assert "stopping at step 5; saved nothing" in caplog.text


def test_one_of_several_flags_is_enough(store):
    with store.save_on_signal(signal.SIGUSR1, exit=False), store.save_on_signal(exit=False):
        assert not store.stop_requested
        signal.raise_signal(signal.SIGTERM)  # the default signal
        assert store.stop_requested
        assert store.maybe_save(x=1, step=5).step == 5
        assert store.maybe_save(x=1, step=6) is None
        assert not store.stop_requested


def test_a_loop_can_end_by_itself(store):
    with store.save_on_signal(signal.SIGUSR1, exit=False):
        for step in range(1, 100):
            if step == 3:
                signal.raise_signal(signal.SIGUSR1)
            stop = store.stop_requested
            store.maybe_save(x=1, step=step)
            if stop:
                break
    assert [entry.step for entry in store.list()] == [3]
    assert not store.stop_requested


@pytest.mark.parametrize("leave", ["with", "restore", "close"])
def test_the_previous_handler_is_restored(store, leave):
    def own(*_):
        pass

    original = signal.signal(signal.SIGUSR2, own)
    try:
        flag = store.save_on_signal(signal.SIGUSR2)
        assert signal.getsignal(signal.SIGUSR2) is not own
        if leave == "with":
            with flag:
                pass
        elif leave == "restore":
            flag.restore()
        else:
            store.close()
        assert signal.getsignal(signal.SIGUSR2) is own
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a handler that is set afterward is kept
        flag.restore()
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, original)


@pytest.mark.parametrize("leave", ["close", "maybe_save"])
def test_two_flags_of_one_signal_restore_the_original_handler(store, leave):
    before = signal.getsignal(signal.SIGUSR1)
    store.save_on_signal(signal.SIGUSR1, exit=False)
    if leave == "maybe_save":
        signal.raise_signal(signal.SIGUSR1)
    store.save_on_signal(signal.SIGUSR1, exit=False)
    if leave == "maybe_save":
        signal.raise_signal(signal.SIGUSR1)
        store.maybe_save(x=1, step=5)
    else:
        store.close()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_forked_worker_is_still_ended_by_the_signal(store):
    context = multiprocessing.get_context("fork")
    ready = context.Event()  # Python drops signals that arrive while it forks

    def work():
        ready.set()
        time.sleep(100)

    with store.save_on_signal():
        worker = context.Process(target=work)
        worker.start()
        assert ready.wait(20)
        worker.terminate()
        worker.join(20)
    assert worker.exitcode == -signal.SIGTERM


def test_maybe_save_saves_every_n_steps(store):
    for step in range(8):
        entry = store.maybe_save(x=step, step=step, every=3)
        assert (entry is not None) == (step in (3, 6))
    assert [entry.step for entry in store.list()] == [3, 6]
    assert store.maybe_save(x=1, step=9) is None


def test_wrong_use_is_an_error(store):
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ValueError, match="cannot handle signal 999"):
        store.save_on_signal(signal.SIGUSR1, 999)
    assert signal.getsignal(signal.SIGUSR1) is before
    errors = []

    def elsewhere():
        try:
            store.save_on_signal()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
