"""Recognises the layout of a gradient list with a single call.

The gradients of a step are new tensors, but with the same type, layout, dtype, device, shape and
strides as in the last step. Checking these in Python takes 0.05 µs per tensor; torch's own check of
the inputs of compiled code checks all of them in one call.

2000 tensors, host time on an EPYC: the buckets take 117 µs instead of 371, and all host work of a
clipping besides the launches 690 instead of 1240 (torch 2.13), 471 instead of 1098 (2.11).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.errors.versions import tensor_guards

FORMS = 8  # number kept: sets of None gradients alternate
FEWEST = 4  # tensors; a shorter list is looked at as fast in Python


class Group(NamedTuple):
    """The gradients of one device and dtype, by their positions in the list."""

    device: torch.device
    dtype: torch.dtype
    positions: Sequence[int]


class Form:
    """The form of a list of dense gradients.

    Attributes:
        groups: By device and dtype, in order of first appearance.
        sizes: Number of elements of each gradient; empty unless the form can be recognised again.
    """

    __slots__ = ("_guards", "_n", "groups", "sizes")

    def __init__(self, grads: list[Tensor], groups: tuple[Group, ...], keep: bool = True) -> None:
        self.groups: tuple[Group, ...] = groups
        self._n = len(grads)
        long_and_plain = keep and self._n >= FEWEST and set(map(type, grads)) == {Tensor}
        self._guards: Any = tensor_guards(grads) if long_and_plain else None
        self.sizes: tuple[int, ...] = tuple(map(Tensor.numel, grads)) if self.known_again else ()

    @property
    def known_again(self) -> bool:
        """Whether a later list of this form is recognised and gets this same object."""
        return self._guards is not None

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether a list has this form."""
        return len(grads) == self._n and self._guards.check(*grads)


_forms: tuple[Form, ...] = ()  # replaced, never modified: other threads may be reading it
_lock = threading.Lock()


def known_form(grads: Sequence[Tensor | None]) -> Form | None:
    """Returns the form of a list that matches an earlier one, or None."""
    for form in _forms:
        if form.fits(grads):
            return form
    return None


def new_form(grads: list[Tensor], groups: tuple[Group, ...], keep: bool = True) -> Form:
    """Creates the form of a new list.

    Args:
        grads: The list.
        groups: See `Form`.
        keep: Whether to recognise lists of this form again. False if their type is not sufficient:
            a tensor inside a transform looks like a plain one.
    """
    global _forms
    form = Form(grads, groups, keep)
    if form.known_again:
        with _lock:  # so that two threads adding at once lose neither
            _forms = (form, *_forms[: FORMS - 1])
    return form
