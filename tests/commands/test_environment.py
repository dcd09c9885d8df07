"""`fastguard env`: versions, devices and the backend of each device."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastguard
from fastguard.commands import environment
from fastguard.commands.cli import main
from fastguard.errors import versions
from fastguard.stages import backend


def test_the_command_prints_versions(tmp_path):
    command = [sys.executable, "-m", "fastguard", "env"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert ["fastguard", fastguard.__version__] in lines
    assert ["torch", torch.__version__] in lines
    assert lines[0][0] == "fastguard"


def test_json_output_has_versions_machine_and_devices(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["numpy"] == np.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["backend"]) == ("cpu", "torch")
    assert (cpu["stages"], cpu["not_triton"]) == ("cpu", "Triton kernels need a CUDA device")


def test_verbose_shows_the_number_of_copied_gradients(capsys, monkeypatch):
    stages = SimpleNamespace(diagnostics=lambda: {"copied_gradients": 3})
    monkeypatch.setitem(sys.modules, "fastguard.stages.triton", stages)
    assert main(["env"]) == 0
    assert "copied_gradients" not in capsys.readouterr().out
    assert main(["env", "--verbose"]) == 0
    assert ["copied_gradients", "3"] in [s.split() for s in capsys.readouterr().out.splitlines()]
    assert main(["env", "--verbose", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["diagnostics"] == {"copied_gradients": 3}
    monkeypatch.delitem(sys.modules, "fastguard.stages.triton")
    assert environment.environment()["diagnostics"] == {"copied_gradients": 0}


def test_packages_that_are_not_installed_are_listed(monkeypatch):
    monkeypatch.setattr(environment, "FRAMEWORKS", ("fastguard-missing", "numpy"))
    found = environment.environment()
    assert found["frameworks"] == {"fastguard-missing": None, "numpy": np.__version__}
    assert f"{'fastguard-missing':<18} -" in environment.as_text(found).splitlines()


def test_missing_features_of_an_old_torch_are_listed_with_their_effect(monkeypatch):
    monkeypatch.setattr(versions, "TORCH", (2, 11))
    found = environment.environment()
    name, since = versions.FUSED_ADAGRAD.name, "since torch 2.12"
    assert list(found["missing_features"]) == [name]
    assert f"without {name}: {since}; guarding a fused Adagrad costs" in environment.as_text(found)
    monkeypatch.setattr(versions, "TORCH", (99, 0))
    found = environment.environment()
    assert found["missing_features"] == {} and "without" not in environment.as_text(found)


@pytest.mark.parametrize(
    "problem, backend_name, stages",
    [(None, "triton", "triton"), ("triton is not installed", "torch", "reference")],
)
def test_the_backend_of_a_gpu_is_shown_with_the_reason(problem, backend_name, stages, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(environment, "devices", lambda: [gpu])
    monkeypatch.setattr(environment, "_device_name", lambda device: "a GPU")
    monkeypatch.setattr(environment, "why_not_triton", lambda device: problem)
    found = environment.environment()
    assert found["devices"] == [
        {
            "device": "cuda:0",
            "name": "a GPU",
            "backend": backend_name,
            "stages": stages,
            "not_triton": problem,
        }
    ]
    text = environment.as_text(found)
    assert f"backend: {backend_name}" in text
    assert (problem is None) or problem in text


def test_why_not_triton_reports_a_failed_import(monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    monkeypatch.setitem(sys.modules, "fastguard.stages.triton", None)
    assert "importing triton failed" in backend.why_not_triton(torch.device("cuda", 0))
    assert "CUDA" in backend.why_not_triton(torch.device("cpu"))
