"""`fastguard ckpt`: list, verify, rollback, exit statuses and usage errors."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastguard import CheckpointStore
from fastguard.commands.cli import main
from guardtest.longrun import LongRun
from guardtest.training import assert_same_bits

NAN = float("nan")


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cv = torch.nn.Conv2d(1, 2, 3)


def write(path, epoch, *, bad=False, fitness=0.1, optimizer=True):
    """Writes a checkpoint as a detection trainer does: pickled modules in half precision."""
    model = torch.nn.Sequential(Head(), torch.nn.Linear(2, 2)).half()
    state = {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    if bad:
        model[1].weight.data[0, 1] = NAN
    torch.save(
        {
            "epoch": epoch,
            "best_fitness": np.float64(fitness),
            "ema": model,
            "optimizer": state if optimizer else None,
        },
        path,
    )


@pytest.fixture
def weights(tmp_path):
    """The files of incident B: last.pt contains NaN, best.pt is good and from epoch 1."""
    folder = tmp_path / "train" / "weights"
    folder.mkdir(parents=True)
    write(folder / "best.pt", 1, fitness=0.31)
    write(folder / "epoch0.pt", 0)
    write(folder / "epoch2.pt", 2, bad=True)
    write(folder / "last.pt", 3, bad=True)
    return folder


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run") as opened:
        for step, value in ((0, 1.0), (100, 2.0), (200, NAN)):
            opened.save(m={"w": torch.full((4,), value)}, step=step, epoch=step // 100, metric=0.5)
    return tmp_path / "run"


def test_incident_b_is_solved_by_one_command(weights, capsys):
    bad, best = (weights / "last.pt").read_bytes(), (weights / "best.pt").read_bytes()
    assert main(["ckpt", "rollback", str(weights.parent)]) == 0
    out = capsys.readouterr().out
    assert (weights / "last.pt").read_bytes() == best  # including its epoch number
    assert (weights / "best.pt").read_bytes() == best
    assert (weights / "last.pt.replaced-1").read_bytes() == bad
    assert "passed over epoch2.pt: 1 tensor is not finite, first ema.1.weight" in out
    assert "last.pt (epoch 3, metric 0.1) is now a copy of" in out
    assert "best.pt (epoch 1, metric 0.31)" in out
    assert "last.pt.replaced-1" in out
    assert torch.load(weights / "last.pt", weights_only=False)["epoch"] == 1


def test_a_second_rollback_keeps_the_first_backup(weights, capsys):
    main(["ckpt", "rollback", str(weights)])
    first = (weights / "last.pt.replaced-1").read_bytes()
    target = str(weights / "last.pt")
    assert main(["ckpt", "rollback", target, "--to", str(weights / "epoch0.pt")]) == 0
    assert (weights / "last.pt.replaced-1").read_bytes() == first
    assert (weights / "last.pt.replaced-2").read_bytes() == (weights / "best.pt").read_bytes()
    assert sorted(p.name for p in weights.iterdir() if "tmp" in p.name) == []


def test_a_file_without_optimizer_state_is_not_chosen(weights, capsys):
    write(weights / "best.pt", 1, optimizer=False)
    assert main(["ckpt", "rollback", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "passed over best.pt: holds no optimizer state to resume with" in out
    assert "copy of" in out and "epoch0.pt" in out
    target, source = str(weights / "last.pt"), str(weights / "best.pt")
    assert main(["ckpt", "rollback", target, "--to", source]) == 0  # the user may choose it
    assert "the optimizer starts from scratch" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_not_chosen(weights, capsys):
    others = {"epoch": 2, "optimizer": {}, "ema": torch.nn.Linear(3, 3)}
    torch.save(others, weights / "teacher.pt")
    assert main(["ckpt", "rollback", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "passed over teacher.pt: belongs to another model: it shares 0 of 2 tensors" in out
    assert "best.pt (epoch 1, metric 0.31)" in out


def test_replacing_a_good_file_is_noted_and_can_be_undone(weights, capsys):
    write(weights / "last.pt", 3)
    target, good = str(weights / "last.pt"), (weights / "last.pt").read_bytes()
    assert main(["ckpt", "rollback", target]) == 0
    backup = target + ".replaced-1"
    assert (
        f"complete and finite too; to undo the rollback, use --to {backup}"
        in capsys.readouterr().out
    )
    assert main(["ckpt", "rollback", target, "--to", backup]) == 0
    assert (weights / "last.pt").read_bytes() == good


def test_without_a_good_checkpoint_nothing_changes(weights, capsys):
    for name in ("best", "epoch0"):
        write(weights / f"{name}.pt", 0, bad=True)
    before = {p.name: p.read_bytes() for p in weights.iterdir()}
    assert main(["ckpt", "rollback", str(weights)]) == 1
    assert "no good checkpoint next to" in capsys.readouterr().err
    target = str(weights / "last.pt")
    assert main(["ckpt", "rollback", target, "--to", str(weights / "best.pt")]) == 1
    assert "cannot be used for a rollback: 1 tensor is not finite" in capsys.readouterr().err
    assert main(["ckpt", "rollback", target, "--to", target]) == 1
    assert "is the file to be replaced" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in weights.iterdir()} == before


def test_verify_names_bad_tensors(weights, capsys):
    assert main(["ckpt", "verify", str(weights / "best.pt")]) == 0
    assert "all finite" in capsys.readouterr().out
    assert main(["ckpt", "verify", str(weights)]) == 1
    out = capsys.readouterr().out
    assert out.count("ok  ") == 2 and out.count("BAD ") == 2
    assert "ema.1.weight (1 NaN)" in out
    pattern = ["--ignore", "ema.1.*"]
    assert main(["ckpt", "verify", str(weights), *pattern]) == 0


def test_verify_reports_damaged_and_dangerous_files(weights, capsys):
    os.truncate(weights / "last.pt", 900)
    torch.save({"x": _Bomb()}, weights / "best.pt")
    assert main(["ckpt", "verify", str(weights / "last.pt"), str(weights / "best.pt")]) == 1
    out = capsys.readouterr().out
    assert "last.pt: truncated or damaged" in out
    assert "best.pt: the file would call posix.system" in out


class _Bomb:
    def __reduce__(self):
        return os.system, ("false",)


def test_list_shows_files_of_other_programs(weights, capsys):
    (weights / "notes.txt").write_text("")
    os.truncate(weights / "epoch0.pt", 100)
    assert main(["ckpt", "list", str(weights)]) == 1
    head, *rows, why = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["file", "epoch", "step", "metric"]
    assert [row.split()[1] for row in rows] == ["1", "-", "2", "3"]
    assert rows[0].split()[3] == "0.31"
    assert rows[1].endswith(" unreadable")
    assert why.startswith(f"BAD  {weights / 'epoch0.pt'}: truncated or damaged")


def test_a_store_is_listed_verified_and_rolled_back(store, capsys):
    assert main(["ckpt", "list", str(store)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[:3] for row in rows] == [
        ["0", "0", "0.5"],
        ["100", "1", "0.5"],
        ["200", "2", "0.5"],
    ]
    assert "clean" in rows[1] and "last-clean, best" in rows[1]
    assert "NOT FINITE" in rows[2] and "last " in rows[2]

    assert main(["ckpt", "verify", str(store)]) == 1
    assert "m.w (4 NaN)" in capsys.readouterr().out

    assert main(["ckpt", "rollback", str(store)]) == 0
    out = capsys.readouterr().out
    assert "set aside" in out and "training resumes after step-000000100" in out
    assert main(["ckpt", "verify", str(store)]) == 0
    assert main(["ckpt", "rollback", str(store), "--to", "0"]) == 0
    assert main(["ckpt", "list", str(store)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "replaced" in rows[-1]
    with CheckpointStore(store) as opened:
        assert (opened.last().step, opened.last().epoch) == (0, 0)


def test_a_damaged_checkpoint_of_a_store_is_reported(store, capsys):
    with CheckpointStore(store, read_only=True) as opened:
        entry = opened.last_clean()
    os.truncate(store / entry.file, 50)
    assert main(["ckpt", "verify", str(store)]) == 1
    assert f"is truncated: 50 of {entry.size} bytes" in capsys.readouterr().out
    assert main(["ckpt", "rollback", str(store)]) == 0  # to the previous clean checkpoint
    assert "training resumes after step-000000000" in capsys.readouterr().out


def test_a_store_in_use_can_be_listed_but_not_rolled_back(store, capsys):
    with CheckpointStore(store):
        assert main(["ckpt", "list", str(store)]) == 0
        assert main(["ckpt", "verify", str(store)]) == 1
        assert main(["ckpt", "rollback", str(store)]) == 2
    assert f"already open for writing in this process ({os.getpid()})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "ckpt needs an action"),
        (["verify"], 2, "required: PATH"),
        (["list", "nowhere"], 2, "nowhere does not exist"),
        (["verify", "empty"], 2, "holds no checkpoints"),
        (["list", "empty"], 2, "holds no checkpoints; pass a store"),
        (["rollback", "empty"], 2, "holds no checkpoints"),
        (["rollback", "."], 2, "holds no checkpoints itself; these subfolders do: run"),
        (["rollback", "run", "--to", "worst"], 2, "--to 'worst' is not a checkpoint of a store"),
        (["rollback", "run", "--to", "9" * 5000], 2, "999… is not a checkpoint of a store"),
        (["rollback", "run", "--to", "7"], 1, "has no checkpoint 7; its steps are 0, 100, 200"),
        (["rollback", "run", "--to", "200"], 1, "cannot roll back to"),
        (["verify", "run/text.pt"], 1, ""),
    ],
)
def test_usage_errors_are_explained(store, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(store.parent)
    (store / "text.pt").write_text("no checkpoint")
    (store.parent / "empty").mkdir()
    assert main(["ckpt", *arguments]) == status
    assert message in capsys.readouterr().err


def test_the_error_for_a_newer_manifest_says_to_upgrade(store, capsys):
    path = store / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    for action in ("list", "verify", "rollback"):
        assert main(["ckpt", action, str(store)]) == 1
        assert "upgrade torch-fastguard" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"name": "a web page"}', "{"], ids=["whole", "damaged"])
def test_a_folder_with_a_manifest_of_another_tool_is_not_a_store(weights, capsys, text):
    (weights / "manifest.json").write_text(text)
    assert main(["ckpt", "verify", str(weights)]) == 1
    assert "last.pt: 1 of" in capsys.readouterr().out
    assert main(["ckpt", "rollback", str(weights)]) == 0
    assert (weights / "manifest.json").read_text() == text


def test_the_command_runs_as_a_subprocess(store):
    command = [sys.executable, "-m", "fastguard", "ckpt", "verify", store]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "m.w (4 NaN)" in done.stdout


def test_a_run_resumes_after_a_rollback_by_the_command(tmp_path):
    run = LongRun()
    with CheckpointStore(tmp_path / "run") as opened:
        run.advance(4).save(opened)
        expected = run.advance(6).everything()
        run.model[0].weight.data.fill_(NAN)
        run.save(opened)
    assert main(["ckpt", "rollback", str(tmp_path / "run")]) == 0
    with CheckpointStore(tmp_path / "run") as opened:
        resumed = LongRun.resumed(opened, "last")
    assert resumed.step == 4
    assert_same_bits(resumed.advance(6).everything(), expected)


def test_verify_without_a_manifest_reports_damaged_checkpoints(store, capsys):
    (store / "manifest.json").unlink()
    files = sorted(store.glob("step-*.pt"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    assert main(["ckpt", "verify", str(store)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"BAD  {files[0]}: ") and "directory" in lines[0]
    assert any(line.startswith("ok   ") for line in lines[1:])
    for file in files[1:]:
        file.unlink()
    assert main(["ckpt", "verify", str(store)]) == 1
