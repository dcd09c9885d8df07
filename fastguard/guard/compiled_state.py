"""Prepares optimizer state for a compiled update, which needs all of it in device tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.inner_step import steps_as_torch
from fastguard.guard.optimizer_copy import with_inner
from fastguard.guard.placeholder_optimizer import CreatesState, Place
from fastguard.guard.whole_step import WholeStep
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.ranks.dtensors import is_dtensor
from fastguard.ranks.plain_shards import is_managed

DEVICES = ("cpu", "cuda")
STATE_FROM_LR = (torch.optim.ASGD, torch.optim.Rprop)
"""Optimizers whose initial state depends on the learning rate of the first step."""


def check_compiled_optimizer(optimizer: Optimizer, flat_parameters: bool) -> None:
    """Raises a TypeError or ValueError for an optimizer that `compile_step=True` does not support.

    The check uses the class and the parameters. Other obstacles are found when tracing.
    """
    name = type(optimizer).__name__
    if flat_parameters:
        raise ValueError(
            "compile_step=True cannot be combined with flat_parameters=True; pass one of them"
        )
    if WholeStep.serves(optimizer):
        raise TypeError(
            f"compile_step=True does not support {name}, which evaluates a closure in the "
            "middle of its step; remove compile_step"
        )
    if isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"compile_step=True is not needed for fastguard.optim.{name}, whose own update "
            "can skip a step; remove compile_step"
        )
    kind = type(optimizer)
    forwards = [isinstance(getattr(kind, key, None), property) for key in ("param_groups", "state")]
    if any(forwards) or len(list(with_inner(optimizer))) > 1:
        raise TypeError(
            f"compile_step=True does not support {name}, whose param_groups belong to other "
            "optimizers; remove compile_step, or guard each of the other optimizers"
        )
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise TypeError(
            f"the step of this {name} was replaced on the instance, but compile_step=True compiles "
            "the step of the class; remove compile_step"
        )
    check_compiled_parameters([p for group in optimizer.param_groups for p in group["params"]])


def check_compiled_parameters(parameters: Sequence[Tensor]) -> None:
    """Raises a TypeError or ValueError for parameters that compiled updates do not support."""
    devices = {p.device for p in parameters if p.device.type != "meta"}
    if len(devices) > 1 or not {d.type for d in devices} <= set(DEVICES):
        raise ValueError(
            f"the parameters are on {', '.join(sorted(map(str, devices)))}, but compile_step=True "
            "needs all parameters on one CPU or CUDA device; remove compile_step"
        )
    for p in parameters:
        if is_dtensor(p) or is_managed(p):
            raise TypeError(
                "a parameter is a DTensor, or is sharded by FSDP or DeepSpeed, which "
                "compile_step=True does not support; remove compile_step"
            )
        if p.is_complex():
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} is complex, which compile_step=True does "
                "not support; remove compile_step"
            )


def dtype_of_numbers(parameters: Iterable[Tensor]) -> torch.dtype:
    """Returns the dtype for settings: float64 if any parameter is float64, else float32."""
    wide = any(p.dtype is torch.float64 for p in parameters)
    return torch.float64 if wide else torch.float32


class StateForUpdate:
    """Prepares the state of an optimizer for a compiled update.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def copy(self, params: Sequence[Tensor]) -> Callable[[], None]:
        """Returns a function that undoes `prepare` and `count_in_tensors` for these parameters.

        No tensor is copied, since neither method writes into a tensor.
        """
        state, groups = self.optimizer.state, self.optimizer.param_groups
        before = {p: dict(state[p]) for p in params if p in state}
        settings = [dict(group) for group in groups]

        def put_back() -> None:
            for p in params:
                if p in before:
                    state[p] = before[p]
                else:
                    state.pop(p, None)
            for group, kept in zip(groups, settings, strict=True):
                group.clear()
                group.update(kept)

        return put_back

    def prepare(self, params: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Creates missing state with torch's initial values, on the device.

        Args:
            params: The parameters with a gradient.
            owners: The param group number of each.

        Raises:
            CreatesState: The first step uses a different formula, or creates state that depends on
                settings, so the state has no fixed initial values.
        """
        if steps_as_torch(self.optimizer):
            for number in dict.fromkeys(owners):
                self._create(number)
        for p in params:
            of_p = self.optimizer.state.get(p, {})
            for key, value in of_p.items():
                if isinstance(value, Tensor) and not value.dim() and value.device != p.device:
                    of_p[key] = value.to(p.device)

    def _create(self, number: int) -> None:
        optimizer = self.optimizer
        group = optimizer.param_groups[number]
        create = getattr(optimizer, "_init_group", None)
        if create is None:
            return
        live = [p for p in group["params"] if p.grad is not None]
        if isinstance(optimizer, STATE_FROM_LR) and any(not optimizer.state.get(p) for p in live):
            # The learning rate may differ between a skipped first step and the next one.
            name = type(optimizer).__name__
            raise CreatesState(f"{name} creates state that depends on the learning rate")
        on_gpu = any(p.device.type != "cpu" for p in live)
        form = {"capturable": on_gpu, "fused": False}
        settings = {**group, **{k: v for k, v in form.items() if k in group}}
        wanted = [
            p
            for p in inspect.signature(create).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        create(settings, *[[] for _ in wanted[1:]])
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] != 0:
            for p in live:
                if optimizer.state[p].get("momentum_buffer") is None:
                    if group["dampening"] != 0:
                        raise CreatesState("SGD creates its momentum buffer without dampening")
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def count_in_tensors(self, params: Sequence[Tensor], places: Iterable[Place]) -> None:
        """Stores each Python number that the step changes in a 0-dim tensor instead.

        Args:
            params: The parameters with a gradient.
            places: The locations of the numbers.
        """
        dtype = dtype_of_numbers(params)
        for place in places:
            owner: dict[str, Any] = (
                self.optimizer.param_groups[place.owner]
                if place.of_group
                else self.optimizer.state[params[place.owner]]
            )
            value = float(owner[place.key])
            owner[place.key] = torch.full((), value, dtype=dtype, device=params[0].device)
