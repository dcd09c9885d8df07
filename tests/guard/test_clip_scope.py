"""Segments of parameters, and the limits of segments."""

import math

import pytest
import torch

from fastguard.guard.clip_scope import lay_out, limits

A, B, C = (torch.zeros(i + 1) for i in range(3))
GROUPS = [{"params": [A, B]}, {"params": [C]}]


@pytest.mark.parametrize(
    ("scope", "segments", "n"),
    [("global", None, 1), ("group", [0, 0, 1], 2), ("tensor", [0, 1, 2], 3)],
)
def test_layout_of_each_scope(scope, segments, n):
    layout = lay_out(GROUPS, scope, {})
    assert [id(p) for p in layout.parameters] == [id(A), id(B), id(C)]
    assert (layout.segments if segments is None else list(layout.segments)) == segments
    assert layout.n_segments == n


def test_an_empty_param_group_keeps_its_segment():
    layout = lay_out([{"params": []}, *GROUPS], "group", {})
    assert (list(layout.segments), layout.n_segments) == ([1, 1, 2], 3)


def test_given_names_take_precedence_over_names_of_the_group_and_over_numbers():
    groups = [{"params": [A, B], "param_names": ["ga", "gb"]}, {"params": [C]}]
    assert lay_out(groups, "global", {A: "mine"}).names == ["mine", "gb", "parameter 2"]


@pytest.mark.parametrize(
    ("scope", "max_norm", "own", "expected"),
    [
        ("global", None, [None, None], (math.inf,)),
        ("global", 2, [None, None], (2.0,)),
        ("tensor", 2.0, [None, None], (2.0,)),
        ("group", 2.0, [None, None], (2.0, 2.0)),
        ("group", 2.0, [0.5, None], (0.5, 2.0)),
        ("group", None, [0.5, None], (0.5, math.inf)),
        ("group", 1.0, [math.inf, 0], (math.inf, 0.0)),
    ],
)
def test_limits(scope, max_norm, own, expected):
    groups = [{**g, "max_norm": m} for g, m in zip(GROUPS, own, strict=True)]
    assert limits(groups, scope, max_norm) == expected


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_limit_of_a_group_needs_the_group_scope(scope):
    with pytest.raises(ValueError, match=f"max_norm=0.5, but clip_scope='{scope}'"):
        limits([{**GROUPS[0], "max_norm": 0.5}, GROUPS[1]], scope, 1.0)


@pytest.mark.parametrize(
    ("value", "error"), [(-1.0, ValueError), (math.nan, ValueError), ("x", TypeError)]
)
def test_a_bad_limit_of_a_group_names_the_value(value, error):
    with pytest.raises(error, match=f"max_norm={value!r}"):
        limits([{**GROUPS[0], "max_norm": value}], "group", None)
