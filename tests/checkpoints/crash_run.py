"""Kills a process that uses a store: `python crash_run.py random|exhaustive|file FOLDER`.

Each trial forks a child that works on one store. The child is killed, either at a random moment or
just before its k-th operation on the disk. Then the parent opens the store and checks it. Forking
avoids importing torch in each child. test_crashes.py runs this script.
"""

import logging
import mmap
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints import inspect, roll_back_file

torch.set_num_threads(1)  # threads do not survive a fork
SIZE = 20_000
SAVING, ROTATING, ROLLING_BACK = range(3)
ACTIONS = ("saving", "rotating", "rolling back")


def save(store, step, *, bad=False):
    state = {"w": torch.full((SIZE,), float("nan") if bad else float(step)), "step": step}
    store.save(state=state, step=step, metric=float(step % 7))


def live(folder, doing, cycles=10**9):
    """Saves, rotates and rolls back; writes the current action to `doing`."""
    with CheckpointStore(folder, keep=2) as store:
        for _ in range(cycles):
            step = store.last().step
            for action, bad in ((SAVING, False), (ROTATING, True), (ROTATING, True)):
                step += 1
                doing[0] = action
                save(store, step, bad=bad)
            doing[0] = ROLLING_BACK
            store.rollback()


def check(folder):
    """Checks that the store opens, all checkpoints are complete, and the last clean one loads."""
    with CheckpointStore(folder, keep=2) as store:
        clean = store.last_clean()
        assert clean is not None
        state = store.load("last-clean").state["state"]
        assert state["step"] == clean.step
        assert torch.equal(state["w"], torch.full((SIZE,), float(clean.step)))
        assert all(c.problem is None for c in store.verify()), store.verify()
        listed = {e.file for e in store.list()} | {f"{e.file}.replaced" for e in store.replaced()}
        found = {path.name for path in Path(folder).iterdir()}
        assert found <= {*listed, "manifest.json", ".lock"}, found - listed
        steps = [e.step for e in store.list()]
        assert len(steps) <= 4
        return steps


def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def killed(pid):
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


def random_moments(folder):
    draw = random.Random(int(sys.argv[3]))
    doing = mmap.mmap(-1, 1)  # shared with the children
    with CheckpointStore(folder) as store:
        save(store, 1)
    hit = dict.fromkeys(range(len(ACTIONS)), 0)
    for kill in range(20):
        doing[0] = len(ACTIONS)  # no action has started yet
        pid = forked(lambda: live(folder, doing))
        wanted = kill % len(ACTIONS)
        for _ in range(draw.randrange(3) + 1):  # lets the child do some actions first
            turn(doing, wanted, pid)
        time.sleep(draw.uniform(0.0, 0.01))  # a save takes about 10 ms, a rollback 5 ms
        os.kill(pid, signal.SIGKILL)
        assert killed(pid)
        hit[doing[0]] += 1
        check(folder)
    told = {action: hit[i] for i, action in enumerate(ACTIONS)}
    print(f"20 kills, by action: {told}; steps at the end: {check(folder)}")


def turn(doing, action, pid):
    """Waits until the child starts `action` again."""
    for at_it in (False, True):
        while (doing[0] == action) != at_it:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child ended by itself"
            time.sleep(0.0002)


def dying_before(k):
    """Patches the disk operations so that the process dies before the k-th."""
    done = 0

    def counted(operation, weight):
        def call(*args, **kwargs):
            nonlocal done
            done += weight
            if done >= k:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink", "link"):
        setattr(os, name, counted(getattr(os, name), 1))
    # torch writes a small file in about 40 pieces; every 16th piece is enough
    files.Sink.write = counted(files.Sink.write, 1 / 16)


def every_moment(folder):
    template = Path(folder) / "template"
    with CheckpointStore(template, keep=2) as store:
        for step in range(1, 4):
            save(store, step)
        save(store, 4, bad=True)

    def scenario(k, work):
        dying_before(k)
        with CheckpointStore(work, keep=2) as store:
            save(store, 5, bad=True)
            store.rollback()
            save(store, 6)
            save(store, 7)

    k = 0
    while True:
        k += 1
        work = Path(folder) / "work"
        shutil.copytree(template, work)
        dead = killed(forked(lambda k=k, work=work: scenario(k, work)))
        check(work)
        shutil.rmtree(work)
        if not dead:
            print(f"{k - 1} moments")
            return


def every_moment_of_a_file(folder):
    """Checks that after a killed rollback the file is the old or the new one."""
    last, best = Path(folder) / "last.pt", Path(folder) / "best.pt"
    torch.save({"epoch": 1, "model": torch.ones(SIZE)}, best)
    torch.save({"epoch": 3, "model": torch.full((SIZE,), float("nan"))}, last)
    old, new = last.read_bytes(), best.read_bytes()

    def scenario(k):
        dying_before(k)
        roll_back_file(last, best)

    k = 0
    while True:
        k += 1
        last.write_bytes(old)
        for path in Path(folder).glob("last.pt.replaced-*"):
            path.unlink()
        dead = killed(forked(lambda k=k: scenario(k)))
        assert last.read_bytes() in (old, new)
        backups = list(Path(folder).glob("last.pt.replaced-*"))
        assert all(path.read_bytes() == old for path in backups)
        assert backups or last.read_bytes() == old
        inspect(last)
        if not dead:
            assert last.read_bytes() == new
            print(f"{k - 1} moments")
            return


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    work = {"random": random_moments, "exhaustive": every_moment, "file": every_moment_of_a_file}
    work[sys.argv[1]](sys.argv[2])
