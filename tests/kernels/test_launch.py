"""What a launch hands to Triton, against what Triton's own `compiled[grid]` hands over."""

import pytest
import torch
import triton
from triton.compiler.compiler import CompiledKernel

from fastguard.kernels import launch, versions

STREAM = 77


class Compiler:
    """In place of the JIT: always gives the same compiled kernel."""

    def __init__(self, compiled):
        self.compiled, self.options = compiled, None

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **options):
            self.options = options
            return self.compiled

        return compile_and_launch


@pytest.fixture
def compiled():
    """Triton's class, loaded already; `calls` are those of what reaches the driver."""
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.module, kernel._module_pid = object(), None
    kernel.function, kernel.packed_metadata = 4711, (8, 1)
    kernel.name, kernel.src = "kernel", None
    kernel.calls = []
    launcher = lambda *arguments: kernel.calls.append(arguments)  # noqa: E731
    vars(kernel).update(_run=launcher, run=launcher)  # behind a property `run` since triton 3.5
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
    # Whether products are fused is said each time: the default differs between versions.
    assert compiler.options == {"P": 2.0, "N": 4, "num_warps": 8, "enable_fp_fusion": True}
    return lambda: variant(6, tensors, 11, 12) or [t.data_ptr() for t in tensors]


def test_a_launch_hands_over_what_tritons_own_does(variant, compiled):
    addresses = variant()
    compiled[(6, 1, 1)](*addresses, 11, 12, 2.0, 4, stream=STREAM)
    ours, theirs = compiled.calls
    assert versions.RUN_IS_KNOWN, "another triton: read CompiledKernel.run again"
    assert ours[:6] == theirs[:6] == (6, 1, 1, STREAM, 4711, (8, 1))
    assert ours[6:9] == (None, None, None)  # no hooks, and nothing to tell them
    assert ours[9:] == theirs[9:]


def test_a_profiler_hears_of_launches(variant, compiled, monkeypatch):
    runtime = triton.knobs.runtime
    if runtime.launch_exit_hook is None:  # triton 3.4: one function in place of a chain
        monkeypatch.setattr(runtime, "launch_exit_hook", print)
    else:
        monkeypatch.setattr(runtime.launch_exit_hook, "calls", [print])
    variant()
    assert compiled.calls[0][8] is runtime.launch_exit_hook


def test_a_triton_that_nobody_has_read_is_launched_as_documented(compiled, monkeypatch, request):
    monkeypatch.setattr(versions, "RUN_IS_KNOWN", False)
    request.getfixturevalue("variant")()
    assert compiled.calls[0][7] is triton.knobs.runtime.launch_enter_hook


def test_the_trial_goes_both_roads(compiled, monkeypatch):
    """In the interpreter it runs; on a device the second launch is the one that steps take."""
    launch.try_launching(torch.device("cpu"))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "raw_stream_of", lambda: lambda index: STREAM)
    monkeypatch.setattr(launch, "trial_kernel", Compiler(compiled))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    launch.try_launching(torch.device("cpu"))
    assert [arguments[:4] for arguments in compiled.calls] == [(1, 1, 1, STREAM)]
