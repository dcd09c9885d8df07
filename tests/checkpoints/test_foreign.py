"""The choice of the foreign file to roll back to, and disk errors during a rollback."""

import os

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import CheckpointError, DamagedFile, roll_back_file
from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.foreign_files import describe, good_source
from fastguard.commands.cli import main

NAN = float("nan")


def write(path, epoch, value=1.0, names="abcd", optimizer=True, **more):
    model = {name: torch.full((3,), float(value)) for name in names}
    state = {"optimizer": {"lr": 0.1}} if optimizer else {}
    torch.save({"epoch": epoch, "model": model, **state, **more}, path)
    return path


def flip(path):
    """Changes one element; the archive stays complete."""
    raw = bytearray(path.read_bytes())
    at = raw.index(torch.full((3,), 1.0).numpy().tobytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def chosen(target, ignore=()):
    source, passed_over = good_source(target, ignore)
    return source and source.name, passed_over


def test_the_source_is_the_newest_of_the_latest_epoch_not_after_the_target(tmp_path):
    last = write(tmp_path / "last.pt", 5, NAN)
    for name, epoch, modified in (
        ("a.pt", 3, 50),
        ("b.pt", 5, 20),
        ("c.pt", 5, 30),
        ("d.pt", 5, 9),
    ):
        os.utime(write(tmp_path / name, epoch), (modified, modified))
    write(tmp_path / "later.pt", 6)
    # The file of a writer that is running or was killed.
    write(tmp_path / f"{files.TEMPORARY}e.pt", 5)
    assert chosen(last) == ("c.pt", ["later.pt: is from epoch 6, later than epoch 5"])
    flip(tmp_path / "c.pt")
    name, (_, passed_over) = chosen(last)
    assert (name, passed_over) == ("b.pt", "c.pt: data/0 changed after the file was written")


def test_a_file_with_half_of_the_tensors_is_chosen(tmp_path):
    last = write(tmp_path / "last.pt", 5, NAN, "abcd")
    write(tmp_path / "half.pt", 4, names="abxy")
    write(tmp_path / "less.pt", 5, names="axyz")
    assert chosen(last) == (
        "half.pt",
        ["less.pt: belongs to another model: it shares 1 of 4 tensors"],
    )


def test_a_damaged_or_missing_target_does_not_restrict_the_source(tmp_path):
    last = tmp_path / "last.pt"
    write(tmp_path / "good.pt", 4, optimizer=False)
    assert chosen(last)[0] == "good.pt"
    last.write_text("cut short")
    assert chosen(last)[0] == "good.pt"
    last.unlink()
    assert roll_back_file(last, tmp_path / "good.pt") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.pt", "last.pt"]


def test_an_epoch_that_is_not_a_number_is_ignored(tmp_path):
    assert describe(write(tmp_path / "x.pt", "soon", step=7)).epoch is None
    assert describe(tmp_path / "x.pt").step == 7


def test_a_file_of_a_store_shows_whether_it_is_resumable(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CheckpointStore(tmp_path) as store:
        whole = store.save(model=model, optimizer=optimizer, step=3, epoch=1)
        weights = store.save(model=model, step=4)
    found = describe(tmp_path / whole.file)
    assert (found.resumable, found.step, found.epoch) == (True, 3, 1)
    assert not describe(tmp_path / weights.file).resumable


def test_without_hard_links_the_backup_is_a_copy(tmp_path, monkeypatch):
    last, good = write(tmp_path / "last.pt", 5, NAN), write(tmp_path / "good.pt", 4)
    old = last.read_bytes()

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert roll_back_file(last, good).read_bytes() == old
    assert last.read_bytes() == good.read_bytes()


def test_a_disk_that_fails_while_copying_changes_nothing(tmp_path, monkeypatch):
    last, good = write(tmp_path / "last.pt", 5, NAN), write(tmp_path / "good.pt", 4)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    honest = files.Sink.write
    with monkeypatch.context() as patch:
        patch.setattr(files.Sink, "write", lambda sink, data: honest(sink, bytes(len(data))))
        with pytest.raises(
            DamagedFile, match=r"differs from the verified file, .* the disk is failing"
        ):
            roll_back_file(last, good)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_ignored_tensors_are_ignored_by_every_action(tmp_path, capsys):
    last, good = write(tmp_path / "last.pt", 5), write(tmp_path / "good.pt", 4)
    for path, epoch in ((last, 5), (good, 4)):
        write(path, epoch, odds=torch.full((2,), -float("inf")))
    ignore = ["--ignore", "odds"]
    assert main(["ckpt", "rollback", str(last)]) == 1
    assert (
        "; use --ignore PATTERN for tensors that are non-finite by design"
        in capsys.readouterr().err
    )
    assert main(["ckpt", "rollback", str(last), *ignore]) == 0
    assert "the replaced file was complete and finite too" in capsys.readouterr().out
    assert last.read_bytes() == good.read_bytes()
    with CheckpointStore(tmp_path / "run") as store:
        store.save(m={"mask": torch.full((2,), NAN)}, step=0)
    assert main(["ckpt", "verify", str(tmp_path / "run")]) == 1
    assert main(["ckpt", "verify", str(tmp_path / "run"), "--ignore", "m.mask"]) == 0


def test_one_bad_file_is_enough_in_any_position(tmp_path, capsys):
    good, bad = write(tmp_path / "good.pt", 4), write(tmp_path / "bad.pt", 5)
    flip(bad)
    for paths in ((good, bad), (bad, good)):
        assert main(["ckpt", "verify", *map(str, paths)]) == 1
        assert "bad.pt: data/0 changed after the file was written" in capsys.readouterr().out


def test_sizes_and_verdicts_are_listed(tmp_path, capsys):
    for name, size in (("a.pt", 999), ("b.pt", 1000), ("c.pt", 1_500_000), ("d.pt", 2_500_000_000)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    assert main(["ckpt", "list", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in (" 999 B ", " 1 kB ", " 1.5 MB ", " 2.5 GB "))


def test_a_store_without_its_manifest_is_recognized_and_verified(tmp_path, capsys):
    with CheckpointStore(tmp_path) as store:
        for step in (0, 100, 200):
            path = tmp_path / store.save(m={"w": torch.full((3,), 1.0)}, step=step).file
        whole = path.read_bytes()
        flip(path)
        store.verify()
        path.write_bytes(whole)
    assert main(["ckpt", "list", str(tmp_path)]) == 0
    assert ["damaged" in row for row in capsys.readouterr().out.splitlines()] == [False] * 3 + [
        True
    ]
    assert main(["ckpt", "rollback", str(tmp_path), "--to", "200"]) == 0
    assert "set aside" not in capsys.readouterr().out
    (tmp_path / "manifest.json").unlink()
    assert main(["ckpt", "list", str(tmp_path)]) == 0
    assert "clean" in capsys.readouterr().out


def test_the_last_file_of_lightning_is_found(tmp_path, capsys):
    write(tmp_path / "last.ckpt", 5, NAN)
    write(tmp_path / "epoch=4.ckpt", 4)
    assert main(["ckpt", "rollback", str(tmp_path)]) == 0
    assert "last.ckpt (epoch 5) is now a copy of" in capsys.readouterr().out


def test_a_source_that_changed_on_disk_is_an_error(tmp_path):
    last, good = write(tmp_path / "last.pt", 5, NAN), write(tmp_path / "good.pt", 4)
    flip(good)
    with pytest.raises(CheckpointError, match=r"cannot be used for a rollback: .* changed after"):
        roll_back_file(last, good)
