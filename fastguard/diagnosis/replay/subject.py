"""The subject of a diagnosis: a model, a batch, and how they become a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from fastguard.diagnosis.replay.arguments import (
    Autocast,
    check_batch_kind,
    check_functions,
    checked_model,
    context_of,
)
from fastguard.diagnosis.replay.replay import Step, step_of
from fastguard.guard.wrapper import OptimizerWrapper


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of a diagnosis. Create it with `Subject.of`, which checks the arguments.

    Attributes:
        model: The model without DataParallel, DistributedDataParallel or torch.compile wrappers.
        batch: The batch, as in `fastguard.explain_nonfinite`.
        loss_fn, given_step: The arguments of `diagnose`.
        step: `step(model, batch)` returns a loss, its parts by name, or an output without a loss.
        optimizer: The optimizer that steps, without the guard around it.
        guard: The guard around the optimizer, if any.
        max_norm: The norm that the guard clips to; None without a guard, or if its limit is
            adaptive.
        data: Further batches.
        autocast: The context of a step.
    """

    model: nn.Module
    batch: Any
    loss_fn: Callable[..., Any] | None
    given_step: Step | None
    step: Step
    optimizer: Optimizer | None
    guard: OptimizerWrapper | None
    max_norm: float | None
    data: Iterable[Any] | None
    autocast: AbstractContextManager[Any]

    @staticmethod
    def of(
        model: nn.Module,
        batch: Any,
        loss_fn: Callable[..., Any] | None = None,
        optimizer: Optimizer | None = None,
        data: Iterable[Any] | None = None,
        step: Step | None = None,
        autocast: Autocast = None,
    ) -> Subject:
        """Checks the arguments of `diagnose`.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A parameter of the model has no values yet.
        """
        model = checked_model(model)
        check_functions(loss_fn, step)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer is a {kind}, not a torch.optim.Optimizer")
        check_batch_kind(batch, any_kind=step is not None)
        if data is not None and not isinstance(data, Iterable):
            raise TypeError(f"data is a {type(data).__name__}; pass an iterable of batches")
        guard = optimizer if isinstance(optimizer, OptimizerWrapper) else None
        max_norm = None
        while isinstance(optimizer, OptimizerWrapper):
            max_norm = getattr(optimizer, "max_norm", max_norm)
            max_norm = max_norm if isinstance(max_norm, float) else None
            optimizer = optimizer.optimizer
        return Subject(
            model,
            batch,
            loss_fn,
            step,
            step_of(loss_fn, step),
            optimizer,
            guard,
            max_norm,
            data,
            context_of(autocast, model),
        )

    @property
    def roots(self) -> dict[str, nn.Module]:
        """Returns the model under the key `""`, and a loss that is a module under its name."""
        loss = {"loss_fn": self.loss_fn} if isinstance(self.loss_fn, nn.Module) else {}
        return {"": self.model, **loss}

    @property
    def modules(self) -> dict[nn.Module, str]:
        """Maps every module involved to its description: `decoder.3 (Conv2d)`."""
        names: dict[nn.Module, str] = {}
        for prefix, root in self.roots.items():
            for name, module in root.named_modules(prefix=prefix):
                kind = type(module).__name__
                names.setdefault(module, f"{name} ({kind})" if name else f"the model ({kind})")
        return names

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Maps names to all parameters involved, each once."""
        seen: dict[nn.Parameter, str] = {}
        for prefix, root in self.roots.items():
            for name, parameter in root.named_parameters(prefix=prefix):
                seen.setdefault(parameter, name)
        return {name: parameter for parameter, name in seen.items()}

    @property
    def targets(self) -> Any:
        """The targets of the batch; None if they cannot be identified."""
        return split(self.batch)[1]

    @property
    def low_precision(self) -> set[torch.dtype]:
        """The 16-bit dtypes of autocast and of the parameters."""
        dtypes = {p.dtype for p in self.parameters.values()}
        context = self.autocast
        if isinstance(context, torch.autocast) and context._enabled:
            dtypes.add(context.fast_dtype)
        return dtypes & {torch.float16, torch.bfloat16}


def split(batch: Any) -> tuple[Any, Any]:
    """Returns `(inputs, targets)` of a batch; targets are None if they cannot be identified."""
    if isinstance(batch, Mapping) and set(batch) == {"inputs", "targets"}:
        return batch["inputs"], batch["targets"]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def tensors(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read; inside torch.vmap and torch.func.grad they cannot."""
    return not is_functorch_wrapped_tensor(tensor)
