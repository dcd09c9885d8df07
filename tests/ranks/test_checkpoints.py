"""`CheckpointStore(group=...)`: all ranks save, load and roll back the same step, or none does."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastguard import CheckpointStore, GuardedOptimizer, Replicated
from fastguard.checkpoints import CheckpointError, manifest
from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.sharded import shard_report as shard_looking
from guardtest.ranks import Ranks

NAN = float("nan")


def store_of(folder: Path, **kwargs: Any) -> CheckpointStore:
    return CheckpointStore(folder, group=dist.group.WORLD, **kwargs)


class Run:
    """The same model on every rank; each rank has its own data and its own random stream."""

    def __init__(self, sharded: bool) -> None:
        rank = dist.get_rank()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
        )
        if sharded:
            fully_shard(self.model)
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.order = torch.Generator().manual_seed(10 + rank)
        torch.manual_seed(100 + rank)
        self.batch = 0

    def advance(self, to: int) -> Run:
        while self.batch < to:
            x = torch.randn(5, 6, generator=self.order) + 0.1 * torch.rand(())
            self.opt.zero_grad()
            self.model(x).square().mean().backward()
            if not isinstance(self.model[0].weight, DTensor):
                for p in self.model.parameters():
                    dist.all_reduce(p.grad)
            self.opt.step()
            self.batch += 1
        return self

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.opt, "order": self.order}

    def everything(self) -> list[Any]:
        tensors = [*self.model.state_dict().values()]
        for entry in self.opt.state_dict()["state"].values():
            tensors += entry.values()
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return [*(t.tolist() for t in local), torch.rand(()).item(), self.batch]


def save_and_resume(folder: Path, sharded: bool) -> tuple[list[Any], list[Any]]:
    run = Run(sharded).advance(3)
    with store_of(folder) as store:
        entry = store.save(run.objects(), step=3, position=run.batch)
        assert entry is not None and entry.clean, entry
        assert store.list()[-1:] == (entry,)
        expected = run.advance(6).everything()
        other = Run(sharded)
        checkpoint = store.load("last-clean", other.objects())
        other.batch = checkpoint.state["position"]
        return other.advance(6).everything(), expected


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_every_rank_resumes_bit_for_bit(two: Ranks, tmp_path: Path, sharded: bool) -> None:
    (first, first_expected), (second, second_expected) = two.run(save_and_resume, tmp_path, sharded)
    assert first == first_expected and second == second_expected
    assert first != second  # each rank has its own shards, batch statistics and random stream
    assert len(list(tmp_path.glob("*/rest*.pt"))) == 2
    with CheckpointStore(tmp_path, read_only=True) as store:  # one process can read it
        (check,) = store.verify()
        assert check.ok
        state = store.load().state["model"]
        assert state["0.weight"].shape == (8, 6)


def nan_in_one_shard(folder: Path) -> tuple[Any, int]:
    run = Run(sharded=True).advance(1)
    with store_of(folder) as store:
        store.save(run.objects(), step=1)
        if dist.get_rank() == 1:
            run.opt.state[run.model[0].weight]["exp_avg"].to_local()[1, 2] = NAN
        bad = store.save(run.objects(), step=2).bad
        assert [c.ok for c in store.verify()] == [True, False]
        return bad, store.load("last-clean", run.objects()).step


def test_a_nan_in_the_shard_of_one_rank_is_seen_by_all(two: Ranks, tmp_path: Path) -> None:
    answer = ((("optimizer.state.0.exp_avg", 1, 0, 0),), 1)
    assert two.run(nan_in_one_shard, tmp_path) == [answer, answer]


def load_sharded_elsewhere(folder: Path) -> list[float]:
    torch.manual_seed(7)
    model = torch.nn.Linear(6, 8)
    fully_shard(model)
    with store_of(folder) as store:
        with pytest.raises(CheckpointError, match=r"random state is from 2 ranks.*rng=False"):
            store.load("last", model=model)
        store.load("last", model=model, rng=False)
    return model.weight.full_tensor().flatten().tolist()


def save_sharded(folder: Path) -> list[float]:
    torch.manual_seed(3)
    model = torch.nn.Linear(6, 8)
    fully_shard(model)
    with store_of(folder) as store:
        store.save(model=model, step=0)
    return model.weight.full_tensor().flatten().tolist()


def test_shards_of_two_ranks_load_on_four(two: Ranks, four: Ranks, tmp_path: Path) -> None:
    saved, _ = two.run(save_sharded, tmp_path)
    assert four.run(load_sharded_elsewhere, tmp_path) == [saved] * 4


def save_own(folder: Path) -> None:
    with store_of(folder) as store:
        store.save(stage={"w": torch.full((3,), float(dist.get_rank()))}, step=0)


def test_values_of_each_rank_need_as_many_ranks(two: Ranks, tmp_path: Path) -> None:
    two.run(save_own, tmp_path)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(
            CheckpointError, match=r"saved by 2 ranks, each with its own values of stage\.w"
        ):
            store.load("last", stage=torch.nn.Module())
        assert store.load().state["stage"]["w"].tolist() == [0.0] * 3


def said_differently(folder: Path) -> list[Any]:
    rank = dist.get_rank()
    with store_of(folder) as store:
        time.sleep(0.05 * rank)  # the ranks save at different times
        said = {"epoch": rank, "metric": float(rank), "tag": f"rank {rank}", "incidents": rank}
        saved = store.save(w={"w": torch.ones(1)}, step=3, **said)
    dist.barrier()
    if rank == 0:
        (folder / "manifest.json").unlink()
    dist.barrier()
    with store_of(folder) as store:  # rebuilt from the header of the checkpoint
        found = store.list()
    return [(e.epoch, e.metric, e.tag, e.incidents, e.time) for e in (saved, *found)]


def test_rank_0_decides_the_metadata_of_a_checkpoint(two: Ranks, tmp_path: Path) -> None:
    first, second = two.run(said_differently, tmp_path)
    assert first == second == first[:1] * 2
    assert first[0][:4] == (0, 0.0, "rank 0", 0)


def rollback_and_damage(folder: Path) -> list[int]:
    run = Run(sharded=True)
    with store_of(folder, keep=5) as store:
        for step in (1, 2, 3):
            store.save(run.advance(step).objects(), step=step)
        assert store.rollback(to=2).step == 2
        seen = [store.last().step]
        if dist.get_rank() == 0:
            path = folder / store.last().file / "rest-1.pt"
            path.write_bytes(path.read_bytes()[:-10])
        dist.barrier()
        seen.append(store.load("last-clean", run.objects()).step)
        seen.append(store.save(run.objects(), step=2).step)
    return seen


def test_all_ranks_roll_back_together_and_skip_damaged_checkpoints(
    two: Ranks, tmp_path: Path
) -> None:
    assert two.run(rollback_and_damage, tmp_path) == [[2, 1, 2]] * 2


def failing_disk(folder: Path, failing: int) -> tuple[list[Any], list[str]]:
    run = Run(sharded=True).advance(1)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastguard").addHandler(handler)
    with store_of(folder) as store:
        found = [store.save(run.objects(), step=1).step]
        fsync = os.fsync
        if dist.get_rank() == failing:
            os.fsync = lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        try:
            found.append(store.save(run.objects(), step=2))
        finally:
            os.fsync = fsync
        found += [e.step for e in store.list()]
        assert all(check.ok for check in store.verify())
        assert not list(folder.glob(".tmp-*"))
        found.append(store.save(run.advance(2).objects(), step=2).step)
    logging.getLogger("fastguard").removeHandler(handler)
    return found, [m for m in messages if "NOT saved" in m]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_rank_fails_the_save_on_all_but_not_the_run(
    two: Ranks, tmp_path: Path, failing: int
) -> None:
    for found, (message,) in two.run(failing_disk, tmp_path, failing):
        assert found == [1, None, 1, 2]
        assert "step 2 was NOT saved: [Errno 28] No space left on device" in message


def failing_behind_the_manifest(folder: Path) -> list[Any]:
    sync = files.sync_folder

    def fail(path: Path) -> None:
        if path == folder and 1 in [e.step for e in manifest.read(folder).entries]:
            raise OSError(5, "Input/output error")
        sync(path)

    with store_of(folder, keep=1) as store:
        store.save(w={"w": torch.ones(3)}, step=0)
        files.sync_folder = fail if dist.get_rank() == 0 else sync
        try:
            found = [store.save(w={"w": torch.ones(3)}, step=1)]
        finally:
            files.sync_folder = sync
        found += [[e.step for e in store.list()], store.load("last-clean").step]
        return [*found, store.save(w={"w": torch.ones(3)}, step=2).step]


def test_ranks_agree_on_a_save_that_fails_after_the_manifest_is_written(
    two: Ranks, tmp_path: Path
) -> None:
    assert two.run(failing_behind_the_manifest, tmp_path) == [[None, [1], 1, 2]] * 2
    assert len(list(tmp_path.glob("*.sharded"))) == 1


def die_while_saving(folder: Path, dying: int, moment: str) -> None:
    run = Run(sharded=True).advance(1)
    store = store_of(folder)
    store.save(run.objects(), step=1)
    if dist.get_rank() == dying:
        target = {"rest": files, "verify": shard_looking}[moment]
        name = {"rest": "write_temporary", "verify": "read_shards"}[moment]
        setattr(target, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    store.save(run.advance(2).objects(), step=2)


@pytest.mark.parametrize("moment", ["rest", "verify"])
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_killed_while_saving_leaves_the_store_intact(
    two: Ranks, tmp_path: Path, dying: int, moment: str
) -> None:
    outcomes = two.outcomes(die_while_saving, tmp_path, dying, moment)
    assert outcomes[dying].exitcode == -signal.SIGKILL
    assert "RuntimeError" in (outcomes[1 - dying].error or ""), outcomes[1 - dying]
    with CheckpointStore(tmp_path) as store:
        assert [e.step for e in store.list()] == [1]
        assert all(check.ok for check in store.verify())
        assert {p.name for p in tmp_path.iterdir()} == {
            ".lock", "manifest.json", store.last().file,
        }  # fmt: skip
    assert two.run(save_and_resume, tmp_path, True)


def signaled(folder: Path) -> tuple[int, int]:
    model = torch.nn.Linear(2, 1)
    store = store_of(folder)
    step = 0
    with store.save_on_signal(), pytest.raises(SystemExit) as ended:
        while True:
            step += 1
            if step == 3 and dist.get_rank() == 1:
                signal.raise_signal(signal.SIGTERM)
            store.maybe_save(model=model, step=step)
    return step, ended.value.code


def test_a_signal_to_one_rank_ends_all_at_the_same_step(two: Ranks, tmp_path: Path) -> None:
    assert two.run(signaled, tmp_path) == [(3, 143)] * 2
    with CheckpointStore(tmp_path) as store:
        assert store.last_clean().step == 3


def wrong_use(folder: Path) -> str:
    rank = dist.get_rank()
    model = torch.nn.Linear(2, 1)
    with store_of(folder) as store:
        with pytest.raises(CheckpointError, match=r"save different steps to .*: 0, 1; call save"):
            store.save(model=model, step=rank)
        with pytest.raises(TypeError, match=r"bad is a builtin_function"):
            store.save({"model": model, **({"bad": len} if rank else {})}, step=0)
        store.save(model=model, step=0)
        weight = model.weight.detach().clone()
        torch.nn.init.zeros_(model.weight)
        with pytest.raises(CheckpointError, match="no state for 'other'"):
            store.load("last", {"model": model, **({"other": model} if rank else {})})
        assert not model.weight.any()  # if one rank cannot load, no rank loads
        store.load("last", model=model)
        return str(torch.equal(model.weight, weight))


def test_wrong_use_on_one_rank_is_an_error_on_all(two: Ranks, tmp_path: Path) -> None:
    assert two.run(wrong_use, tmp_path) == ["True"] * 2


def without_group(folder: Path) -> None:
    if dist.get_rank() == 0:
        model = torch.nn.Linear(4, 4)
        with CheckpointStore(folder) as store:
            store.save(model=model, step=0)  # does not communicate
            store.load("last", model=model)
    dist.barrier()
    sharded = torch.nn.Linear(4, 4)
    fully_shard(sharded)
    if dist.get_rank() == 0:
        with CheckpointStore(folder) as store:
            with pytest.raises(CheckpointError, match=r"spread over 2 ranks.*group=torch"):
                store.save(model=sharded, step=1)
    dist.barrier()


def test_a_store_of_one_rank_does_not_communicate_and_rejects_other_ranks_shards(
    two: Ranks, tmp_path: Path
) -> None:
    two.run(without_group, tmp_path)


def test_values_that_are_not_groups_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"group='all' must be None or a torch\.distributed"):
        CheckpointStore(tmp_path, group="all")  # type: ignore[arg-type]


def guarded_incidents(folder: Path) -> int:
    weight = torch.nn.Parameter(torch.zeros(2))
    replicas = Replicated(dist.group.WORLD)
    opt = GuardedOptimizer(torch.optim.SGD([weight], lr=0.1), group=replicas)
    opt.step(loss=NAN)
    with store_of(folder) as store:
        return store.save(weight={"w": weight}, optimizer=opt, step=1).incidents


def test_incidents_are_counted_once(two: Ranks, tmp_path: Path) -> None:
    assert two.run(guarded_incidents, tmp_path) == [1, 1]
