"""A launch passes the same arguments to the driver as Triton's own `compiled[grid]`."""

import pytest
import torch
import triton
from triton.compiler.compiler import CompiledKernel

from fastguard.kernels import launch, versions

STREAM = 77


class Compiler:
    """Replaces the JIT: always returns the same compiled kernel."""

    def __init__(self, compiled):
        self.compiled, self.options = compiled, None

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **options):
            self.options = options
            return self.compiled

        return compile_and_launch


@pytest.fixture
def compiled():
    """An object of Triton's class; `calls` are the arguments that reach the driver."""
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.module, kernel._module_pid = object(), None
    kernel.function, kernel.packed_metadata = 4711, (8, 1)
    kernel.name, kernel.src = "kernel", None
    kernel.calls = []
    launcher = lambda *arguments: kernel.calls.append(arguments)  # noqa: E731
    vars(kernel).update(_run=launcher, run=launcher)  # `run` is a property since triton 3.5
    return kernel


@pytest.fixture
def variant(compiled, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "raw_stream_of", lambda: lambda index: STREAM + index)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    compiler = Compiler(compiled)
    variant = launch.Launcher(compiler, num_warps=8).variant(torch.device("cuda", 0), P=2.0, N=4)
    tensors = (torch.zeros(3), torch.zeros(5))
    variant(6, tensors, 11, 12)
    # enable_fp_fusion is always set, because its default differs between versions.
    assert compiler.options == {"P": 2.0, "N": 4, "num_warps": 8, "enable_fp_fusion": True}
    return lambda: variant(6, tensors, 11, 12) or [t.data_ptr() for t in tensors]


def test_a_launch_passes_the_same_arguments_as_tritons_launch(variant, compiled):
    addresses = variant()
    compiled[(6, 1, 1)](*addresses, 11, 12, 2.0, 4, stream=STREAM)
    ours, theirs = compiled.calls
    assert versions.RUN_IS_KNOWN, "another triton: read CompiledKernel.run again"
    assert ours[:6] == theirs[:6] == (6, 1, 1, STREAM, 4711, (8, 1))
    assert ours[6:9] == (None, None, None)  # no hooks, and no arguments for them
    assert ours[9:] == theirs[9:]


def test_hooks_of_a_profiler_are_called(variant, compiled, monkeypatch):
    runtime = triton.knobs.runtime
    if runtime.launch_exit_hook is None:  # triton 3.4: a function instead of a chain
        monkeypatch.setattr(runtime, "launch_exit_hook", print)
    else:
        monkeypatch.setattr(runtime.launch_exit_hook, "calls", [print])
    variant()
    assert compiled.calls[0][8] is runtime.launch_exit_hook


def test_an_unknown_version_of_triton_is_launched_as_documented(compiled, monkeypatch, request):
    monkeypatch.setattr(versions, "RUN_IS_KNOWN", False)
    request.getfixturevalue("variant")()
    assert compiled.calls[0][7] is triton.knobs.runtime.launch_enter_hook


def test_the_trial_launches_in_both_ways(compiled, monkeypatch):
    """The trial runs in the interpreter; on a device, steps use the second way."""
    launch.try_launching(torch.device("cpu"))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "raw_stream_of", lambda: lambda index: STREAM)
    monkeypatch.setattr(launch, "trial_kernel", Compiler(compiled))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    launch.try_launching(torch.device("cpu"))
    assert [arguments[:4] for arguments in compiled.calls] == [(1, 1, 1, STREAM)]
