"""The backend of each device; its selection starts no GPU and hides no problem."""

import importlib
import subprocess
import sys

import pytest
import torch

import fastguard
from fastguard.stages import backend, reference
from fastguard.stages.cpu import stages as cpu

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Clears the cached choice, which is otherwise made once per process."""
    backend.triton_stages.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield
    backend.triton_stages.cache_clear()


class Kernels:
    """Replaces all modules of the kernels."""

    def __init__(self, monkeypatch, error=None):
        self.error, self.tried = error, []
        monkeypatch.setattr(backend, "triton_problem", lambda device: None)
        monkeypatch.setattr(backend, "_kernel_stages", lambda: self)
        monkeypatch.setattr(backend, "_try_launching", self.try_launching)

    def try_launching(self, device):
        self.tried.append(device)
        if self.error:
            raise self.error


def test_a_cpu_uses_pytorch():
    assert fastguard.backend_for(torch.zeros(1)) == "torch"
    assert backend.stages(torch.device("cpu")) is cpu


def test_devices_without_kernels_use_pytorch_without_a_warning(recwarn):
    assert fastguard.backend_for(torch.zeros(1, device="meta")) == "torch"
    assert backend.stages(torch.device("meta")) is reference
    assert not recwarn.list


def test_a_gpu_uses_triton(monkeypatch):
    kernels = Kernels(monkeypatch)
    for _ in range(2):
        assert backend.stages(CUDA) is kernels
        assert backend.backend_of(CUDA) == "triton"
    assert kernels.tried == [CUDA]  # the trial runs only once


@pytest.mark.filterwarnings("always")
def test_a_triton_that_cannot_launch_gives_one_warning_and_pytorch(monkeypatch):
    """Importing triton does not detect a missing C compiler or a wrong driver."""
    error = RuntimeError("Failed to find C compiler.\nPlease specify via CC")
    kernels = Kernels(monkeypatch, error)
    reason = "RuntimeError: Failed to find C compiler. Please specify via CC"
    with pytest.warns(RuntimeWarning, match=f"could not be launched: {reason}.*gcc") as caught:
        for _ in range(3):
            assert backend.stages(CUDA) is reference
            assert backend.backend_of(CUDA) == "torch"
    assert len(caught) == len(kernels.tried) == 1
    assert reason in backend.why_not_triton(CUDA)


def test_no_kernel_is_tried_during_graph_capture(monkeypatch):
    error = RuntimeError("operation not permitted when stream is capturing")
    kernels = Kernels(monkeypatch, error)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.stages(CUDA) is kernels and not kernels.tried


@pytest.mark.filterwarnings("always")
def test_an_unsupported_gpu_gives_one_warning_with_reason_and_remedy(monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: "triton is not installed")
    with pytest.warns(
        RuntimeWarning, match=r"because triton is not installed.*pip install"
    ) as caught:
        for _ in range(3):
            assert backend.stages(CUDA) is reference
            assert backend.backend_of(CUDA) == "torch"
    assert len(caught) == 1


def test_a_broken_triton_is_a_reason_and_not_a_crash(monkeypatch):
    def broken():
        raise OSError("libcuda.so: cannot open shared object file")

    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    monkeypatch.setattr(backend, "_kernel_stages", broken)
    with pytest.warns(RuntimeWarning, match=r"importing triton failed: OSError\('libcuda"):
        assert backend.stages(CUDA) is reference


def test_the_environment_can_turn_the_kernels_off(monkeypatch, recwarn):
    kernels = Kernels(monkeypatch)
    monkeypatch.setenv("FASTGUARD_BACKEND", "torch")
    assert backend.stages(CUDA) is reference
    assert backend.backend_of(CUDA) == "torch"
    assert backend.why_not_triton(CUDA) == "FASTGUARD_BACKEND=torch"
    assert not kernels.tried and not recwarn.list


@pytest.mark.parametrize("value", ["", "triton", "Triton "])
def test_the_environment_can_ask_for_the_kernels(monkeypatch, value):
    kernels = Kernels(monkeypatch)
    monkeypatch.setenv("FASTGUARD_BACKEND", value)
    assert backend.stages(CUDA) is kernels


def test_an_unknown_backend_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", "numpy")
    with pytest.raises(ValueError, match=r"FASTGUARD_BACKEND='numpy' is not a backend; use torch"):
        backend.stages(CUDA)


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ("3.3.1", "triton 3.3.1 is older than 3.4"),
        ("2.9", "older"),
        ("3.4.0", None),
        ("10.0", None),
        ("3.4.0+git1234", None),
        ("3.7.0a1", None),
    ],
)
def test_the_oldest_triton(monkeypatch, installed, problem):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    found = backend.triton_problem()
    assert found is None if problem is None else problem in found


def test_no_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.triton_problem() == "triton is not installed"


def test_old_gpus_are_named_by_their_capability(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.triton_problem(CUDA) == "the compute capability of the device is 7.5"


def test_importing_and_using_fastguard_on_a_cpu_imports_no_triton_and_starts_no_gpu():
    script = """
import sys, torch, fastguard
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.ones(2)
fastguard.clip_grad_norm_([p], 1.0)
assert fastguard.backend_for(p) == "torch"
assert "triton" not in sys.modules, "triton was imported"
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_backend_for_refuses_a_model():
    with pytest.raises(TypeError, match=r"tensor is a Linear; pass a tensor.*parameters\(\)"):
        fastguard.backend_for(torch.nn.Linear(2, 1))
