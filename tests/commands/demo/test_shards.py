"""`fastguard demo --fsdp`: the demo on several processes, each with a shard of the model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from fastguard.commands.cli import main
from fastguard.commands.demo.faults import Kind, plan
from guardtest import require
from guardtest.ranks import Ranks

require("rich")
require("matplotlib")
STEPS = 20


def demo(folder: Path, port: int) -> tuple[int, str]:
    """Runs the demo in one process as `torchrun` does; returns exit status and output."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["demo", "--fsdp", "--steps", str(STEPS), "--out", str(folder)])
    return status, printed.getvalue()


@pytest.mark.slow
def test_the_demo_on_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Ranks(2) as two:
        (first, printed), (second, silence) = two.run(demo, tmp_path, port, timeout=120)
    assert (first, second) == (0, 0)
    assert silence == ""
    assert f"{len(plan(STEPS))} of {STEPS} steps" in printed
    assert printed.count("NaN since step") == 2  # bare PyTorch and clip_grad_norm_
    assert printed.count("a shard of rank 1") == 4
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    _, *records = map(json.loads, lines)  # the first line is the header
    one_shard = [f.step for f in plan(STEPS) if f.kind in (Kind.INF_GRAD, Kind.NAN_GRAD)]
    assert [r["step"] for r in records if r["culprit_rank"] == 1] == one_shard
    skipped = [r["step"] for r in records if r["action"] == "skipped"]
    assert skipped == [fault.step for fault in plan(STEPS)]
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("environment", "options", "complaint"),
    [
        ({}, [], "run: torchrun --nproc-per-node 2 -m fastguard demo --fsdp"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, [], "3 processes cannot share batches of 16"),
        ({}, ["--incident", "A"], "leave out --fsdp"),
    ],
    ids=["alone", "three", "incident"],
)
def test_wrong_use(environment, options, complaint, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["demo", "--fsdp", "--out", str(tmp_path), *options]) == 2
    assert complaint in capsys.readouterr().err
