"""`protect_buffers`: what a forward pass leaves in a model is taken back with a skipped step.

BatchNorm's running mean and variance, min-max observers, the vectors of spectral norm and other
buffers change in the forward pass, long before an optimizer can decline: one batch with NaN leaves
finite weights and a model whose evaluation is NaN.

After each step, per device and dtype, four operations on all buffers at once and no wait:

    now  = all buffers, gathered
    bad  = the step was skipped, or now is NaN or Inf         by element
    kept = where(bad, kept, now)
    all buffers = kept                                        on a CPU only if something is bad

A step that was skipped only to lower a loss scale keeps its buffers: without a guard it would, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastguard.errors import NonFiniteGradError, TrainingDivergedError
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.buffer_places import Batch, Place
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.stages.contract import HostVerdict, Verdict
from fastguard.stages.reason import Reason

log: logging.Logger = logging.getLogger("fastguard")


def protect_buffers(
    model: nn.Module, optimizer: GuardedOptimizer, *, also: Iterable[Tensor] = ()
) -> ModelBuffers:
    """Takes the buffers of a model back to what they were whenever `optimizer` skips a step.

    Call it once, when the model holds what training begins with. All buffers go back, integer
    counters too, and likewise where the guard raises; after a step that was applied, only elements
    that have become NaN or Inf. Nothing waits for a GPU, unless a buffer was replaced or resized,
    or is not a plain tensor. The integrations for trainers do this by themselves.

    Args:
        model: Its buffers are copied once, on their devices.
        optimizer: The guarded optimizer that trains it; with several, call it for each.
        also: Tensors outside of buffers that a forward pass changes in place, such as the amax
            histories of an fp8 recipe.

    Returns:
        What protects them: `keep()` after loading into the model later than into the optimizer,
        `put_back()` by hand, `remove()` to end it.

    Raises:
        TypeError: An argument is of another kind.

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
    """The buffers of a model as they were after the last step that was applied.

    Args:
        model: Where they are.
        also: Further tensors.
    """

    def __init__(self, model: nn.Module, *, also: Iterable[Tensor] = ()) -> None:
        more = dict(enumerate(also))
        for tensor in more.values():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"also holds a {type(tensor).__name__}; it takes tensors")
        self._places = [
            Place(module, module._buffers, name, f"{prefix}.{name}" if prefix else name)
            for prefix, module in model.named_modules()
            for name in module._buffers
        ]
        self._places += [Place(None, more, i, f"also[{i}]") for i in more]  # type: ignore[arg-type]
        self._handles: list[RemovableHandle] = []
        self._lay_out()

    def follow(self, optimizer: GuardedOptimizer) -> None:
        """Puts back after every skipped step of `optimizer`, keeps after the others and a load."""
        if not self._places:
            return
        self._handles += [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_failed_step_hook(self._after_error),
            optimizer.register_load_state_dict_post_hook(lambda _: self.keep()),
        ]

    def remove(self) -> None:
        """Ends it: steps no longer touch the buffers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def keep(self) -> None:
        """Remembers the buffers as they are now."""
        if not self._are_as_before():
            self._lay_out()
            return
        for batch in self._batches:
            batch.keep()
        self._keep_odd()

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes the buffers what they were when they were last kept."""
        if not self._are_as_before():
            self._follow_changes(taken_back=True)
            return
        for batch in self._batches:
            batch.put_back()
        for place, kept in self._odd:
            place.buffer.copy_(kept)

    @property
    def mended(self) -> int:
        """Elements that were NaN or Inf after steps that were applied. Waits for a GPU."""
        return sum(int(batch.mended) for batch in self._batches)

    @torch.no_grad()
    def _after_step(self, optimizer: GuardedOptimizer, *_: Any) -> None:
        verdict = optimizer.last
        if verdict is None:
            return
        if not has_numbers(verdict.found_inf):  # the step was taken
            self.keep()
            return
        undo = _is_taken_back(verdict)
        if not self._are_as_before():
            self._follow_changes(taken_back=bool(undo))
            return
        for batch in self._batches:
            if batch.settle(undo):
                self._say_mended(batch.bad_names())
        if self._odd:
            if undo:  # waits for a GPU
                for place, kept in self._odd:
                    place.buffer.copy_(kept)
            else:
                self._keep_odd()

    def _after_error(self, _: Optimizer, error: BaseException) -> None:
        # Not for an interrupt or a lack of memory: that step may be tried again.
        if isinstance(error, NonFiniteGradError | TrainingDivergedError):
            self.put_back()

    def _are_as_before(self) -> bool:
        """Whether every buffer is still the tensor that it was, where it was."""
        return all(place.is_as_before() for place in self._places)

    def _lay_out(self) -> None:
        """Sorts the buffers by device and dtype, and keeps them as they are."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Place]] = {}
        self._odd: list[tuple[Place, Tensor]] = []
        seen: set[int] = set()  # a buffer that several modules share
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
        """Buffers were replaced, moved, resized, or have only now got their memory."""
        kept = dict(self._odd)
        for batch in self._batches:
            kept |= batch.kept_by_place()
        unknown = []
        for place in self._places:
            if place in kept:
                place.mend(kept[place], whole=taken_back)
            elif taken_back and not place.had_values:
                if not (place.start_anew() or place.is_finite()):
                    unknown.append(place.path)
        if unknown:
            log.warning(
                "the first batch has left NaN or Inf in %s, and nothing to go back to is known: "
                "set these buffers by hand",
                ", ".join(unknown),
            )
        self._lay_out()

    def _say_mended(self, names: Iterator[str]) -> None:
        log.warning("buffers had become NaN or Inf, and were put back: %s", ", ".join(names))

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, copies carry no hooks. Copied together with its model, it belongs to that.
        return {"_places": self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = []
        self._lay_out()


def are_protected(optimizer: GuardedOptimizer) -> bool:
    """Whether some model's buffers follow the steps of an optimizer."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), ModelBuffers) for hook in hooks)


def _is_taken_back(verdict: Verdict) -> bool | Tensor:
    """Whether the step was skipped for more than a loss scale; a tensor where only a GPU knows."""
    if isinstance(verdict, HostVerdict):
        return verdict.known.skipped and verdict.known.reason != Reason.LOSS_SCALE
    return (verdict.found_inf != 0) & (verdict.reason != int(Reason.LOSS_SCALE))
