"""Recognizes the layout of a gradient list with a single call.

Each step has new gradient tensors, but usually with the same types, layouts, dtypes, devices,
shapes and strides as in the last step. A comparison in Python takes 0.05 µs per tensor. This module
uses a check that torch has for the inputs of compiled code, which compares all tensors in one call.

Host time for 2000 tensors on an EPYC: building the buckets takes 117 µs instead of 371; all host
work of a clipping, without kernel launches, 690 µs instead of 1240 (torch 2.13), or 471 instead of
1098 (2.11).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.errors.versions import tensor_guards

FORMS = 8  # number of cached forms; several are needed if steps differ in which gradients are None
MIN_TENSORS = 4  # tensors; for shorter lists, a comparison in Python is as fast


class Group(NamedTuple):
    """The gradients of one device and dtype, by their positions in the list."""

    device: torch.device
    dtype: torch.dtype
    positions: Sequence[int]


class Form:
    """The layout of a list of dense gradients.

    Attributes:
        groups: The gradients by device and dtype, in order of first appearance.
        sizes: Number of elements of each gradient; empty unless the form can be recognized again.
        contiguous: Whether all gradients are known to be contiguous.
    """

    __slots__ = ("_guards", "_n", "contiguous", "groups", "sizes")

    def __init__(self, grads: list[Tensor], groups: tuple[Group, ...], keep: bool = True) -> None:
        self.groups: tuple[Group, ...] = groups
        self._n = len(grads)
        long_and_plain = keep and self._n >= MIN_TENSORS and set(map(type, grads)) == {Tensor}
        self._guards: Any = tensor_guards(grads) if long_and_plain else None
        self.sizes: tuple[int, ...] = tuple(map(Tensor.numel, grads)) if self.known_again else ()
        self.contiguous: bool = self.known_again and all(map(Tensor.is_contiguous, grads))

    @property
    def known_again(self) -> bool:
        """Whether later lists of this form are recognized, and get this object."""
        return self._guards is not None

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether a list has this form."""
        return len(grads) == self._n and self._guards.check(*grads)


_forms: tuple[Form, ...] = ()  # replaced and never modified, since other threads may be reading it
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
        keep: Whether to recognize later lists of this form. False for tensors that the check
            cannot tell from plain ones, such as tensors inside a transform. Default: True.
    """
    global _forms
    form = Form(grads, groups, keep)
    if form.known_again:
        with _lock:  # otherwise a form could be lost if two threads add one at the same time
            _forms = (form, *_forms[: FORMS - 1])
    return form
