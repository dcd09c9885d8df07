"""Data from a GPU is not read before it has arrived."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastguard.gradients.buckets import bucketize
from fastguard.gradients.transfer import moved
from fastguard.guard.grad_scaler import scaler_inputs
from fastguard.records.losses import stacked
from fastguard.stages.apply import scale
from fastguard.stages.measure import measure

CPU, META = torch.device("cpu"), torch.device("meta")


class WaysHome(TorchFunctionMode):
    """Records how tensors are copied to the CPU, with meta tensors in place of GPU tensors."""

    def __init__(self):
        super().__init__()
        self.waited: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.to and args[0].device == META and CPU in args:
            self.waited.append(not kwargs.get("non_blocking", False))
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        return func(*args, **kwargs)


def measured():
    grads = [torch.ones(2), torch.ones(2, dtype=torch.float64, device=META)]
    assert measure(bucketize(grads)).summary.device == CPU


def scaled():
    scale(bucketize([torch.ones(2)]), torch.ones(1, device=META), torch.zeros((), device=META))


def joined():
    stacked({"a": torch.ones((), device=META), "b": 1.0}, CPU)


def unscaled():
    one = torch.ones((), device=META)
    scaler_inputs(SimpleNamespace(grad_scale=one, found_inf=one), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [measured, scaled, joined, unscaled])
def test_a_transfer_to_the_cpu_waits(stage):
    with WaysHome() as ways:
        stage()
    assert ways.waited and all(ways.waited)


def test_no_other_transfer_syncs():
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is Tensor.to:
                seen.append(kwargs)
            return func(*args, **(kwargs or {}))

    with Seen():
        assert moved(torch.ones(2), META).device == META
    assert seen == [{"non_blocking": True}]
