"""`CheckpointStore`: rotation, verdicts, loading, and the state of training afterward."""

import os

import numpy as np
import pytest
import torch

import fastguard
from fastguard import CheckpointStore, GuardedOptimizer
from fastguard.checkpoints import CheckpointError, StoreLocked
from guardtest.longrun import LongRun
from guardtest.programs import run_program
from guardtest.training import assert_same_bits
from guardtest.versions import has_torch

NAN = float("nan")


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run", keep=2, on_error="raise") as opened:
        yield opened


def save(store, step, value=1.0, **more):
    return store.save(weights={"w": torch.full((3,), float(value))}, step=step, **more)


def steps(store):
    return [entry.step for entry in store.list()]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(store):
    expected = LongRun().advance(12).everything()
    LongRun().advance(7).save(store)
    assert_same_bits(LongRun.resumed(store, "last").advance(12).everything(), expected)


def test_saving_changes_no_state(store):
    expected = LongRun().advance(8).everything()
    run = LongRun().advance(4)
    run.save(store)
    assert_same_bits(run.advance(8).everything(), expected)


def test_loading_twice_gives_the_same_run_twice(store):
    run = LongRun().advance(4)
    run.save(store)
    once = LongRun.resumed(store).advance(9).everything()
    assert_same_bits(LongRun.resumed(store).advance(9).everything(), once)


def test_the_newest_the_last_clean_and_the_best_are_kept(store):
    save(store, 0)
    save(store, 1, metric=0.5)
    save(store, 2, metric=0.7)
    for step in range(3, 8):
        save(store, step, NAN, metric=0.1)
    assert steps(store) == [1, 2, 6, 7]
    assert store.best().step == 1
    assert store.last_clean().step == 2
    assert store.last().step == 7
    names = {path.name for path in store.directory.iterdir()}
    assert names == {".lock", "manifest.json", *(entry.file for entry in store.list())}


def test_a_store_stays_where_it_was_opened(tmp_path, monkeypatch):
    """A program may change the working directory during a run."""
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("checkpoints")
    save(store, 0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert save(store, 1) is not None
    assert steps(store) == [0, 1] and os.listdir() == []


def test_the_initial_checkpoint_is_kept_until_there_is_a_later_clean_one(store):
    save(store, 0)
    for step in range(1, 6):
        save(store, step, NAN)
    assert steps(store) == [0, 4, 5]
    save(store, 6)
    assert steps(store) == [5, 6]


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 1)])
def test_the_best_checkpoint_depends_on_mode_and_is_never_nan(tmp_path, mode, best):
    with CheckpointStore(tmp_path, mode=mode, keep=9) as store:
        for step, metric in enumerate([0.4, 0.9, 0.1, NAN, None]):
            save(store, step, metric=metric)
        save(store, 5, NAN, metric=0.0 if mode == "min" else 1.0)
        assert store.best().step == best
    with CheckpointStore(tmp_path, read_only=True) as later:  # the store remembers the mode
        assert later.best().step == best
        assert later.list()[3].metric != later.list()[3].metric


def test_every_bad_tensor_is_named_with_its_counts(store):
    state = {"a": torch.tensor([NAN, 1.0, NAN]), "deep": [{"b": torch.tensor([-float("inf")])}]}
    entry = store.save(state=state, fine={"c": torch.ones(2)}, step=1)
    assert entry.bad == (("state.a", 2, 0, 0), ("state.deep.0.b", 0, 0, 1))
    assert entry.n_tensors == 3
    assert not entry.clean


def test_nan_in_the_ema_alone_is_found(store):
    run = LongRun().advance(2)
    run.save(store)
    expected = run.advance(6).everything()
    run.ema.module[0].weight.data[0, 0] = NAN
    entry = run.save(store)
    assert entry.bad == (("ema.module.0.weight", 1, 0, 0),)
    assert_same_bits(LongRun.resumed(store).advance(6).everything(), expected)


def test_nan_in_the_optimizer_state_alone_is_found(store):
    run = LongRun().advance(2)
    run.save(store)
    expected = run.advance(6).everything()
    run.optimizer.state[run.model[0].weight]["exp_avg_sq"][1, 2] = float("inf")
    entry = run.save(store)
    assert entry.bad == (("optimizer.state.0.exp_avg_sq", 0, 1, 0),)
    assert_same_bits(LongRun.resumed(store).advance(6).everything(), expected)


def test_a_nan_number_in_a_state_is_found_and_infinite_ones_are_not(store):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # its initial best value is inf
    assert store.save(optimizer=optimizer, plateau=plateau, step=0).clean
    optimizer.param_groups[0]["lr"] = NAN
    assert store.save(optimizer=optimizer, step=1).bad[0][0] == "optimizer.param_groups.0.lr"
    assert store.save(losses=[NAN], step=2).clean  # plain data is not checked


def test_tensors_nonfinite_by_design_can_be_ignored(tmp_path):
    with CheckpointStore(tmp_path, ignore=["*.attn_mask"]) as store:
        mask = {"layer.attn_mask": torch.full((2, 2), -float("inf")), "w": torch.ones(1)}
        assert store.save(model=mask, step=0).clean
    with CheckpointStore(tmp_path) as later:
        assert later.save(model=mask, step=1).clean
        assert all(check.ok for check in later.verify())


def test_incidents_count_from_the_last_clean_checkpoint(store):
    assert save(store, 0, incidents=3).incidents == 3
    assert save(store, 1, NAN, incidents=2).incidents == 2  # counted since step 0, which was clean
    assert save(store, 2, NAN, incidents=1).incidents == 3
    assert save(store, 3, incidents=["a", "b"]).incidents == 5
    assert save(store, 4).incidents == 0


def test_skipped_steps_of_a_guarded_optimizer_are_incidents(store):
    run = LongRun()
    assert run.save(store).incidents == 0
    assert run.advance(5).save(store).incidents == 1
    assert run.advance(15).save(store).incidents == 2
    assert store.last().skipped_steps == 3


def test_rollback_makes_an_earlier_checkpoint_the_last(store):
    save(store, 0, epoch=0)
    save(store, 10, epoch=1, metric=0.5)
    save(store, 20, NAN, epoch=2)
    target = store.rollback()
    assert (target.step, target.epoch) == (10, 1)
    assert steps(store) == [10]
    assert store.last() == store.last_clean() == target
    (aside,) = store.replaced()
    assert (store.directory / f"{aside.file}.replaced").exists()
    assert not (store.directory / aside.file).exists()
    again = save(store, 20, epoch=2)  # repeated steps have the same numbers
    assert steps(store)[-2:] == [10, 20]
    assert again.file != aside.file
    assert store.load(20).state["weights"]["w"].tolist() == [1.0] * 3


def test_only_the_backup_of_the_latest_rollback_is_kept(store):
    save(store, 0)
    save(store, 1, NAN)
    store.rollback()
    save(store, 2, NAN)
    store.rollback()
    assert [entry.step for entry in store.replaced()] == [2]
    assert [p.name for p in store.directory.glob("*.replaced")] == [
        f"{store.replaced()[0].file}.replaced"
    ]
    assert store.rollback().step == 0  # there is nothing to roll back, and the backup is kept
    assert len(store.replaced()) == 1


def test_rollback_to_a_step(store):
    for step in (0, 1, 2):
        save(store, step, step)
    assert store.rollback(to=1).step == 1
    with pytest.raises(CheckpointError, match="no checkpoint 7; its steps are 1"):
        store.rollback(to=7)
    save(store, 2, NAN)
    with pytest.raises(CheckpointError, match=r"cannot roll back to .*last-clean"):
        store.rollback(to=2)
    with pytest.raises(ValueError, match="'worst' is not a checkpoint"):
        store.rollback(to="worst")


OTHER = """
import sys, fastguard
from fastguard.checkpoints import StoreLocked
try:
    fastguard.CheckpointStore(sys.argv[1])
except StoreLocked as error:
    print(error)
print(len(fastguard.CheckpointStore(sys.argv[1], read_only=True).list()))
"""


def test_a_second_process_gets_the_pid_of_the_writer(store):
    save(store, 0)
    done = run_program(OTHER, store.directory, check=True)
    locked, count = done.stdout.splitlines()
    assert (
        f"is open for writing in process {os.getpid()}; wait for that process or stop it" in locked
    )
    assert count == "1"


def test_a_second_store_in_this_process_is_an_error_until_the_first_closes(store):
    with pytest.raises(StoreLocked, match="in this process"):
        CheckpointStore(store.directory)
    store.close()
    with CheckpointStore(store.directory) as other:
        save(other, 1)
    with pytest.raises(CheckpointError, match="is closed"):
        save(store, 2)


def test_read_only_changes_nothing(store):
    save(store, 0)
    with CheckpointStore(store.directory, read_only=True) as looking:
        save(store, 1)
        assert steps(looking) == [0, 1]  # the reader sees the writer's changes
        with pytest.raises(CheckpointError, match="read_only"):
            save(looking, 2)
        with pytest.raises(CheckpointError, match="read_only"):
            looking.rollback()
    with pytest.raises(CheckpointError, match="is not a directory"):
        CheckpointStore(store.directory / "nowhere", read_only=True)


def test_numpy_scalars_become_numbers_and_unloadable_values_are_named(store):
    entry = store.save(data={"lr": np.float64(0.1)}, step=np.int64(4), metric=torch.tensor(0.5))
    assert store.load(4).state["data"] == {"lr": 0.1}
    assert entry.metric == 0.5
    with pytest.raises(TypeError, match=r"data\.f is a function, which .*weights_only"):
        store.save(data={"f": lambda: None}, step=5)
    with pytest.raises(TypeError, match=r"data\.0 is a ndarray.*from_numpy"):
        store.save(data=[np.ones(2)], step=5)
    assert steps(store) == [4]


def with_state(optimizer):
    lr = torch.optim.lr_scheduler
    cosine = lr.CosineAnnealingLR(optimizer, 10)
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    return {
        "scaler": torch.amp.GradScaler("cpu"),
        "steps": lr.MultiStepLR(optimizer, [2, 4]),
        "lambda": lr.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        "sequence": lr.SequentialLR(optimizer, [lr.ConstantLR(optimizer), cosine], [3]),
        "guarded": fastguard.GuardedLR(optimizer, floor=1e-6),
        "meter": fastguard.LossMeter(),
        "lbfgs": torch.optim.LBFGS([torch.nn.Parameter(torch.ones(2))]),
        **({"muon": torch.optim.Muon([matrix])} if has_torch(2, 9) else {}),
    }


def test_every_object_with_a_state_is_restored(store):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    guarded = GuardedOptimizer(optimizer)
    saved, fresh = with_state(guarded), with_state(guarded)
    meter = saved["meter"]
    meter.update(torch.tensor(NAN), tag=["epoch 0", 3])
    meter.update(torch.tensor(2.0))
    assert store.save(saved, step=0).bad == ()
    store.load(0, fresh)
    for name, value in saved.items():
        assert repr(fresh[name].state_dict()) == repr(value.state_dict()), name


def test_tied_tensors_and_module_versions_survive(store):
    shared = torch.ones(3)
    norm = torch.nn.BatchNorm1d(2)
    store.save(state={"a": shared, "b": shared}, norm=norm, step=0)
    state = store.load().state
    assert state["state"]["a"].data_ptr() == state["state"]["b"].data_ptr()
    assert state["norm"]._metadata == norm.state_dict()._metadata


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep=0 must be an integer >= 1"),
        ({"keep_clean": 0}, ValueError, "keep_clean=0"),
        ({"mode": "best"}, ValueError, "mode='best' is unknown"),
        ({"on_error": "ignore"}, ValueError, "on_error='ignore' is unknown"),
    ],
)
def test_wrong_settings_are_an_error(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        CheckpointStore(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step=-1 must be an integer >= 0"),
        ({"step": 1.5}, ValueError, r"step=1\.5"),
        ({"step": 1, "epoch": True}, ValueError, "epoch=True"),
        ({"step": 1, "tag": {1, 2}}, TypeError, "tag=.* cannot be stored in the manifest"),
        ({"step": 1, "incidents": -1}, ValueError, "incidents=-1"),
    ],
)
def test_wrong_arguments_of_save_are_an_error(store, arguments, error, message):
    with pytest.raises(error, match=message):
        store.save(w={"x": torch.ones(1)}, **arguments)
    with pytest.raises(TypeError, match="give names"):
        store.save(torch.nn.Linear(1, 1), step=1)
    with pytest.raises(ValueError, match="both contain w; pass each only once"):
        store.save({"w": 1}, w=2, step=1)
    assert steps(store) == []


def test_wrong_arguments_of_load_change_nothing(store):
    model = torch.nn.Linear(1, 1)
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"no checkpoint 'last'; its steps are none"):
        store.load()
    store.save(model=model, position=4, step=1)
    before = model.weight.clone()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(CheckpointError, match="no state for 'optimizer', only for 'model', 'pos"):
        store.load("last", model=model, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"position=4 has no load_state_dict; read it from"):
        store.load("last", model=model, position=4)
    assert torch.equal(model.weight, before + 1)
