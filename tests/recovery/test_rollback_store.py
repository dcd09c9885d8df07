"""`Rollback(store=...)`: snapshots on disk, restarted processes, and disk errors."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastguard import CheckpointStore, GuardedLR, GuardedOptimizer, Rollback, TrainingDivergedError
from guardtest.training import assert_same_bits, snapshot


class Run:
    """Uses dropout, so that random states matter; each batch is determined by its number."""

    def __init__(
        self, store: CheckpointStore | None, resume: bool = False, **rollback: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout())
        self.opt = GuardedOptimizer(torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True))
        self.lr = GuardedLR(self.opt)
        self.position = -1
        if resume and store is not None:
            objects = {"model": self.model, "optimizer": self.opt, "lr": self.lr}
            self.position = store.load("last-clean", objects).state["position"]
        rollback = {"every": 3, "after_skips": 2, "lr_factor": 1.0, "store": store, **rollback}
        self.rollback = Rollback(self.opt, {"model": self.model}, lr=self.lr, **rollback)

    def batch(self, i: int, scale: float = 1.0) -> Any:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
        self.opt.zero_grad()
        loss = self.model(x).square().mean() * scale
        loss.backward()
        self.opt.step(loss=loss)
        self.lr.step()
        self.position = i
        return self.rollback.step(position=i)

    def advance(self, to: int) -> Run:
        for i in range(self.position + 1, to):
            assert self.batch(i) is None
        return self


@pytest.fixture
def store(tmp_path: Path):
    with CheckpointStore(tmp_path / "run", keep=3) as opened:
        yield opened


def test_store_and_memory_restore_the_same_bits(store: CheckpointStore) -> None:
    rewinds, runs = [], []
    for place in (None, store):
        run = Run(place).advance(4)
        runs.append(run)
        run.batch(4, math.nan)
        rewinds.append(run.batch(5, math.nan))
        assert run.rollback.snapshots[-1] == 3
        for i in (3, 6, 7, 8):
            run.batch(i)
    assert rewinds[0] == rewinds[1]
    assert (rewinds[1].step, rewinds[1].position, rewinds[1].skip) == (3, 2, (4, 5))
    assert_same_bits(snapshot(runs[1].opt), snapshot(runs[0].opt))


def test_a_restarted_process_resumes_from_the_store_and_rolls_back_to_it(
    store: CheckpointStore,
) -> None:
    expected = snapshot(Run(None).advance(8).opt)
    Run(store).advance(5)  # the process ends here; its last snapshot is of step 3
    files = [entry.file for entry in store.list()]
    run = Run(store, resume=True)
    assert run.position == 2 and run.opt.steps_taken == 3
    assert [entry.file for entry in store.list()] == files  # nothing is saved twice
    assert_same_bits(snapshot(run.advance(5).opt), snapshot(Run(None).advance(5).opt))
    run.batch(5, math.nan)
    assert run.batch(6, math.nan).step == 3
    run.position = 2
    assert_same_bits(snapshot(run.advance(8).opt), expected)


def test_repeated_steps_replace_the_earlier_ones(store: CheckpointStore) -> None:
    run = Run(store).advance(3)
    with torch.no_grad():
        run.model[0].weight[0, 0] = math.nan
    run.rollback.snapshot(position=2)
    assert run.rollback.snapshots == [0, 3]
    assert run.rollback.trigger().step == 3
    assert [entry.step for entry in store.list()] == [0, 3]
    assert [entry.step for entry in store.replaced()] == [3]


def test_an_old_run_in_the_directory_is_not_restored(store: CheckpointStore) -> None:
    Run(store).advance(4)
    with torch.no_grad():
        new = Run(store, after_skips=1)
    bias = new.model[0].bias.detach().clone()
    assert new.batch(0, math.nan).step == 0
    assert torch.equal(new.model[0].bias, bias)


def test_an_old_run_that_never_took_a_step_is_not_restored(store: CheckpointStore) -> None:
    Run(store)
    new = Run(None)
    with torch.no_grad():
        new.model[0].weight.fill_(0.5)
    rollback = Rollback(new.opt, {"model": new.model}, lr=new.lr, store=store)
    rollback.trigger()
    assert (new.model[0].weight == 0.5).all()


def test_attempts_restart_only_with_a_snapshot_after_the_problem(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(store, after_skips=1, every=1).advance(2)
    assert run.batch(2, math.nan).attempt == 1  # the problem lasted until step 3

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run.advance(6)
    assert run.opt.steps_taken == 5 and run.rollback.snapshots[-1] == 2
    assert run.batch(6, math.nan).attempt == 2
    run.advance(12)
    assert run.rollback.snapshots[-1] > 6
    assert run.batch(12, math.nan).attempt == 1


def test_a_damaged_snapshot_is_skipped(store: CheckpointStore) -> None:
    run = Run(store).advance(4)
    path = store.directory / store.last().file
    path.write_bytes(path.read_bytes()[:-100])
    assert run.rollback.trigger().step == 0


def test_a_full_disk_is_reported_and_the_run_continues(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(store).advance(4)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run.advance(8)
    assert "step 6 was NOT saved: [Errno 28] No space left on device" in caplog.text
    assert run.rollback.snapshots == [0, 3]
    assert_same_bits(snapshot(run.opt), snapshot(Run(None).advance(8).opt))
    run.batch(8, math.nan)
    assert run.batch(9, math.nan).step == 3
    run.advance(11)


def test_rollback_works_from_a_disk_that_became_read_only(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(store).advance(4)
    with torch.no_grad():
        run.model[0].weight[0, 0] = math.nan
    run.rollback.snapshot()

    def read_only(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", read_only)
    assert run.rollback.trigger().step == 3
    assert run.model[0].weight.isfinite().all()
    assert "the run went back to step 3, but" in caplog.text
    assert "[Errno 30] Read-only file system" in caplog.text


def test_without_a_usable_snapshot_the_error_says_so(store: CheckpointStore) -> None:
    run = Run(store)
    for entry in store.list():
        (store.directory / entry.file).unlink()
    with pytest.raises(TrainingDivergedError, match=r"at step 0, .* has no usable snapshot"):
        run.rollback.trigger()


def test_an_unreadable_snapshot_ends_the_run_with_the_history(
    store: CheckpointStore,
) -> None:
    run = Run(store)
    path = store.directory / store.last().file
    path.unlink()
    path.mkdir()
    with pytest.raises(TrainingDivergedError, match=r"at step 0, .* has no usable snapshot"):
        run.rollback.trigger()


def test_wrong_use_is_an_error(store: CheckpointStore) -> None:
    run = Run(store)
    with pytest.raises(TypeError, match=r"store='there' must be None or a fastguard\.Checkpoint"):
        Rollback(run.opt, {}, store="there")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="position is a function"):
        run.rollback.snapshot(position=lambda: 0)
    for name in ("position", "optimizer", "lr"):
        with pytest.raises(ValueError, match=rf"objects\['{name}'\] has a name that Rollback uses"):
            Rollback(run.opt, {name: run.model}, lr=run.lr)
    # The same objects are accepted.
    Rollback(run.opt, {"optimizer": run.opt, "lr": run.lr}, lr=run.lr)
