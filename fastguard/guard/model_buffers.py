"""`protect_buffers`: restores the buffers of a model when a step is skipped.

Running mean and variance of BatchNorm, min-max observers, the vectors of spectral norm and other
buffers change in the forward pass, before an optimizer can skip. After a single batch with NaN, the
weights are finite, but the model outputs NaN in evaluation mode.

After each step, four operations per device and dtype on all buffers at once, without waiting:

    now  = all buffers, concatenated
    bad  = the step was skipped, or now is NaN or Inf         per element
    kept = where(bad, kept, now)
    all buffers = kept                                        on a CPU only if any element is bad

After a step that was skipped only to lower a loss scale, buffers keep their new values, as they
would without a guard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastguard.errors import NonFiniteGradError, TrainingDivergedError
from fastguard.errors.logger import log
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.buffer_places import Batch, Place
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.stages.contract import HostVerdict, Verdict
from fastguard.stages.reason import Reason


def protect_buffers(
    model: nn.Module, optimizer: GuardedOptimizer, *, also: Iterable[Tensor] = ()
) -> ModelBuffers:
    """Restores the buffers of a model whenever `optimizer` skips a step.

    Call it once, when the model is ready for training. Modules added or replaced later are not
    protected: after that, `remove()` the protection and call it again. If the guard skips a step or
    raises, all buffers are restored, including integer counters; after an applied step, only
    elements that have become NaN or Inf. It never waits for a GPU, unless a buffer was replaced or
    resized, or is not a plain tensor. The integrations for trainers call it themselves.

    Args:
        model: The model; its buffers are copied once, on their devices.
        optimizer: The guarded optimizer that trains it; with several optimizers, call it for each.
        also: Further tensors that a forward pass changes in place, such as the amax histories of an
            fp8 recipe. Default: none.

    Returns:
        An object with three methods. `keep()`: saves the current buffers; call it if you load the
        model after the optimizer. `put_back()`: restores the saved buffers. `remove()`: ends the
        protection.

    Raises:
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> buffers = fastguard.protect_buffers(model, opt)
        >>> model(torch.full((4, 2), float("nan"))).sum().backward()
        >>> opt.step()
        >>> opt.skipped_steps, model[1].running_mean
        (1, tensor([0., 0.]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the torch.nn.Module")
    if not isinstance(optimizer, GuardedOptimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass the fastguard.GuardedOptimizer"
        )
    buffers = ModelBuffers(model, also=also)
    buffers.follow(optimizer)
    return buffers


class ModelBuffers:
    """The buffers of a model after the last applied step.

    Args:
        model: The model.
        also: Further tensors.

    Raises:
        TypeError: `also` holds something other than tensors.
    """

    def __init__(self, model: nn.Module, *, also: Iterable[Tensor] = ()) -> None:
        more = dict(enumerate(also))
        for tensor in more.values():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"`also` contains a {type(tensor).__name__}; pass only tensors")
        self._places = [
            Place(module, module._buffers, name, f"{prefix}.{name}" if prefix else name)
            for prefix, module in model.named_modules()
            for name in module._buffers
        ]
        self._places += [Place(None, more, i, f"also[{i}]") for i in more]  # type: ignore[arg-type]
        self._handles: list[RemovableHandle] = []
        self._settled: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._lay_out()

    def follow(self, optimizer: GuardedOptimizer) -> None:
        """Registers hooks that restore the buffers after a skipped step, and save them otherwise.

        Loading a state dict into the optimizer also saves them.
        """
        if not self._places:
            return
        self._handles += [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_failed_step_hook(self._after_error),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._settled[optimizer] = optimizer.steps_taken

    def remove(self) -> None:
        """Ends the protection: steps no longer change the buffers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def keep(self) -> None:
        """Saves the current buffers."""
        if not self._are_as_before():
            self._lay_out()
            return
        for batch in self._batches:
            batch.keep()
        self._keep_odd()

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores the buffers as they were last saved."""
        if not self._are_as_before():
            self._follow_changes(taken_back=True)
            return
        for batch in self._batches:
            batch.put_back()
        for place, kept in self._odd:
            place.buffer.copy_(kept)

    @property
    def mended(self) -> int:
        """Number of NaN and Inf elements restored after applied steps. Waits for a GPU."""
        return sum(int(batch.mended) for batch in self._batches)

    def _after_load(self, optimizer: Any) -> None:  # torch types the argument of hooks as Optimizer
        self.keep()
        self._settled[optimizer] = optimizer.steps_taken

    def _after_step(self, optimizer: GuardedOptimizer, *_: Any) -> None:
        self._settle(optimizer)
        # set last, because an interrupt may come before this line
        self._settled[optimizer] = optimizer.steps_taken

    @torch.no_grad()
    def _settle(self, optimizer: GuardedOptimizer) -> None:
        """Restores or saves the buffers after a step, by its verdict."""
        verdict = optimizer.last
        if verdict is None:
            return
        if not has_numbers(verdict.found_inf):  # with placeholders, the step was taken
            self.keep()
            return
        undo = _restores_buffers(verdict)
        if not self._are_as_before():
            self._follow_changes(taken_back=bool(undo))
            return
        for batch in self._batches:
            if batch.settle(undo):
                self._warn_of_restored(batch.bad_names())
        if self._odd:
            if undo:  # waits for a GPU
                for place, kept in self._odd:
                    place.buffer.copy_(kept)
            else:
                self._keep_odd()

    def _after_error(self, optimizer: Any, error: BaseException) -> None:
        # the error was raised after a complete step
        if optimizer.steps_taken != self._settled.get(optimizer):
            self._after_step(optimizer)
        # After an interrupt or an out-of-memory error the buffers stay as they are, since the
        # caller may try the step again.
        elif isinstance(error, NonFiniteGradError | TrainingDivergedError):
            self.put_back()

    def _are_as_before(self) -> bool:
        """Whether every buffer is still the same tensor, at the same address."""
        return all(place.is_as_before() for place in self._places)

    def _lay_out(self) -> None:
        """Groups the buffers by device and dtype, and saves them."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Place]] = {}
        self._odd: list[tuple[Place, Tensor]] = []
        seen: set[int] = set()  # several modules may share a buffer
        for place in self._places:
            place.look()
            if id(place.buffer) in seen:
                continue
            seen.add(id(place.buffer))
            if place.plain is not None:
                by_kind.setdefault((place.plain.device, place.plain.dtype), []).append(place)
            elif place.can_change:
                self._odd.append((place, place.buffer.clone()))
        self._batches = [Batch(places) for places in by_kind.values()]

    def _keep_odd(self) -> None:
        for i, (place, _) in enumerate(self._odd):
            self._odd[i] = (place, place.buffer.clone())

    def _follow_changes(self, *, taken_back: bool) -> None:
        """Adapts to buffers replaced, moved, resized, or allocated since the last step."""
        # Expanded tensors cannot be written to, so their values have not changed.
        kept = {p: p.buffer for p in self._places if p.had_values and not p.can_change}
        kept |= dict(self._odd)
        for batch in self._batches:
            kept |= batch.kept_by_place()
        unknown = []
        for place in self._places:
            if place in kept:
                place.mend(kept[place], whole=taken_back)
            elif taken_back and not place.had_values:
                if not (place.reset() or place.is_finite()):
                    unknown.append(place.path)
        if unknown:
            log.warning(
                "the first batch left NaN or Inf in %s, which have no earlier values to restore; "
                "set these buffers yourself",
                ", ".join(unknown),
            )
        self._lay_out()

    def _warn_of_restored(self, names: Iterator[str]) -> None:
        log.warning("buffers with NaN or Inf were restored: %s", ", ".join(names))

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, copies have no hooks. A copy that was made together with the model refers to
        # the model's copy.
        return {"_places": self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = []
        self._settled = WeakKeyDictionary()
        self._lay_out()


def are_protected(optimizer: GuardedOptimizer) -> bool:
    """Whether `protect_buffers` has been called for an optimizer."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), ModelBuffers) for hook in hooks)


def _restores_buffers(verdict: Verdict) -> bool | Tensor:
    """Whether the step was skipped, and not only to lower a loss scale; a tensor on a GPU."""
    if isinstance(verdict, HostVerdict):
        return verdict.known.skipped and verdict.known.reason != Reason.LOSS_SCALE
    return (verdict.found_inf != 0) & (verdict.reason != int(Reason.LOSS_SCALE))
