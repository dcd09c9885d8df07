"""`--json` of `report` and `ckpt` prints one object with the content of the text output."""

import json
import math

import pytest
import torch

from fastguard import CheckpointStore, JsonLinesSink, StepRecord
from fastguard.commands.cli import main
from guardtest import require

NAN = math.nan


def json_of(argv, capsys, status):
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_report(tmp_path, capsys):
    require("plotly")
    with JsonLinesSink(tmp_path / "records.jsonl") as sink:
        for step in range(1, 30):
            reason = "nonfinite_grad" if step in (7, 8) else None
            action = "skipped" if reason else "applied"
            bad = (("head.bias", 1, 0, 0),) if reason else ()
            sink(StepRecord(step, 1.0, 1.0, action, reason, nan=len(bad), culprits=bad, tag=step))
    answer = json_of(["report", tmp_path], capsys, 0)
    assert answer["headline"] == "1 incident in 29 steps, survived." and answer["survived"]
    (incident,) = answer["incidents"]
    assert (incident["first_step"], incident["last_step"], incident["tag"]) == (7, 8, 7)
    assert incident["culprits"] == [["head.bias", 1, 0, 0]]
    assert answer["page"] == str(tmp_path / "records.html")


def test_checkpoints_in_files(tmp_path, capsys):
    good, bad = tmp_path / "good.pt", tmp_path / "last.pt"
    torch.save({"model": {"w": torch.ones(3)}, "step": 4}, good)
    torch.save({"model": {"w": torch.tensor([NAN])}, "step": 5}, bad)
    listed = json_of(["ckpt", "list", tmp_path], capsys, 0)["checkpoints"]
    assert [(entry["path"], entry["step"]) for entry in listed] == [(str(good), 4), (str(bad), 5)]
    answer = json_of(["ckpt", "verify", tmp_path], capsys, 1)
    assert not answer["ok"]
    found = {entry["path"]: entry for entry in answer["checkpoints"]}
    assert found[str(good)]["verdict"] == "ok" and found[str(good)]["tensors"] == 1
    assert found[str(bad)]["verdict"] == "bad" and found[str(bad)]["bad"] == [["model.w", 1, 0, 0]]
    (done,) = json_of(["ckpt", "rollback", bad, "--to", good], capsys, 0)["checkpoints"]
    assert (done["path"], done["copy_of"], done["step"]) == (str(bad), str(good), 4)


def test_checkpoints_in_a_store(tmp_path, capsys):
    with CheckpointStore(tmp_path) as store:
        for step, value in ((10, 1.0), (20, NAN)):
            store.save({"w": torch.tensor([value])}, step=step)
    listed = json_of(["ckpt", "list", tmp_path], capsys, 0)["checkpoints"]
    assert [(entry["step"], entry["verdict"]) for entry in listed] == [
        (10, "clean"),
        (20, "not finite"),
    ]
    assert "last-clean" in listed[0]["marks"]
    answer = json_of(["ckpt", "verify", tmp_path], capsys, 1)
    assert [entry["verdict"] for entry in answer["checkpoints"]] == ["ok", "bad"]
    (done,) = json_of(["ckpt", "rollback", tmp_path], capsys, 0)["checkpoints"]
    assert done["step"] == 10 and len(done["set_aside"]) == 1


@pytest.mark.parametrize("argv", [["report"], ["ckpt", "list"]], ids=" ".join)
def test_a_usage_error_prints_a_line_and_no_json(argv, tmp_path, capsys):
    assert main([*argv, str(tmp_path / "missing"), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "missing" in captured.err
