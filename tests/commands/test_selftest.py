"""`fastguard selftest` compares the backend with the reference, and detects faults."""

import json

import pytest
import torch

from fastguard.commands import selftest
from fastguard.commands.cli import main
from fastguard.stages.cpu import stages as cpu


def test_this_machine_agrees_with_the_reference(capsys):
    assert main(["selftest"]) == 0
    captured = capsys.readouterr()
    assert "comparisons agree" in captured.out and "FAILED" not in captured.out
    assert captured.err == ""
    if not torch.cuda.is_available():
        assert "note: no GPU found: checked the CPU stages only" in captured.out


FAULTS = {
    "measure": ("measure_bucket", lambda ours: lambda *a: (ours(*a)[0] * (1 + 1e-6), ours(*a)[1])),
    "watch": ("count_exponents", lambda ours: lambda *a: ours(*a).roll(1)),
    "apply": ("apply", lambda ours: lambda bucket, m, clean: ours(bucket, m * 1.5, clean)),
}


@pytest.mark.parametrize("stage", FAULTS)
def test_a_wrong_stage_is_detected(stage, monkeypatch, capsys):
    name, wrong = FAULTS[stage]
    monkeypatch.setattr(cpu, name, wrong(getattr(cpu, name)))
    assert main(["selftest", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert stage in {check["what"] for check in result["checks"] if check["problem"]}


def test_a_stage_that_raises_is_a_failed_check(monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(cpu, "apply", broken)
    checks = {check.what: check for check in selftest.check_device(torch.device("cpu"))}
    assert "no kernel image" in checks["apply"].problem and checks["measure"].problem is None
