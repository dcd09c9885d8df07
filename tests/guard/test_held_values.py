"""Copies of the Python values of an optimizer, on which a trace runs the step."""

import logging

import torch

from fastguard.guard.held_values import copied, same


def test_objects_that_copy_to_themselves_are_not_copied():
    logger = logging.getLogger("fastguard.test_held_values")
    logger.handlers.append(handler := logging.NullHandler())
    handlers, parent = logger.handlers, logger.parent
    group = {"log": logger, "betas": [0.9]}
    assert same(group, copied(group))
    assert logger.handlers is handlers and handlers == [handler] and logger.parent is parent


def test_the_shape_of_a_tensor_remains_a_size():
    state = {"shape": torch.Size([2, 3]), "noted": ([1.0],)}
    copy = copied(state)
    assert copy["shape"].numel() == 6 and copy["noted"][0] is not state["noted"][0]
    copy["noted"][0][0] = 2.0
    assert state["noted"] == ([1.0],) and not same(state, copy)
