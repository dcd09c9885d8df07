"""Syncs are counted by PyTorch's warnings, which these tests emit without a GPU."""

import warnings

import torch

NOTICE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all "
    "synchronizing operations"
)


def test_syncs_are_counted_without_the_notice_of_the_debug_mode(benchmarks, monkeypatch):
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn(NOTICE, stacklevel=2)

    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", set_mode)
    waits_of, device = benchmarks("syncs").waits_of, torch.device("cuda")

    def work():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        warnings.warn("something else", stacklevel=2)

    assert len(waits_of(work, device)) == 2
    assert waits_of(lambda: None, device) == []
    assert modes == ["warn", "default"] * 2
