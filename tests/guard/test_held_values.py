"""The copies of an optimizer's Python values on which a traced step runs."""

import logging

import torch

from fastguard.guard.held_values import copied, same


def test_objects_whose_copy_is_the_same_object_are_not_changed():
    logger = logging.getLogger("fastguard.test_held_values")
    logger.handlers.append(handler := logging.NullHandler())
    handlers, parent = logger.handlers, logger.parent
    group = {"log": logger, "betas": [0.9]}
    assert same(group, copied(group))
    assert logger.handlers is handlers and handlers == [handler] and logger.parent is parent


def test_a_copied_torch_size_is_still_a_torch_size():
    state = {"shape": torch.Size([2, 3]), "noted": ([1.0],)}
    copy = copied(state)
    assert copy["shape"].numel() == 6 and copy["noted"][0] is not state["noted"][0]
    copy["noted"][0][0] = 2.0
    assert state["noted"] == ([1.0],) and not same(state, copy)
